"""Images and tokens per second of sampling, with random weights.

Shapes: B images, L image tokens, n tokens of a block, V codebook.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlgen.errors import ConfigError
from rlgen.jobs.bench_model import (
    Clock,
    add_model_arguments,
    describe,
    open_device,
    peak_memory_gib,
    random_policy,
    rates,
    work_of_sampling,
)
from rlgen.nn.precision import cast_parameters
from rlgen.sampling.cuda_graph import GraphSampler
from rlgen.sampling.decode import check_guidance, sample_tokens
from rlgen.sampling.noise import uniform_noise
from rlgen.types import SamplingSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_model_arguments(parser)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 keeps all")
    parser.add_argument(
        "--cuda-graph", action="store_true", help="record the whole loop once and replay it"
    )


def measure(request: argparse.Namespace) -> dict[str, Any]:
    """Sample a batch a few times, and once more with a clock on its parts.

    Raises:
        ConfigError: no such model or device, guidance that the model can't have, or a graph on
            a CPU.
    """
    device = open_device(request)
    if request.cuda_graph and device.type != "cuda":
        raise ConfigError("--cuda-graph needs --device cuda.")
    settings = SamplingSettings(
        cfg_scale=request.cfg_scale,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
    )
    policy = random_policy(request.model, device=device).requires_grad_(False)
    check_guidance(policy, settings)
    cast_parameters(policy, request.dtype, keep=policy.float32_parts)
    class_ids_B = torch.arange(request.batch, device=device) % policy.num_classes
    noise_BL = uniform_noise(
        seed=0,
        purpose="evaluate",
        step=0,
        condition_indices_B=torch.arange(request.batch, device=device),
        sample_indices_B=torch.zeros(request.batch, dtype=torch.int64, device=device),
        num_tokens=policy.num_tokens,
    )
    sample = _sampler(policy, settings, request)
    sample(class_ids_B, noise_BL)  # the first run fills caches of kernels and memory
    clock = Clock(device)
    seconds: list[float] = []
    for _ in range(request.repeats):
        with clock.part("all"):
            sample(class_ids_B, noise_BL)
        seconds.append(clock.seconds.pop("all"))
    result = describe(policy, request, device) | rates(seconds, policy=policy, batch=request.batch)
    work = work_of_sampling(
        request.model, settings=settings, batch=request.batch, dtype=request.dtype
    )
    return result | {
        "cuda_graph": request.cuda_graph,
        "peak_memory_gib": peak_memory_gib(device),
        "time_split_s": _time_split(policy, class_ids_B, noise_BL, settings, device),
        "work": work | {f"{name}_per_s": x / result["median_s"] for name, x in work.items()},
    }


def _sampler(
    policy: Any, settings: SamplingSettings, request: argparse.Namespace
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if request.cuda_graph:
        return GraphSampler(policy, batch=request.batch, settings=settings)
    return lambda class_ids_B, noise_BL: sample_tokens(policy, class_ids_B, noise_BL, settings)


def _time_split(
    policy: Any,
    class_ids_B: Tensor,
    noise_BL: Tensor,
    settings: SamplingSettings,
    device: torch.device,
) -> dict[str, float]:
    """Seconds of one eager run: allocation, first block, later blocks, and choosing tokens."""
    clock = Clock(device)
    with clock.part("all"):
        sample_tokens(_Timed(policy, clock), class_ids_B, noise_BL, settings)
    split = dict(clock.seconds)
    split["draw"] = split.pop("all") - sum(split.values())
    return split


class _Timed:
    """A policy whose steps of decoding are timed; everything else is the policy's own."""

    def __init__(self, policy: Any, clock: Clock) -> None:
        self._policy = policy
        self._clock = clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def allocate_cache(self, batch: int) -> Any:
        with self._clock.part("allocate"):
            return self._policy.allocate_cache(batch)

    def prefill(self, class_ids_B: Tensor, cache: Any) -> Tensor:
        with self._clock.part("prefill"):
            return self._policy.prefill(class_ids_B, cache)

    def decode_next(self, tokens_Bn: Tensor, block: int, cache: Any) -> Tensor:
        with self._clock.part("decode"):
            return self._policy.decode_next(tokens_Bn, block, cache)
