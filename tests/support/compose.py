"""Run deploy/compose.yaml beside everything else on this machine, and make its services fail."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from streamrec.local.process import free_port

from support.servers import COMPOSE, docker_answers

IMAGE = "streamrec:test"  # stays afterwards, so that the next build finds its layers


@dataclass
class Compose:
    """compose.yaml with project, image, secrets and ports of its own: it never meets a user's.

    Args:
        folder: for the changed compose.yaml and the secrets.
        clicks: the file that trains the first model.
    """

    folder: Path
    clicks: Path
    project: str = field(default_factory=lambda: f"streamrec-test-{secrets.token_hex(4)}")
    redis_port: int = field(default_factory=free_port)
    kafka_port: int = field(default_factory=free_port)
    redis_password: str = field(default_factory=lambda: secrets.token_hex(32))

    def write(self) -> None:
        """Write the changed compose.yaml and the secrets."""
        compose = yaml.safe_load(COMPOSE.read_text("utf-8"))
        for service in compose["services"].values():
            service.pop("ports", None)
            if "build" in service:
                service["image"] = IMAGE
                # the containers and the tests share the cores
                service["environment"]["OMP_NUM_THREADS"] = "1"
        redis, kafka = compose["services"]["redis"], compose["services"]["kafka"]
        redis["ports"] = [f"127.0.0.1:{self.redis_port}:6379"]
        kafka["ports"] = [f"127.0.0.1:{self.kafka_port}:29092"]
        listeners = kafka["environment"]["KAFKA_ADVERTISED_LISTENERS"]
        listeners = listeners.replace("localhost:29092", self.kafka_bootstrap_servers)
        kafka["environment"]["KAFKA_ADVERTISED_LISTENERS"] = listeners
        for name in compose["secrets"]:
            path = self.folder / name
            path.write_text(self.redis_password if name == "redis_password" else secrets.token_hex(32))
            compose["secrets"][name] = {"file": str(path)}
        self._file.write_text(yaml.safe_dump(compose))

    @property
    def _file(self) -> Path:
        return self.folder / "compose.yaml"

    @property
    def _environment(self) -> dict[str, str]:
        # BuildKit would pull a frontend for the Dockerfile
        return os.environ | {"CLICKS_FILE": str(self.clicks), "DOCKER_BUILDKIT": "0"}

    @property
    def redis_url(self) -> str:
        return f"redis://localhost:{self.redis_port}/0"

    @property
    def kafka_bootstrap_servers(self) -> str:
        return f"localhost:{self.kafka_port}"

    async def run(self, *arguments: str) -> str:
        """Run ``docker compose`` with arguments; return its output."""
        return await docker(*self._command(*arguments), environment=self._environment)

    def _command(self, *arguments: str) -> list[str]:
        files = ("--file", str(self._file), "--project-directory", str(COMPOSE.parent))
        return ["compose", "--project-name", self.project, *files, *arguments]

    async def containers(self, service: str) -> list[str]:
        """Return the ids of the containers of a service."""
        return (await self.run("ps", "--quiet", service)).split()

    async def kill_processes(self, container: str) -> None:
        """Kill every process of a container but tini, which then ends; Docker restarts the container."""
        await docker("exec", "--detach", container, "sh", "-c", "kill -KILL -1")

    @contextlib.asynccontextmanager
    async def cut_off(self, container: str) -> AsyncIterator[None]:
        """Disconnect a container from the network while the block runs."""
        network = f"{self.project}_default"
        await docker("network", "disconnect", network, container)
        yield
        await docker("network", "connect", network, container)

    def down(self) -> None:
        """Remove containers, networks and volumes."""
        command = self._command("down", "--volumes", "--timeout", "1")
        subprocess.run(["docker", *command], env=self._environment, check=True, capture_output=True)


async def docker(*arguments: str, environment: dict[str, str] | None = None) -> str:
    process = await asyncio.create_subprocess_exec(
        "docker", *arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        out, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, f"docker {' '.join(arguments)}:\n{out.decode()}{errors.decode()}"
    return out.decode()


@contextlib.contextmanager
def composed(folder: Path, clicks: Path) -> Iterator[Compose]:
    """Yield compose.yaml, not yet started; skip the test where no engine answers. Remove everything in the end."""
    if not docker_answers():
        pytest.skip("needs a Docker engine")
    if shutil.which("docker") is None:
        pytest.skip("needs the docker command")
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("needs docker compose")
    compose = Compose(folder, clicks)
    compose.write()
    try:
        yield compose
    finally:
        compose.down()
