"""The servers of compose.yaml as processes of this machine, by the commands that the file gives.

A service's name and its port become 127.0.0.1 and a free port, and folders of the container become
folders of the test; nothing else in commands, arguments and environments is changed.
"""

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.heads import closed_port
from tests.infra.compose import FILES, services, substituted
from tests.infra.rules import INFRA, shortened

PG_BIN = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)), None)
"""Debian keeps it off the PATH."""
SCRAPE_FACTOR = 15.0
"""Scrapes and evaluations come every second instead of every 15."""
RULES_FACTOR = 360.0
"""An hour of the rules takes 10 seconds."""
_START_S = 90.0


def await_that(find: Callable[[], Any], what: str, *, deadline_s: float = _START_S) -> Any:
    """Ask ten times a second until the answer is true; the answer."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if found := find():
            return found
        time.sleep(0.1)
    raise AssertionError(f"no {what} within {deadline_s:g} s")


@contextmanager
def process(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process group of its own, killed at the end."""
    with log.open("wb") as stream:
        server = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
        try:
            yield server
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGCONT)
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def run_of(
    service: str, settings: Mapping[str, str], places: Mapping[str, str]
) -> tuple[list[str], dict[str, str], list[str]]:
    """A service's command, its environment, and its health check.

    Args:
        service: its name in the compose files.
        settings: what a user writes into .env.
        places: what stands in for names, ports and folders of the container.
    """
    found = substituted(services(*FILES)[service], settings)

    def here(text: str) -> str:
        for container, native in places.items():
            text = text.replace(container, native)
        return text

    environment = {key: here(value) for key, value in found.get("environment", {}).items()}
    for name in ("PATH", "HOME"):
        environment[name] = os.environ.get(name, "/")
    command = [here(word) for word in found.get("command", [])]
    check = [here(word) for word in found.get("healthcheck", {}).get("test", ["CMD"])[1:]]
    return command, environment, check


@contextmanager
def postgres(settings: Mapping[str, str]) -> Iterator[int]:
    """A PostgreSQL with the user, the database and the password of compose.yaml; its port."""
    assert PG_BIN is not None
    bin_folder, port = PG_BIN.parent, closed_port()
    _, environment, check = run_of("postgres", settings, {})
    user, database = environment["POSTGRES_USER"], environment["POSTGRES_DB"]
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    password = folder / "password"
    password.write_text(environment["POSTGRES_PASSWORD"])
    options: dict[str, Any] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        account = pwd.getpwnam("postgres")
        options = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        for path in (folder, password):
            os.chown(path, account.pw_uid, account.pw_gid)
    data = str(folder / "data")
    try:
        subprocess.run(
            [str(PG_BIN), "-D", data, "-U", user, f"--pwfile={password}", "-A", "scram-sha-256"],
            check=True,
            cwd=folder,
            capture_output=True,
            **options,
        )
        command = [str(bin_folder / "postgres"), "-D", data, "-h", "127.0.0.1", "-p", str(port)]
        with process(
            [*command, "-k", "", "-c", "fsync=off"], folder / "log", cwd=folder, **options
        ):
            check = [str(bin_folder / check[0]), *check[1:], f"--port={port}"]
            await_that(
                lambda: subprocess.run(check, capture_output=True).returncode == 0, "PostgreSQL"
            )
            create = [str(bin_folder / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", user]
            subprocess.run(
                [*create, database],
                env={"PGPASSWORD": environment["POSTGRES_PASSWORD"]},
                check=True,
            )
            yield port
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def mlflow(
    settings: Mapping[str, str], postgres_port: int, port: int, folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """The tracking server's process, once it is healthy."""
    places = {
        "@postgres:5432": f"@127.0.0.1:{postgres_port}",
        "--port=5000": f"--port={port}",
        "127.0.0.1:5000/health": f"127.0.0.1:{port}/health",
        "--host=0.0.0.0": "--host=127.0.0.1",
    }
    command, environment, check = run_of("mlflow", settings, places)
    assert command[0] == "mlflow" and check[0] == "python"
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["HOME"] = str(folder)
    log = folder / "mlflow.log"
    with process(command, log, env=environment, cwd=folder) as server:

        def is_healthy() -> bool:
            assert server.poll() is None, log.read_text()[-3000:]
            return subprocess.run([sys.executable, *check[1:]], capture_output=True).returncode == 0

        await_that(is_healthy, "MLflow")
        yield server


def make_bucket(settings: Mapping[str, str]) -> None:
    """What the service `bucket` does, twice: the second time there is nothing to do."""
    command, environment, _ = run_of("bucket", settings, {})
    for _ in range(2):
        subprocess.run([sys.executable, *command[1:]], env=environment, check=True)


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that reads our configuration."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression gives now."""
        path = f"/api/v1/query?{urlencode({'query': expression})}"
        return self._get(path)["result"]

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        found = self._get("/api/v1/alerts")["alerts"]
        return {a["labels"]["alertname"] for a in found if a["state"] == "firing"}

    def targets(self) -> dict[str, str]:
        """Health of each target that is scraped, by job and address."""
        found = self._get("/api/v1/targets")["activeTargets"]
        return {f"{t['labels']['job']} {t['labels']['instance']}": t["health"] for t in found}

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            body = json.load(answer)
        assert body["status"] == "success", body
        return body["data"]


@contextmanager
def prometheus(ray_folder: Path, folder: Path) -> Iterator[Prometheus]:
    """Prometheus with our files, durations shortened, for the Ray head with this `--temp-dir`."""
    port = closed_port()
    config = folder / "etc"
    shutil.copytree(INFRA / "prometheus", config)
    text = (config / "prometheus.yml").read_text().replace("/tmp/ray/", f"{ray_folder}/")
    text = text.replace("localhost:9090", f"127.0.0.1:{port}")
    (config / "prometheus.yml").write_text(shortened(text, SCRAPE_FACTOR))
    rules = config / "rules.yaml"
    rules.write_text(shortened(rules.read_text(), RULES_FACTOR))
    places = {"/etc/prometheus": str(config), "=/prometheus": f"={folder / 'data'}"}
    command, _, _ = run_of("prometheus", {}, places)
    listen = f"--web.listen-address=127.0.0.1:{port}"
    log = folder / "prometheus.log"
    with process(["prometheus", *command, listen], log) as server:
        found = Prometheus(f"http://127.0.0.1:{port}")

        def is_up() -> bool:
            assert server.poll() is None, log.read_text()[-3000:]
            with suppress(OSError):
                return urllib.request.urlopen(f"{found.url}/-/ready", timeout=2).status == 200
            return False

        await_that(is_up, "Prometheus")
        yield found
