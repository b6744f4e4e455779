"""Fixtures: real servers, settings, models and daemons."""

import faulthandler
import logging
import os
import signal
import tempfile
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from sasrec import Interactions, ItemVocab, SASRec, SASRecConfig, save_model
from sasrec.data.readers import Event
from streamrec.local.embedded_kafka import CHANGES
from streamrec.local.servers import LocalServers
from streamrec.redis.client import RedisClient
from streamrec.settings import ENV_PREFIX, Settings
from streamrec.settings_sources import load_settings
from streamrec.storage import Place

from support.certificates import Certificates
from support.daemon_process import Daemon
from support.places import use
from support.s3_server import S3Server, s3_server
from support.servers import OwnRedis, Servers, find_servers, own_redis_server, own_servers

# the environment of the test run, for example with addresses of servers; tests do not see it
GIVEN = dict(os.environ)
STDERR = pytest.StashKey[int]()
GRACE_S = 100  # for the fixtures of a test that ran into its time limit


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End the run if a test hangs in its fixtures after its time limit, where pytest-timeout no longer helps."""

    def give_up() -> None:
        os.write(stderr, f"\n{item.nodeid} hangs after its time limit; the run ends here\n".encode())
        faulthandler.dump_traceback(stderr)
        os._exit(3)

    stderr = item.config.stash[STDERR]
    own_limit = item.get_closest_marker("timeout")
    limit_s = own_limit.args[0] if own_limit else float(item.config.getini("timeout"))
    watchdog = threading.Timer(limit_s + GRACE_S, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        return (yield)
    finally:
        watchdog.cancel()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)  # tests capture stderr
    hypothesis.settings.register_profile("under any load", deadline=None)
    hypothesis.settings.load_profile("under any load")
    # one thread: tests share two cores with the servers, and floats depend on the number of threads
    torch.set_num_threads(1)
    # a background job ignores Ctrl-C, and its child processes inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    with find_servers(GIVEN) as found:
        yield found


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Restore logging: a command configures it for its process, on a stderr that is closed after the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in ("aiokafka", "kafka", "sasrec.training.train")}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


@pytest.fixture(autouse=True)
def aiokafka_as_it_was() -> Iterator[None]:
    """Restore aiokafka: a command that a test runs in this process may adapt it to the embedded Kafka server."""
    before = {(kind, name): vars(kind)[name] for kind, name in CHANGES}
    yield
    for (kind, name), method in before.items():
        setattr(kind, name, method)


@pytest.fixture
def make_settings(servers: Servers) -> Callable[..., Settings]:
    """Make settings with a topic, group and Redis keys of the test: tests share servers, but nothing else."""
    unique = uuid.uuid4().hex[:12]

    def make(**changes: Any) -> Settings:
        own = {
            "kafka_bootstrap_servers": servers.kafka_bootstrap_servers,
            "redis_url": servers.redis_url,
            "kafka_topic": f"clicks-{unique}",
            "kafka_group": f"group-{unique}",
            "redis_key_prefix": f"test-{unique}",
            "http_port": 0,
            "commands_wait_s": 0,  # a server that is missing in a test will not come
        }
        settings = load_settings(flags=own | changes)
        if settings.redis.url.get_secret_value() == servers.redis_url:
            assert unique in settings.redis.key_prefix, "a test would meet what it left there in an earlier run"
        if settings.kafka.bootstrap_servers == servers.kafka_bootstrap_servers:
            assert unique in settings.kafka.topic and unique in settings.kafka.group
        return settings

    return make


@pytest.fixture
async def redis(make_settings: Callable[..., Settings]) -> AsyncIterator[RedisClient]:
    async with RedisClient(make_settings().redis) as client:
        yield client


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model: 50 items i0 to i49, windows of 8. Its scores are arbitrary, but always equal."""
    torch.manual_seed(0)
    vocab = ItemVocab([f"i{n}" for n in range(50)], list(range(50, 0, -1)))
    model = SASRec(SASRecConfig(num_items=50, max_len=8, hidden_units=16, num_blocks=2, dropout_rate=0.0))
    for parameter in model.parameters():  # scores of the small initial weights would tie
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    with torch.no_grad():
        model.item_embedding.weight[0].zero_()
    path = tmp_path_factory.mktemp("models") / "small"
    save_model(path, model, vocab)
    return path


@pytest.fixture
def start_daemon(model_dir: Path, make_settings: Callable[..., Settings]) -> Iterator[Callable[..., Daemon]]:
    """Start `streamrec serve` processes; the test's end kills those that still run."""
    daemons: list[Daemon] = []

    def start(*arguments: str, command: tuple[str, ...] | None = None, **changes: Any) -> Daemon:
        daemons.append(Daemon(make_settings(**({"model_dir": model_dir} | changes)), arguments, command))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.kill()


@pytest.fixture
def interactions() -> Interactions:
    """Six users in a circle of twelve items: item n + 1 follows item n."""
    return Interactions.from_events(
        Event(f"u{user}", f"i{(user * 2 + step) % 12}", 1_000 * step) for step in range(30) for user in range(6)
    )


@pytest.fixture(scope="module")
def own() -> Iterator[LocalServers]:
    """Redis and Apache Kafka for one module."""
    with own_servers() as servers:
        yield servers


@pytest.fixture(scope="module")
def own_redis() -> Iterator[OwnRedis]:
    """A Redis server for one module."""
    with own_redis_server() as server:
        yield server


@pytest.fixture(scope="module")
def certificates() -> Iterator[Certificates]:
    with tempfile.TemporaryDirectory() as folder:
        yield Certificates(Path(folder) / "trusted")


@pytest.fixture
def other_certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path / "other")


@pytest.fixture(scope="session")
def s3_of_session() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_of_session: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3 server that this process and its children use."""
    use(s3_of_session, monkeypatch)
    return s3_of_session


@pytest.fixture
def own_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """An S3 server that one test may stop and pause."""
    with s3_server() as server:
        use(server, monkeypatch)
        yield server


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty place for models or clicks: a folder, then a prefix of a bucket."""
    if request.param == "folder":
        return tmp_path / "place"
    server: S3Server = request.getfixturevalue("s3")
    return server.new_bucket()
