"""Weight transfer from a learner to rollout workers: pause, barrier, transfer and GB/s.

With real Ray actors on this machine, beside the memory bandwidth measured in the same run.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch
from torch import nn

from rlgen.actors.weight_store import WeightStore
from rlgen.actors.weight_transport import Publisher, Receiver
from rlgen.config.weights import WeightsConfig
from rlgen.errors import ConfigError, WeightTransferError
from rlgen.nn.flat import pack_weights, unpack_weights
from rlgen.types import WeightManifest

_TENSOR_BYTES = 16_000_000
_WAIT_S = 300.0
_WARM_UP = 8
"""Versions before the timed ones: they connect, and reach all of the object store's memory, which
takes ten times as long at the first touch."""
_STORES_HELD = 3
"""Copies in the object store at a time: two versions, and the one that is replaced."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--gigabytes", type=float, default=0.7, help="size of the weights")
    parser.add_argument("--receivers", type=int, default=4, help="actors that load them")
    parser.add_argument(
        "--transport", choices=["object_store", "collective"], default="object_store"
    )
    parser.add_argument("--chunk-mib", type=int, default=256, help="see weights.chunk_mib")
    parser.add_argument("--repeats", type=int, default=5, help="versions that are timed")
    parser.add_argument(
        "--min-ratio",
        type=float,
        default=0.0,
        help="exit with 1 if GB/s is less than this share of the memory bandwidth",
    )


def measure(request: argparse.Namespace) -> dict[str, Any]:
    """Publish a few versions of random weights and load each in all receivers.

    Returns:
        medians over the versions. pause_s: the learner's whole wait. barrier_s: a call to all
        receivers that does nothing. transfer_s: from packed weights to the last receiver's own
        model, checked; handover_s and load_s are the publisher's and the receivers' part of it.
        gb_per_s: bytes delivered, over all receivers, by transfer_s. memcpy_gb_per_s: bytes
        copied once by one thread, after each version. ratio: of the two, for each version by
        itself, so that a machine that is slow for a while is slow in both. missed: there if the
        ratio is below --min-ratio.
    Raises:
        ConfigError: sizes that can't be.
        WeightTransferError: a receiver ended with other weights than the learner.
    """
    if request.gigabytes <= 0 or min(request.receivers, request.repeats) < 1:
        raise ConfigError(
            f"--gigabytes {request.gigabytes:g}, --receivers {request.receivers} and --repeats "
            f"{request.repeats} must be above 0."
        )
    was_connected = ray.is_initialized()
    if not was_connected:
        address = os.environ.get("RAY_ADDRESS", "local")
        ray.init(address=address, log_to_driver=False, **_local_options(request))
    try:
        result = _measure(request)
    finally:
        if not was_connected:
            ray.shutdown()
    if result["ratio"] < request.min_ratio:
        result["missed"] = (
            f"{result['gb_per_s']:.2f} GB/s is {result['ratio']:.2f} of the memory bandwidth of "
            f"{result['memcpy_gb_per_s']:.2f} GB/s; --min-ratio asks for {request.min_ratio:.2f}."
        )
    return result


def _local_options(request: argparse.Namespace) -> dict[str, Any]:
    if os.environ.get("RAY_ADDRESS"):
        return {}
    store_bytes = _STORES_HELD * request.gigabytes * 1e9 + 2 * request.chunk_mib * 2**20
    return {"object_store_memory": int(store_bytes) + 200_000_000, "include_dashboard": False}


def _measure(request: argparse.Namespace) -> dict[str, Any]:
    config = WeightsConfig(transport=request.transport, chunk_mib=request.chunk_mib)
    num_bytes = int(request.gigabytes * 1e9)
    store = _actor(WeightStore).remote(2)
    learner = _actor(_Learner).remote(store, config, num_bytes)
    workers = [
        _actor(_Worker).remote(store, config, num_bytes, f"worker-{index}")
        for index in range(request.receivers)
    ]
    try:
        for worker in workers:
            ray.get(worker.wait.remote(), timeout=_WAIT_S)
        if request.transport == "collective":
            _await_listeners(store, request.receivers)
        last = request.repeats + _WARM_UP
        runs = [_round(learner, workers, version) for version in range(1, last + 1)][_WARM_UP:]
        for run in runs:
            run["gb_per_s"] = num_bytes * request.receivers / run["transfer_s"] / 1e9
            run["ratio"] = run["gb_per_s"] / run["memcpy_gb_per_s"]
        digests = ray.get([actor.digest.remote() for actor in (learner, *workers)], timeout=_WAIT_S)
    finally:
        for actor in (learner, *workers, store):
            ray.kill(actor)
    if len(set(digests)) != 1:
        raise WeightTransferError(f"the learner's digest and the receivers' differ: {digests}.")
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {
        "transport": request.transport,
        "gigabytes": num_bytes / 1e9,
        "receivers": request.receivers,
        "chunk_mib": request.chunk_mib,
        **medians,
        "digest": digests[0],
        "runs": runs,
    }


def _round(learner: Any, workers: list[Any], version: int) -> dict[str, float]:
    """Publish and load one version."""
    published = ray.get(learner.publish.remote(version), timeout=_WAIT_S)
    start = time.perf_counter()
    ray.get([worker.wait.remote() for worker in workers], timeout=_WAIT_S)
    barrier_s = time.perf_counter() - start
    start = time.perf_counter()
    sources = ray.get([worker.update.remote(version) for worker in workers], timeout=_WAIT_S)
    load_s = time.perf_counter() - start
    return {
        "pause_s": published["weights/pause_s"],
        "barrier_s": barrier_s,
        "transfer_s": published["weights/transfer_s"] + load_s,
        "handover_s": published["weights/transfer_s"],
        "load_s": load_s,
        "fallbacks": published["weights/fallbacks"],
        "by_collective": float(sources.count("collective")),
        "memcpy_gb_per_s": ray.get(learner.memcpy_gb_per_s.remote(), timeout=_WAIT_S),
    }


def _await_listeners(store: Any, count: int) -> None:
    end = time.monotonic() + _WAIT_S
    while len(ray.get(store.receivers.remote(), timeout=_WAIT_S)) < count:
        if time.monotonic() > end:
            raise WeightTransferError(f"{count} receivers did not come up within {_WAIT_S:g} s.")
        time.sleep(0.05)


def _actor(shell: type) -> Any:
    return ray.remote(shell).options(num_cpus=0)


class _Model(nn.Module):
    """Weights of a given size, in tensors as large as a transformer's."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        sizes = [_TENSOR_BYTES] * (num_bytes // _TENSOR_BYTES)
        rest = num_bytes % _TENSOR_BYTES // 4 * 4
        for index, size in enumerate([*sizes, rest] if rest else sizes):
            values = torch.full((size // 4,), float(index))
            self.register_buffer(f"layer_{index:05d}", values)


class _Learner:
    """The publishing side: weights that change a little from version to version."""

    def __init__(self, store: Any, config: WeightsConfig, num_bytes: int) -> None:
        torch.set_num_threads(1)
        self._model = _Model(num_bytes)
        self._publisher = Publisher(store, config)
        self._copies = [np.ones(num_bytes, dtype=np.uint8) for _ in range(2)]

    def publish(self, version: int) -> dict[str, float]:
        for tensor in self._model.buffers():
            tensor += version
        return self._publisher.publish(self._model.state_dict(), version=version)

    def digest(self) -> str:
        return pack_weights(self._model.state_dict(), version=0)[0].digest

    def memcpy_gb_per_s(self) -> float:
        """One thread, memory to memory."""
        source, target = self._copies
        start = time.perf_counter()
        np.copyto(target, source)
        return len(source) / (time.perf_counter() - start) / 1e9


class _Worker:
    """The receiving side."""

    def __init__(self, store: Any, config: WeightsConfig, num_bytes: int, name: str) -> None:
        torch.set_num_threads(1)
        self._model = _Model(num_bytes)
        self._receiver = Receiver(store, config, name=name, wait_s=_WAIT_S)

    def wait(self) -> None:
        """Nothing: what a call to all receivers costs by itself."""

    def update(self, version: int) -> str:
        return self._receiver.update(version, self._load)

    def digest(self) -> str:
        return pack_weights(self._model.state_dict(), version=0)[0].digest

    def _load(self, manifest: WeightManifest, chunks: Sequence[Any]) -> None:
        unpack_weights(manifest, chunks, self._model)
