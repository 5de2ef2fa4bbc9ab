"""What the benchmarks of published models share: options, random policies, clocks, the machine.

Owns no measurement. Weights are random, so nothing is downloaded.

Shapes: N captions, T text tokens, W feature width.
"""

import argparse
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlgen.config.model_sizes import policy_sizes
from rlgen.config.models import POLICY_FAMILIES, ModelSpec, model_spec
from rlgen.errors import ConfigError
from rlgen.jobs.memory import BYTES_PER_GIB
from rlgen.policies.captions import Captions
from rlgen.policies.llamagen import LlamaGen
from rlgen.policies.load import build_policy
from rlgen.policies.protocol import Policy
from rlgen.tokenizers.multiscale import MultiScaleConfig, MultiScaleQuantizer
from rlgen.types import SamplingSettings

_NUM_CAPTIONS = 8


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `sample` and `learn` have in common."""
    parser.add_argument("--model", required=True, help="a published model: llamagen-b-256, ...")
    parser.add_argument("--batch", type=int, default=8, help="images (default: 8)")
    parser.add_argument("--cfg-scale", type=float, default=1.0, help="guidance (default: 1, none)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the median counts")


def open_device(request: argparse.Namespace) -> torch.device:
    """The device to measure on, with the number of threads set.

    Raises:
        ConfigError: there is no such device, or a count is not positive.
    """
    if request.threads is not None:
        if request.threads < 1:
            raise ConfigError(f"--threads {request.threads} must be at least 1.")
        torch.set_num_threads(request.threads)
    if request.batch < 1 or request.repeats < 1:
        raise ConfigError(
            f"--batch {request.batch} and --repeats {request.repeats} must be at least 1."
        )
    if request.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda finds no CUDA device here; use --device cpu.")
    return torch.device(request.device)


def random_policy(name: str, *, device: torch.device) -> Any:
    """A published policy's architecture with random weights, and random captions if it needs any.

    Raises:
        ConfigError: no such policy.
    """
    spec = model_spec(name)
    if spec.family not in POLICY_FAMILIES:
        raise ConfigError(f"{name} is a tokenizer; --model takes a policy, such as llamagen-b-256.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = build_policy(spec.family, spec.architecture, name, _quantizer(spec))
        if isinstance(policy, LlamaGen) and policy.config.caption_width is not None:
            num_slots = policy.config.num_caption_slots
            features_NTW = torch.randn(_NUM_CAPTIONS, num_slots, policy.config.caption_width)
            num_valid_N = torch.linspace(num_slots / 8, num_slots, _NUM_CAPTIONS).long()
            prompts = tuple(f"caption {index}" for index in range(_NUM_CAPTIONS))
            policy.set_captions(Captions(prompts, features_NTW, num_valid_N))
    return policy.to(device)


def _quantizer(spec: ModelSpec) -> MultiScaleQuantizer | None:
    """What a VAR feeds itself through; None for the other families."""
    if spec.family != "var":
        return None
    a = spec.architecture
    return MultiScaleQuantizer(
        MultiScaleConfig(a["codebook_size"], a["code_dim"], a["patch_nums"])
    ).requires_grad_(False)


class Clock:
    """Seconds by part; on a GPU it waits for the work to end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to a part."""
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def work_of_sampling(name: str, *, settings: SamplingSettings, batch: int, dtype: str) -> dict:
    """Arithmetic and memory traffic that sampling a batch can't do without.

    Every block of tokens reads all weights and the keys and values before it once. Compare the
    rates with the device's peaks to see how far there is to go.

    Returns:
        `tflop`, and `traffic_gb` in 1e9 bytes.
    """
    spec = model_spec(name)
    sizes = policy_sizes(spec.family, spec.architecture)
    rows = batch * (2 if settings.is_guided else 1)
    num_bytes = 4 if dtype == "float32" else 2
    head = sizes.width * sizes.codebook_size
    weights = sizes.num_layers * sum(i * o for i, o in sizes.linears) + head
    flop = traffic = 0.0
    end = 0
    for size in sizes.block_sizes:
        end += size
        seen = sizes.num_layers * 2 * end * sizes.width  # keys and values
        flop += 2.0 * rows * size * (weights + seen)
        traffic += num_bytes * (weights + rows * seen)
    return {"tflop": flop / 1e12, "traffic_gb": traffic / 1e9}


def describe(policy: nn.Module, request: argparse.Namespace, device: torch.device) -> dict:
    """What was measured and on what."""
    return {
        "model": request.model,
        "num_parameters": sum(p.numel() for p in policy.parameters()),
        "batch": request.batch,
        "cfg_scale": request.cfg_scale,
        "dtype": request.dtype,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def rates(seconds: list[float], *, policy: Policy, batch: int) -> dict:
    """Images and tokens per second by the median run."""
    median = sorted(seconds)[len(seconds) // 2]
    return {
        "images_per_s": batch / median,
        "tokens_per_s": batch * policy.num_tokens / median,
        "median_s": median,
        "runs_s": seconds,
    }


def peak_memory_gib(device: torch.device) -> float:
    """Largest allocation on the GPU, or largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / BYTES_PER_GIB
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / BYTES_PER_GIB


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
