"""A Kubernetes cluster that tests may use: kubectl, and the pods of one namespace.

| variable | value |
|---|---|
| `KUBECONFIG` | the cluster; without it the tests are skipped |
| `KUBECTL` | command line of kubectl [kubectl] |
| `KUBE_HOST` | address at which pods reach servers of this machine [10.244.0.1] |
| `KUBE_IMAGE` | image of streamrec that the nodes have [streamrec:0.1.0] |
| `KUBE_SHARED_CLASS` | storage class with ReadWriteMany [shared] |
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from support.daemon_process import get

COMMAND_TIMEOUT_S = 300


@dataclass(frozen=True)
class Pod:
    """The state of a pod."""

    name: str
    uid: str
    address: str
    ready: bool
    restarts: int

    async def get(self, path: str, port: int = 9464) -> tuple[int, str]:
        """Return HTTP status and text; status 0 if it does not answer."""
        return await asyncio.to_thread(get, f"http://{self.address}:{port}{path}") if self.address else (0, "")


@dataclass(frozen=True)
class Cluster:
    """A cluster, seen through kubectl."""

    namespace: str
    kubectl: Sequence[str] = field(default_factory=lambda: shlex.split(os.environ.get("KUBECTL", "kubectl")))
    host: str = field(default_factory=lambda: os.environ.get("KUBE_HOST", "10.244.0.1"))
    image: str = field(default_factory=lambda: os.environ.get("KUBE_IMAGE", "streamrec:0.1.0"))
    shared_class: str = field(default_factory=lambda: os.environ.get("KUBE_SHARED_CLASS", "shared"))

    def skip_unless_it_answers(self) -> None:
        if not os.environ.get("KUBECONFIG"):
            pytest.skip("needs a Kubernetes cluster in KUBECONFIG (tests/support/kubernetes.py)")
        if shutil.which(self.kubectl[0]) is None:
            pytest.skip(f"needs {self.kubectl[0]}: install Debian's kubernetes-client, or set KUBECTL")
        if subprocess.run([*self.kubectl, "get", "nodes"], capture_output=True, timeout=60).returncode:
            pytest.skip(f"no cluster answers at the address in {os.environ['KUBECONFIG']}")

    async def run(self, *arguments: str) -> str:
        """Run kubectl in the namespace; return its output."""
        command = [*self.kubectl, "--namespace", self.namespace, *arguments]
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
        assert done.returncode == 0, f"{shlex.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    async def pods(self, name: str) -> list[Pod]:
        """Return the pods with a label app.kubernetes.io/name, by name."""
        found = json.loads(await self.run("get", "pods", "-o", "json", "-l", f"app.kubernetes.io/name={name}"))
        return sorted((_pod(each) for each in found["items"]), key=lambda pod: pod.name)


def _pod(found: dict[str, Any]) -> Pod:
    status = found["status"]
    containers = status.get("containerStatuses", [])
    return Pod(
        found["metadata"]["name"],
        found["metadata"]["uid"],
        status.get("podIP", ""),
        bool(containers) and all(each["ready"] for each in containers),
        sum(each["restartCount"] for each in containers),
    )
