"""Every command line for Docker, compose and kubectl that a page or a file of deploy/ shows, parsed as they do."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamrec.commands.main import _parser

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
MANIFESTS = [
    manifest
    for path in sorted(DEPLOY.glob("kubernetes/*/*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text("utf-8"))
]
WORKLOADS = {f"{m['kind'].lower()}/{m['metadata']['name']}" for m in MANIFESTS if "template" in m.get("spec", {})}
IMAGE = (DEPLOY / "Dockerfile").read_text("utf-8")
ENTRYPOINT = re.findall(r'^ENTRYPOINT \["tini", "--", "(\w+)"\]$', IMAGE, re.MULTILINE)


def command_lines() -> list[str]:
    """Return the command lines in code blocks, code spans and comments, without shell comments and variables."""
    found = set()
    pages = [*ROOT.glob("*.md"), *DEPLOY.glob("*.md"), *(ROOT / "streamrec").glob("*.md")]
    files = [DEPLOY / "Dockerfile", *DEPLOY.glob("**/*.y*ml"), *DEPLOY.glob("**/*.example")]
    for path in [*pages, *files]:
        for line in path.read_text("utf-8").splitlines():
            spans = re.findall(r"`([^`]+)`", line) if path.suffix == ".md" and not line.startswith("    ") else [line]
            for span in spans:
                match = re.search(r"\b(docker (?:compose )?(?:-|[a-z])|kubectl (?:-|[a-z])).*", span)
                if match and not span.strip().startswith("make "):
                    found.add(re.split(r"\s+#|;", match[0])[0].strip())
    return sorted(found)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(exit_on_error=False, add_help=False)
    programs = parser.add_subparsers(dest="program", required=True)
    docker = programs.add_parser("docker", add_help=False).add_subparsers(dest="verb", required=True)
    kubectl = programs.add_parser("kubectl", add_help=False)
    kubectl.add_argument("-n", dest="namespace")
    kubectl_verbs = kubectl.add_subparsers(dest="verb", required=True)

    build = docker.add_parser("build")
    for flag in ("-f", "-t", "--build-arg"):
        build.add_argument(flag)
    build.add_argument("context")
    run = docker.add_parser("run")
    run.add_argument("image")
    run.add_argument("arguments", nargs=argparse.REMAINDER)
    docker.add_parser("inspect").add_argument("what", nargs="*")

    compose = docker.add_parser("compose")
    compose.add_argument("--profile")
    verbs = compose.add_subparsers(dest="compose_verb", required=True)
    up = verbs.add_parser("up")
    for flag in ("--build", "--detach", "--no-recreate"):
        up.add_argument(flag, action="store_true")
    up.add_argument("--scale")
    up.add_argument("services", nargs="*")
    verbs.add_parser("down").add_argument("--volumes", action="store_true")
    run = verbs.add_parser("run")
    run.add_argument("--rm", action="store_true")
    for verb in (run, verbs.add_parser("exec")):
        verb.add_argument("service")
        verb.add_argument("arguments", nargs=argparse.REMAINDER)
    port = verbs.add_parser("port")
    port.add_argument("--index", type=int)
    port.add_argument("service")
    port.add_argument("port", type=int)

    apply = kubectl_verbs.add_parser("apply")
    apply.add_argument("-k", dest="folder", required=True)
    execute = kubectl_verbs.add_parser("exec")
    execute.add_argument("workload")
    execute.add_argument("arguments", nargs=argparse.REMAINDER)
    copy = kubectl_verbs.add_parser("cp")
    copy.add_argument("source")
    copy.add_argument("target")
    for name, nouns in (("logs", 0), ("get", 1), ("describe", 1)):
        verb = kubectl_verbs.add_parser(name)
        verb.add_argument("nouns", nargs=nouns or "*")
        verb.add_argument("-w", action="store_true")
    return parser


def check_streamrec(arguments: list[str]) -> None:
    """Parse what follows the program's name."""
    try:
        assert callable(_parser().parse_args(arguments).run)
    except SystemExit:
        pytest.fail(f"streamrec does not understand: {arguments}")


def check_in_container(arguments: list[str]) -> None:
    """Parse what runs in a container without an entrypoint: the program first."""
    program, *rest = arguments
    assert program == "streamrec", f"{program} is not what the image is for"
    check_streamrec(rest)


def test_there_are_command_lines_to_check() -> None:
    lines = command_lines()
    assert len(lines) >= 15, lines
    for beginning in ("docker compose run ", "docker compose exec ", "docker run ", "kubectl -n streamrec exec "):
        assert any(line.startswith(beginning) for line in lines), beginning
    assert ENTRYPOINT == ["streamrec"]


@pytest.mark.parametrize("line", command_lines())
def test_a_command_line_is_understood(line: str) -> None:
    given = argument_parser().parse_args(shlex.split(line))
    if given.program == "kubectl":
        assert given.namespace in (None, "streamrec")
        if given.verb == "exec":
            resource, _, name = given.workload.partition("/")
            assert f"{ {'deploy': 'deployment', 'sts': 'statefulset'}.get(resource, resource) }/{name}" in WORKLOADS
            assert " -- " in line
            check_in_container([each for each in given.arguments if each != "--"])
        elif given.verb == "apply":
            assert any(
                (folder / given.folder / "kustomization.yaml").is_file() for folder in DEPLOY.glob("kubernetes/*")
            )
    elif given.verb == "build":
        assert (ROOT / given.f).is_file() and (ROOT / given.context).is_dir()
    elif given.verb == "run":
        assert given.image == SERVICES["serve"]["image"]
        check_streamrec(given.arguments)
    elif given.verb == "compose":
        check_compose(given)


def check_compose(given: argparse.Namespace) -> None:
    profiles = {profile for service in SERVICES.values() for profile in service.get("profiles", ())}
    assert given.profile is None or given.profile in profiles
    verb = given.compose_verb
    named = {given.service} if verb in ("run", "exec", "port") else set(getattr(given, "services", ()))
    if getattr(given, "scale", None):
        named |= {given.scale.partition("=")[0]}
    assert named <= SERVICES.keys()
    if verb == "run":
        assert "entrypoint" not in SERVICES[given.service], "its own entrypoint takes other arguments"
        check_streamrec(given.arguments)
    elif verb == "exec":
        check_in_container(given.arguments)
    elif verb == "port":
        assert any(mapping.endswith(f":{given.port}") for mapping in SERVICES[given.service]["ports"])


@pytest.mark.parametrize(
    "line", ["docker compose run --rm retrain streamrec rebuild", "docker run streamrec:0.1.0 streamrec check"]
)
def test_a_program_that_is_named_twice_is_found(line: str) -> None:
    with pytest.raises(pytest.fail.Exception, match="streamrec does not understand"):
        test_a_command_line_is_understood(line)


def test_a_program_that_is_not_named_is_found() -> None:
    for line in ("docker compose exec retrain rebuild", "kubectl -n streamrec exec deploy/retrain -- rebuild"):
        with pytest.raises(AssertionError, match="rebuild is not what the image is for"):
            test_a_command_line_is_understood(line)


def test_pods_reach_names_kafka_and_redis_also_behind_tls_sentinel_and_nodelocal_dns() -> None:
    (policy,) = [manifest for manifest in MANIFESTS if manifest["kind"] == "NetworkPolicy"]
    names, *others = policy["spec"]["egress"]
    assert {"ipBlock": {"cidr": "169.254.20.10/32"}} in names["to"]
    assert {(each["protocol"], each["port"]) for each in names["ports"]} == {("UDP", 53), ("TCP", 53)}
    reached = {each["port"] for rule in others for each in rule["ports"]}
    assert {9092, 9093, 9094, 9096, 9098, 6379, 6380, 26379} <= reached


def test_no_container_of_ours_may_take_all_cores() -> None:
    for name, service in SERVICES.items():
        if service["image"].startswith("streamrec:"):
            assert service["cpus"] == "${CPUS:-1}", name


def test_trouble_at_kafka_changes_no_number_of_pods() -> None:
    (scaled,) = [manifest for manifest in MANIFESTS if manifest["kind"] == "ScaledObject"]
    assert "fallback" not in scaled["spec"], "it sets exactly its replicas, also fewer than run"
