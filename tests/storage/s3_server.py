"""A real S3 server in a process of its own, behind a line that can be cut.

moto keeps what it was given in memory, so an outage is one of the line between it and us.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

KEY, SECRET = "AKIAPLANTEDKEYID", "planted/secret+access0key"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def moto_server(**environment: str) -> Iterator[int]:
    """Run moto's server; yields its port."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < deadline, "moto did not start"
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        yield port
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


class Line:
    """A TCP line to the server, which tests cut and mend."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._open: set[socket.socket] = set()
        self.port = free_port()
        self.bytes_sent = 0
        """Bytes that clients sent since the line was last mended."""
        self.cut_after: int | None = None
        """Cut the line once clients have sent so many bytes."""
        self._listener: socket.socket | None = None
        self.mend()

    def cut(self) -> None:
        """Refuse new connections and break those that are open."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Take connections again."""
        if self._listener is not None:
            return
        self.bytes_sent, self.cut_after = 0, None
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client, server), daemon=True).start()

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        self._open |= {client, server}
        other = {client: server, server: client}
        with suppress(OSError), client, server:
            while True:
                for end in select.select([client, server], [], [])[0]:
                    data = end.recv(65536)
                    if not data:
                        return
                    if end is client:
                        self.bytes_sent += len(data)
                        if self.cut_after is not None and self.bytes_sent > self.cut_after:
                            self.cut()
                            return
                    other[end].sendall(data)
        self._open -= {client, server}
