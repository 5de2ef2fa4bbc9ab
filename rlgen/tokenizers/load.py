"""Tokenizers from and to weight files.

Owns the choice of the architecture, by what a file says of itself or by a family's name and
fields. Published files do not describe themselves: whoever reads them builds the module here and
fills it with `load_public_state_dict`.
"""

from dataclasses import asdict
from typing import Any

import torch

from rlgen.errors import CheckpointError, ConfigError
from rlgen.nn.weights import load_state, peek_metadata, read_tensors, save_weights
from rlgen.storage import without_credentials
from rlgen.tokenizers.conv_vq import KIND as CONV_VQ
from rlgen.tokenizers.conv_vq import ConvVQ, ConvVQConfig
from rlgen.tokenizers.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig
from rlgen.tokenizers.multiscale_conv_vq import MultiScaleConvVQ, MultiScaleConvVQConfig
from rlgen.tokenizers.taming_vqgan import TamingVQGAN, TamingVQGANConfig
from rlgen.tokenizers.var_vqvae import VarVQVAE, VarVQVAEConfig

AnyTokenizer = ConvVQ | MultiScaleConvVQ | LlamaGenVQ | TamingVQGAN | VarVQVAE
"""All that exist; each is a `Tokenizer`."""

_FAMILIES: dict[str, tuple[type[AnyTokenizer], type]] = {
    CONV_VQ: (ConvVQ, ConvVQConfig),
    "multiscale_conv_vq": (MultiScaleConvVQ, MultiScaleConvVQConfig),
    "llamagen_vq": (LlamaGenVQ, LlamaGenVQConfig),
    "taming_vqgan": (TamingVQGAN, TamingVQGANConfig),
    "var_vqvae": (VarVQVAE, VarVQVAEConfig),
}


def build_tokenizer(family: str, fields: dict[str, Any]) -> AnyTokenizer:
    """Build a tokenizer for use, with weights still to be loaded.

    Args:
        family: "llamagen_vq", "taming_vqgan", "var_vqvae", "conv_vq" or "multiscale_conv_vq".
        fields: of the family's config; what is left out has the published default.
    Raises:
        ConfigError: an unknown family or field, or sizes that do not fit together.
    """
    if family not in _FAMILIES:
        raise ConfigError(
            f"tokenizer family {family!r} is unknown; use one of {', '.join(_FAMILIES)}."
        )
    module_type, config_type = _FAMILIES[family]
    # JSON and YAML have no tuples.
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    try:
        config = config_type(**given)
    except TypeError as error:
        raise ConfigError(
            f"fields of a {family} tokenizer are not those of {config_type.__name__} ({error}); "
            "leave out what it doesn't have."
        ) from None
    return module_type(config).requires_grad_(False).eval()


def load_tokenizer(location: str, *, device: torch.device | str = "cpu") -> AnyTokenizer:
    """Build the tokenizer that a weight file describes and load it, for use.

    Args:
        location: path or fsspec URL of a file that `save_tokenizer` wrote.
        device: where to put it.
    Raises:
        CheckpointError: unreadable, no tokenizer, or tensors that do not fit.
    """
    metadata = peek_metadata(location)
    if metadata["kind"] not in _FAMILIES:
        raise CheckpointError(
            f"{without_credentials(location)} holds weights of kind {metadata['kind']!r}, not a "
            f"tokenizer; name a file of one of the kinds {', '.join(_FAMILIES)}."
        )
    try:
        tokenizer = build_tokenizer(metadata["kind"], metadata["config"])
    except ConfigError as error:
        raise CheckpointError(
            f"{without_credentials(location)} describes a tokenizer that can't be built: {error}"
        ) from error
    load_state(tokenizer, read_tensors(location), location)
    return tokenizer.to(device)


def save_tokenizer(location: str, tokenizer: AnyTokenizer) -> None:
    """Write a tokenizer as a self-describing weight file.

    Raises:
        StorageError: it cannot be written.
    """
    (kind,) = (kind for kind, (module, _) in _FAMILIES.items() if type(tokenizer) is module)
    save_weights(location, tokenizer, kind=kind, config=asdict(tokenizer.config))
