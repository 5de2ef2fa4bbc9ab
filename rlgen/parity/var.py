"""Cases of VAR: the transformer with its tokenizer's quantizer.

Shapes: B images, L image tokens, V codebook.
"""

import torch

from rlgen.nn.weights import load_state
from rlgen.parity.cases import Case, Outputs
from rlgen.parity.logits import forced_logits, labels_and_tokens, logit_arrays
from rlgen.policies.var import VAR, VarConfig
from rlgen.tokenizers.multiscale import MultiScaleQuantizer
from rlgen.tokenizers.var_vqvae import VarVQVAE, VarVQVAEConfig
from rlgen.types import SamplingSettings

_TOKENIZER_FIELDS = (
    "patch_nums",
    "vocab_size",
    "z_channels",
    "ch",
    "share_quant_resi",
    "quant_resi",
)
_POLICY_FIELDS = {
    "depth": "depth",
    "embed_dim": "width",
    "num_heads": "num_heads",
    "patch_nums": "patch_nums",
    "vocab_size": "codebook_size",
    "z_channels": "code_dim",
    "num_classes": "num_classes",
    "mlp_ratio": "mlp_ratio",
    "norm_eps": "norm_eps",
    "shared_aln": "shared_aln",
    "attn_l2_norm": "attn_l2_norm",
}
"""Public name to ours."""
_QUANTIZER = "quantize."


@torch.no_grad()
def run_var(case: Case) -> Outputs:
    """Inputs of the scales, logits in one pass, guided logits from the cache, and the image.

    In one pass for the labels and for the null class; the image only if the case expects it.
    """
    case.check_fields(
        config={*_TOKENIZER_FIELDS, *_POLICY_FIELDS}, settings=("cfg", "tokenizer_keys_used")
    )
    class_ids_B, tokens_BL = labels_and_tokens(case)
    tokenizer = VarVQVAE(VarVQVAEConfig(**{name: case.config[name] for name in _TOKENIZER_FIELDS}))
    weights = case.weights("vae")
    if "out.ar_image" in case.arrays:
        tokenizer.load_public_state_dict(weights)
    else:
        _load_quantizer(tokenizer.quantize, weights)
    fields = {ours: case.config[theirs] for theirs, ours in _POLICY_FIELDS.items()}
    policy = VAR(VarConfig(**fields), tokenizer.quantize)
    load_state(policy, case.weights("var"), case.name)

    # The public scale is what the last scale adds to 1.
    guided = SamplingSettings(cfg_scale=1.0 + case.settings["cfg"])
    null_B = torch.full_like(class_ids_B, policy.num_classes)
    logits_BLV = {
        "tf_cond": policy.teacher_forced(class_ids_B, tokens_BL),
        "tf_uncond": policy.teacher_forced(null_B, tokens_BL),
        "ar_cfg": forced_logits(policy, class_ids_B, tokens_BL, guided),
    }
    found = logit_arrays(case, logits_BLV, tokens_BL)
    found["out.var_input"] = policy.quantizer.inputs_of(tokens_BL)
    if "out.ar_image" in case.arrays:
        found["out.ar_image"] = tokenizer.decode(tokens_BL)
    return found


def _load_quantizer(quantizer: MultiScaleQuantizer, weights: dict[str, torch.Tensor]) -> None:
    state = {
        name.removeprefix(_QUANTIZER): tensor
        for name, tensor in weights.items()
        if name.startswith(_QUANTIZER)
    }
    load_state(quantizer, state, "the case's quantizer")
