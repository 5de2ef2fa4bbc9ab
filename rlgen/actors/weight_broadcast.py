"""Weights by broadcast: the ends of the process group in the learner and in each sampler.

The sender asks the weight store who is there, announces the broadcast and sends; the group is
made anew whenever the members changed or one failed. A listener takes part in a thread of its
own, so that a broadcast neither waits for a unit nor interrupts one, and keeps what arrived until
a unit asks for it. All waits share one deadline; a failed member is left out until it asks again.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from threading import Lock, Thread
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from torch import Tensor

from rlgen.actors.weight_store import POLL_S, Broadcast
from rlgen.config.weights import WeightsConfig
from rlgen.errors import RlgenError, WeightTransferError
from rlgen.nn.collective import (
    LOOPBACK,
    Backend,
    BroadcastGroup,
    Deadline,
    Rendezvous,
    connect,
)
from rlgen.nn.flat import split_chunks
from rlgen.types import WeightManifest

Load = Callable[[WeightManifest, Sequence[Any]], None]
"""Checks a manifest's digest against chunks of uint8 and copies them into a model."""

_ANSWER_S = 30.0
_FAILED_GRACE_S = 2.0
"""How long the members of a failed broadcast may take to say that they are alive."""


class BroadcastSender:
    """The publisher's end of the process group, made anew when its members change."""

    def __init__(self, store: Any, config: WeightsConfig, backend: Backend) -> None:
        self._store = store
        self._config = config
        self._backend: Backend = backend
        self._address = ray.util.get_node_ip_address()
        self._members: tuple[str, ...] = ()
        self._rendezvous: Rendezvous | None = None
        self._group: BroadcastGroup | None = None

    def send(self, manifest: WeightManifest, buffer: Tensor) -> int:
        """Broadcast to all who are there; how many were.

        Raises:
            WeightTransferError: someone has not got it.
        """
        deadline = Deadline(self._config.timeout_s)
        receivers = self._ask(self._store.receivers.remote(), deadline.remaining_s())
        if not receivers:
            return 0
        try:
            rendezvous = self._rendezvous_for(receivers)
            broadcast = Broadcast(
                broadcast_id=uuid.uuid4().hex,
                group_id=rendezvous.group_id,
                host=rendezvous.host,
                port=rendezvous.port,
                members=self._members,
                manifest=manifest,
            )
            self._ask(self._store.open_broadcast.remote(broadcast), deadline.remaining_s())
            self._transmit(broadcast, rendezvous, buffer, deadline)
            failures = self._close(broadcast, deadline.remaining_s())
        except WeightTransferError:
            self._leave()  # the others see it at once
            raise
        if failures:
            self._leave()
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
            raise WeightTransferError(reasons)
        return len(receivers)

    def _rendezvous_for(self, receivers: dict[str, str]) -> Rendezvous:
        """Where these meet: a new place unless all of them, and nobody else, are in the group."""
        if self._rendezvous is None or tuple(receivers) != self._members:
            self._leave()
            is_one_node = set(receivers.values()) == {self._address}
            host = LOOPBACK if is_one_node else self._address
            self._rendezvous = Rendezvous(host, timeout_s=self._config.timeout_s)
            self._members = tuple(receivers)
        return self._rendezvous

    def _transmit(
        self, broadcast: Broadcast, rendezvous: Rendezvous, buffer: Tensor, deadline: Deadline
    ) -> None:
        try:
            if self._group is None:
                self._group = BroadcastGroup(
                    broadcast.group_id,
                    server=rendezvous.server,
                    rank=0,
                    size=1 + len(broadcast.members),
                    host=broadcast.host,
                    backend=self._backend,
                    deadline=deadline,
                )
            on_device = buffer.cuda() if self._backend == "nccl" else buffer
            chunks = split_chunks(on_device, self._config.chunk_mib * 2**20)
            self._group.broadcast(chunks, deadline)
        except WeightTransferError:
            self._leave()  # so that nobody goes on waiting for this end
            self._close(broadcast, _FAILED_GRACE_S)
            raise

    def _close(self, broadcast: Broadcast, wait_s: float) -> dict[str, str]:
        reference = self._store.close_broadcast.remote(broadcast.broadcast_id, wait_s)
        return self._ask(reference, wait_s + _ANSWER_S)

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group, self._members, self._rendezvous = None, (), None

    def _ask(self, reference: Any, timeout_s: float) -> Any:
        return answer_of(reference, timeout_s, "the weight store does not answer")


class BroadcastListener:
    """A receiver's end of the process group, in a thread of its own."""

    def __init__(self, store: Any, config: WeightsConfig, backend: Backend, name: str) -> None:
        self._store = store
        self._config = config
        self._backend: Backend = backend
        self._name = name
        self._address = ray.util.get_node_ip_address()
        self._group: BroadcastGroup | None = None
        self._device = torch.device("cuda" if backend == "nccl" else "cpu")
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self._device)
        self._arrived: WeightManifest | None = None
        self._lock = Lock()
        """Held while the buffer is written or read."""
        Thread(target=self._listen, name="weight-listener", daemon=True).start()

    def take(self, version: int, digest: str, load: Load) -> bool:
        """Load what arrived last, if that is what is asked for."""
        with self._lock:
            found = self._arrived
            if found is None or (found.version, found.digest) != (version, digest):
                return False
            load(found, self._chunks(found))
            return True

    def _listen(self) -> None:
        last_id = ""
        while True:
            try:
                found = self._store.next_broadcast.remote(self._name, self._address, last_id)
                broadcast = ray.get(found, timeout=POLL_S + _ANSWER_S)
                if broadcast is None:
                    continue
                last_id = broadcast.broadcast_id
                failure = self._receive(broadcast)
                ray.get(self._store.report.remote(self._name, last_id, failure), timeout=_ANSWER_S)
            except (GetTimeoutError, RayActorError):
                time.sleep(1.0)  # a sampler without weights is told where it asks for them

    def _receive(self, broadcast: Broadcast) -> str:
        """Take the bytes; what went wrong, or an empty string."""
        deadline = Deadline(self._config.timeout_s)
        with self._lock:
            self._arrived = None
            try:
                if self._group is None or self._group.group_id != broadcast.group_id:
                    self._join(broadcast, deadline)
                assert self._group is not None, "just joined"
                if len(self._buffer) != broadcast.manifest.num_bytes:
                    self._buffer = self._buffer.new_empty(broadcast.manifest.num_bytes)
                self._group.broadcast(self._chunks(broadcast.manifest), deadline)
            except RuntimeError as error:  # also what torch raises when memory runs out
                self._leave()
                self._buffer = self._buffer.new_empty(0)  # late bytes may still land in the old one
                return str(error)
            self._arrived = broadcast.manifest
            return ""

    def _join(self, broadcast: Broadcast, deadline: Deadline) -> None:
        self._leave()
        self._group = BroadcastGroup(
            broadcast.group_id,
            server=connect(broadcast.host, broadcast.port, deadline),
            rank=1 + broadcast.members.index(self._name),
            size=1 + len(broadcast.members),
            host=LOOPBACK if broadcast.host == LOOPBACK else self._address,
            backend=self._backend,
            deadline=deadline,
        )

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None

    def _chunks(self, manifest: WeightManifest) -> list[Tensor]:
        return split_chunks(self._buffer[: manifest.num_bytes], self._config.chunk_mib * 2**20)


def answer_of(references: Any, timeout_s: float, what: str) -> Any:
    """ray.get with a deadline and rlgen's own errors."""
    try:
        return ray.get(references, timeout=timeout_s)
    except GetTimeoutError:
        raise WeightTransferError(
            f"{what} within {timeout_s:g} s; raise weights.timeout_s for large models on slow "
            "networks, or look at the nodes' memory in the Ray dashboard."
        ) from None
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, RlgenError) else error) from None
