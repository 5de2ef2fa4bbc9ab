"""The doctor before a real cluster that asks for a token."""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlgen.config import load_config
from rlgen.jobs.doctor_check import Finding
from rlgen.jobs.doctor_cluster import find_ray

pytestmark = pytest.mark.ray

_START_S = 120.0
_ANSWER_S = 60.0


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Head:
    """A running head node."""

    address: str
    token: str


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` with token authentication, in a folder and on ports of its own."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # a socket's path must be short
    token = secrets.token_hex(32)
    flags = {
        "port": closed_port(),
        "dashboard-port": closed_port(),
        "dashboard-agent-listen-port": closed_port(),
        "ray-client-server-port": closed_port(),
        "num-cpus": 2,
        "num-gpus": 0,
        "object-store-memory": 100 << 20,
        "include-dashboard": "false",
        "temp-dir": folder,
    }
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "start", "--head", "--block", "--disable-usage-stats"]
    log = folder / "start.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in flags.items())],
            env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + _START_S
        while "will now block" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)
        plain = re.sub(r"\x1b\[\d*m", "", log.read_text())
        host = re.search(r"Local node IP: ([\d.]+)", plain)
        assert host is not None, plain
        yield Head(f"{host[1]}:{flags['port']}", token)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def found(head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What the doctor finds of the cluster, by what the environment says of tokens."""
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    monkeypatch.setenv("HOME", str(tmp_path))  # whose .ray/auth_token would be taken
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)

    def find(*settings: str, **environment: str) -> list[Finding]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return find_ray(load_config(None, settings), timeout_s=_ANSWER_S)

    return find


@pytest.mark.parametrize(
    ("environment", "said", "remedy"),
    [
        ({}, "RAY_AUTH_MODE is not set", "set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE is disabled", "set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_MODE": "token"}, "there is none", "RAY_AUTH_TOKEN_PATH"),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64},
            "refuses the token of RAY_AUTH_TOKEN",
            "the head was started with",
        ),
    ],
)
def test_a_missing_or_wrong_token_is_told_apart_from_an_absent_cluster(
    found, environment: dict[str, str], said: str, remedy: str
) -> None:
    start = time.monotonic()
    (finding,) = found(**environment)
    assert finding.verdict == "failure"
    assert said in finding.found and remedy in finding.remedy
    assert "b" * 64 not in str(finding)
    assert time.monotonic() - start < 30, "Ray by itself tries again for twenty seconds"


def test_with_the_token_the_nodes_are_seen_and_an_unmet_bundle_is_named(found, head: Head) -> None:
    right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token}
    reached, placed = found(**right)
    assert (reached.verdict, placed.verdict) == ("ok", "ok")
    assert reached.found == f"{head.address}: 1 node(s), 2 CPU, 0 GPU"
    reached, placed = found("learner.num_gpus=1", "rollout.num_cpus=0.5", **right)
    assert (reached.verdict, placed.verdict) == ("ok", "failure")
    assert "no room for a learner process with 0.25 CPU and 1 GPU. Nodes" in placed.found


def test_nothing_at_the_address_is_told_at_once(found) -> None:
    start = time.monotonic()
    (finding,) = found(RAY_ADDRESS=f"127.0.0.1:{closed_port()}")
    assert finding.verdict == "failure" and "nothing listens there" in finding.found
    assert "RAY_ADDRESS" in finding.remedy
    assert time.monotonic() - start < 30
