"""The two ends of weight transfer: a publisher in learner rank 0, a receiver in each sampler.

One interface, two transports. By the object store: the payload first, the version last, and
receivers map the same copy on their node. By a collective: who is there gets a broadcast, and the
copy for latecomers goes into the object store afterwards, beside the learner's next step. Whatever
goes wrong with a broadcast, the object store serves instead.
"""

import logging
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlgen.actors.weight_broadcast import BroadcastListener, BroadcastSender, Load, answer_of
from rlgen.actors.weight_store import POLL_S
from rlgen.config.run import RunConfig
from rlgen.config.weights import WeightsConfig
from rlgen.errors import WeightTransferError
from rlgen.nn.collective import Backend
from rlgen.nn.flat import pack_weights, split_chunks
from rlgen.types import WeightManifest

_log = logging.getLogger(__name__)

_AS_MADE = (0, "")
"""What a worker holds that has loaded nothing."""
_NOTHING = (-1, "")


def collective_backend(config: RunConfig) -> Backend:
    """NCCL wants a GPU of its own for every member."""
    has_whole_gpus = min(config.learner.num_gpus, config.rollout.num_gpus) >= 1
    return "nccl" if has_whole_gpus else "gloo"


class Publisher:
    """Publishes policy versions; lives where the learner's rank 0 is."""

    def __init__(self, store: Any, config: WeightsConfig, *, backend: Backend = "gloo") -> None:
        """Publish nothing yet.

        Args:
            store: the weight store actor.
            config: transport and limits.
            backend: of the collective transport.
        """
        self._store = store
        self._config = config
        self._name = uuid.uuid4().hex
        self._buffer: np.ndarray | None = None
        self._sender: BroadcastSender | None = None
        if config.transport == "collective":
            self._sender = BroadcastSender(store, config, backend)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weight-copy")
        self._copy: Future[None] | None = None
        self.fallbacks = 0

    def publish(self, state: Mapping[str, Tensor], *, version: int) -> dict[str, float]:
        """Hand a version to the receivers; returns when it can't be lost by them any more.

        Returns:
            metrics: weights/pause_s (the caller's whole wait), weights/transfer_s and
            weights/gb_per_s (without packing and digest; gigabytes handed over once),
            weights/fallbacks (broadcasts that failed so far), weights/broadcast_receivers (who
            got this one).
        Raises:
            WeightTransferError: the object store does not take it within weights.timeout_s.
        """
        start = time.perf_counter()
        if self._copy is not None:
            self._copy.result()  # it reads the buffer that is about to be written
        manifest, self._buffer = pack_weights(state, version=version, out=self._buffer)
        packed = time.perf_counter()
        self._copy = None
        num_receivers = self._broadcast(manifest, self._buffer)
        if num_receivers:
            self._copy = self._thread.submit(self._put, manifest, self._buffer)
        else:
            self._put(manifest, self._buffer)
        end = time.perf_counter()
        return {
            "weights/pause_s": end - start,
            "weights/transfer_s": end - packed,
            "weights/gb_per_s": manifest.num_bytes / (end - packed) / 1e9,
            "weights/fallbacks": float(self.fallbacks),
            "weights/broadcast_receivers": float(num_receivers),
        }

    def _broadcast(self, manifest: WeightManifest, buffer: np.ndarray) -> int:
        """How many have it now: everyone who was there, or 0."""
        if self._sender is None:
            return 0
        try:
            return self._sender.send(manifest, torch.from_numpy(buffer))
        except WeightTransferError as error:
            self.fallbacks += 1
            _log.warning("policy version %d goes by the object store: %s", manifest.version, error)
            return 0

    def _put(self, manifest: WeightManifest, buffer: np.ndarray) -> None:
        """Payload first, version last; no more than two pieces are there twice."""
        chunks = split_chunks(torch.from_numpy(buffer), self._config.chunk_mib * 2**20)
        pending: list[Any] = []
        for index, chunk in enumerate(chunks):
            if len(pending) == 2:
                self._await_stored(pending.pop(0))
            stage = self._store.stage.remote
            pending.append(stage(self._name, manifest.version, index, chunk.numpy()))
        self._await_stored(pending)
        self._await_stored(self._store.publish.remote(self._name, manifest, len(chunks)))

    def _await_stored(self, references: Any) -> None:
        answer_of(references, self._config.timeout_s, "the object store did not take the weights")


class Receiver:
    """Brings a sampler to the version that a unit asks for."""

    def __init__(
        self,
        store: Any,
        config: WeightsConfig,
        *,
        name: str,
        wait_s: float,
        backend: Backend = "gloo",
    ) -> None:
        """Listen for broadcasts from now on, if the transport has them.

        Args:
            store: the weight store actor.
            config: transport and limits, the publisher's.
            name: of the worker, for messages.
            wait_s: how long a version may take to be published at all.
            backend: of the collective transport, the publisher's.
        """
        self._store = store
        self._config = config
        self._wait_s = wait_s
        self._held = _AS_MADE
        self._listener: BroadcastListener | None = None
        if config.transport == "collective":
            self._listener = BroadcastListener(
                store, config, backend, f"{name}-{uuid.uuid4().hex[:8]}"
            )

    def update(self, version: int, load: Load) -> str:
        """Load a version, unless it is held already; a new worker holds version 0.

        Args:
            version: to hold afterwards.
            load: takes manifest and chunks, checks the digest and copies; such as
                Sampler.update_weights.
        Returns:
            where it came from: "held", "collective" or "object_store".
        Raises:
            WeightTransferError: it is not published in time, is no longer kept, or arrived with
                another digest; then no version is held.
        """
        if version == 0 and self._held == _AS_MADE:
            return "held"
        # The digest, as a learner that starts again publishes a version again with other bytes.
        digest = self._await(self._store.digest, version)
        if (version, digest) == self._held:
            return "held"
        self._held = _NOTHING  # of a load that fails, a part may be there
        if self._listener is not None and self._listener.take(version, digest, load):
            source = "collective"
        else:
            manifest, references = self._await(self._store.fetch, version)
            limit = self._config.timeout_s
            load(manifest, answer_of(references, limit, f"policy version {version} did not come"))
            digest, source = manifest.digest, "object_store"
        self._held = (version, digest)
        return source

    def _await(self, method: Any, version: int) -> Any:
        """Ask until there is an answer."""
        end = time.monotonic() + self._wait_s
        while time.monotonic() < end:
            answer = answer_of(
                method.remote(version), POLL_S + 30, "the weight store does not answer"
            )
            if answer is not None:
                return answer
        raise WeightTransferError(
            f"policy version {version} was not published within cluster.step_timeout_s = "
            f"{self._wait_s:g}; look at the learner's log, or raise it if steps take that long."
        )
