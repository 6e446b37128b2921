"""The examples for Compose and Kubernetes: what they promise stands in them, and what they run works.

Neither Docker nor a cluster is needed: their commands run in containers as `tests.support.containers` makes them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from shmpool.observation import observe
from shmpool.states import ServerKind
from shmpool.status import RowState
from shmpool_coordinator import config
from shmpool_coordinator.cli import main
from tests.integration.containers.conftest import ROLE, Host
from tests.support.containers import FILES, ROOT
from tests.support.coordinator import running_coordinator
from tests.support.gunicorn import request_to
from tests.support.waiting import wait_until
from tools.stage import fill_in, free_port

EXAMPLES = ROOT / "examples"
COMPOSE = yaml.safe_load((EXAMPLES / "compose/compose.yaml").read_text())
DEPLOYMENT = yaml.safe_load((EXAMPLES / "kubernetes/deployment.yaml").read_text())
CONFIG_MAP = yaml.safe_load((EXAMPLES / "kubernetes/configmap.yaml").read_text())

SERVICES: dict[str, Any] = {name: COMPOSE["services"][name] for name in ("coordinator", "web", "admin")}
POD: dict[str, Any] = DEPLOYMENT["spec"]["template"]["spec"]
(SIDECAR,) = POD["initContainers"]
(WEB,) = POD["containers"]


class Example(NamedTuple):
    """What an example runs, and the configuration that it runs with."""

    configuration: str
    password_file: str
    coordinator: list[str]
    probe: list[str]
    web: list[str]
    pool: str


EXAMPLE_OF = {
    "compose": Example(
        configuration=(EXAMPLES / "compose" / COMPOSE["configs"]["shmpool"]["file"]).read_text(),
        password_file="/run/secrets/" + SERVICES["web"]["secrets"][0],
        coordinator=SERVICES["coordinator"]["command"],
        probe=SERVICES["coordinator"]["healthcheck"]["test"][1:],
        web=SERVICES["web"]["command"],
        pool=SERVICES["web"]["environment"]["SHMPOOL_NAME"],
    ),
    "kubernetes": Example(
        configuration=CONFIG_MAP["data"]["shmpool.toml"],
        password_file=next(m["mountPath"] for m in WEB["volumeMounts"] if m["name"] == "password") + "/password",
        coordinator=SIDECAR["command"],
        probe=SIDECAR["startupProbe"]["exec"]["command"],
        web=WEB["command"],
        pool=WEB["env"][0]["value"],
    ),
}


@pytest.fixture(params=EXAMPLE_OF)
def example(request: pytest.FixtureRequest) -> Example:
    """Each example."""
    return EXAMPLE_OF[request.param]


def test_compose_shares_memory_and_nothing_else() -> None:
    """Coordinator and services run as one user on a read-only root, and share a memory-backed /dev/shm."""
    (volume,) = COMPOSE["volumes"]
    assert COMPOSE["volumes"][volume]["driver_opts"] == {"type": "tmpfs", "device": "tmpfs", "o": "size=16m,mode=1777"}
    for service in SERVICES.values():
        (mount,) = service["volumes"]
        assert (mount["source"], mount["target"]) == (volume, "/dev/shm")
        assert service["read_only"] is True
        assert service["user"] == "10001:10001"
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    for name in ("web", "admin"):
        assert SERVICES[name]["depends_on"]["coordinator"] == {"condition": "service_healthy"}
    assert SERVICES["web"]["ports"] != SERVICES["admin"]["ports"]


def test_pod_starts_the_coordinator_first_and_gives_no_privilege() -> None:
    """A native sidecar with its probes, memory-backed /dev/shm, one unprivileged user, nothing writable beside it."""
    assert SIDECAR["restartPolicy"] == "Always"
    assert SIDECAR["startupProbe"]["exec"] == SIDECAR["livenessProbe"]["exec"]
    security = POD["securityContext"]
    assert (security["runAsNonRoot"], security["runAsUser"]) == (True, 10001)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    volumes = {volume.pop("name"): volume for volume in json.loads(json.dumps(POD["volumes"]))}
    assert volumes["shm"] == {"emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}}
    assert volumes["config"]["configMap"]["name"] == CONFIG_MAP["metadata"]["name"]
    assert volumes["password"]["secret"] == {"secretName": "guestbook-db", "defaultMode": 0o440}
    assert "secret generic guestbook-db --from-file=password=" in (EXAMPLES / "kubernetes/README.md").read_text()
    for container in (SIDECAR, WEB):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        assert mounts.pop("shm") == {"name": "shm", "mountPath": "/dev/shm"}
        assert all(mount["readOnly"] for mount in mounts.values())
        assert mounts.keys() <= volumes.keys()
    rollout = DEPLOYMENT["spec"]
    assert rollout["minReadySeconds"] >= POD["terminationGracePeriodSeconds"]


def test_configuration_is_accepted(example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`check-config` has no warning, the segment fits, and names and paths agree with the rest of the example."""
    assert main(["check-config", str(configuration_file(example, tmp_path))]) == 0
    printed = capsys.readouterr().out
    assert "warning" not in printed
    (needed,) = re.findall(r"^/dev/shm: (\d+) bytes", printed, re.MULTILINE)
    assert int(needed) < 16 << 20
    parsed = config.parse(tomllib.loads(example.configuration), "example")
    assert parsed.name == example.pool == example.probe[-1]
    assert not parsed.coordinator.autostart
    assert parsed.endpoints["pg1"].credentials.password_file == example.password_file


def configuration_file(example: Example, directory: Path) -> Path:
    """Write the example's configuration into a file."""
    file = directory / "shmpool.toml"
    file.write_text(example.configuration)
    return file


def program(command: list[str], *options: str) -> list[str]:
    """Return a command of an example such that it is found in this environment."""
    return ["env", *options, f"PATH={Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", *command]


def exit_code(*command: str) -> int:
    """Run a command and return how it ended."""
    return subprocess.run(program([*command]), check=False, capture_output=True, timeout=10).returncode


def test_probe_asks_for_the_coordinator_alone(example: Example, pool_name: str, tmp_path: Path) -> None:
    """It fails without a coordinator and succeeds with one, though the database is down and `status` says degraded."""
    probe = [*example.probe[:-1], pool_name]
    assert exit_code(*probe) == 1
    text = fill_in(configuration_file(example, tmp_path), pool_name, {"pg1": "host=127.0.0.1 port=1"})
    with running_coordinator(text, pool_name):
        assert exit_code(*probe) == 0
        assert exit_code("shmpool", "status", pool_name) == 1


@pytest.fixture
def entries(host: Host) -> Iterator[None]:
    """The table of the guest book, with access for the role of the pool."""
    schema = (EXAMPLES / "gunicorn/schema.sql").read_text()
    host.server.execute(f"{schema}; GRANT ALL ON entries TO {ROLE}")
    yield
    host.server.execute("DROP TABLE entries")


def is_served(port: int) -> bool:
    """Whether a service is ready, as the pod's readiness probe sees it."""
    try:
        return request_to(port, WEB["readinessProbe"]["httpGet"]["path"])[0] == 200
    except OSError:
        return False


@pytest.mark.usefixtures("entries")
def test_commands_work_in_containers(example: Example, host: Host) -> None:
    """Coordinator and two services, each in a container with a read-only root, serve within one budget."""

    text = fill_in(configuration_file(example, host.files), host.names.pool, {"pg1": host.server.conninfo(user=ROLE)})
    file = host.files / "pool.toml"
    file.write_text(text.replace(example.password_file, f"{FILES}/password"))
    host.container(*program([*example.coordinator[:-1], f"{FILES}/pool.toml"]))
    wait_until(lambda: observe(host.names).endpoints, within=10, what=host.log.read_text)
    ports = free_port(), free_port()
    for port in ports:
        command = [each.replace("0.0.0.0:8000", f"127.0.0.1:{port}") for each in example.web]
        host.container(*program(command, f"--chdir={EXAMPLES / 'gunicorn'}", f"SHMPOOL_NAME={host.names.pool}"))
    for port in ports:
        wait_until(lambda port=port: is_served(port), within=10, what=host.log.read_text)  # type: ignore[misc]
        assert request_to(port, "/entries", f"name=Ann&said={port}")[0] == 201
    status, book = request_to(ports[0], "/")
    assert (status, [entry["said"] for entry in book["entries"]]) == (200, [str(port) for port in reversed(ports)])
    held = [row for row in observe(host.names).workers if row.held]
    assert {(row.server, row.server_pid, row.state) for row in held} == {(ServerKind.GUNICORN, 1, RowState.HELD)}
    assert len(held) >= len(ports)
