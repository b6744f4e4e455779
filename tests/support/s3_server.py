"""moto's S3 server as a child process, with faults: `python -m support.s3_server PORT`.

It takes one request after the other: moto compares an ETag and replaces the object in two steps. Like Amazon's it
refuses requests without a signature, and those of the key REFUSED_KEY.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from streamrec.local.process import ServerProcess

REFUSED_KEY = "AKIAREFUSED"
SECRET = "s3cr3t-of-the-object-store"
DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
CHANGES = ("PUT", "POST", "DELETE")
TESTS = Path(__file__).parents[1]


class S3Server:
    """The server, seen from the tests."""

    def __init__(self, folder: Path) -> None:
        self._process = ServerProcess(
            "moto",
            folder / "moto.log",
            lambda port: [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(TESTS)!r}); {CODE}", str(port)],
            lambda connection: True,
            start_timeout_s=60,
        )
        self.start, self.stop = self._process.start, self._process.stop
        self.pause, self.resume = self._process.pause, self._process.resume

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which its clients run."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._process.port}",
            "AWS_ACCESS_KEY_ID": "AKIATEST",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def new_bucket(self) -> str:
        """Make a bucket; return the URL of a place in it."""
        name = f"bucket-{uuid.uuid4().hex}"
        self._call(f"/{name}", "PUT")
        return f"s3://{name}/some/place"

    def changes(self) -> int:
        """Return how many requests that change something it has got."""
        return int(self._call("/-/changes"))

    def kill_client(self, change: int, when: str) -> None:
        """Send SIGKILL to the process that makes the n-th change from now on, ``before`` or ``after`` it is made."""
        self._call(f"/-/kill/{change}/{when}")

    def _call(self, path: str, method: str = "GET") -> bytes:
        request = urllib.request.Request(
            self.environment["AWS_ENDPOINT_URL"] + path, method=method, headers={"Authorization": "of the tests"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            content: bytes = answer.read()
            return content


CODE = "from support.s3_server import main; main()"


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = S3Server(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()


class Application:
    """Counts changes, kills clients, denies access, and else is moto."""

    def __init__(self, moto: Any, port: int) -> None:
        self._moto = moto
        self._port = port
        self._one_at_a_time = threading.Lock()
        self._changes = 0
        self._kill_at, self._when = 0, ""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._one_at_a_time:
            path = environ["PATH_INFO"]
            if path.startswith("/-/"):
                return self._control(path.split("/")[2:], start_response)
            key = environ.get("HTTP_AUTHORIZATION", REFUSED_KEY)
            if REFUSED_KEY in key:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response("403 Forbidden", [("Content-Length", str(len(DENIED)))])
                return [DENIED]
            is_change = environ["REQUEST_METHOD"] in CHANGES
            self._changes += is_change
            kills = is_change and self._changes == self._kill_at
            if kills and self._when == "before":
                self._kill(environ)
                start_response("500 Killed", [])
                return []
            answer = list(self._moto(environ, start_response))
            if kills:
                self._kill(environ)
            return answer

    def _control(self, words: list[str], start_response: Any) -> list[bytes]:
        if words[0] == "kill":
            self._kill_at, self._when = self._changes + int(words[1]), words[2]
        start_response("200 OK", [])
        return [str(self._changes).encode()]

    def _kill(self, environ: dict[str, Any]) -> None:
        theirs = int(environ["REMOTE_PORT"])
        for found in psutil.net_connections("tcp"):
            if found.laddr and found.raddr and (found.laddr.port, found.raddr.port) == (theirs, self._port):
                assert found.pid and found.pid != os.getpid()
                os.kill(found.pid, signal.SIGKILL)
                with contextlib.suppress(psutil.NoSuchProcess):
                    psutil.Process(found.pid).wait(10)


def main() -> None:
    """Serve on the port that the first argument names."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import run_simple

    port = int(sys.argv[1])
    moto = DomainDispatcherApplication(create_backend_app)
    run_simple("127.0.0.1", port, Application(moto, port), threaded=True, request_handler=MotoRequestHandler)
