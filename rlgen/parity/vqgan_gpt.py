"""Cases of taming's GPT."""

import math

from rlgen.errors import ConfigError
from rlgen.nn.weights import load_state
from rlgen.parity.cases import Case, Outputs
from rlgen.parity.logits import forced_logits, labels_and_tokens, logit_arrays, token_loss
from rlgen.policies.vqgan_gpt import VqganGpt, VqganGptConfig
from rlgen.types import SamplingSettings

_DROPOUTS = ("embd_pdrop", "resid_pdrop", "attn_pdrop")
"""Only train the public model; the numbers are computed without."""


def run_vqgan_gpt(case: Case) -> Outputs:
    """Logits in one pass and from the cache."""
    case.check_fields(
        config=(
            "vocab_size",
            "num_classes",
            "block_size",
            "n_layer",
            "n_head",
            "n_embd",
            *_DROPOUTS,
        ),
        settings=("n_unmasked", "cond_length"),
    )
    num_unmasked = case.settings.get("n_unmasked", 0)
    if case.settings.get("cond_length", 1) != 1 or num_unmasked > 1:
        raise ConfigError(
            f"case {case.name} has cond_length {case.settings.get('cond_length', 1)} and "
            f"n_unmasked {num_unmasked}; the class is one token, so known are 1 and at most 1."
        )
    class_ids_B, tokens_BL = labels_and_tokens(case)
    public, num_tokens = case.config, tokens_BL.shape[1]
    policy = VqganGpt(
        VqganGptConfig(
            num_layers=public["n_layer"],
            num_heads=public["n_head"],
            width=public["n_embd"],
            grid_size=math.isqrt(num_tokens),
            codebook_size=public["vocab_size"],
            num_classes=public["num_classes"],
            num_positions=public["block_size"],
            num_tokens=num_tokens,
        )
    )
    load_state(policy, case.weights(), case.name)
    policy.requires_grad_(False)
    logits_BLV = {
        "tf": policy.teacher_forced(class_ids_B, tokens_BL),
        "decode": forced_logits(policy, class_ids_B, tokens_BL, SamplingSettings()),
    }
    found = logit_arrays(case, logits_BLV, tokens_BL)
    found["out.tf_loss"] = token_loss(logits_BLV["tf"], tokens_BL)
    return found
