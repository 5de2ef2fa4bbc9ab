"""A real MLflow server that can be stopped and started again, and a gate that stands before one."""

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.heads import closed_port

_START_S = 120.0


class MlflowServer:
    """`mlflow server` on sqlite with proxied artifacts, in a folder of its own, as a context."""

    def __init__(self, folder: Path) -> None:
        """Start nothing yet."""
        self._folder, self._port = folder, closed_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it on its port, and wait until it answers."""
        self._folder.mkdir(parents=True, exist_ok=True)
        named = {
            "backend-store-uri": f"sqlite:///{self._folder}/server.db",
            "artifacts-destination": str(self._folder / "artifacts"),
            "host": "127.0.0.1",
            "port": self._port,
            "workers": 1,
        }
        log = self._folder / "server.log"
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server"]
                + [f"--{name}={value}" for name, value in named.items()],
                env=os.environ
                | {
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                },
                cwd=self._folder,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        end = time.monotonic() + _START_S
        while not self._answers():
            is_alive = self._process.poll() is None and time.monotonic() < end
            assert is_alive, log.read_text()[-3000:]
            time.sleep(0.1)

    def stop(self) -> None:
        """End all its processes; its port refuses connections then."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


class Gate(ThreadingHTTPServer):
    """A proxy that delays every call, or answers it with an error instead, as a context."""

    daemon_threads = True

    def __init__(self, server_uri: str) -> None:
        """Let everything through."""
        self.server_address_of_mlflow = server_uri.removeprefix("http://")
        self.delay_s = 0.0
        self.refusal: int | None = None
        """The status that every call gets."""
        self.refused_part = ""
        """Refuse only calls whose path holds this."""
        super().__init__(("127.0.0.1", 0), _Passage)
        self.uri = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()


class _Passage(BaseHTTPRequestHandler):
    server: Gate

    def do_GET(self) -> None:
        gate = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        time.sleep(gate.delay_s)
        if gate.refusal is not None and gate.refused_part in self.path:
            self.send_error(gate.refusal)
            return
        onward = http.client.HTTPConnection(gate.server_address_of_mlflow, timeout=60)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
            onward.request(self.command, self.path, body, headers)
            answer = onward.getresponse()
            payload = answer.read()
        except OSError:
            self.send_error(502)
            return
        finally:
            onward.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass
