"""The weight store actor: published policy versions, one copy a node, in the object store.

Consumes flat buffers from learner rank 0, hands out references to rollout workers. It owns the
objects, so that they survive the death of whoever published them. For the collective transport it
also knows who is there: receivers wait here for the next broadcast, which the publisher announces.
Everyone waits here with a deadline; it waits for nobody.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from rlgen.errors import WeightTransferError
from rlgen.types import WeightManifest

POLL_S = 5.0
"""Longest wait of one call; the caller asks again."""
_LIVE_S = 2 * POLL_S
"""A receiver that has not asked for so long takes no part in a broadcast."""


@dataclass(frozen=True)
class Broadcast:
    """An announced broadcast: what comes, and where its members meet."""

    broadcast_id: str
    group_id: str
    """The epoch of the process group: another one when a member came, left or failed."""
    host: str
    port: int
    members: tuple[str, ...]
    """Receivers, in the order of their ranks from 1 on."""
    manifest: WeightManifest


class WeightStore:
    """Keeps the newest versions, and brings the members of a broadcast together."""

    def __init__(self, num_kept: int) -> None:
        self._num_kept = num_kept
        self._digests: dict[int, str] = {}
        self._versions: dict[int, tuple[WeightManifest, list[Any]]] = {}
        self._staged_for: tuple[str, int] | None = None
        self._staged: dict[int, Any] = {}
        self._changed = asyncio.Condition()
        self._seen: dict[str, tuple[str, float]] = {}
        self._broadcast: Broadcast | None = None
        self._reports: dict[str, str] = {}

    async def stage(self, publisher: str, version: int, index: int, chunk: np.ndarray) -> None:
        """Keep a piece of the payload that `publish` will make visible; in any order.

        Args:
            publisher: who sends.
            version: whose pieces these are; any others were left by a publisher that died.
            index: place of the piece.
            chunk: uint8; arrives as the caller's object and is put again as this actor's own.
        """
        if self._staged_for != (publisher, version):
            self._staged_for = (publisher, version)
            self._staged.clear()
        self._staged[index] = ray.put(chunk)

    async def publish(self, publisher: str, manifest: WeightManifest, num_chunks: int) -> None:
        """Make the staged payload visible under its version; the last thing to happen.

        Raises:
            WeightTransferError: the payload is not there, or not whole.
        """
        whole = self._staged_for == (publisher, manifest.version)
        if not whole or sorted(self._staged) != list(range(num_chunks)):
            raise WeightTransferError(
                f"policy version {manifest.version} has {len(self._staged)} of {num_chunks} pieces "
                "in the weight store; only one learner group may publish at a time."
            )
        chunks = [self._staged[index] for index in range(num_chunks)]
        self._staged.clear()
        self._versions[manifest.version] = (manifest, chunks)
        for version in sorted(self._versions)[: -self._num_kept]:
            del self._versions[version]
        self._note(manifest)
        await self._notify()

    async def rewind(self) -> None:
        """Forget every version: those that follow are published again, with other contents."""
        self._versions.clear()
        self._digests.clear()
        self._staged.clear()
        self._broadcast = None

    async def digest(self, version: int) -> str | None:
        """The digest of a version's bytes, once it is known; None means ask again."""
        await self._poll(lambda: version in self._digests or self._is_past(version))
        self._check_kept(version)
        return self._digests.get(version)

    async def fetch(self, version: int) -> tuple[WeightManifest, list[Any]] | None:
        """Manifest and references to the chunks, once they are here; None means ask again.

        Raises:
            WeightTransferError: the version is older than those kept.
        """
        await self._poll(lambda: version in self._versions or self._is_past(version))
        self._check_kept(version)
        return self._versions.get(version)

    async def receivers(self) -> dict[str, str]:
        """Who waits for broadcasts at present, and the address of each one's node."""
        now = time.monotonic()
        self._seen = {name: seen for name, seen in self._seen.items() if now - seen[1] < _LIVE_S}
        return {name: address for name, (address, _) in sorted(self._seen.items())}

    async def next_broadcast(self, name: str, address: str, last_id: str) -> Broadcast | None:
        """A receiver's call: wait for a broadcast after the last one; None means ask again."""

        def announced() -> bool:
            found = self._broadcast
            return found is not None and found.broadcast_id != last_id and name in found.members

        self._seen[name] = (address, time.monotonic())
        await self._poll(announced)  # a caller that died meanwhile must not look alive
        return self._broadcast if announced() else None

    async def open_broadcast(self, broadcast: Broadcast) -> None:
        """The publisher's call: tell the members."""
        self._broadcast, self._reports = broadcast, {}
        self._note(broadcast.manifest)
        await self._notify()

    async def report(self, name: str, broadcast_id: str, failure: str) -> None:
        """A receiver's call: it has the bytes, or a reason why not."""
        if self._broadcast is not None and self._broadcast.broadcast_id == broadcast_id:
            self._reports[name] = failure
            await self._notify()

    async def close_broadcast(self, broadcast_id: str, timeout_s: float) -> dict[str, str]:
        """Wait for the members' reports and end the broadcast.

        Returns:
            a reason for every member that has not got the bytes; one that does not report is
            left out until it asks again.
        """
        broadcast = self._broadcast
        if broadcast is None or broadcast.broadcast_id != broadcast_id:
            return {}  # rewound meanwhile
        await self._poll(lambda: len(self._reports) == len(broadcast.members), timeout_s)
        self._broadcast = None
        for name in set(broadcast.members) - self._reports.keys():
            self._seen.pop(name, None)
            self._reports[name] = "it did not answer"
        return {name: failure for name, failure in sorted(self._reports.items()) if failure}

    def _note(self, manifest: WeightManifest) -> None:
        """A version's bytes are known; one more than is kept may be on its way."""
        self._digests[manifest.version] = manifest.digest
        for version in sorted(self._digests)[: -self._num_kept - 1]:
            del self._digests[version]

    def _is_past(self, version: int) -> bool:
        return version not in self._versions and max(self._versions, default=-1) > version

    def _check_kept(self, version: int) -> None:
        if self._is_past(version):
            raise WeightTransferError(
                f"policy version {version} was asked for, and only {sorted(self._versions)} are "
                "kept; the worker fell behind by more than max_policy_lag."
            )

    async def _poll(self, is_done: Callable[[], bool], timeout_s: float = POLL_S) -> None:
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(is_done), timeout_s)
            except TimeoutError:
                return

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
