"""Which runner computes which family's cases."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlgen.errors import ConfigError, RlgenError
from rlgen.parity.cases import Case, Comparison, Outputs, compare, load_case
from rlgen.parity.features import run_fid_inception
from rlgen.parity.filters import run_filters
from rlgen.parity.llamagen import run_llamagen_c2i, run_llamagen_t2i
from rlgen.parity.metrics import run_metrics
from rlgen.parity.rewards import run_aesthetic, run_hpsv2, run_open_clip
from rlgen.parity.tokenizers import run_llamagen_vq, run_taming_vqgan, run_var_vqvae
from rlgen.parity.var import run_var
from rlgen.parity.vqgan_gpt import run_vqgan_gpt

CPU = torch.device("cpu")
RUNNERS: dict[str, Callable[[Case], Outputs]] = {
    "llamagen_gpt_c2i": run_llamagen_c2i,
    "llamagen_gpt_t2i": run_llamagen_t2i,
    "llamagen_vq": run_llamagen_vq,
    "var": run_var,
    "var_vqvae": run_var_vqvae,
    "taming_mingpt": run_vqgan_gpt,
    "taming_vqgan": run_taming_vqgan,
    "sampling_filters": run_filters,
    "open_clip": run_open_clip,
    "hpsv2": run_hpsv2,
    "aesthetic": run_aesthetic,
    "fid_inception": run_fid_inception,
    "metrics": run_metrics,
}


def run_case(
    folder: Path, entry: dict[str, Any], *, device: torch.device = CPU
) -> list[Comparison]:
    """Compute one case and compare; what can't be computed is one failed comparison."""
    try:
        family = entry["family"]
        if family not in RUNNERS:
            raise ConfigError(f"family {family} is unknown; known are {', '.join(RUNNERS)}.")
        case = load_case(folder, entry)
        with device:
            outputs = RUNNERS[family](case)
        return compare(case, outputs)
    except (RlgenError, KeyError, TypeError, ValueError, RuntimeError) as error:
        return [Comparison("-", np.inf, 0.0, f"{type(error).__name__}: {error}")]
