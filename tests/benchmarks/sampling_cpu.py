"""LlamaGen-B sampled by rlgen and by the public sampler, in turns on the same weights.

    git clone https://github.com/FoundationVision/LlamaGen DIR
    python tests/benchmarks/sampling_cpu.py --llamagen DIR [--threads 2] [--json FILE]

256 tokens, batch 8, guidance 2, no top-k or top-p, on a CPU in float32 and in bfloat16. Whole
batches of the two alternate, so that a busy moment of the machine hits both. Seconds are wall
clock; `cpu_ratio` compares the processor time of all threads, which other processes disturb less.
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from rlgen.jobs.bench_model import device_name, random_policy
from rlgen.sampling.decode import sample_tokens
from rlgen.types import SamplingSettings

BATCH = 8
CFG_SCALE = 2.0
NUM_TOKENS = 256


def public_sampler(checkout: Path, dtype: torch.dtype, state: dict) -> Callable[[], object]:
    """The public model with these weights, and its generate function."""
    sys.path.insert(0, str(checkout))
    gpt = import_module("autoregressive.models.gpt")
    generate = import_module("autoregressive.models.generate").generate
    model = gpt.GPT_models["GPT-B"](
        block_size=NUM_TOKENS, cls_token_num=1, model_type="c2i", vocab_size=16384
    )
    model.load_state_dict(state)
    model = model.to(dtype).eval()
    class_ids_B = torch.arange(BATCH)
    return lambda: generate(
        model,
        class_ids_B,
        NUM_TOKENS,
        cfg_scale=CFG_SCALE,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        sample_logits=True,
    )


def own_sampler(policy: nn.Module, dtype: torch.dtype) -> Callable[[], object]:
    """rlgen's."""
    policy = policy.to(dtype).requires_grad_(False)
    settings = SamplingSettings(cfg_scale=CFG_SCALE)
    noise_BL = torch.rand(BATCH, NUM_TOKENS, dtype=torch.float64)
    return lambda: sample_tokens(policy, torch.arange(BATCH), noise_BL, settings)


def measure(checkout: Path, *, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Ratios of the public sampler's time to rlgen's."""
    policy = random_policy("llamagen-b-256", device=torch.device("cpu"))
    samplers = {
        "public": public_sampler(checkout, dtype, policy.state_dict()),
        "rlgen": own_sampler(policy, dtype),
    }
    wall: dict[str, list[float]] = {name: [] for name in samplers}
    processor: dict[str, list[float]] = {name: [] for name in samplers}
    for sample in samplers.values():
        sample()
    for _ in range(rounds):
        for name, sample in samplers.items():
            started, worked = time.perf_counter(), time.process_time()
            sample()
            wall[name].append(time.perf_counter() - started)
            processor[name].append(time.process_time() - worked)
            print(f"{dtype} {name}: {wall[name][-1]:.2f} s", file=sys.stderr, flush=True)
    ratios = [a / b for a, b in zip(wall["public"], wall["rlgen"], strict=True)]
    return {
        "ratio": median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "cpu_ratio": median(processor["public"]) / median(processor["rlgen"]),
        "rlgen_images_per_s": BATCH / median(wall["rlgen"]),
        "public_images_per_s": BATCH / median(wall["public"]),
    }


def main() -> int:
    """Measure, print, compare with the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--llamagen", type=Path, required=True, help="a checkout of the public code"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--require", type=float, default=1.5, help="smallest ratio allowed")
    parser.add_argument("--json", type=Path, help="write the result here")
    request = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # the public code's own
    torch.set_num_threads(request.threads)
    commit = subprocess.run(
        ["git", "-C", str(request.llamagen), "rev-parse", "HEAD"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    result: dict[str, Any] = {
        "command": f"python tests/benchmarks/sampling_cpu.py --llamagen DIR --threads "
        f"{request.threads} --rounds {request.rounds}",
        "public": f"FoundationVision/LlamaGen@{commit}",
        "hardware": device_name(torch.device("cpu")),
        "threads": request.threads,
        "torch": torch.__version__,
    }
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        result[name] = measure(request.llamagen, dtype=dtype, rounds=request.rounds)
    text = json.dumps(result, indent=2)
    print(text)
    if request.json is not None:
        request.json.write_text(text + "\n")
    return 0 if min(result[n]["ratio"] for n in ("float32", "bfloat16")) >= request.require else 1


if __name__ == "__main__":
    sys.exit(main())
