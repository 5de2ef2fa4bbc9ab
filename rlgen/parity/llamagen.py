"""Cases of LlamaGen's GPT, conditioned on classes and on captions.

Shapes: B images, L image tokens, T text tokens, V codebook.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlgen.errors import ConfigError
from rlgen.nn.weights import load_state
from rlgen.parity.cases import Case, Outputs
from rlgen.parity.logits import forced_logits, labels_and_tokens, logit_arrays, token_loss
from rlgen.policies.captions import Captions
from rlgen.policies.llamagen import LlamaGen, LlamaGenConfig
from rlgen.types import SamplingSettings

_DROPOUTS = ("token_dropout_p", "resid_dropout_p", "ffn_dropout_p")
"""Only train the public model; the numbers are computed without."""
_FIELDS = (
    "model_type",
    "cls_token_num",
    "multiple_of",
    "norm_eps",
    "rope_base",
    "n_kv_head",
    "class_dropout_prob",
    "drop_path_rate",
    "dim",
    "n_layer",
    "n_head",
    "vocab_size",
    "block_size",
    "num_classes",
    *_DROPOUTS,
)
_SETTINGS = ("cfg_scale", "cfg_interval")


def run_llamagen_c2i(case: Case) -> Outputs:
    """Logits in one pass and from the cache, with and without guidance."""
    case.check_fields(config=_FIELDS, settings=_SETTINGS)
    if case.config["model_type"] != "c2i" or case.config["cls_token_num"] != 1:
        raise ConfigError(
            f"case {case.name} has model_type {case.config['model_type']} and cls_token_num "
            f"{case.config['cls_token_num']}; a class-conditional LlamaGen has c2i and 1."
        )
    has_null = case.config["class_dropout_prob"] > 0
    policy = _policy(case, num_classes=case.config["num_classes"], has_null_class=has_null)
    class_ids_B, tokens_BL = labels_and_tokens(case)
    return _logits(case, policy, class_ids_B, tokens_BL)


def run_llamagen_t2i(case: Case) -> Outputs:
    """The same from captions as the text encoder gives them, padded on the right."""
    case.check_fields(config=(*_FIELDS, "caption_dim"), settings=(*_SETTINGS, "valid_tokens"))
    if case.config["model_type"] != "t2i":
        raise ConfigError(f"case {case.name} has model_type {case.config['model_type']}, not t2i.")
    # The public model has as many learned slots as its default, whatever cls_token_num is.
    learned_SW = case.weights()["cls_embedding.uncond_embedding"]
    policy = _policy(
        case, caption_width=case.config["caption_dim"], num_caption_slots=len(learned_SW)
    )
    features_BTW = case.tensor("in.caption_rightpad")
    mask_BT = case.tensor("in.caption_rightpad_mask").bool()
    if features_BTW.shape[1] != case.config["cls_token_num"]:
        raise ConfigError(
            f"case {case.name} has cls_token_num {case.config['cls_token_num']} and captions of "
            f"{features_BTW.shape[1]} tokens."
        )
    num_valid_B = mask_BT.sum(dim=1)
    if not torch.equal(mask_BT, torch.arange(mask_BT.shape[1]) < num_valid_B[:, None]):
        raise ConfigError(f"case {case.name} has captions whose padding is not all on the right.")
    if case.settings.get("valid_tokens", num_valid_B.tolist()) != num_valid_B.tolist():
        raise ConfigError(
            f"case {case.name} says valid_tokens {case.settings['valid_tokens']} and its masks "
            f"have {num_valid_B.tolist()}."
        )
    prompts = tuple(f"caption {index}" for index in range(len(features_BTW)))
    policy.set_captions(Captions(prompts, features_BTW, num_valid_B))
    tokens_BL = case.tensor("in.tokens").long()
    return _logits(case, policy, torch.arange(len(prompts)), tokens_BL)


def _policy(case: Case, **fields: Any) -> LlamaGen:
    """Build the case's model with the rule's weights.

    Raises:
        ConfigError: it asks for something that rlgen's LlamaGen does not have.
    """
    public = case.config
    if public["n_kv_head"] not in (None, public["n_head"]) or public["drop_path_rate"] != 0:
        raise ConfigError(
            f"case {case.name} has n_kv_head {public['n_kv_head']} and drop_path_rate "
            f"{public['drop_path_rate']}; known are as many key as query heads, and 0."
        )
    grid_size = math.isqrt(public["block_size"])
    if grid_size**2 != public["block_size"]:
        raise ConfigError(f"case {case.name} has block_size {public['block_size']}, no square.")
    policy = LlamaGen(
        LlamaGenConfig(
            num_layers=public["n_layer"],
            num_heads=public["n_head"],
            width=public["dim"],
            grid_size=grid_size,
            codebook_size=public["vocab_size"],
            ffn_multiple_of=public["multiple_of"],
            norm_eps=public["norm_eps"],
            rope_base=public["rope_base"],
            **fields,
        )
    )
    load_state(policy, case.weights(), case.name)
    return policy.requires_grad_(False)


def _logits(case: Case, policy: LlamaGen, class_ids_B: Tensor, tokens_BL: Tensor) -> Outputs:
    scale, interval = case.settings.get("cfg_scale", 1.0), case.settings.get("cfg_interval", -1)
    # The public sampler guides only above 1, and -1 means no interval.
    guided = SamplingSettings(cfg_scale=max(scale, 1.0))
    limited = replace(guided, cfg_interval=interval if interval >= 0 else None)
    ways: dict[str, Callable[[], Tensor]] = {
        "tf_cond": lambda: policy.teacher_forced(class_ids_B, tokens_BL),
        "decode_nocfg": lambda: forced_logits(policy, class_ids_B, tokens_BL, SamplingSettings()),
    }
    if policy.null_class is not None:
        null_B = policy.null_of(class_ids_B)
        ways |= {
            "tf_uncond": lambda: policy.teacher_forced(null_B, tokens_BL),
            "decode_cfg": lambda: forced_logits(policy, class_ids_B, tokens_BL, guided),
            "decode_cfg_interval": lambda: forced_logits(policy, class_ids_B, tokens_BL, limited),
        }
    logits_BLV = {name: way() for name, way in ways.items() if _is_wanted(case, name)}
    found = logit_arrays(case, logits_BLV, tokens_BL)
    if "tf_cond" in logits_BLV:
        found["out.tf_loss"] = token_loss(logits_BLV["tf_cond"], tokens_BL)
    return found


def _is_wanted(case: Case, name: str) -> bool:
    """Whether the case has these logits in one of the stored forms, or their loss."""
    forms = ("", "_slice", "_token_logprob", "_logsumexp")
    has_logits = any(f"out.{name}{form}" in case.arrays for form in forms)
    return has_logits or (name == "tf_cond" and "out.tf_loss" in case.arrays)
