"""The manifests of deploy/kubernetes/base in a real cluster, applied as deploy/KUBERNETES.md says.

They are applied as they stand, but for addresses, image, storage class and CPU requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import yaml

from streamrec.local.apache_kafka import apache_kafka
from streamrec.local.process import ServerProcess, free_port
from streamrec.local.servers import redis_command
from streamrec.redis.client import RedisClient
from streamrec.serving.inspection import published, stored
from streamrec.settings import Settings
from streamrec.settings_sources import load_settings

from support.kafka_client import feeding, read_topic, wait_caught_up
from support.kubernetes import Cluster, Pod
from support.oracle import assert_dead_letters, assert_sequences, expected_sequences, is_bad
from support.servers import apache_kafka_home
from support.waiting import eventually

log = logging.getLogger(__name__)

BASE = Path(__file__).parents[2] / "deploy" / "kubernetes" / "base"
SERVE, RETRAIN = "streamrec-serve", "streamrec-retrain"
SESSION_TIMEOUT_S = 120  # serve.yaml
CLICKS_PER_S = 170
MODEL_MAX_LEN = 8

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


class Outside:
    """Redis and Kafka on this machine, at an address for the pods and at a loopback one for the test.

    Args:
        host: the address for the pods.
    """

    def __init__(self, folder: Path, home: Path, host: str) -> None:
        self.password = secrets.token_hex(16)
        self._host = host
        (folder / "redis").mkdir(parents=True)
        self.redis = ServerProcess("Redis", folder / "redis.log", self._redis_command(folder / "redis"), refuses_login)
        test_port, self.kafka_port, controller_port = free_port(), free_port(), free_port()
        listeners = f"PLAINTEXT://127.0.0.1:{test_port},PODS://{host}:{self.kafka_port}"
        self.kafka = apache_kafka(
            home,
            folder / "kafka",
            {
                "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
                "listeners": f"{listeners},CONTROLLER://127.0.0.1:{controller_port}",
                "advertised.listeners": listeners,
                "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,PODS:PLAINTEXT,CONTROLLER:PLAINTEXT",
                "inter.broker.listener.name": "PLAINTEXT",
            },
        )
        self.kafka.port = test_port

    def _redis_command(self, folder: Path) -> Callable[[int], list[str]]:
        def command(port: int) -> list[str]:
            line = redis_command(port, folder)
            line.insert(line.index("--bind") + 2, self._host)
            return [*line, "--requirepass", self.password]

        return command

    @property
    def addresses(self) -> dict[str, str]:
        """The settings with addresses that the pods use."""
        return {
            "STREAMREC_KAFKA_BOOTSTRAP_SERVERS": f"{self._host}:{self.kafka_port}",
            "STREAMREC_REDIS_URL": f"redis://{self._host}:{self.redis.port}/0",
        }

    @property
    def settings(self) -> Settings:
        """The settings of this process."""
        return load_settings(
            flags={
                "kafka_bootstrap_servers": f"127.0.0.1:{self.kafka.port}",
                "kafka_group": "streamrec",
                "kafka_partitions": 12,
                "redis_url": f"redis://127.0.0.1:{self.redis.port}/0",
                "redis_password": self.password,
            }
        )

    def stop(self) -> None:
        self.kafka.stop()
        self.redis.stop()


def refuses_login(connection: socket.socket) -> bool:
    """Return whether a Redis with a password at the other end is ready."""
    connection.sendall(b"PING\r\n")
    return connection.recv(16).startswith(b"-NOAUTH")


@pytest.fixture
def cluster() -> Cluster:
    cluster = Cluster("streamrec")
    cluster.skip_unless_it_answers()
    return cluster


@pytest.fixture
def outside(cluster: Cluster, tmp_path: Path) -> Iterator[Outside]:
    servers = Outside(tmp_path / "servers", apache_kafka_home(), cluster.host)
    yield servers
    servers.stop()


def overlay(cluster: Cluster, outside: Outside, folder: Path) -> Path:
    """Write the base, its secrets, and an overlay with what differs here; return the folder of the overlay."""
    shutil.copytree(BASE, folder / "base", ignore=shutil.ignore_patterns("secrets.env"))
    (folder / "base" / "secrets.env").write_text(f"redis_password={outside.password}\n")
    name, _, tag = cluster.image.partition(":")
    cpu = "/spec/template/spec/containers/0/resources/requests/cpu"
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": cluster.namespace,
        "resources": ["../base"],
        "images": [{"name": "streamrec", "newName": name, "newTag": tag}],
        "configMapGenerator": [
            {
                "name": "streamrec-settings",
                "behavior": "merge",
                "literals": [f"{variable}={value}" for variable, value in outside.addresses.items()],
            }
        ],
        "patches": [
            patch("PersistentVolumeClaim", "registry", "add", "/spec/storageClassName", cluster.shared_class),
            patch("StatefulSet", "serve", "replace", cpu, "50m"),
            patch("Deployment", "retrain", "replace", cpu, "50m"),
        ],
    }
    (folder / "overlay").mkdir()
    (folder / "overlay" / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder / "overlay"


def patch(kind: str, name: str, operation: str, path: str, value: str) -> dict[str, object]:
    change = [{"op": operation, "path": path, "value": value}]
    return {"target": {"kind": kind, "name": name}, "patch": yaml.safe_dump(change)}


@contextlib.asynccontextmanager
async def applied(cluster: Cluster, folder: Path) -> AsyncIterator[None]:
    await cluster.run("apply", "-k", str(folder))
    try:
        yield
    finally:
        await cluster.run("delete", "-k", str(folder), "--timeout=120s")


async def all_wait_for(cluster: Cluster, name: str) -> None:
    """Wait until both daemons say that they wait; none has been restarted."""

    async def wait() -> bool:
        pods = await cluster.pods(SERVE)
        assert not any(pod.restarts for pod in pods), pods
        said = [await pod.get("/readyz") for pod in pods]
        return said == [(503, f"waiting for {name}; the log says why\n")] * 2

    await eventually(wait, timeout_s=240, every_s=1)
    assert [await pod.get("/livez") for pod in await cluster.pods(SERVE)] == [(200, "ok\n")] * 2


async def ready(cluster: Cluster, number: int) -> list[Pod]:
    """Wait until there are so many daemons, all ready; return them."""

    async def all_ready() -> list[Pod]:
        pods = await cluster.pods(SERVE)
        return pods if len(pods) == number and all(pod.ready for pod in pods) else []

    return await eventually(all_ready, timeout_s=300, every_s=1)


async def can_bind(host: str) -> bool:
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind((host, 0))
        return True
    return False


async def give_first_model(cluster: Cluster, model_dir: Path) -> None:
    """Copy and publish it as deploy/KUBERNETES.md says."""
    (retrain,) = await cluster.pods(RETRAIN)
    await cluster.run("cp", str(model_dir), f"{retrain.name}:/tmp/model")
    await cluster.run("exec", "deploy/retrain", "--", "streamrec", "models", "publish", "/tmp/model", "--promote")


class Timed:
    """Logs and stores how long each step took."""

    def __init__(self) -> None:
        self.steps: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.steps[name] = round(time.monotonic() - started, 1)
        log.info("%s: %.1f s", name, self.steps[name])


async def upset(cluster: Cluster, timed: Timed) -> None:
    """Roll the daemons, delete one by force, scale to three and back."""
    before = await ready(cluster, 2)
    with timed.step("rollout restart of two pods"):
        await cluster.run("rollout", "restart", "statefulset/serve")
        await cluster.run("rollout", "status", "statefulset/serve", "--timeout=280s")
    rolled = await ready(cluster, 2)
    assert not {pod.uid for pod in before} & {pod.uid for pod in rolled}
    with timed.step("a pod deleted by force until it is ready again"):
        await cluster.run("delete", "pod", "serve-0", "--force", "--grace-period=0")

        async def replaced() -> bool:
            return (await ready(cluster, 2))[0].uid != rolled[0].uid

        await eventually(replaced, timeout_s=300)
    with timed.step("scaled to three"):
        await cluster.run("scale", "statefulset/serve", "--replicas=3")
        third = (await ready(cluster, 3))[2]

    async def has_lag() -> bool:
        return "streamrec_lag_records{" in (await third.get("/metrics"))[1]

    with timed.step("the third has partitions"):
        await eventually(has_lag, timeout_s=120, every_s=1)
    with timed.step("scaled back to two"):
        await cluster.run("scale", "statefulset/serve", "--replicas=2")
        await ready(cluster, 2)


async def test_the_manifests_serve_every_click_through_rollout_lost_pod_and_scaling(
    cluster: Cluster, outside: Outside, model_dir: Path, tmp_path: Path
) -> None:
    timed = Timed()
    async with applied(cluster, overlay(cluster, outside, tmp_path)):
        enforced = await cluster.run("get", "namespace", cluster.namespace, "-o", "jsonpath={.metadata.labels}")
        assert '"pod-security.kubernetes.io/enforce":"restricted"' in enforced
        await eventually(lambda: can_bind(cluster.host), timeout_s=120)  # the first pod makes the bridge
        with timed.step("applied until both daemons wait for Redis"):
            await all_wait_for(cluster, "Redis")
        await asyncio.to_thread(outside.redis.start)
        await all_wait_for(cluster, "Kafka")
        await asyncio.to_thread(outside.kafka.start)
        async with feeding(outside.settings, seed=1, per_s=CLICKS_PER_S, at_least=100):
            # the topics exist now, with one replica; settings.env asks for three, which this Kafka refuses
            await all_wait_for(cluster, "the first champion of the registry")
            with timed.step("first model published until both daemons are ready"):
                await give_first_model(cluster, model_dir)
                await ready(cluster, 2)
            await upset(cluster, timed)
        with timed.step("caught up after the last click"):
            await wait_caught_up(outside.settings, timeout_s=SESSION_TIMEOUT_S + 180)
        await assert_every_sequence(outside.settings)
        pods = [*await cluster.pods(SERVE), *await cluster.pods(RETRAIN)]
        assert [pod.restarts for pod in pods] == [0, 0, 0], pods


async def assert_every_sequence(settings: Settings) -> None:
    records = await read_topic(settings, settings.kafka.topic)
    users = expected_sequences(records, settings, MODEL_MAX_LEN)
    async with RedisClient(settings.redis) as redis:
        assert_sequences({user: value async for user, value in stored(redis, None)}, users)
        lists = {user: value.n async for user, value in published(redis, None) if value}
    assert lists == {user: expected.n for user, expected in users.items()}
    await assert_dead_letters(settings, [record for record in records if is_bad(record)])
    clicks = sum(expected.n for expected in users.values())
    log.info("%d clicks of %d users, %d dead letters", clicks, len(users), len(records) - clicks)
