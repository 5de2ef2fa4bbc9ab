"""Modules of published models: on the meta device at full size, or with tiny fields."""

from typing import Any

import torch
from torch import nn

from rlgen.config.models import architecture_of, model_spec
from rlgen.policies.load import build_policy
from rlgen.tokenizers.load import build_tokenizer
from rlgen.tokenizers.multiscale import MultiScaleConfig, MultiScaleQuantizer

TINY: dict[str, dict[str, Any]] = {
    "llamagen-b-256": {
        "num_layers": 2,
        "num_heads": 4,
        "width": 128,
        "grid_size": 8,
        "codebook_size": 32,
        "num_classes": 3,
        "ffn_multiple_of": 64,
    },
    "var-d16-256": {
        "depth": 2,
        "width": 128,
        "num_heads": 4,
        "patch_nums": (1, 2, 4, 6),
        "codebook_size": 32,
        "code_dim": 8,
        "num_classes": 3,
    },
    "vqgan-1.4b-256": {
        "num_layers": 2,
        "num_heads": 4,
        "width": 128,
        "grid_size": 8,
        "codebook_size": 32,
        "num_classes": 4,
    },
    "llamagen-vq-ds16": {"ch": 32, "codebook_size": 12, "num_res_blocks": 1, "z_channels": 8},
    "vqgan-f16-1024": {"ch": 32, "n_embed": 12, "num_res_blocks": 1, "z_channels": 8},
    "var-vq": {"ch": 32, "vocab_size": 12, "z_channels": 8},
}
"""Changes that make one model of each family small."""


def quantizer_for(fields: dict[str, Any]) -> MultiScaleQuantizer:
    return MultiScaleQuantizer(
        MultiScaleConfig(
            codebook_size=fields["codebook_size"],
            code_dim=fields["code_dim"],
            patch_nums=tuple(fields["patch_nums"]),
            num_phi=4,
            quant_resi=0.5,
        )
    )


def build(name: str, device: str = "meta", **changes: Any) -> nn.Module:
    """The module of a published model, on the meta device without values."""
    spec = model_spec(name)
    fields = architecture_of(name, changes)
    with torch.device(device):
        if spec.is_tokenizer:
            return build_tokenizer(spec.family, fields)
        quantizer = quantizer_for(fields) if spec.family == "var" else None
        return build_policy(spec.family, fields, name, quantizer)
