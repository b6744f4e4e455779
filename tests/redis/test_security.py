"""Redis with TLS and with users of least rights: every part works, and errors are explained."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from cryptography.hazmat.primitives import serialization

from sasrec import load_model
from streamrec.errors import RedisRefused, RedisUnavailable, SettingsError
from streamrec.local.daemon import environment
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.registry import Registry
from streamrec.schemas import Recommendation
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import SequenceStore
from streamrec.settings import Settings
from streamrec.settings_sources import load_settings

from support.certificates import Certificates, tls_front
from support.daemon_process import Daemon, Retrain, models, serves, versions_published
from support.kafka_client import feed
from support.redis_access import clicks, raw_redis
from support.redis_rights import DONE_BY, PASSWORD, RIGHTS
from support.servers import OwnRedis, Servers
from support.waiting import eventually
from support.workload import Record, click


def redis_settings(port: int, scheme: str = "rediss", **more: Any) -> Settings:
    return load_settings(flags={"redis_url": f"{scheme}://127.0.0.1:{port}/0"} | more)


async def refusal_of(settings: Settings) -> str:
    async with RedisClient(settings.redis) as redis:
        with pytest.raises(RedisUnavailable) as raised:
            await redis.ping()
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- TLS


async def test_commands_run_over_tls_under_the_name_in_the_certificate(
    own_redis: OwnRedis, certificates: Certificates
) -> None:
    async with (
        tls_front(own_redis.redis.port, certificates.server()) as port,
        RedisClient(redis_settings(port, redis_tls_ca_file=certificates.ca_file).redis) as redis,
    ):
        await redis.set("over-tls", b"yes", 60)
        assert await redis.get_many(["over-tls"]) == [b"yes"]


@pytest.mark.parametrize(
    ("names", "expired", "trusted", "message"),
    [
        ((), False, False, r"signed by an unknown CA .* set STREAMREC_REDIS_TLS_CA_FILE to its CA's certificate"),
        ((), True, True, r"out of date \(certificate has expired\): renew it"),
        (("redis.example",), False, True, r"for another name \(.*127\.0\.0\.1.*\): use a name that the cert"),
    ],
    ids=["another CA", "expired", "another name"],
)
async def test_a_server_with_a_wrong_certificate_is_refused(
    own_redis: OwnRedis,
    certificates: Certificates,
    other_certificates: Certificates,
    names: tuple[str, ...],
    expired: bool,
    trusted: bool,
    message: str,
) -> None:
    known = certificates if trusted else other_certificates
    async with tls_front(own_redis.redis.port, certificates.server(*names, expired=expired)) as port:
        assert re.search(message, await refusal_of(redis_settings(port, redis_tls_ca_file=known.ca_file)))


async def test_a_client_certificate_is_sent_if_the_server_requires_one(
    own_redis: OwnRedis, certificates: Certificates, other_certificates: Certificates
) -> None:
    async with tls_front(own_redis.redis.port, certificates.server(requires_client=True)) as port:

        def settings(pair: tuple[Path, Path] | None) -> Settings:
            files = dict(zip(("redis_tls_cert_file", "redis_tls_key_file"), pair, strict=True)) if pair else {}
            return redis_settings(port, redis_tls_ca_file=certificates.ca_file, **files)

        async with RedisClient(settings(certificates.client("streamrec")).redis) as redis:
            await redis.ping()
        assert "does it require a client certificate (redis_tls_cert_file)?" in await refusal_of(settings(None))
        stranger = settings(other_certificates.client("streamrec"))
        assert "does it require another client certificate?" in await refusal_of(stranger)


async def test_a_mix_up_of_tls_and_plain_ports_is_explained(own_redis: OwnRedis, certificates: Certificates) -> None:
    async with tls_front(own_redis.redis.port, certificates.server()) as port:
        assert "does it require TLS on this port?" in await refusal_of(redis_settings(port, "redis"))
    to_plain = redis_settings(own_redis.redis.port, redis_tls_ca_file=certificates.ca_file, redis_timeout_s=0.2)
    assert "does it speak TLS on this port" in await refusal_of(to_plain)


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("ca", None, "redis_tls_ca_file: cannot read {path}: No such file"),
        ("ca", "no certificate", "redis_tls_ca_file: {path} contains no certificate in PEM format"),
        ("cert", None, "redis_tls_cert_file: cannot read {path}: No such file"),
        ("cert", "no certificate", "redis_tls_cert_file and redis_tls_key_file: {path} and "),
        ("key", None, "redis_tls_key_file: cannot read {path}: No such file"),
        ("key", "no key", "are no certificate and its key in PEM format, the key unencrypted"),
        ("key", "another's", "are no certificate and its key in PEM format, the key unencrypted (KEY_VALUES_MISMATCH)"),
        ("key", "encrypted", "are no certificate and its key in PEM format, the key unencrypted"),
    ],
)
def test_an_unusable_tls_file_is_named(
    certificates: Certificates, tmp_path: Path, part: str, content: str | None, message: str
) -> None:
    cert, key = certificates.client("streamrec")
    files = {"redis_tls_ca_file": certificates.ca_file, "redis_tls_cert_file": cert, "redis_tls_key_file": key}
    path = files[f"redis_tls_{part}_file"] = tmp_path / "file.pem"
    if content == "another's":
        path.write_bytes(certificates.client("another")[1].read_bytes())
    elif content == "encrypted":
        pem = serialization.load_pem_private_key(key.read_bytes(), None).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"pw")
        )
        path.write_bytes(pem)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError) as raised:
        RedisClient(redis_settings(1, **files).redis)
    assert message.format(path=path) in str(raised.value)


# --- users


async def give_rights(own_redis: OwnRedis, user: str, without: str = "") -> None:
    """Grant rights as an operator does, with the line of the page."""
    rights = shlex.split(RIGHTS[user].replace(">PASSWORD", shlex.quote(f">{PASSWORD}")))
    assert not without or without in rights
    await admin(own_redis, "ACL", "SETUSER", user, *(right for right in rights if right != without))


async def admin(own_redis: OwnRedis, *command: str) -> Any:
    async with raw_redis(redis_settings(own_redis.redis.port, "redis")) as raw:
        return await raw.execute_command(*command)  # type: ignore[no-untyped-call]


async def refused(own_redis: OwnRedis) -> list[str]:
    """Return the commands refused since the last call."""
    found = await admin(own_redis, "ACL", "LOG")
    await admin(own_redis, "ACL", "LOG", "RESET")
    fields = [entry if isinstance(entry, dict) else dict(zip(entry[::2], entry[1::2], strict=True)) for entry in found]
    texts = [{_text(name): _text(value) for name, value in entry.items()} for entry in fields]
    return [f"{entry['username']}: {entry['reason']} {entry['object']}" for entry in texts]


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


@pytest.fixture
def registry(model_dir: Path, tmp_path: Path) -> Registry:
    """Two versions, the older one the champion."""
    registry, saved = Registry(tmp_path / "registry"), load_model(model_dir)
    registry.promote(registry.publish(saved.model, saved.vocab, {}), "first")
    saved.model.item_embedding.weight.data[1:] *= 2
    registry.publish(saved.model, saved.vocab, {})
    return registry


@pytest.fixture
def settings_of(own_redis: OwnRedis, servers: Servers, registry: Registry, tmp_path: Path) -> Callable[..., Settings]:
    """Make settings of a Redis user of the page."""
    unique = uuid.uuid4().hex

    def make(user: str, **more: Any) -> Settings:
        own_ones = {
            "kafka_bootstrap_servers": servers.kafka_bootstrap_servers,
            "redis_url": own_redis.redis_url,
            "redis_username": user,
            "redis_password": PASSWORD,
            "registry_dir": registry.place,
            "archive_dir": tmp_path / "archive",
            "http_port": 0,
            "lists_refresh_s": 0.2,
            "lists_popular_half_life_s": 1,
            "kafka_topic": f"clicks-{unique}",
            "kafka_group": f"group-{unique}",
        }
        return load_settings(flags=own_ones | more)

    return make


@contextlib.asynccontextmanager
async def daemon_of(settings: Settings) -> AsyncIterator[Daemon]:
    daemon = Daemon(settings)
    try:
        yield daemon
    finally:
        daemon.kill()


def clicks_of(user: str, times: int, first: int = 0) -> list[Record]:
    # far apart, so that popularity is rescaled
    return [
        Record(user.encode(), click(user, f"i{n % 12}", 1_700_000_000_000 + 100_000 * n))
        for n in range(first, first + times)
    ]


async def command(settings: Settings, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "streamrec",
        *arguments,
        env=environment(settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    return out.decode()


async def test_every_part_works_with_the_rights_of_the_page(
    own_redis: OwnRedis, registry: Registry, settings_of: Callable[..., Settings]
) -> None:
    await asyncio.gather(*(give_rights(own_redis, user) for user in (*DONE_BY, "pages")))
    await refused(own_redis)
    settings, commands = settings_of("streamrec-serve"), settings_of("streamrec-commands")
    async with daemon_of(settings) as daemon:
        await daemon.wait_ready()
        for place, record in enumerate(clicks_of("ann", 5)):  # each judged against the list before it
            await feed(settings, [record])
            await daemon.wait_handled(place + 1)
        await feed(settings, clicks_of("bob", 60))
        newer = registry.versions()[1].version
        assert (await asyncio.to_thread(models, commands, "promote", newer)).returncode == 0
        await eventually(lambda: daemon.has_logged("users re-scored"))
        assert await serves(daemon, newer)
        assert (await versions_published(commands))["ann"] == newer
        outputs = await asyncio.gather(
            command(commands, "user", "ann"),
            command(commands, "recs", "--all"),
            command(commands, "check"),
            command(commands, "models", "list"),
        )
        for text, wanted in zip(
            outputs, ("user ann: 5 events", "user ann: model", "ok      Redis", newer), strict=True
        ):
            assert wanted in text
        tiny = {
            "train_epochs": 1,
            "retrain_update_epochs": 1,
            "retrain_gate_tolerance": 0.99,
            "retrain_holdout_share": 0.3,
        }
        retrain = Retrain(settings_of("streamrec-retrain", **tiny), "--once")
        await retrain.ends()
        page = own_redis.redis_url.replace("redis://", f"redis://pages:{quote(PASSWORD, safe='')}@")
        async with raw_redis(load_settings(flags={"redis_url": page})) as raw:
            assert (await raw.get(Keys().recommendation("ann")) or b"").startswith(b'{"items":')
        daemon.signal(signal.SIGTERM)
        assert await daemon.wait_exit() == 0
        assert not daemon.lines("WARNING", "ERROR")
        assert PASSWORD[:6] not in daemon.output + retrain.output
    assert await refused(own_redis) == []


EACH = [(u, right) for u in DONE_BY for right in RIGHTS[u].split() if right not in ("reset", "on", ">PASSWORD")]


@pytest.mark.parametrize(("user", "right"), [*((user, "") for user in DONE_BY), *EACH])
async def test_all_rights_together_are_enough_and_each_is_needed(
    own_redis: OwnRedis, settings_of: Callable[..., Settings], model_dir: Path, user: str, right: str
) -> None:
    await admin(own_redis, "FLUSHALL")
    await admin(own_redis, "SCRIPT", "FLUSH")
    await give_rights(own_redis, user, right)
    await refused(own_redis)
    await DONE_BY[user](settings_of(user, lists_popular_half_life_s=0.01), model_dir)
    assert bool(await refused(own_redis)) is bool(right)


async def test_an_unreadable_sequence_or_list_is_not_overwritten_as_damaged(
    own_redis: OwnRedis, settings_of: Callable[..., Settings]
) -> None:
    settings, keys = settings_of("streamrec-serve"), Keys()
    await give_rights(own_redis, "streamrec-serve")
    async with RedisClient(settings.redis) as redis:
        store, publisher = (
            SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, 8, Metrics()),
            Publisher(redis, settings.lists.ttl_s, Metrics()),
        )
        lists = [Recommendation("eve", ["i1"], [1.0], "m", 1, 2)]
        fewer = [Recommendation("eve", ["i9"], [1.0], "m", 1, 1)]
        await store.append(clicks("eve", ["i1", "i2"]))
        await publisher.publish(lists)
        before = await redis.get_many([keys.sequence("eve"), keys.recommendation("eve")])
        for right in ("+get", "+getrange", "%RW~streamrec:seq:*", "%RW~streamrec:recs:*"):
            await give_rights(own_redis, "streamrec-serve", right)
            for step in (lambda: store.append(clicks("eve", ["i3"], 5)), lambda: publisher.publish(fewer)):
                with contextlib.suppress(RedisRefused):
                    await step()
        await give_rights(own_redis, "streamrec-serve")
        after = await redis.get_many([keys.sequence("eve"), keys.recommendation("eve")])
    assert after[1] == before[1]
    assert (after[0] or b"").startswith(b"1 3 3 3 ")


async def test_a_batch_waits_while_a_right_is_missing(
    own_redis: OwnRedis, settings_of: Callable[..., Settings]
) -> None:
    settings = settings_of("streamrec-serve")
    await give_rights(own_redis, "streamrec-serve")
    async with daemon_of(settings) as daemon:
        await daemon.wait_ready()
        await feed(settings, clicks_of("ann", 1))
        await daemon.wait_handled(1)
        await give_rights(own_redis, "streamrec-serve", "+set")
        await feed(settings, clicks_of("ann", 1, first=1))
        await eventually(lambda: daemon.has_logged("the batch waits and is retried"))
        await eventually(lambda: daemon.has_logged("popular list and online figures are behind"))
        warnings = daemon.lines("WARNING")
        for line in warnings:  # Redis 7.0 does not name the command
            assert re.search(r"'set' command|can't run this command", line)
            assert "deploy/SECURITY.md" in line
        assert 2 <= len(warnings) <= 3, "worker, refresh, and the probe if it was first"
        await give_rights(own_redis, "streamrec-serve")
        await daemon.wait_handled(2)
        assert "Traceback" not in daemon.output


async def test_without_the_right_to_listen_the_registry_is_polled(
    own_redis: OwnRedis, registry: Registry, settings_of: Callable[..., Settings]
) -> None:
    settings = settings_of("streamrec-serve", registry_poll_s=0.2)
    await give_rights(own_redis, "streamrec-serve", "&streamrec:models")
    async with daemon_of(settings) as daemon:
        await eventually(lambda: daemon.has_logged("a new champion is noticed up to 0.2 s late"))
        newer = registry.versions()[1].version
        registry.promote(newer, "by hand")
        await eventually(lambda: serves(daemon, newer))
        assert "Traceback" not in daemon.output


@pytest.mark.parametrize("user", ["streamrec-serve", "nobody"])
async def test_a_wrong_password_ends_the_start_with_one_line_without_the_password(
    own_redis: OwnRedis, settings_of: Callable[..., Settings], user: str
) -> None:
    await give_rights(own_redis, "streamrec-serve")
    settings = settings_of(user, redis_password="s3cr3t-but-wrong", log_level="DEBUG")
    async with daemon_of(settings) as daemon:
        assert await daemon.wait_exit() == 1
        last = daemon.output.splitlines()[-1]
        assert re.fullmatch(
            r"streamrec: Redis at redis://127.*invalid username-password.*; set STREAMREC_REDIS_USERN.*", last
        )
        assert "s3cr3t" not in daemon.output
        assert "Traceback" not in daemon.output


async def test_the_daemon_waits_while_its_password_is_wrong(
    own_redis: OwnRedis, settings_of: Callable[..., Settings]
) -> None:
    settings = settings_of("streamrec-serve")
    await give_rights(own_redis, "streamrec-serve")
    async with daemon_of(settings) as daemon:
        await daemon.wait_ready()
        await admin(own_redis, "ACL", "SETUSER", "streamrec-serve", "resetpass", ">another")
        await admin(own_redis, "CLIENT", "KILL", "USER", "streamrec-serve")
        await feed(settings, clicks_of("ann", 1))
        await eventually(lambda: daemon.has_logged("STREAMREC_REDIS_PASSWORD"))
        assert (await daemon.get("/livez"))[0] == 200
        await give_rights(own_redis, "streamrec-serve")
        await daemon.wait_handled(1)
        assert "Traceback" not in daemon.output
