"""The published tokenizers' golden cases, computed by rlgen's."""

import numpy as np
import torch
from torch import Tensor

from rlgen.parity.cases import Case, Codes, Outputs
from rlgen.tokenizers.grid_vq import GridVQ
from rlgen.tokenizers.llamagen_vq import LlamaGenVQ
from rlgen.tokenizers.load import build_tokenizer
from rlgen.tokenizers.taming_vqgan import TamingVQGAN
from rlgen.tokenizers.var_vqvae import VarVQVAE

_LLAMAGEN_FIELDS = {
    "codebook_size",
    "codebook_embed_dim",
    "codebook_l2_norm",
    "encoder_ch_mult",
    "decoder_ch_mult",
    "num_res_blocks",
    "z_channels",
    "ch",
    "dropout_p",
}
_TAMING_FIELDS = {
    "double_z",
    "z_channels",
    "resolution",
    "in_channels",
    "out_ch",
    "ch",
    "ch_mult",
    "num_res_blocks",
    "attn_resolutions",
    "dropout",
    "embed_dim",
    "n_embed",
}
_VAR_FIELDS = {"vocab_size", "z_channels", "ch", "share_quant_resi", "quant_resi", "patch_nums"}


def run_llamagen_vq(case: Case) -> Outputs:
    """Codes, latents and pixels of LlamaGen's tokenizer."""
    # "tokenizer" is upstream's name for a choice of the multipliers, which are given in full.
    case.check_fields(config=_LLAMAGEN_FIELDS | {"tokenizer"})
    fields = {name: case.config[name] for name in _LLAMAGEN_FIELDS & case.config.keys()}
    tokenizer = build_tokenizer("llamagen_vq", fields)
    assert isinstance(tokenizer, LlamaGenVQ)
    return _run_grid(case, tokenizer)


def run_taming_vqgan(case: Case) -> Outputs:
    """Codes, latents and pixels of taming's tokenizer."""
    case.check_fields(config=_TAMING_FIELDS)
    tokenizer = build_tokenizer("taming_vqgan", case.config)
    assert isinstance(tokenizer, TamingVQGAN)
    return _run_grid(case, tokenizer)


@torch.inference_mode()
def run_var_vqvae(case: Case) -> Outputs:
    """Codes, maps, policy inputs and pixels of VAR's tokenizer."""
    case.check_fields(config=_VAR_FIELDS)
    tokenizer = build_tokenizer("var_vqvae", case.config)
    assert isinstance(tokenizer, VarVQVAE)
    tokenizer.load_public_state_dict(case.weights(), case.name)
    tokens_BL = case.tensor("in.tokens")
    f_hat = tokenizer.quantize.f_hat(tokens_BL)
    outputs: Outputs = {
        "out.f_hat": f_hat,
        "out.var_input": tokenizer.quantize.inputs_of(tokens_BL),
        "out.phi_index": np.array(tokenizer.quantize.phi_index),
    }
    # Cases of the scales alone have no pixels.
    if "out.decoded" in case.arrays:
        outputs["out.decoded"] = tokenizer.decode_map(f_hat)
    if "in.image_u8" in case.arrays:
        latents = tokenizer.latents(_images_01(case))
        outputs["out.latent"] = latents
        outputs["out.codes"] = _codes(case, tokenizer.quantize.encode(latents), is_sequential=True)
    return outputs


@torch.inference_mode()
def _run_grid(case: Case, tokenizer: GridVQ) -> Outputs:
    tokenizer.load_public_state_dict(case.weights(), case.name)
    outputs: Outputs = {}
    if "in.codes" in case.arrays:
        tokens_Bhw = case.tensor("in.codes")
        outputs["out.decoded"] = tokenizer.decode_grid(tokens_Bhw)
    if "in.image_u8" in case.arrays:
        latents = tokenizer.latents(_images_01(case))
        codes = tokenizer.quantize.search(latents)
        outputs["out.latent"] = latents
        outputs["out.codes"] = _codes(case, codes, is_sequential=False)
        outputs["out.quantized"] = tokenizer.quantize.look_up(codes)
        outputs["out.reconstruction"] = tokenizer.decode_grid(codes)
    return outputs


def _images_01(case: Case) -> Tensor:
    return case.tensor("in.image_u8").float() / 255


def _codes(case: Case, codes: Tensor, *, is_sequential: bool) -> Codes:
    return Codes(
        codes,
        margin=case.arrays["aux.code_margin"],
        threshold=case.tolerance["out.codes"]["margin"],
        is_sequential=is_sequential,
    )
