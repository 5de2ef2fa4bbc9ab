"""Policies from and to weight files.

Owns the choice of the architecture: by what rlgen's own file says of itself, or by the name of
the published model.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from rlgen.config.models import architecture_of, model_spec
from rlgen.config.run import PolicyConfig, RunConfig
from rlgen.errors import CheckpointError, ConfigError
from rlgen.nn.public_files import load_public_state, read_public_state, select_state
from rlgen.nn.weights import make_config, peek_metadata, read_weights, weight_bytes
from rlgen.policies.captions import load_captions
from rlgen.policies.llamagen import LlamaGen, LlamaGenConfig
from rlgen.policies.protocol import Policy
from rlgen.policies.var import VAR, VarConfig
from rlgen.policies.vqgan_gpt import VqganGpt, VqganGptConfig
from rlgen.storage import cached_file, write_bytes
from rlgen.tokenizers.multiscale import MultiScaleQuantizer
from rlgen.tokenizers.published import open_tokenizer

_FAMILIES: dict[str, tuple[type, type]] = {
    "llamagen": (LlamaGen, LlamaGenConfig),
    "vqgan_gpt": (VqganGpt, VqganGptConfig),
    "var": (VAR, VarConfig),
}


def build_policy(
    kind: str, fields: Mapping[str, Any], source: str, quantizer: MultiScaleQuantizer | None = None
) -> Any:
    """Make a policy module with fresh weights.

    Args:
        kind: "llamagen", "vqgan_gpt" or "var".
        fields: of the family's config dataclass.
        source: where the fields came from, for messages.
        quantizer: of the tokenizer; VAR feeds itself through it.
    Raises:
        CheckpointError: another kind, or fields that the family does not have.
        ConfigError: fields that do not fit each other, or a tokenizer without scales for VAR.
    """
    if kind not in _FAMILIES:
        raise CheckpointError(f"{source} is a {kind}; a policy is one of {', '.join(_FAMILIES)}.")
    module_type, config_type = _FAMILIES[kind]
    config: Any = make_config(config_type, dict(fields), source)
    if kind != "var":
        return module_type(config)
    if quantizer is None:
        raise ConfigError(
            f"{source} is a VAR policy, which needs a multi-scale tokenizer; make "
            "tokenizer.checkpoint the one that it was trained with."
        )
    return module_type(config, quantizer)


def load_policy(config: RunConfig, *, device: torch.device) -> Any:
    """Build the policy that a run names and load its weights.

    Raises:
        CheckpointError: unreadable, of another kind, or tensors that do not fit.
        ConfigError: the tokenizer can't serve it, or captions are missing.
    """
    kind, fields, state = read_policy_file(config.policy)
    location = config.policy.checkpoint
    quantizer = None
    if kind == "var":
        quantizer = getattr(open_tokenizer(config.tokenizer, device=device), "quantize", None)
    policy = build_policy(kind, fields, location, quantizer)
    load_public_state(policy, state, location, model_name=config.policy.model)
    if isinstance(policy, LlamaGen) and policy.config.caption_width is not None:
        if config.policy.captions is None:
            raise ConfigError(
                f"{location} is conditioned on text; set policy.captions to a file of encoded "
                "captions."
            )
        policy.set_captions(load_captions(config.policy.captions))
    return policy.to(device)


def read_policy_file(policy: PolicyConfig) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Kind, architecture and tensors of a policy's file.

    Raises:
        CheckpointError: unreadable, of another kind, or not the expected digest.
    """
    if policy.model is None:
        location = str(cached_file(policy.checkpoint, sha256=policy.sha256))
        kind = peek_metadata(location)["kind"]
        fields, state = read_weights(location, kind=kind)
        return kind, {**fields, **policy.architecture}, state
    family = model_spec(policy.model).family
    state = read_public_state(policy.checkpoint, sha256=policy.sha256)
    fields = architecture_of(policy.model, policy.architecture)
    return family, fields, select_state(state, family)


def save_policy(location: str, policy: Policy) -> None:
    """Write a policy with its architecture."""
    write_bytes(location, policy_bytes(policy))


def policy_bytes(policy: Any, state: Mapping[str, Tensor] | None = None) -> bytes:
    """The bytes of the weight file that `load_policy` reads.

    Args:
        policy: the module.
        state: its tensors by public name, if they are not its state dict (LoRA).
    """
    weights: nn.Module | Mapping[str, Tensor] = policy if state is None else state
    [kind] = [name for name, (family, _) in _FAMILIES.items() if isinstance(policy, family)]
    return weight_bytes(weights, kind=kind, config=asdict(policy.config))
