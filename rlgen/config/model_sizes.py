"""How large a model is, by closed formulas over its architecture. Must not import torch.

Owns counts of parameters and tokens. A test holds them against the published numbers and against
the modules.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Architecture = Mapping[str, Any]


@dataclass(frozen=True)
class PolicySizes:
    """What a plan needs to know of a policy."""

    num_layers: int
    width: int
    codebook_size: int
    block_sizes: tuple[int, ...]
    """Tokens that are drawn at once, in order: ones, or a VAR's scales."""
    linears: tuple[tuple[int, int], ...]
    """Inputs and outputs of the linear layers that each token of a block goes through."""
    kept_widths: tuple[float, float]
    """Values that a block keeps per token for the backward pass, as multiples of the width: in the
    arithmetic's format, and in float32. Measured."""
    image_linears: tuple[tuple[int, int], ...] = ()
    """The same as linears of those that a block applies once per image."""

    @property
    def num_tokens(self) -> int:
        """L, tokens of an image."""
        return sum(self.block_sizes)

    def num_lora_parameters(self, rank: int) -> int:
        """Parameters of adapters on every linear layer of every block."""
        return self.num_layers * sum(
            min(rank, inputs, outputs) * (inputs + outputs)
            for inputs, outputs in self.linears + self.image_linears
        )


def policy_sizes(family: str, architecture: Architecture) -> PolicySizes:
    """Sizes of a policy of the families llamagen, var and vqgan_gpt."""
    a = architecture
    width = a["width"]
    if family == "var":
        hidden = round(width * a["mlp_ratio"])
        linears = [(width, 3 * width), (width, width), (width, hidden), (hidden, width)]
        modulation = () if a["shared_aln"] else ((width, 6 * width),)
        blocks = tuple(side**2 for side in a["patch_nums"])
        return PolicySizes(
            a["depth"], width, a["codebook_size"], blocks, tuple(linears), (8, 16), modulation
        )
    if family == "llamagen":
        ffn = _ffn_width(a)
        linears = [(width, 3 * width), (width, width), *[(width, ffn)] * 2, (ffn, width)]
        kept = (10 + 3 * ffn / width, 5.0)
    else:
        linears = [*[(width, width)] * 4, (width, 4 * width), (4 * width, width)]
        kept = (12.0, 4.0)
    blocks = (1,) * a["grid_size"] ** 2
    return PolicySizes(a["num_layers"], width, a["codebook_size"], blocks, tuple(linears), kept)


def num_parameters(family: str, architecture: Architecture) -> int:
    """Trainable parameters of a policy or tokenizer of any family."""
    return _COUNTS[family](architecture)


def _ffn_width(a: Architecture) -> int:
    """8/3 of the width, rounded up to a multiple."""
    hidden, multiple = int(2 * 4 * a["width"] / 3), a["ffn_multiple_of"]
    return -(-hidden // multiple) * multiple


def _llamagen(a: Architecture) -> int:
    width = a["width"]
    block = 4 * width**2 + 3 * width * _ffn_width(a) + 2 * width
    if a.get("caption_width") is None:
        condition = (a["num_classes"] + 1) * width
    else:
        condition = (a["caption_width"] + width) * width  # the learned empty caption is a buffer
    return a["num_layers"] * block + 2 * a["codebook_size"] * width + width + condition


def _var(a: Architecture) -> int:
    width, hidden = a["width"], round(a["width"] * a["mlp_ratio"])
    modulation = 6 * width * (width + 1)
    attention = _linear(width, 3 * width) - width + _linear(width, width)  # keys have no bias
    attention += a["num_heads"] if a["attn_l2_norm"] else 0
    block = attention + _linear(width, hidden) + _linear(hidden, width)
    block += 6 * width if a["shared_aln"] else modulation
    num_tokens = sum(side**2 for side in a["patch_nums"])
    embeddings = a["patch_nums"][0] ** 2 + num_tokens + len(a["patch_nums"]) + a["num_classes"] + 1
    return (
        a["depth"] * block
        + (modulation if a["shared_aln"] else 0)
        + embeddings * width
        + _linear(a["code_dim"], width)
        + _linear(width, 2 * width)
        + _linear(width, a["codebook_size"])
    )


def _vqgan_gpt(a: Architecture) -> int:
    width, codebook = a["width"], a["codebook_size"]
    block = 4 * _linear(width, width) + 4 * width
    block += _linear(width, 4 * width) + _linear(4 * width, width)
    return a["num_layers"] * block + (2 * codebook + a["grid_size"] ** 2 + 2) * width


def _llamagen_vq(a: Architecture) -> int:
    code, z = a["codebook_embed_dim"], a["z_channels"]
    coarsest = {len(a["encoder_ch_mult"]) - 1}
    nets = _encoder(a["ch"], a["encoder_ch_mult"], a["num_res_blocks"], z, coarsest)
    nets += _decoder(a["ch"], a["decoder_ch_mult"], a["num_res_blocks"], z, coarsest)
    return nets + a["codebook_size"] * code + _linear(z, code) + _linear(code, z)


def _taming_vqgan(a: Architecture) -> int:
    code, z, ch, ch_mult = a["embed_dim"], a["z_channels"], a["ch"], a["ch_mult"]
    levels = {i for i in range(len(ch_mult)) if a["resolution"] // 2**i in a["attn_resolutions"]}
    nets = _encoder(ch, ch_mult, a["num_res_blocks"], z, levels)
    nets += _decoder(ch, ch_mult, a["num_res_blocks"], z, levels)
    return nets + a["n_embed"] * code + _linear(z, code) + _linear(code, z)


def _var_vqvae(a: Architecture) -> int:
    z, ch, ch_mult = a["z_channels"], a["ch"], (1, 1, 2, 2, 4)
    num_phi = a["share_quant_resi"] or len(a["patch_nums"])
    nets = _encoder(ch, ch_mult, 2, z, {4}) + _decoder(ch, ch_mult, 2, z, {4})
    return nets + a["vocab_size"] * z + (num_phi + 2) * _conv3(z, z)


_COUNTS = {
    "llamagen": _llamagen,
    "var": _var,
    "vqgan_gpt": _vqgan_gpt,
    "llamagen_vq": _llamagen_vq,
    "taming_vqgan": _taming_vqgan,
    "var_vqvae": _var_vqvae,
}


def _linear(inputs: int, outputs: int) -> int:
    """A linear layer or a 1x1 convolution."""
    return inputs * outputs + outputs


def _conv3(inputs: int, outputs: int) -> int:
    return 9 * inputs * outputs + outputs


def _resnet(inputs: int, outputs: int) -> int:
    shortcut = 0 if inputs == outputs else _linear(inputs, outputs)
    return 2 * inputs + _conv3(inputs, outputs) + 2 * outputs + _conv3(outputs, outputs) + shortcut


def _attention(channels: int) -> int:
    return 2 * channels + 4 * _linear(channels, channels)


def _level(inputs: int, outputs: int, num_blocks: int, has_attention: bool) -> int:
    blocks = _resnet(inputs, outputs) + (num_blocks - 1) * _resnet(outputs, outputs)
    return blocks + (num_blocks * _attention(outputs) if has_attention else 0)


def _ends(coarse: int, z_channels: int, full: int, pixels_out: bool) -> int:
    """First and last convolution, last norm, and the middle block at the coarsest level."""
    middle = 2 * _resnet(coarse, coarse) + _attention(coarse)
    if pixels_out:
        return _conv3(z_channels, coarse) + middle + 2 * full + _conv3(full, 3)
    return _conv3(3, full) + middle + 2 * coarse + _conv3(coarse, z_channels)


def _encoder(ch: int, ch_mult: tuple[int, ...], depth: int, z: int, attention: set[int]) -> int:
    widths = [ch, *(ch * multiple for multiple in ch_mult)]
    levels = sum(
        _level(widths[i], widths[i + 1], depth, i in attention)
        + (_conv3(widths[i + 1], widths[i + 1]) if i + 1 < len(ch_mult) else 0)
        for i in range(len(ch_mult))
    )
    return levels + _ends(widths[-1], z, ch, pixels_out=False)


def _decoder(ch: int, ch_mult: tuple[int, ...], depth: int, z: int, attention: set[int]) -> int:
    widths = [*(ch * multiple for multiple in ch_mult), ch * ch_mult[-1]]
    levels = sum(
        _level(widths[i + 1], widths[i], depth + 1, i in attention)
        + (_conv3(widths[i], widths[i]) if i > 0 else 0)
        for i in range(len(ch_mult))
    )
    return levels + _ends(widths[-1], z, widths[0], pixels_out=True)
