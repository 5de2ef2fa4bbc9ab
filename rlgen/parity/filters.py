"""Cases of the sampling filters: the distribution that each public sampler draws from.

Shapes: N rows, V codebook.
"""

from torch import Tensor

from rlgen.parity.cases import Case, Outputs
from rlgen.sampling.logits import processed_logprobs
from rlgen.types import SamplingSettings


def run_filters(case: Case) -> Outputs:
    """Probabilities under every stored setting of the three families."""
    case.check_fields(
        config=("rows", "vocab", "spread", "llamagen_settings", "var_settings", "taming_settings")
    )
    settings = {
        "llamagen": [
            SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p)
            for temperature, top_k, top_p in case.config.get("llamagen_settings", [])
        ],
        # VAR switches top-p off with 0, and rlgen with 1.
        "var": [
            SamplingSettings(top_k=top_k, top_p=top_p or 1.0)
            for top_k, top_p in case.config.get("var_settings", [])
        ],
        "taming": [
            SamplingSettings(temperature=temperature, top_k=top_k or 0)
            for temperature, top_k in case.config.get("taming_settings", [])
        ],
    }
    logits = {
        suffix: case.tensor(f"in.logits{suffix}")
        for suffix in ("", "_ties")
        if f"in.logits{suffix}" in case.arrays
    }
    found: Outputs = {}
    for family, family_settings in settings.items():
        for index, one in enumerate(family_settings):
            for suffix, logits_NV in logits.items():
                probs_NV: Tensor = processed_logprobs(logits_NV, one).exp()
                found[f"out.{family}_probs_{index}{suffix}"] = probs_NV
    return found
