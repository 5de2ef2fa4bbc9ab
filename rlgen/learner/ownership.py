"""One run at a time under one root of checkpoints.

Owns the claim on a root: the file OWNER.json with a token that each start of a run writes, and a
file beside it that the owner rewrites every few seconds as a sign of life. A dead owner blocks no
one: on its own machine the kernel tells that it is dead, elsewhere its signs of life stop. A run
that another one took for dead finds the foreign token before it commits, and stops. Must not know
what is under the root.
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from rlgen.errors import CheckpointError, StorageError
from rlgen.storage import join, read_bytes, remove, without_credentials, write_bytes

OWNER = "OWNER.json"
BEAT_S = 5.0
_MISSED_BEATS = 2.5
_held: set[str] = set()
"""Tokens that this process holds; one that it could not give back is not among them."""


@dataclass(frozen=True)
class Owner:
    """Who writes under a root."""

    token: str
    started: str
    """UTC, for people."""
    host: str
    pid: int
    process: str
    """What the kernel tells this process apart by; equal first lines mean the same kernel."""
    beat_s: float

    @property
    def shown(self) -> str:
        """For messages."""
        return f"process {self.pid} on {self.host}, started {self.started} (token {self.token})"


class RootClaim:
    """The right to write checkpoints under a root, as a context."""

    def __init__(self, root: str, *, beat_s: float = BEAT_S) -> None:
        """Take no claim yet.

        Args:
            root: folder or URL of the checkpoints.
            beat_s: seconds between two signs of life.
        """
        self._root = root
        self._owner = Owner(
            token=uuid.uuid4().hex[:12],
            started=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            host=socket.gethostname(),
            pid=os.getpid(),
            process=process_mark(os.getpid()),
            beat_s=beat_s,
        )
        self.token = self._owner.token
        self._released = threading.Event()

    def __enter__(self) -> Self:
        """Claim the root.

        Raises:
            CheckpointError: a live run holds it.
            StorageError: it can't be read or written.
        """
        shown = without_credentials(self._root)
        other = _read_owner(self._root)
        if other is not None and _is_alive(self._root, other):
            raise CheckpointError(
                f"{shown} belongs to a run that is alive: {other.shown}. Two runs can't write to "
                "one root; stop that one, or give this run another checkpoint.uri or --output."
            )
        if other is not None:
            with suppress(StorageError):
                remove(_beat_file(self._root, other))
        self._beat()
        _held.add(self.token)
        write_bytes(join(self._root, OWNER), json.dumps(asdict(self._owner), indent=1).encode())
        self.check()
        threading.Thread(target=self._keep_beating, name="checkpoint-claim", daemon=True).start()
        return self

    def check(self) -> None:
        """Refuse to go on if another run has taken the root.

        Raises:
            CheckpointError: names the other run.
            StorageError: it can't be told.
        """
        owner = _read_owner(self._root)
        if owner is None or owner.token != self._owner.token:
            taken = "was removed" if owner is None else f"names another run now: {owner.shown}"
            raise CheckpointError(
                f"{join(without_credentials(self._root), OWNER)} {taken}. This run (token "
                f"{self._owner.token}) stops, because two runs can't write to one root; start it "
                "again with another checkpoint.uri, or after the other one has ended."
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the root back, if it is still ours; what can't be deleted blocks no one."""
        self._released.set()
        _held.discard(self.token)
        with suppress(StorageError, CheckpointError):
            remove(_beat_file(self._root, self._owner))
            self.check()
            remove(join(self._root, OWNER))

    def _keep_beating(self) -> None:
        while not self._released.wait(self._owner.beat_s):
            with suppress(StorageError):  # the server is away; no one else can claim then either
                self._beat()

    def _beat(self) -> None:
        write_bytes(_beat_file(self._root, self._owner), str(time.time_ns()).encode())


def _is_alive(root: str, owner: Owner) -> bool:
    kernel = owner.process.partition("\n")[0]
    if owner.process and owner.process == process_mark(os.getpid()):
        return owner.token in _held
    if kernel and kernel == process_mark(os.getpid()).partition("\n")[0]:
        return process_mark(owner.pid) == owner.process
    first = _read_beat(root, owner)
    if first is None:
        return False
    # On another machine, or behind another clock: whoever lives will be heard of.
    time.sleep(_MISSED_BEATS * owner.beat_s)
    return _read_beat(root, owner) not in (None, first)


def process_mark(pid: int) -> str:
    """What a process is told apart by: kernel and process-id namespace on the first line, then its
    id and start time. Empty if it is dead, or without Linux's /proc.
    """
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    state, start_ticks = fields[0], fields[19]
    return "" if state in "ZX" else f"{boot_id} {namespace}\n{pid} {start_ticks}"


def _beat_file(root: str, owner: Owner) -> str:
    return join(root, f"OWNER.{owner.token}.beat")


def _read_beat(root: str, owner: Owner) -> bytes | None:
    return _read_if_there(_beat_file(root, owner))


def _read_owner(root: str) -> Owner | None:
    payload = _read_if_there(join(root, OWNER))
    if payload is None:
        return None
    try:
        return Owner(**json.loads(payload))
    except (ValueError, TypeError):
        return None  # no owner writes such a file


def _read_if_there(location: str) -> bytes | None:
    try:
        return read_bytes(location)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
