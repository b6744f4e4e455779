"""The rights of deploy/SECURITY.md, checked by Apache Kafka's own authorizer: they suffice, and none is superfluous."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sasrec import load_model
from streamrec.errors import KafkaForbidden
from streamrec.kafka.topics import ensure_topics
from streamrec.registry import Registry
from streamrec.settings import Settings

from support.daemon_process import Daemon, Retrain
from support.kafka_client import feed, raw_producer
from support.preloaded import run_command
from support.secured_kafka import PASSWORD, Right, SecuredKafka, login
from support.servers import OwnRedis
from support.token_endpoint import TokenEndpoint
from support.waiting import eventually
from support.workload import Record, click

PAGE = (Path(__file__).parents[2] / "deploy" / "SECURITY.md").read_text("utf-8")
BASE_MS = 1_700_000_000_000
MakeSettings = Callable[..., Settings]
Serve = Callable[[Settings], Daemon]
# the topics and groups of the page
NAMES = {"kafka_topic": "clicks", "kafka_group": "streamrec"}


def parts() -> dict[str, tuple[list[str], list[Right]]]:
    """Return the commands and the rights of each user of the page: a comment names commands, the lines below rights."""
    found: dict[str, tuple[list[str], list[Right]]] = {}
    commands: list[str] = []
    for line in re.findall(r"^    (#.*|\$acl .*)$", PAGE, re.MULTILINE):
        if line.startswith("#"):
            commands = re.findall(r"streamrec ([a-z ]+)", line)
            continue
        granted_to = re.fullmatch(r"\$acl --allow-principal User:(\S+) --operation (\w+) (.*)", line)
        assert granted_to, line
        user, operation, rest = granted_to.groups()
        rights = found.setdefault(user, (commands, []))[1]
        rights += [Right(user, operation, kind, name) for kind, name in re.findall(r"--(topic|group) (\S+)", rest)]
    return found


PARTS = parts()
REFUSED = re.compile(r"Kafka at \S+ refuses a right (on (topic|group) \S+|to write to the topic, .*) \(the rights .*\)")


@pytest.fixture
def settings_of(settings_of: MakeSettings, model_dir: Path, tmp_path: Path) -> MakeSettings:
    """Settings with the names of the page, and with folders in which every command finds what it needs."""
    saved, registry = load_model(model_dir), Registry(tmp_path / "registry")
    registry.promote(registry.publish(saved.model, saved.vocab, {}), "first")
    (tmp_path / "clicks.csv").write_text("user_id,item_id,timestamp\nbob,i1,1700000000000\n")
    folders = {"archive_dir": tmp_path / "archive", "registry_dir": registry.place, "model_dir": None}
    rest = {"retrain_every_s": 10**6, "retrain_http_port": 0, "archive_flush_s": 0.1}
    return lambda *listener, **more: settings_of(*listener, **NAMES | folders | rest | more)


async def outcome(command: str, settings: Settings, folder: Path) -> str:
    """Run a command until it has done its work; return its output if it could not do it, else an empty text."""
    if command == "retrain":
        process = Retrain(settings)
        await eventually(lambda: _ended_or_says(process, "segments written"), timeout_s=60)
        process.process.send_signal(signal.SIGTERM)
        status, output = await asyncio.to_thread(process.process.wait, 60), process.output
    else:
        if command == "rebuild":  # from an archive
            assert not run_command(settings, "archive", "import", str(folder / "clicks.csv")).returncode
        more = {"serve": ["--burst"], "archive follow": ["--burst"], "replay": [str(folder / "clicks.csv")]}
        done = await asyncio.to_thread(run_command, settings, *command.split(), *more.get(command, ()))
        status, output = done.returncode, done.stdout + done.stderr
    assert "Traceback" not in output
    return output if status else ""


async def _ended_or_says(process: Retrain, text: str) -> bool:
    return text in process.output or process.process.poll() is not None


async def new_records(settings_of: MakeSettings) -> None:
    """Give every command work: a click, and a record that becomes a dead letter."""
    await feed(settings_of(), [Record(b"ann", click("ann", "i1", BASE_MS)), Record(b"ann", b"bad")])


@contextlib.asynccontextmanager
async def granted(kafka: SecuredKafka, *rights: Right):  # type: ignore[no-untyped-def]
    await kafka.grant(*rights)
    try:
        yield
    finally:
        await kafka.revoke(*rights)


# --- the list


def test_every_command_that_connects_to_kafka_has_its_rights_on_the_page() -> None:
    listed = [command for commands, _ in PARTS.values() for command in commands]
    assert sorted(listed) == ["archive follow", "check", "rebuild", "replay", "retrain", "serve"]


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "OAUTHBEARER"])
@pytest.mark.parametrize("user", PARTS)
async def test_the_rights_of_the_page_suffice(
    secured: SecuredKafka, settings_of: MakeSettings, tmp_path: Path, user: str, mechanism: str
) -> None:
    commands, rights = PARTS[user]
    endpoint = TokenEndpoint()
    async with endpoint.listening(), granted(secured, *rights):
        if mechanism != "OAUTHBEARER":
            await secured.set_password(user, PASSWORD)
        by = endpoint.login(user) if mechanism == "OAUTHBEARER" else login(mechanism, user)
        for command in commands:
            await new_records(settings_of)
            assert not await outcome(command, settings_of("LOGIN", **by), tmp_path)


def less() -> dict[str, tuple[Right, Right | None]]:
    """Return each right of the page, and what to grant in its stead: nothing, or only to see the topic or group."""
    cases: dict[str, tuple[Right, Right | None]] = {}
    for right in (right for _, rights in PARTS.values() for right in rights):
        name = f"{right.user} without {right.operation} on {right.name}"
        cases[name] = right, None
        if right.operation != "Describe":
            cases[f"{name}, with Describe"] = right, right._replace(operation="Describe")
    return cases


@pytest.mark.parametrize(("right", "instead"), less().values(), ids=less())
async def test_without_any_one_of_them_a_command_ends_with_a_line_that_names_it(
    secured: SecuredKafka, settings_of: MakeSettings, tmp_path: Path, right: Right, instead: Right | None
) -> None:
    commands, rights = PARTS[right.user]
    await secured.set_password(right.user, PASSWORD)
    rest = [other for other in rights if other != right]
    async with granted(secured, *rest, *([instead] if instead else [])):
        for command in commands:
            await new_records(settings_of)
            output = await outcome(command, settings_of("LOGIN", **login("SCRAM-SHA-256", right.user)), tmp_path)
            refusals = REFUSED.findall(output)
            assert len(refusals) == 1, (command, output)
            assert refusals[0][0] in (f"on {right.resource} {right.name}", *_of_producers(right))
            assert REFUSED.search(output.splitlines()[-1])


def _of_producers(right: Right) -> list[str]:
    """Return what a producer is told: Kafka refuses it its number, not the topic."""
    return ["to write to the topic, or Kafka before 2.8 IdempotentWrite"] if right.operation == "Write" else []


async def test_a_table_of_items_needs_the_right_to_read_its_topic_that_the_page_names(
    secured: SecuredKafka, settings_of: MakeSettings, tmp_path: Path
) -> None:
    user, items = "streamrec-serve", {"items_topic": "items"}
    assert "`streamrec serve` and `streamrec rebuild` also need `--operation Read` on that topic" in PAGE
    await secured.set_password(user, PASSWORD)
    await new_records(settings_of)
    await ensure_topics(settings_of().kafka, ["items"])
    async with raw_producer(settings_of()) as producer:
        await producer.send_and_wait("items", b"{}", key=b"i1")
    settings = settings_of("LOGIN", **login("SCRAM-SHA-256", user), **items)
    async with granted(secured, *PARTS[user][1]):
        output = await outcome("serve", settings, tmp_path)
        assert "refuses a right on topic items" in output.splitlines()[-1]
        async with granted(secured, Right(user, "Read", "topic", "items")):
            assert not await outcome("serve", settings, tmp_path)


# --- topics


async def test_a_missing_topic_is_created_with_the_right_to_and_named_without_it(
    secured: SecuredKafka, settings_of: MakeSettings
) -> None:
    user, topic = "creator", "not-yet-there"
    await secured.set_password(user, PASSWORD)
    settings = settings_of("LOGIN", **login("SCRAM-SHA-256", user))
    async with granted(secured, Right(user, "Read", "topic", topic)):
        with pytest.raises(KafkaForbidden) as raised:
            await ensure_topics(settings.kafka, [topic])
        assert str(raised.value).startswith(
            f"topic {topic} does not exist, and may not be created: create it, or allow Create on it (the rights"
        )
        async with granted(secured, Right(user, "Create", "topic", topic)):
            assert await ensure_topics(settings.kafka, [topic]) == [topic]
        assert await ensure_topics(settings.kafka, [topic]) == []  # needs no right to create


# --- rights that are lost


@pytest.mark.parametrize("right", PARTS["streamrec-serve"][1], ids=lambda right: f"{right.operation} {right.name}")
async def test_a_daemon_that_loses_a_right_ends_with_a_line_that_names_it(
    secured: SecuredKafka, settings_of: MakeSettings, serve: Serve, right: Right
) -> None:
    await secured.set_password(right.user, PASSWORD)
    async with granted(secured, *(other for other in PARTS[right.user][1] if other != right)):
        await secured.grant(right)
        await new_records(settings_of)
        daemon = serve(settings_of("LOGIN", **login("SCRAM-SHA-256", right.user), kafka_session_timeout_s=6))
        await daemon.wait_ready()
        await secured.revoke(right)
        await new_records(settings_of)
        assert await daemon.wait_exit() == 1
        assert_names(right, daemon.output)


async def test_a_daemon_that_waits_for_redis_notices_a_lost_right(
    secured: SecuredKafka, settings_of: MakeSettings, serve: Serve, own_redis: OwnRedis
) -> None:
    right = next(right for right in PARTS["streamrec-serve"][1] if right.resource == "group")
    await secured.set_password(right.user, PASSWORD)
    async with granted(secured, *(other for other in PARTS[right.user][1] if other != right)):
        await secured.grant(right)
        await new_records(settings_of)
        daemon = serve(settings_of("LOGIN", **login("SCRAM-SHA-256", right.user), kafka_session_timeout_s=6))
        await daemon.wait_ready()
        own_redis.redis.pause()
        try:
            await new_records(settings_of)
            await eventually(lambda: daemon.has_logged("the batch waits and is retried"))
            await secured.revoke(right)
            assert await daemon.wait_exit() == 1
        finally:
            own_redis.redis.resume()
        assert_names(right, daemon.output)


@pytest.mark.parametrize("right", PARTS["streamrec-retrain"][1], ids=lambda right: f"{right.operation} {right.name}")
async def test_a_worker_that_loses_a_right_ends_with_a_line_that_names_it(
    secured: SecuredKafka, settings_of: MakeSettings, right: Right
) -> None:
    await secured.set_password(right.user, PASSWORD)
    async with granted(secured, *(other for other in PARTS[right.user][1] if other != right)):
        await secured.grant(right)
        await new_records(settings_of)
        worker = Retrain(settings_of("LOGIN", **login("SCRAM-SHA-256", right.user)))
        await worker.says("segments written")
        await secured.revoke(right)
        await new_records(settings_of)
        assert_names(right, await worker.ends(1))


def assert_names(right: Right, output: str) -> None:
    assert "Traceback" not in output
    assert f"refuses a right on {right.resource} {right.name} (the rights that" in output.splitlines()[-1]
    assert len(REFUSED.findall(output)) == 1, output
