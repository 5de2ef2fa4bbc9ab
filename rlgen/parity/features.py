"""Cases of FID's Inception: both public input paths, from 8-bit images to features and logits."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlgen.errors import ConfigError
from rlgen.features.inception import Inception, normalize_levels
from rlgen.features.resize import resize_like_tf1, to_levels
from rlgen.parity.cases import Case, Outputs

_ARCHITECTURE = "inception-v3-compat (FID variant)"


@torch.inference_mode()
def run_fid_inception(case: Case) -> Outputs:
    """Features of every depth and logits, by torch-fidelity's input path and by pytorch-fid's."""
    case.check_fields(config=("architecture", "input_size", "num_logits", "bn_eps"))
    if case.config["architecture"] != _ARCHITECTURE:
        raise ConfigError(
            f"case {case.name} has architecture {case.config['architecture']!r}, not "
            f"{_ARCHITECTURE!r}."
        )
    size = case.config["input_size"]
    net = Inception(num_logits=case.config["num_logits"], eps=case.config["bn_eps"])
    net.load_public_state_dict(case.weights(), case.name)
    net.requires_grad_(False).eval()
    found: Outputs = {}
    for name in case.arrays:
        if name.startswith("in.") and name.endswith("_u8"):
            # Through [0, 1] and back, as images reach the extractor.
            levels = to_levels(case.tensor(name).float() / 255)
            outputs = _outputs(case, net, levels, size, prefix=f"out.{name[3:-3]}_")
            found |= {key: tensor for key, tensor in outputs.items() if key in case.arrays}
    return found


def _outputs(case: Case, net: Inception, levels: Tensor, size: int, *, prefix: str) -> Outputs:
    layers = net(normalize_levels(levels, size))
    found: Outputs = {prefix + name: tensor for name, tensor in layers.items()}
    found[f"{prefix}logits_unbiased"] = net.unbiased_logits(layers["2048"])
    found[f"{prefix}logits"] = net.fc(layers["2048"])
    if (strided := f"{prefix}resized_strided") in case.arrays:
        step = math.ceil(size / case.arrays[strided].shape[-1])
        resized = resize_like_tf1(levels, (size, size))
        found[strided] = resized[..., ::step, ::step]
    if f"{prefix}2048_pytorch_fid" in case.arrays:
        pixels = F.interpolate(levels / 255, (size, size), mode="bilinear", align_corners=False)
        found[f"{prefix}2048_pytorch_fid"] = net(2 * pixels - 1)["2048"]
    return found
