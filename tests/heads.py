"""A head node of its own, as `ray start --head` makes it, that asks for a token."""

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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RAY = str(Path(sys.executable).with_name("ray"))
_START_S = 120.0


@dataclass(frozen=True)
class Head:
    """A running head node."""

    address: str
    dashboard: str
    token: str
    folder: Path
    """Ray's `--temp-dir`."""


def closed_port() -> int:
    """A port of the loopback interface where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def ray_head(*flags: str, num_cpus: int = 2, **environment: str) -> Iterator[Head]:
    """`ray start --head` with token authentication, in a folder and on ports of its own."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # a socket's path must be short
    token = secrets.token_hex(32)
    named = {
        "port": closed_port(),
        "dashboard-port": closed_port(),
        "dashboard-agent-listen-port": closed_port(),
        "ray-client-server-port": closed_port(),
        "num-cpus": num_cpus,
        "num-gpus": 0,
        "object-store-memory": 200 << 20,
        "temp-dir": folder,
    }
    command = [RAY, "start", "--head", "--block", "--disable-usage-stats", *flags]
    log = folder / "start.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in named.items())],
            env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} | environment,
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
        dashboard = f"http://127.0.0.1:{named['dashboard-port']}"
        yield Head(f"{host[1]}:{named['port']}", dashboard, token, folder)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)
