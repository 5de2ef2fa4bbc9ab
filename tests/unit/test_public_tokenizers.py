"""The published tokenizers: names and sizes, search and look-up, ranges, files, refusals.

Their numbers against the published code are the parity cases' matter.
Shapes: B images, L image tokens, C code dimensions, g side of the grid.
"""

import pytest
import torch

from rlgen.errors import CheckpointError, ConfigError
from rlgen.nn.weights import save_weights
from rlgen.tokenizers import codebook
from rlgen.tokenizers.autoencoder import AttentionBlock
from rlgen.tokenizers.codebook import nearest_codes
from rlgen.tokenizers.conv_vq import ConvVQ, ConvVQConfig
from rlgen.tokenizers.load import build_tokenizer, load_tokenizer, save_tokenizer

TINY = {
    "llamagen_vq": {
        "image_size": 16,
        "codebook_size": 30,
        "encoder_ch_mult": [1, 2],
        "decoder_ch_mult": [1, 2],
        "z_channels": 12,
        "ch": 32,
        "num_res_blocks": 1,
    },
    "taming_vqgan": {
        "resolution": 16,
        "n_embed": 30,
        "embed_dim": 8,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "z_channels": 12,
        "attn_resolutions": [8],
    },
    "var_vqvae": {"patch_nums": [1, 2, 3], "vocab_size": 30, "z_channels": 8, "ch": 32},
}
GRIDS = ("llamagen_vq", "taming_vqgan")


def tiny(family, **fields):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_tokenizer(family, TINY[family] | fields)


def random_images(tokenizer, batch=2):
    shape = (batch, 3, tokenizer.image_size, tokenizer.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def random_tokens(tokenizer, batch=2):
    shape = (batch, tokenizer.num_tokens)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(tokenizer.codebook_size, shape, generator=generator)


@pytest.mark.parametrize(
    ("family", "fields", "num_tensors", "num_tokens"),
    [
        # Tensors as listed for the published files, without the one that is no weight.
        ("llamagen_vq", {}, 343, 256),
        (
            "llamagen_vq",
            {"encoder_ch_mult": [1, 2, 2, 4], "decoder_ch_mult": [1, 2, 2, 4]},
            299,
            1024,
        ),
        ("taming_vqgan", {}, 343, 256),
        ("var_vqvae", {}, 323, 680),
    ],
)
def test_published_sizes(family, fields, num_tensors, num_tokens):
    with torch.device("meta"):
        tokenizer = build_tokenizer(family, fields)
    assert len(tokenizer.state_dict()) == num_tensors
    assert (tokenizer.image_size, tokenizer.num_tokens) == (256, num_tokens)


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("llamagen_vq", "encoder.conv_blocks.0.downsample.conv.weight", [32, 32, 3, 3]),
        ("llamagen_vq", "encoder.conv_blocks.1.res.0.nin_shortcut.bias", [64]),
        ("llamagen_vq", "encoder.conv_blocks.1.attn.0.q.weight", [64, 64, 1, 1]),
        ("llamagen_vq", "encoder.mid.1.proj_out.bias", [64]),
        # LlamaGen counts the decoder's levels as they run, from the coarsest...
        ("llamagen_vq", "decoder.conv_blocks.0.upsample.conv.weight", [64, 64, 3, 3]),
        ("llamagen_vq", "decoder.conv_blocks.1.res.1.conv2.weight", [32, 32, 3, 3]),
        # ...taming and VAR by resolution, from the finest.
        ("taming_vqgan", "decoder.up.1.upsample.conv.weight", [64, 64, 3, 3]),
        ("taming_vqgan", "decoder.up.0.block.1.conv2.weight", [32, 32, 3, 3]),
        ("taming_vqgan", "decoder.up.1.attn.1.v.weight", [64, 64, 1, 1]),
        ("taming_vqgan", "encoder.down.0.downsample.conv.bias", [32]),
        ("taming_vqgan", "encoder.mid.block_2.norm1.weight", [64]),
        ("taming_vqgan", "quantize.embedding.weight", [30, 8]),
        ("var_vqvae", "encoder.mid.attn_1.qkv.weight", [384, 128, 1, 1]),
        ("var_vqvae", "decoder.up.4.attn.2.proj_out.weight", [128, 128, 1, 1]),
        ("var_vqvae", "quantize.quant_resi.qresi_ls.3.weight", [8, 8, 3, 3]),
        ("var_vqvae", "post_quant_conv.weight", [8, 8, 3, 3]),
    ],
)
def test_tensors_have_their_public_names(family, name, shape):
    assert list(tiny(family).state_dict()[name].shape) == shape


def test_attention_follows_the_configured_resolution():
    def levels(**fields):
        names = tiny("taming_vqgan", **fields).state_dict()
        return {name.split(".")[2] for name in names if ".attn." in name}

    assert levels() == {"1"}
    assert levels(attn_resolutions=[16]) == {"0"}
    assert levels(attn_resolutions=[4]) == set(), "the middle's attention has another name"


def test_fused_attention_is_the_separate_one():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        separate = AttentionBlock(32, has_fused_qkv=False)
    fused = AttentionBlock(32, has_fused_qkv=True)
    state = separate.state_dict()
    for part in ("weight", "bias"):
        state[f"qkv.{part}"] = torch.cat([state.pop(f"{one}.{part}") for one in "qkv"])
    fused.load_state_dict(state)
    x_BCHW = torch.randn(2, 32, 5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(fused(x_BCHW), separate(x_BCHW), atol=1e-6)
    # Attention has no order: turned positions give turned outputs.
    assert torch.allclose(separate(x_BCHW.flip(2)), separate(x_BCHW).flip(2), atol=1e-6)


@pytest.mark.parametrize("family", TINY)
def test_ranges_and_types(family):
    tokenizer = tiny(family)
    tokens_BL = tokenizer.encode(random_images(tokenizer))
    assert (tokens_BL.dtype, tokens_BL.shape) == (torch.int64, (2, tokenizer.num_tokens))
    assert tokens_BL.min() >= 0 and tokens_BL.max() < tokenizer.codebook_size == 30
    with torch.no_grad():
        tokenizer.decoder.conv_out.weight.mul_(100)  # far out of range
    images_01 = tokenizer.decode(tokens_BL)
    assert images_01.dtype == torch.float32
    assert images_01.shape == (2, 3, tokenizer.image_size, tokenizer.image_size)
    assert (images_01.min(), images_01.max()) == (0, 1)


@pytest.mark.parametrize("family", TINY)
def test_an_image_does_not_depend_on_its_batch(family):
    tokenizer = tiny(family)
    tokens_BL = random_tokens(tokenizer, batch=3)
    alone = tokenizer.decode(tokens_BL[1:2])
    assert torch.allclose(tokenizer.decode(tokens_BL)[1:2], alone, atol=1e-5)


@pytest.mark.parametrize("family", GRIDS)
def test_grids_need_not_be_square_and_are_in_raster_order(family):
    tokenizer = tiny(family)
    tokens_BL = random_tokens(tokenizer)
    pixels = tokenizer.decode_grid(tokens_BL.view(2, 8, 8))
    assert torch.equal(tokenizer.decode(tokens_BL), (pixels / 2 + 0.5).clamp(0, 1))
    assert tokenizer.decode_grid(tokens_BL[:, :24].view(2, 4, 6)).shape == (2, 3, 8, 12)


@pytest.mark.parametrize(("family", "is_normalised"), [("llamagen_vq", True), (GRIDS[1], False)])
def test_search_and_look_up_agree_on_the_length_of_codes(family, is_normalised):
    tokenizer = tiny(family)
    images_01 = random_images(tokenizer)
    latents_NC = tokenizer.latents(images_01).movedim(1, -1).flatten(0, 2)
    codes_VC = tokenizer.quantize.embedding.weight
    if is_normalised:
        latents_NC = latents_NC / latents_NC.norm(dim=1, keepdim=True)
        codes_VC = codes_VC / codes_VC.norm(dim=1, keepdim=True)
    tokens_BL = tokenizer.encode(images_01)
    assert torch.equal(tokens_BL.flatten(), torch.cdist(latents_NC, codes_VC).argmin(1))
    looked_up = tokenizer.quantize.look_up(tokens_BL.view(2, 8, 8))
    assert torch.allclose(looked_up.movedim(1, -1).flatten(0, 2), codes_VC[tokens_BL.flatten()])


def test_codebook_l2_norm_can_be_off():
    tokenizer = tiny("llamagen_vq", codebook_l2_norm=False)
    tokens_Bhw = random_tokens(tokenizer).view(2, 8, 8)
    raw = tokenizer.quantize.embedding.weight[tokens_Bhw].movedim(-1, 1)
    assert torch.equal(tokenizer.quantize.look_up(tokens_Bhw), raw)


@pytest.mark.parametrize(
    ("family", "field"), [("llamagen_vq", "dropout_p"), ("taming_vqgan", "dropout")]
)
def test_dropout_does_nothing_in_use(family, field):
    plain, dropping = tiny(family), tiny(family, **{field: 0.5})
    images_01 = random_images(plain)
    assert torch.equal(plain.latents(images_01), dropping.latents(images_01))


def test_long_searches_go_in_parts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    latents_NC = torch.randn(37, 5, generator=generator)
    codes_VC = torch.randn(11, 5, generator=generator)
    whole = nearest_codes(latents_NC, codes_VC)
    assert torch.equal(whole, torch.cdist(latents_NC, codes_VC).argmin(1))
    monkeypatch.setattr(codebook, "_MAX_DISTANCES", 4 * 11)
    assert torch.equal(nearest_codes(latents_NC, codes_VC), whole)


@pytest.mark.parametrize(
    ("family", "stray"),
    [
        ("llamagen_vq", "quantize.codebook_used"),
        ("taming_vqgan", None),
        ("var_vqvae", "quantize.ema_vocab_hit_SV"),
    ],
)
def test_public_state_loads_with_its_stray_and_nothing_else(family, stray):
    source, target = tiny(family), tiny(family)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    state = source.state_dict()
    strays = {} if stray is None else {stray: torch.zeros(3)}
    target.load_public_state_dict(state | strays)
    tokens_BL = random_tokens(source)
    assert torch.equal(target.decode(tokens_BL), source.decode(tokens_BL))
    with pytest.raises(CheckpointError, match=r"f\.pt does not fit .*1 unexpected \(loss\.logvar"):
        target.load_public_state_dict(state | {"loss.logvar": torch.zeros(1)}, "f.pt")
    del state["quant_conv.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing \(quant_conv\.bias"):
        target.load_public_state_dict(state)


@pytest.mark.parametrize("family", [*TINY, "conv_vq"])
def test_file_round_trip(family, tmp_path):
    tokenizer = (
        ConvVQ(ConvVQConfig(codebook_size=30)).requires_grad_(False)
        if family == "conv_vq"
        else tiny(family)
    )
    path = str(tmp_path / "tokenizer.safetensors")
    save_tokenizer(path, tokenizer)
    loaded = load_tokenizer(path, device="cpu")
    assert type(loaded) is type(tokenizer)
    assert loaded.config == tokenizer.config
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    tokens_BL = random_tokens(tokenizer)
    assert torch.equal(loaded.decode(tokens_BL), tokenizer.decode(tokens_BL))


def test_a_file_of_something_else_is_refused(tmp_path):
    path = str(tmp_path / "policy.safetensors")
    save_weights(path, {"w": torch.zeros(1)}, kind="llamagen", config={})
    with pytest.raises(CheckpointError, match=r"'llamagen', not a tokenizer.*conv_vq, "):
        load_tokenizer(path)
    save_weights(path, {"w": torch.zeros(1)}, kind="var_vqvae", config={"depth": 3})
    with pytest.raises(CheckpointError, match=r"policy\.safetensors describes .*'depth'"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("vqgan", {}, r"'vqgan' is unknown; use one of conv_vq, "),
        ("llamagen_vq", {"depth": 3}, r"not those of LlamaGenVQConfig.*'depth'"),
        ("llamagen_vq", {"ch": 48}, r"48 channels.*32 groups"),
        ("llamagen_vq", {"image_size": 200}, r"200 pixels.*multiple of 16"),
        ("llamagen_vq", {"decoder_ch_mult": [1, 2]}, r"halved 4 times and doubled 1 times"),
        ("taming_vqgan", {"double_z": True}, r"512 channels.*takes 256; set double_z to false"),
        ("var_vqvae", {"patch_nums": [2, 1]}, r"patch_nums = \[2, 1\].*grow"),
    ],
)
def test_what_can_not_be_built_is_refused_by_name(family, fields, message):
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        build_tokenizer(family, fields)


@pytest.mark.parametrize("family", TINY)
def test_images_and_codes_of_another_size_fail_loudly(family):
    tokenizer = tiny(family)
    with pytest.raises(RuntimeError):
        tokenizer.encode(torch.zeros(2, 3, 2 * tokenizer.image_size, tokenizer.image_size))
    with pytest.raises(RuntimeError):
        tokenizer.decode(random_tokens(tokenizer)[:, :-1])
