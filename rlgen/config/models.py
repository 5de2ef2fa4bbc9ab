"""The published models by name: family, architecture, what they need. Must not import torch.

Owns the table. How large a model is follows from it in model_sizes.py; how a published file is
packed is nn/public_files.py's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlgen.errors import ConfigError

POLICY_FAMILIES = ("llamagen", "var", "vqgan_gpt")
TOKENIZER_FAMILIES = ("llamagen_vq", "var_vqvae", "taming_vqgan")

_PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
_PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


@dataclass(frozen=True)
class ModelSpec:
    """A published policy or tokenizer."""

    name: str
    family: str
    """Which class builds it: llamagen, var, vqgan_gpt, llamagen_vq, var_vqvae or taming_vqgan."""
    architecture: dict[str, Any]
    """Fields of the family's config dataclass."""
    image_size: int
    """Side of its images in pixels; a tokenizer's weights fit others as well."""
    files: tuple[str, ...]
    """Names under which its weights are published; none if only the architecture is."""
    tokenizer: str | None = None
    """The model that turns a policy's tokens into pixels."""

    @property
    def is_tokenizer(self) -> bool:
        """Whether it makes pixels of tokens, not tokens."""
        return self.family in TOKENIZER_FAMILIES


def _llamagen(size: str, px: int, num_layers: int, num_heads: int, width: int) -> ModelSpec:
    published = px == 384 or size in ("b", "l")
    return ModelSpec(
        name=f"llamagen-{size}-{px}",
        family="llamagen",
        architecture={
            "num_layers": num_layers,
            "num_heads": num_heads,
            "width": width,
            "grid_size": px // 16,
            "codebook_size": 16384,
            "num_classes": 1000,
            "ffn_multiple_of": 256,
        },
        image_size=px,
        files=(f"c2i_{size.upper()}_{px}.pt",) if published else (),
        tokenizer="llamagen-vq-ds16",
    )


def _llamagen_t2i(px: int, file: str) -> ModelSpec:
    return ModelSpec(
        name=f"llamagen-t2i-xl-{px}",
        family="llamagen",
        architecture={
            "num_layers": 36,
            "num_heads": 20,
            "width": 1280,
            "grid_size": px // 16,
            "codebook_size": 16384,
            "ffn_multiple_of": 256,
            "caption_width": 2048,
            "num_caption_slots": 120,
        },
        image_size=px,
        files=(file,),
        tokenizer="llamagen-vq-ds16",
    )


def _var(depth: int, px: int) -> ModelSpec:
    return ModelSpec(
        name=f"var-d{depth}-{px}",
        family="var",
        architecture={
            "depth": depth,
            "width": 64 * depth,
            "num_heads": depth,
            "patch_nums": _PATCH_NUMS_256 if px == 256 else _PATCH_NUMS_512,
            "codebook_size": 4096,
            "code_dim": 32,
            "num_classes": 1000,
            "mlp_ratio": 4.0,
            "shared_aln": px == 512,
            "attn_l2_norm": True,
            "norm_eps": 1e-6,
        },
        image_size=px,
        files=(f"var_d{depth}.pth",),
        tokenizer="var-vq",
    )


def _llamagen_vq(stride: int, ch_mult: tuple[int, ...], files: tuple[str, ...]) -> ModelSpec:
    return ModelSpec(
        name=f"llamagen-vq-ds{stride}",
        family="llamagen_vq",
        architecture={
            "image_size": 256,
            "codebook_size": 16384,
            "codebook_embed_dim": 8,
            "encoder_ch_mult": ch_mult,
            "decoder_ch_mult": ch_mult,
            "z_channels": 256,
            "ch": 128,
            "num_res_blocks": 2,
        },
        image_size=256,
        files=files,
    )


def _taming_vqgan(n_embed: int) -> ModelSpec:
    return ModelSpec(
        name=f"vqgan-f16-{n_embed}",
        family="taming_vqgan",
        architecture={
            "n_embed": n_embed,
            "embed_dim": 256,
            "resolution": 256,
            "attn_resolutions": (16,),
            "ch": 128,
            "ch_mult": (1, 1, 2, 2, 4),
            "num_res_blocks": 2,
            "z_channels": 256,
        },
        image_size=256,
        files=(f"vqgan_imagenet_f16_{n_embed}.ckpt", "last.ckpt"),
    )


_LLAMAGEN_SIZES = (
    ("b", 12, 12, 768),
    ("l", 24, 16, 1024),
    ("xl", 36, 20, 1280),
    ("xxl", 48, 24, 1536),
    ("3b", 24, 32, 3200),
)

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        *(_llamagen(size, px, *sizes) for px in (256, 384) for size, *sizes in _LLAMAGEN_SIZES),
        _llamagen_t2i(256, "t2i_XL_stage1_256.pt"),
        _llamagen_t2i(512, "t2i_XL_stage2_512.pt"),
        *(_var(depth, 256) for depth in (16, 20, 24, 30)),
        _var(36, 512),
        ModelSpec(
            name="vqgan-1.4b-256",
            family="vqgan_gpt",
            architecture={
                "num_layers": 48,
                "num_heads": 24,
                "width": 1536,
                "grid_size": 16,
                "codebook_size": 16384,
                "num_classes": 1000,
                "has_null_class": False,
            },
            image_size=256,
            files=("2021-04-03T19-39-50_cin_transformer/checkpoints/last.ckpt",),
            tokenizer="vqgan-f16-16384",
        ),
        _llamagen_vq(16, (1, 1, 2, 2, 4), ("vq_ds16_c2i.pt", "vq_ds16_t2i.pt")),
        _llamagen_vq(8, (1, 2, 2, 4), ("vq_ds8_c2i.pt",)),
        ModelSpec(
            name="var-vq",
            family="var_vqvae",
            architecture={
                "patch_nums": _PATCH_NUMS_256,
                "vocab_size": 4096,
                "z_channels": 32,
                "ch": 160,
                "share_quant_resi": 4,
                "quant_resi": 0.5,
            },
            image_size=256,
            files=("vae_ch160v4096z32.pth",),
        ),
        _taming_vqgan(1024),
        _taming_vqgan(16384),
    )
}
"""Sources: FoundationVision/LlamaGen, FoundationVision/VAR and CompVis/taming-transformers."""


def model_spec(name: str) -> ModelSpec:
    """Look a published model up.

    Raises:
        ConfigError: no such model; names the known ones.
    """
    if name not in MODELS:
        raise ConfigError(f"there is no published model {name!r}; known are {', '.join(MODELS)}.")
    return MODELS[name]


def architecture_of(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A published model's architecture with some fields replaced; lists become tuples.

    Args:
        name: a published model.
        changes: `policy.architecture` or `tokenizer.architecture` of a configuration.
    Raises:
        ConfigError: no such model, or a field that it does not have.
    """
    architecture = model_spec(name).architecture
    unknown = changes.keys() - architecture.keys()
    if unknown:
        raise ConfigError(
            f"architecture has {', '.join(sorted(unknown))}, but {name} has only "
            f"{', '.join(architecture)}; correct the key."
        )
    replaced = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    return architecture | replaced
