"""The weight store actor: published policy versions, one copy a node, in the object store.

Consumes flat buffers from learner rank 0, hands out references to rollout workers. It owns the
objects, so that they survive the death of whoever published them.
"""

import asyncio

import numpy as np
import ray

from rlgen.errors import WeightTransferError
from rlgen.types import WeightManifest


class WeightStore:
    """Keeps the newest versions."""

    def __init__(self, num_kept: int) -> None:
        self._num_kept = num_kept
        self._versions: dict[int, tuple[WeightManifest, ray.ObjectRef]] = {}
        self._published = asyncio.Condition()

    async def publish(self, manifest: WeightManifest, buffer: np.ndarray) -> None:
        """Store a version: payload first, then the entry that makes it visible."""
        reference = ray.put(buffer)
        self._versions[manifest.version] = (manifest, reference)
        for version in sorted(self._versions)[: -self._num_kept]:
            del self._versions[version]
        async with self._published:
            self._published.notify_all()

    async def rewind(self) -> None:
        """Forget every version: those that follow are published again, with other contents."""
        self._versions.clear()

    async def fetch(self, version: int) -> tuple[WeightManifest, list[ray.ObjectRef]]:
        """Wait for a version; the buffer comes as a reference in a list, so that it is not read.

        Raises:
            WeightTransferError: the version is older than those kept.
        """
        async with self._published:
            await self._published.wait_for(
                lambda: version in self._versions or max(self._versions, default=-1) > version
            )
        if version not in self._versions:
            raise WeightTransferError(
                f"policy version {version} was asked for, and only {sorted(self._versions)} are "
                "kept; the worker fell behind by more than max_policy_lag."
            )
        manifest, reference = self._versions[version]
        return manifest, [reference]
