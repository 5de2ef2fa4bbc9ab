"""Cases of the metrics on features that are given, or that a recipe makes.

Shapes: N generated images, R real images, F features, C classes.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlgen.errors import ConfigError
from rlgen.evaluation.metrics import (
    frechet_of_features,
    inception_score,
    kernel_distance,
    neighborhoods,
)
from rlgen.moments.moments import batch_moments
from rlgen.parity.cases import Case, Outputs
from rlgen.parity.rule import make_normal

_CONFIG = (
    "n",
    "n_generated",
    "n_real",
    "feature_dim",
    "logit_dim",
    "kid_subsets",
    "kid_subset_size",
    "kid_kernel",
    "kid_degree",
    "kid_gamma",
    "kid_coef0",
    "kid_estimator",
    "prc_neighborhood",
    "isc_splits",
    "rng_seed",
)
_KERNEL = {
    "kid_kernel": "poly",
    "kid_degree": 3,
    "kid_gamma": "1/d",
    "kid_coef0": 1,
    "kid_estimator": "unbiased",
}
_NUM_FACTORS = 12


class _Inputs(NamedTuple):
    generated_NF: Tensor
    real_RF: Tensor
    logits_NC: Tensor


def run_metrics(case: Case) -> Outputs:
    """Every metric of a case; metrics are computed on the CPU.

    Raises:
        ConfigError: the case asks for another kernel.
    """
    case.check_fields(config=_CONFIG)
    config = case.config
    for name, ours in _KERNEL.items():
        if config.get(name, ours) != ours:
            raise ConfigError(f"case {case.name} has {name} = {config[name]}; only {ours} is made.")
    # torch-fidelity makes tensors of its own, which must lie where the features do.
    with torch.device("cpu"):
        inputs = _inputs(case)
        score = {"num_splits": config["isc_splits"], "seed": config["rng_seed"]}
        kid = kernel_distance(
            inputs.generated_NF,
            inputs.real_RF,
            num_subsets=config["kid_subsets"],
            subset_size=config["kid_subset_size"],
            seed=config["rng_seed"],
        )
        prc = neighborhoods(
            inputs.generated_NF, inputs.real_RF, num_neighbors=config["prc_neighborhood"]
        )
        fid = np.array(frechet_of_features(inputs.generated_NF, inputs.real_RF))
        return {
            "out.metric_fid": fid,
            "out.metric_fid_pytorch_fid": fid,
            "out.metric_mu_generated": batch_moments(inputs.generated_NF).mean_F,
            "out.metric_isc": np.array(inception_score(inputs.logits_NC, **score)),
            "out.metric_isc_unshuffled": np.array(
                inception_score(inputs.logits_NC, is_shuffled=False, **score)
            ),
            "out.metric_kid": np.array(kid),
            "out.metric_prc": np.array(prc),
        }


def _inputs(case: Case) -> _Inputs:
    """The stored features, or those of the recipe."""
    if "in.recipe" not in case.arrays:
        arrays = (case.arrays[f"in.{name}"] for name in ("generated", "real", "logits"))
        return _Inputs(*map(torch.from_numpy, arrays))
    seed, count, width = (int(number) for number in case.arrays["in.recipe"])

    def normal(name: str, *shape: int, std: float) -> np.ndarray:
        return make_normal(seed, name, shape, std=std).astype(np.float64)

    def features(side: str, offset: float) -> Tensor:
        factors = normal(f"factors.{side}", count, _NUM_FACTORS, std=1.0) @ mixing
        noise = normal(f"noise.{side}", count, width, std=0.05)
        return torch.from_numpy(np.maximum(0, offset + factors + noise).astype(np.float32))

    mixing = normal("mixing", _NUM_FACTORS, width, std=0.15)
    logits = make_normal(seed, "logits", (count, case.config["logit_dim"]), std=2.0)
    made = _Inputs(features("generated", 0.40), features("real", 0.45), torch.from_numpy(logits))
    _check_recipe(case, made)
    return made


def _check_recipe(case: Case, made: _Inputs) -> None:
    wanted = case.arrays.get("aux.metric_checksum")
    found = [float(part.double().sum()) for part in (made.generated_NF, made.real_RF)]
    if wanted is not None and not np.allclose(wanted, found, rtol=1e-9):
        raise ConfigError(
            f"case {case.name}: the recipe gives features that sum to {found} and the case says "
            f"{wanted.tolist()}; numpy's generator differs on this machine."
        )
