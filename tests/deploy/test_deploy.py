"""Compare the rules, dashboard, manifests and pages of deploy/ with the code and with running processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import ClientSession
from prometheus_client.parser import text_string_to_metric_families

from sasrec import load_model
from streamrec.commands.main import _parser
from streamrec.errors import SettingsError
from streamrec.health import Health
from streamrec.kafka.consumer import ClickConsumer
from streamrec.kafka.producer import Producer
from streamrec.local.process import free_port
from streamrec.metrics import Metrics, unix_s
from streamrec.redis.client import RedisClient
from streamrec.registry import Registry
from streamrec.retraining.worker import RetrainWorker
from streamrec.serving.inspection import stored
from streamrec.serving.topic_marks import TopicMarks
from streamrec.settings import ENV_PREFIX, Settings, all_settings
from streamrec.settings_sources import secret_variables

from support.daemon_process import Daemon, Retrain, get, models
from support.kafka_client import feed, wait_caught_up
from support.redis_access import raw_redis
from support.servers import own_redis_server
from support.waiting import eventually
from support.workload import Record, click

MakeSettings = Callable[..., Settings]
StartDaemon = Callable[..., Daemon]
DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS, KUBERNETES = DEPLOY / "prometheus", DEPLOY / "kubernetes"
PAGES = {page.name: page.read_text("utf-8") for page in sorted(DEPLOY.glob("*.md"))}
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text("utf-8"))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
RULES = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "rules.yaml").read_text("utf-8"))["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
OURS = {name: service for name, service in COMPOSE["services"].items() if service["image"].startswith("streamrec:")}
MANIFESTS = [
    manifest
    for path in sorted(KUBERNETES.glob("*/*.yaml"))
    if path.name != "kustomization.yaml"
    for manifest in yaml.safe_load_all(path.read_text("utf-8"))
]
WORKLOADS = {m["metadata"]["name"]: m["spec"]["template"]["spec"] for m in MANIFESTS if "template" in m.get("spec", {})}


def tool(name: str, package: str) -> str:
    """Return the path of a program; skip the test if it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}: Debian's package {package}, or the project's own release")
    return found


def run(*command: str | Path, **more: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dashboard_expressions() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    variables = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    return [*panels, *variables, *(each["expr"] for each in DASHBOARD["annotations"]["list"])]


EXPRESSIONS = [str(rule["expr"]) for rule in RULES] + dashboard_expressions()


def named(text: str, prefix: str) -> set[str]:
    """Return the metrics named in a text. Results of recording rules have a colon in their name and are left out."""
    return set(re.findall(rf"(?<![\w:]){prefix}_[a-z0-9_]+\b(?!:)", text))


def exposed(text: str) -> set[str]:
    """Return the names of metrics and of their series, including series without a value yet."""
    names = set()
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE):
        names |= {name, *(f"{name}_{part}" for part in ("bucket", "sum", "count") if kind == "histogram")}
    return names


def labels(text: str) -> dict[tuple[str, str], set[str]]:
    """Return the values of each label, by metric and label."""
    found: dict[tuple[str, str], set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            for label, value in sample.labels.items():
                found.setdefault((sample.name, label), set()).add(value)
    return found


# --- against running processes


@pytest.fixture
def registry(model_dir: Path, tmp_path: Path) -> Registry:
    """Two versions of different ages; the older one is the champion."""
    registry, saved = Registry(tmp_path / "registry"), load_model(model_dir)
    old = registry.publish(saved.model, saved.vocab, {"created_at": "2026-01-01T00:00:00+00:00"})
    registry.promote(old, "first")
    weight = saved.model.item_embedding.weight
    weight.data[1:] *= 2
    registry.publish(saved.model, saved.vocab, {"created_at": "2026-02-01T00:00:00+00:00"})
    return registry


@contextlib.contextmanager
def retraining(settings: Settings) -> Iterator[Retrain]:
    process = Retrain(settings)
    try:
        yield process
    finally:
        process.kill()


async def metrics_of(process: Retrain) -> str:
    await process.says("metrics are served")
    http = re.search(r"metrics are served http=(\S+)", process.output)
    assert http
    return (await asyncio.to_thread(get, f"{http[1]}/metrics"))[1]


async def test_running_processes_expose_the_metrics_that_rules_dashboard_and_pages_name(
    start_daemon: StartDaemon, make_settings: MakeSettings, registry: Registry, tmp_path: Path
) -> None:
    where: dict[str, Any] = {"model_dir": None, "registry_dir": registry.place}
    settings = make_settings(**where, archive_dir=tmp_path / "archive", retrain_http_port=0, retrain_every_s=3600)
    daemon = start_daemon(**where)
    await daemon.wait_ready()
    versions = registry.versions()
    created = "streamrec_model_created_timestamp_seconds"
    assert await daemon.metric(created) == unix_s(versions[0].created_at) == 1767225600
    assert models(settings, "promote", versions[1].version).returncode == 0

    async def swapped() -> bool:
        return await daemon.metric(created) == unix_s(versions[1].created_at)

    await eventually(swapped)
    clicks = [Record(b"ann", click("ann", f"i{n}", 1_700_000_000_000 + n)) for n in range(4)]
    for record in clicks:  # each in its own batch, so that it is judged against the list before it
        await feed(settings, [record])
        await daemon.wait_handled(clicks.index(record) + 1)
    await feed(settings, [Record(b"ann", b"no event")])

    async def counted() -> bool:
        return await daemon.metric("streamrec_dead_letters_total") == 1 and "lag_records{" in await text()

    async def text() -> str:
        return (await daemon.get("/metrics"))[1]

    await eventually(counted)
    with retraining(settings) as retrain:
        found = await text() + await metrics_of(retrain)
    assert named(" ".join([*EXPRESSIONS, *PAGES.values()]), "streamrec") <= exposed(found)
    assert len(named(" ".join(EXPRESSIONS), "streamrec")) > 20
    values = labels(found)
    matchers = [
        (metric, *matcher)
        for expression in EXPRESSIONS
        for metric, inside in re.findall(r"\b(streamrec_\w+)\{([^}]*)\}", expression)
        for matcher in re.findall(r'(\w+)(=|!=)"([^"]*)"', inside)
    ]
    assert {name for name, *_ in matchers} > {"streamrec_hits_total", "streamrec_model_swaps_total"}
    for metric, label, _, value in matchers:
        assert value in values[metric, label] or label == "model", (metric, label, value)


async def test_retraining_counts_its_rounds_by_outcome(make_settings: MakeSettings, tmp_path: Path) -> None:
    settings = make_settings(
        archive_dir=tmp_path / "archive",
        registry_dir=tmp_path / "registry",
        archive_flush_s=0.2,
        retrain_every_s=1,
        retrain_min_new_events=0,
        retrain_http_port=0,
        model_max_len=8,
        model_hidden_units=16,
        model_num_blocks=1,
        model_dropout_rate=0.0,
        train_epochs=40,
        train_batch_size=16,
        train_learning_rate=0.01,
        lists_filter_seen=False,
    )
    ring = [(user, step) for step in range(10) for user in range(30)]
    records = [
        Record(f"u{user}".encode(), click(f"u{user}", f"i{(user + step) % 12}", 1_700_000_000_000 + 1000 * n))
        for n, (user, step) in enumerate(ring)
    ]
    with retraining(settings) as process:
        await eventually(lambda: has(process, 'streamrec_retrain_failures_total{reason="training"} [1-9]'))
        assert "streamrec_retrain_last_round_timestamp_seconds 0.0" in await metrics_of(process)
        await feed(settings, records)
        await eventually(lambda: has(process, 'streamrec_retrain_rounds_total{outcome="promoted"} 1'))
        last = re.search(r"last_round_timestamp_seconds (\d\S+)", await metrics_of(process))
    assert last
    made = unix_s(Registry(tmp_path / "registry").versions()[-1].created_at)
    assert 0 <= float(last[1]) - made < 60


async def has(process: Retrain, pattern: str) -> bool:
    return re.search(pattern, await metrics_of(process)) is not None


async def test_a_taken_port_is_refused_if_it_was_set_and_replaced_if_it_is_the_default(
    make_settings: MakeSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folders = {"archive_dir": tmp_path / "archive", "registry_dir": tmp_path / "registry"}
    taken = free_port()
    async with RetrainWorker(make_settings(**folders, retrain_http_port=taken)).metrics_server():
        with pytest.raises(SettingsError, match="set STREAMREC_RETRAIN_HTTP_PORT"):
            async with RetrainWorker(make_settings(**folders, retrain_http_port=taken)).metrics_server():
                pass
        by_default = replace(make_settings(**folders, retrain_http_port=taken), given={})
        async with RetrainWorker(by_default).metrics_server():
            first, second = [record.http for record in caplog.records if hasattr(record, "http")]
            assert first == f"http://127.0.0.1:{taken}" != second
            assert (await asyncio.to_thread(get, f"{second}/metrics"))[0] == 200


async def test_metrics_of_retraining_need_the_token_and_its_health_does_not(
    make_settings: MakeSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folders = {"archive_dir": tmp_path / "archive", "registry_dir": tmp_path / "registry"}
    token = "s3cr3t-of-16-or-more"
    settings = make_settings(**folders, retrain_http_port=0, http_token=token)
    async with RetrainWorker(settings).metrics_server(), ClientSession() as http:
        address = next(record.http for record in caplog.records if hasattr(record, "http"))
        for path, headers, status in (
            ("/metrics", {}, 401),
            ("/metrics", {"Authorization": "Bearer another-token-of-16"}, 401),
            ("/metrics", {"Authorization": f"Bearer {token}"}, 200),
            ("/livez", {}, 200),
        ):
            async with http.get(address + path, headers=headers) as answer:
                assert answer.status == status, path
                assert ("streamrec_retrain_rounds_total" in await answer.text()) == (
                    path == "/metrics" and status == 200
                )


async def test_a_long_session_time_out_slows_no_rebalance(make_settings: MakeSettings) -> None:
    """Members learn of a rebalance from their heartbeats, and the other members wait for them."""
    for timeout_s, expected_ms in ((120, 3000), (6, 2000)):
        settings = make_settings(kafka_session_timeout_s=timeout_s)
        producer = Producer(settings.kafka)
        marks = TopicMarks(settings.kafka, RedisClient(settings.redis), 60)
        consumer = ClickConsumer(settings.kafka, settings.events, producer, marks, Metrics(), Health(1, 1))
        assert consumer._consumer._heartbeat_interval_ms == expected_ms
        await consumer.stop()
        await producer.stop()


async def test_a_static_member_that_restarts_causes_no_rebalance(start_daemon: StartDaemon) -> None:
    """So a rollout of the StatefulSet interrupts one pod at a time."""

    def start(name: str) -> Daemon:
        return start_daemon(kafka_group_instance_id=name, kafka_session_timeout_s=60)

    running, restarted = start("serve-0"), start("serve-1")

    async def both_have_some() -> bool:
        return all("partitions assigned partitions=[" in daemon.output for daemon in (running, restarted))

    def last(daemon: Daemon) -> str:
        return re.findall(r"partitions assigned partitions=(\[.*\])", daemon.output)[-1]

    await eventually(both_have_some)
    await eventually(lambda: settled(running, restarted))
    before = last(running), last(restarted)
    rebalances = await running.metric("streamrec_rebalances_total")
    restarted.signal(signal.SIGTERM)
    assert await restarted.wait_exit() == 0
    again = start("serve-1")
    await again.wait_ready()
    assert (last(running), last(again)) == before
    assert await running.metric("streamrec_rebalances_total") == rebalances


async def settled(*daemons: Daemon) -> bool:
    """Return whether each partition is assigned to one daemon."""
    taken = [re.findall(r"partitions assigned partitions=\[(.*)\]", daemon.output)[-1] for daemon in daemons]
    return sorted(number for each in taken for number in each.split(", ") if number) == ["0", "1", "2", "3"]


async def test_a_full_redis_that_evicts_nothing_delays_clicks_and_loses_none(
    make_settings: MakeSettings, model_dir: Path
) -> None:
    """This is why compose.yaml sets noeviction."""
    with own_redis_server() as own:
        where = {"redis_url": own.redis_url}
        settings = make_settings(**where, model_dir=model_dir)
        daemon = Daemon(settings)
        try:
            await daemon.wait_ready()
            async with raw_redis(settings) as raw, RedisClient(settings.redis) as redis:
                await raw.config_set("maxmemory-policy", "noeviction")
                await raw.config_set("maxmemory", 1)
                await feed(settings, [Record(b"ann", click("ann", f"i{n}", 1_700_000_000_000 + n)) for n in range(9)])
                await eventually(lambda: daemon.has_logged("the batch waits and is retried"))
                assert await daemon.metric("streamrec_events_total", outcome="applied") == 0
                assert await daemon.get("/livez") == (200, "ok\n")
                await raw.config_set("maxmemory", 0)
                await wait_caught_up(settings)
                found = [user async for user in stored(redis, ["ann"], print)]
            assert [(user, value.n, value.items[-1]) for user, value in found if value] == [("ann", 9, "i8")]
            assert await daemon.metric("streamrec_events_total", outcome="applied") == 9
        finally:
            daemon.kill()


def test_a_redis_exporter_exposes_what_the_rules_name(make_settings: MakeSettings) -> None:
    program = tool("prometheus-redis-exporter", "prometheus-redis-exporter")
    address = f"127.0.0.1:{free_port()}"
    url = make_settings().redis.url.get_secret_value()
    process = subprocess.Popen(
        [program, "-redis.addr", url, "-web.listen-address", address],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        text = asyncio.run(eventually(lambda: said(f"http://{address}/metrics", "redis_memory_used_bytes")))
    finally:
        process.kill()
        process.wait()
    used = named(" ".join([*EXPRESSIONS, *PAGES.values()]), "redis") - {"redis_exporter", *all_settings()}
    assert {"redis_memory_used_bytes", "redis_memory_max_bytes", "redis_evicted_keys_total"} <= used <= exposed(text)


async def said(url: str, text: str) -> str:
    answer = (await asyncio.to_thread(get, url))[1]
    return answer if text in answer else ""


# --- Prometheus and Grafana


def test_the_rules_pass_their_own_tests() -> None:
    promtool = tool("promtool", "prometheus")
    run(
        promtool, "check", "config", "--syntax-only", PROMETHEUS / "prometheus.yml"
    )  # the file of the token does not exist here
    run(promtool, "check", "rules", PROMETHEUS / "rules.yaml")
    run(promtool, "test", "rules", *sorted(PROMETHEUS.glob("rules*_test.yaml")))


def test_every_alert_is_tested_to_fire_and_has_a_runbook_entry() -> None:
    tested = set()
    for path in PROMETHEUS.glob("rules*_test.yaml"):
        for test in yaml.safe_load(path.read_text("utf-8"))["tests"]:
            tested |= {each["alertname"] for each in test.get("alert_rule_test", ()) if each["exp_alerts"]}
    assert {rule["alert"] for rule in ALERTS} == tested
    entries = re.findall(r"^### (Streamrec\w+)$", PAGES["RUNBOOK.md"], re.MULTILINE)
    assert entries == [rule["alert"] for rule in ALERTS]
    for rule in ALERTS:
        assert rule["annotations"]["runbook"] == f"deploy/RUNBOOK.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_expressions_of_the_dashboard_are_valid_and_use_existing_rules(tmp_path: Path) -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    used = set(re.findall(r"streamrec:\w+:\w+", " ".join(EXPRESSIONS)))
    assert used <= recorded
    plain = [e.replace("$__rate_interval", "5m") for e in dashboard_expressions() if not e.startswith("label_values")]
    rules = [{"record": f"panel:{n}", "expr": expression} for n, expression in enumerate(plain)]
    path = tmp_path / "panels.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in run(tool("promtool", "prometheus"), "check", "rules", path)


def test_the_panels_of_the_dashboard_lie_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


async def test_prometheus_scrapes_a_daemon_and_an_alert_fires_when_it_is_stopped(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    program = tool("prometheus", "prometheus")
    token = "s3cr3t-s3cr3t-s3cr3t"
    daemon = start_daemon(http_token=token)
    await daemon.wait_ready()
    (tmp_path / "http_token").write_text(f"{token}\n")
    # the rules with shorter times: enough for a first scrape on a busy machine
    rules = re.sub(r"for: \d+[mh]", "for: 5s", (PROMETHEUS / "rules.yaml").read_text("utf-8"))
    (tmp_path / "rules.yaml").write_text(rules)
    scraped = {"static_configs": [{"targets": [daemon.http.removeprefix("http://")]}]}
    jobs = [{"job_name": "streamrec", "authorization": {"credentials_file": "http_token"}} | scraped]
    fast = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config = tmp_path / "prometheus.yml"
    config.write_text(yaml.safe_dump({"global": fast, "rule_files": ["rules.yaml"], "scrape_configs": jobs}))
    http = f"http://127.0.0.1:{free_port()}"
    process = await asyncio.create_subprocess_exec(
        program,
        "--config.file",
        config,
        "--storage.tsdb.path",
        tmp_path / "data",
        "--web.listen-address",
        http.removeprefix("http://"),
        "--log.level=error",
    )

    async def query(expression: str) -> list[dict[str, Any]]:
        status, text = await asyncio.to_thread(get, f"{http}/api/v1/query?query={expression}")
        found: list[dict[str, Any]] = json.loads(text)["data"]["result"] if status == 200 else []
        return found

    async def firing() -> set[str]:
        return {each["metric"]["alertname"] for each in await query("ALERTS{alertstate=%22firing%22}")}

    async def no_daemon() -> bool:
        return "StreamrecNoDaemon" in await firing()

    try:
        await eventually(lambda: query("streamrec_model_info"))
        await eventually(lambda: query("streamrec:lag_records:sum"))
        assert "StreamrecNoDaemon" not in await firing()
        daemon.kill()
        await eventually(no_daemon)
        assert await firing() == {"StreamrecNoDaemon", "StreamrecNoRetrain"}  # no worker retrains here
    finally:
        process.terminate()
        await process.wait()


# --- compose and Kubernetes


def environments() -> list[tuple[str, str]]:
    """Return every variable of a container, with its value or a stand-in."""
    found = [(name, str(value)) for service in OURS.values() for name, value in service["environment"].items()]
    for spec in WORKLOADS.values():
        (container,) = spec["containers"]
        found += [(each["name"], each.get("value", "streamrec-0")) for each in container["env"]]
    for path in (KUBERNETES / "base").glob("*.env*"):
        found += re.findall(r"^(?:# )?(STREAMREC_\w+)=(.*)$", path.read_text("utf-8"), re.MULTILINE)
    found += re.findall(r"(STREAMREC_\w+)=([^\s\\]+)", (DEPLOY / "Dockerfile").read_text("utf-8"))
    return found


def test_every_variable_is_a_setting_with_a_valid_value() -> None:
    given = dict(environments())
    assert {"STREAMREC_REDIS_URL", "STREAMREC_KAFKA_GROUP_INSTANCE_ID", "STREAMREC_HTTP_HOST"} <= set(given)
    files = {f"{name}_FILE" for name in secret_variables()} & set(given)
    assert {"STREAMREC_REDIS_PASSWORD_FILE", "STREAMREC_HTTP_TOKEN_FILE"} <= files
    names = {name.removeprefix(ENV_PREFIX).lower(): value for name, value in given.items() if name not in files}
    names |= {secret_variables()[name.removesuffix("_FILE")]: "sixteen-or-more-letters" for name in files}
    settings = Settings.of(**names)
    assert settings.http.host == "0.0.0.0"
    mentioned = set(re.findall(r"\bSTREAMREC_([A-Z_]+[A-Z])\b", " ".join(PAGES.values())))
    secrets = {f"{name}_FILE".removeprefix(ENV_PREFIX) for name in secret_variables()}
    assert {name.lower() for name in mentioned - secrets} <= set(all_settings())


def test_every_secret_file_is_mounted_in_its_container() -> None:
    for name, service in OURS.items():
        for path in (value for variable, value in service["environment"].items() if variable.endswith("_FILE")):
            assert path.removeprefix("/run/secrets/") in service["secrets"], name
    assert {secret for service in COMPOSE["services"].values() for secret in service.get("secrets", ())} == set(
        COMPOSE["secrets"]
    )
    (made,) = set(re.findall(r"for name in (.*); do openssl", PAGES["COMPOSE.md"]))
    assert set(made.split()) == set(COMPOSE["secrets"])
    settings, secrets = [
        (KUBERNETES / "base" / name).read_text("utf-8") for name in ("settings.env", "secrets.env.example")
    ]
    for spec in WORKLOADS.values():
        (mounted,) = [volume["secret"] for volume in spec["volumes"] if volume["name"] == "secrets"]
        (mount,) = [each for each in spec["containers"][0]["volumeMounts"] if each["name"] == "secrets"]
        named = re.findall(rf"STREAMREC_\w+_FILE={mount['mountPath']}/(\w+)", settings)
        assert set(named) == set(re.findall(r"^(?:# )?(\w+)=", secrets, re.MULTILINE)) and len(named) == 3
        assert mounted["secretName"] == "streamrec-secrets"


def test_every_command_is_valid() -> None:
    commands = [(name, list(service["command"])) for name, service in OURS.items() if name != "first-model"]
    commands += re.findall(r"^ +(streamrec) (.+)$", OURS["first-model"]["command"][-1], re.MULTILINE)
    commands += [(name, spec["containers"][0]["args"]) for name, spec in WORKLOADS.items()]
    assert len(commands) == 7
    for _, command in commands:
        arguments = command.split() if isinstance(command, str) else [a for a in command if a != "streamrec"]
        assert callable(_parser().parse_args(["100" if a.startswith("${") else a for a in arguments]).run)


def test_images_have_versions_and_ours_run_with_least_rights() -> None:
    for service in COMPOSE["services"].values():
        assert re.search(r":v?\d+\.\d+\.\d+", service["image"]), service["image"]
    for service in OURS.values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
    for spec in WORKLOADS.values():
        (container,) = spec["containers"]
        assert spec["securityContext"]["runAsNonRoot"] and not spec["enableServiceLinks"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
    dockerfile = (DEPLOY / "Dockerfile").read_text("utf-8")
    assert re.search(r"^USER 10001", dockerfile, re.MULTILINE)
    assert re.findall(r"^ARG TORCH=(.*)", dockerfile, re.MULTILINE) == ["debian"]  # for CPUs
    for service in OURS.values():
        assert service["build"]["args"] == {"TORCH": "${TORCH:-debian}"}


def test_compose_opens_no_port_to_other_machines() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", ())]
    assert len(ports) == 5 and all(port.startswith("127.0.0.1:") for port in ports)


def test_ports_and_times_agree_with_the_settings() -> None:
    settings = Settings.of()
    ports = {"serve": settings.http.port, "retrain": settings.retrain.http_port}
    (published,) = COMPOSE["services"]["serve"]["ports"]  # one port for each daemon that can have a partition
    last = settings.http.port + int(OURS["serve"]["environment"]["STREAMREC_KAFKA_PARTITIONS"]) - 1
    assert published == f"127.0.0.1:{settings.http.port}-{last}:{settings.http.port}"
    scraped = (PROMETHEUS / "prometheus.yml").read_text("utf-8")
    for name, spec in WORKLOADS.items():
        (container,) = spec["containers"]
        assert container["ports"] == [{"name": "metrics", "containerPort": ports[name]}]
        assert spec["terminationGracePeriodSeconds"] > settings.serving.shutdown_timeout_s + 10
        assert str(ports[name]) in scraped
        assert (
            int(re.findall(r"\d+", COMPOSE["services"][name]["stop_grace_period"])[0])
            > settings.serving.shutdown_timeout_s
        )


@pytest.mark.parametrize("version", ["1.28.0", "1.34.0"])
def test_manifests_fit_the_schemas_of_kubernetes(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs: pip install kubernetes-validate")
    checked = 0
    for manifest in MANIFESTS:
        if not manifest["apiVersion"].startswith("keda.sh/"):
            validate.validate(manifest, version, strict=True)
            checked += 1
    assert checked == 8


@pytest.mark.parametrize("overlay", ["base", "keda", "object-store"])
def test_kustomize_builds(overlay: str, tmp_path: Path) -> None:
    kubectl = tool("kubectl", "kubernetes-client")
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes", ignore=shutil.ignore_patterns("secrets.env"))
    base = tmp_path / "kubernetes" / "base"
    shutil.copy(base / "secrets.env.example", base / "secrets.env")
    built = list(yaml.safe_load_all(run(kubectl, "kustomize", tmp_path / "kubernetes" / overlay)))
    assert {each["metadata"].get("namespace", "streamrec") for each in built} == {"streamrec"}
    (serve,) = [each for each in built if each["kind"] == "StatefulSet"]
    assert ("replicas" in serve["spec"]) == (overlay != "keda")  # KEDA sets them
    (secret,) = [each["metadata"]["name"] for each in built if each["kind"] == "Secret"]
    pod = serve["spec"]["template"]["spec"]
    assert {"secretName": secret, "defaultMode": 0o440} in [volume.get("secret") for volume in pod["volumes"]]
    claims = {each["metadata"]["name"] for each in built if each["kind"] == "PersistentVolumeClaim"}
    assert claims == (set() if overlay == "object-store" else {"registry", "archive"})
    for each in built:
        if each["kind"] in ("StatefulSet", "Deployment"):
            pod = each["spec"]["template"]["spec"]
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            assert volumes.keys() == {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
            used = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
            assert used <= claims


def test_no_secret_is_committed() -> None:
    if shutil.which("git") is None or not (DEPLOY.parent / ".git").exists():
        pytest.skip("needs a working copy of git")
    files = run("git", "-C", DEPLOY, "ls-files").split()
    assert "compose.yaml" in files
    assert not [name for name in files if re.search(r"secrets(/|\.env$)", name)]
