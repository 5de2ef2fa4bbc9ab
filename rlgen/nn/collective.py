"""A process group of its own for weights: one sender, any number of receivers, a deadline.

Owns rendezvous, broadcast and end of the group. It leaves torch.distributed's default group
alone: learner ranks have one already, and samplers never do. Must not know who the members are
or what the bytes mean.
"""

import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Thread
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rlgen.errors import WeightTransferError

Backend = Literal["gloo", "nccl"]
LOOPBACK = "127.0.0.1"
_POLL_S = 0.002
_LOOK_S = 0.1
_CLOSED = "closed"
"""The key that whoever leaves sets at the rendezvous."""


class Deadline:
    """A moment that several waits share."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def remaining_s(self) -> float:
        """Seconds left.

        Raises:
            WeightTransferError: none are.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise WeightTransferError(
                f"the broadcast missed its deadline, weights.timeout_s = {self._timeout_s:g}."
            )
        return left


class Rendezvous:
    """Where the members of a group find each other: a server in the sender's process."""

    def __init__(self, host: str, *, timeout_s: float) -> None:
        """Listen on this address alone; torch by itself would on every one."""
        self.group_id = f"weights-{uuid.uuid4().hex}"
        listener = socket.create_server((host, 0))
        self.host = host
        self.port: int = listener.getsockname()[1]
        self.server = dist.TCPStore(
            host,
            self.port,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


class BroadcastGroup:
    """A member's end of the group; rank 0 sends."""

    def __init__(
        self,
        group_id: str,
        *,
        server: dist.Store,
        rank: int,
        size: int,
        host: str,
        backend: Backend,
        deadline: Deadline,
    ) -> None:
        """Meet the other members; blocks until all are there.

        Args:
            group_id: the same for all members, never used again.
            server: the rendezvous, or a connection to it.
            rank: 0 sends.
            size: members, the sender included.
            host: this process's address, as the others see it.
            backend: "nccl" needs a GPU for each member.
            deadline: for the others to come.
        Raises:
            WeightTransferError: they don't.
        """
        self.group_id = group_id
        timeout = timedelta(seconds=deadline.remaining_s())
        self._server = dist.PrefixStore(group_id, server)
        with _explained("the process group did not form"):
            self._group: Any = (
                _gloo(self._server, rank, size, host, timeout)
                if backend == "gloo"
                else _nccl(self._server, rank, size, timeout)
            )

    def broadcast(self, chunks: Sequence[Tensor], deadline: Deadline) -> None:
        """Send rank 0's bytes to all; on the others they land in place.

        Args:
            chunks: uint8, of the same lengths on all members, on the backend's device.
            deadline: for all of them.
        Raises:
            WeightTransferError: a member died, or the deadline passed; the group is closed.
        """
        try:
            for chunk in chunks:
                options = dist.BroadcastOptions()
                options.rootRank = options.rootTensor = 0
                options.timeout = timedelta(seconds=deadline.remaining_s())
                with _explained("the broadcast broke off"):
                    self._await(self._group.broadcast([chunk], options), deadline)
        except WeightTransferError:
            self.close()
            raise
        if chunks and chunks[0].is_cuda:
            torch.cuda.synchronize(chunks[0].device)

    def close(self) -> None:
        """Leave, and let the others know: connections alone do not tell all of them."""
        if self._group is None:
            return
        with suppress(RuntimeError):  # the server went with the sender
            self._server.set(_CLOSED, "")
        self._group.abort()
        # Its end waits for operations under way, up to their deadline.
        last_reference, self._group = [self._group], None
        Thread(target=last_reference.clear, name="weight-group-end", daemon=True).start()

    def _await(self, work: Any, deadline: Deadline) -> None:
        next_look = time.monotonic() + _LOOK_S
        while not work.is_completed():
            deadline.remaining_s()
            if time.monotonic() > next_look:
                next_look = time.monotonic() + _LOOK_S
                if self._server.check([_CLOSED]):  # fails if the sender is gone
                    raise WeightTransferError("the broadcast broke off: another member left.")
            time.sleep(_POLL_S)
        work.wait()  # raises what went wrong


def connect(host: str, port: int, deadline: Deadline) -> dist.Store:
    """Connect to a sender's rendezvous.

    Raises:
        WeightTransferError: nothing answers there.
    """
    timeout = timedelta(seconds=deadline.remaining_s())
    with _explained(f"the sender does not answer at {host}:{port}"):
        return dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


def _gloo(store: dist.Store, rank: int, size: int, host: str, timeout: timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    # Without it a watchdog ends the whole process when a broadcast is late; the caller has a
    # better answer. Read when the group is made, so other groups keep their watchdog.
    with _environment("TORCH_NCCL_BLOCKING_WAIT", "1"):
        return dist.ProcessGroupNCCL(store, rank, size, options)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """torch.distributed raises plain RuntimeErrors, which gloo fills with source paths."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, WeightTransferError):
            raise
        reason = str(error).splitlines()[0].partition(". This is typically")[0]
        reason = reason.removeprefix("[").partition("] ")[2] or reason
        raise WeightTransferError(f"{what}: {reason}") from error
