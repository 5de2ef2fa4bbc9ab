"""The feature actor, and the crew of them that measures all shards of a source.

An actor consumes shards from the driver, writes each one's result to storage, and answers with a
number; it holds no state, so one that dies is replaced and its shard read again from where the
written result ends. The driver waits for any of them, and for nothing else.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from rlgen.actors.placement import check_capacity
from rlgen.actors.shell import actor_device, explained
from rlgen.config.roles import Role
from rlgen.errors import RlgenError
from rlgen.evaluation.image_moments import MeasureSettings, ShardReader
from rlgen.evaluation.images import Shard
from rlgen.features.extractor import load_extractor
from rlgen.storage import without_credentials

_MAX_REPLACED = 10
"""Dead workers in a row, without a shard done in between, after which the crew gives up."""
_ROOM_TIMEOUT_S = 10.0
"""Longest wait for free resources."""


@dataclass(frozen=True)
class CrewSize:
    """How many workers, and what each of them gets."""

    num_workers: int
    num_cpus: float
    num_gpus: float


class FeatureWorker:
    """Shell of evaluation.image_moments.ShardReader."""

    def __init__(self, extractor: str, settings: MeasureSettings, size: CrewSize) -> None:
        torch.set_num_threads(settings.threads)
        device = actor_device(size.num_gpus)
        self._reader = ShardReader(load_extractor(extractor, device), settings, device=device)

    def measure(self, shard: Shard) -> int:
        """See ShardReader.measure; safe to repeat."""
        try:
            return self._reader.measure(shard)
        except Exception as error:
            raise explained(error, RlgenError, f"the worker of shard {shard.index}") from None


def measure_on_ray(
    shards: Sequence[Shard],
    *,
    extractor: str,
    settings: MeasureSettings,
    size: CrewSize,
    on_shard: Callable[[int, int], None],
) -> None:
    """Measure shards on actors; Ray is connected already.

    Args:
        shards: those that are not done.
        extractor: path or URL of the network, readable on every node.
        settings: where results go must be readable on every node, too.
        size: of the crew; no more workers are made than there are shards.
        on_shard: called with index and number of images of each shard that is done.
    Raises:
        PlacementError: no node has room for a worker.
        RlgenError: a worker failed on purpose, or too many died; what was done is kept.
    """
    num_workers = min(size.num_workers, len(shards))
    _check_room(num_workers, size, threads=settings.threads)
    hire = ray.remote(FeatureWorker).options(num_cpus=size.num_cpus, num_gpus=size.num_gpus).remote
    pending = deque(shards)
    busy: dict[ray.ObjectRef, tuple[Any, Shard]] = {}
    num_died = 0

    def give_work(actor: Any) -> None:
        if pending:
            shard = pending.popleft()
            busy[actor.measure.remote(shard)] = (actor, shard)
        else:
            ray.kill(actor)

    try:
        for _ in range(num_workers):
            give_work(hire(extractor, settings, size))
        while busy:
            ended, _ = ray.wait(list(busy), num_returns=1)
            actor, shard = busy.pop(ended[0])
            try:
                on_shard(shard.index, ray.get(ended[0]))
                num_died = 0
            except RayTaskError as error:
                if isinstance(error.cause, RlgenError):
                    raise error.cause from None
                raise
            except RayActorError as error:
                if error.actor_init_failed:
                    cause = str(error).strip().splitlines()[-1]
                    raise RlgenError(
                        f"a feature worker can't load {without_credentials(extractor)} ({cause}); "
                        "every node must be able to read it."
                    ) from None
                num_died += 1
                if num_died > _MAX_REPLACED:
                    raise RlgenError(
                        f"{num_died} feature workers died one after another, the last one with "
                        f"{str(error).splitlines()[0]} Look for out-of-memory kills in the Ray "
                        "dashboard or lower --batch; the same command goes on where this one ended."
                    ) from None
                pending.appendleft(shard)
                actor = hire(extractor, settings, size)
            give_work(actor)
    finally:
        for actor, _ in busy.values():
            ray.kill(actor)


def _check_room(num_workers: int, size: CrewSize, *, threads: int) -> None:
    role = Role("feature worker", num_workers, threads, size.num_cpus, size.num_gpus)
    advice = "lower --num-workers, --num-cpus or --num-gpus"
    check_capacity([role], timeout_s=_ROOM_TIMEOUT_S, advice=advice)
