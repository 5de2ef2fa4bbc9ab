"""Codes of growing maps: which phi, sampling = teacher forcing, greedy search, digits' tokenizer.

Shapes: B images, n tokens of a scale, L of all, C code dimensions, P side of the last scale.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from rlgen.config.digits import DigitsConfig
from rlgen.digits.data import load_digits_data
from rlgen.digits.train_tokenizer import growing_sides, train_multiscale_tokenizer
from rlgen.errors import ConfigError
from rlgen.tokenizers.load import load_tokenizer, save_tokenizer
from rlgen.tokenizers.multiscale import MultiScaleConfig, MultiScaleQuantizer, phi_index
from rlgen.tokenizers.multiscale_conv_vq import MultiScaleConvVQ, MultiScaleConvVQConfig

# Long enough to pass one reset of dead codes, at step 50.
CONFIG = DigitsConfig(tokenizer_steps=120, augmentations=2)


def random_quantizer(patch_nums=(1, 2, 3, 4), **fields):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MultiScaleConfig(codebook_size=20, code_dim=6, patch_nums=patch_nums, **fields)
        return MultiScaleQuantizer(config).requires_grad_(False)


def random_tokens(quantizer, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, quantizer.num_tokens)
    return torch.randint(quantizer.codebook_size, shape, generator=generator)


def step_by_step(quantizer, tokens_BL):
    """What sampling does: (the map after the last scale, inputs of all scales but the first)."""
    f_hat, inputs = None, []
    for scale, tokens_Bn in enumerate(tokens_BL.split(quantizer.block_sizes, dim=1)):
        f_hat, following = quantizer.embed_step(f_hat, tokens_Bn, scale)
        inputs.append(following)
    assert inputs.pop() is None, "nothing follows the last scale"
    return f_hat, torch.cat(inputs, 1)


@pytest.mark.parametrize(
    ("num_scales", "num_phi", "expected"),
    [
        (10, 4, (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)),  # the published weights' table: two ties
        (4, 4, (0, 1, 2, 3)),
        (6, 2, (0, 0, 0, 1, 1, 1)),
        (5, 1, (0, 0, 0, 0, 0)),
        (7, 0, (0, 1, 2, 3, 4, 5, 6)),
    ],
)
def test_scales_share_the_nearest_phi(num_scales, num_phi, expected):
    assert phi_index(num_scales, num_phi) == expected


@pytest.mark.parametrize("num_phi", [0, 1, 4])
def test_sampling_sees_the_inputs_of_teacher_forcing_bit_for_bit(num_phi):
    quantizer = random_quantizer(num_phi=num_phi)
    tokens_BL = random_tokens(quantizer)
    f_hat, inputs = step_by_step(quantizer, tokens_BL)
    assert inputs.shape == (3, quantizer.num_tokens - 1, 6)
    assert torch.equal(f_hat, quantizer.f_hat(tokens_BL))
    assert torch.equal(inputs, quantizer.inputs_of(tokens_BL))


def test_autocast_and_inference_mode_change_no_bit():
    quantizer = random_quantizer()
    tokens_BL = random_tokens(quantizer)
    f_hat, inputs = step_by_step(quantizer, tokens_BL)
    codes = quantizer.encode(f_hat)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        f_hat_inside, inputs_inside = step_by_step(quantizer, tokens_BL)
        assert torch.equal(quantizer.encode(f_hat), codes)
    assert torch.equal(f_hat_inside, f_hat)
    assert torch.equal(inputs_inside, inputs)
    assert inputs_inside.dtype == torch.float32


def test_a_step_leaves_the_map_that_it_is_given_alone():
    quantizer = random_quantizer()
    tokens = random_tokens(quantizer).split(quantizer.block_sizes, dim=1)
    before, _ = quantizer.embed_step(None, tokens[0], 0)
    kept = before.clone()
    quantizer.embed_step(before, tokens[1], 1)
    assert torch.equal(before, kept)


def test_a_scale_changes_no_input_up_to_its_own():
    quantizer = random_quantizer()
    tokens_BL = random_tokens(quantizer)
    inputs = quantizer.inputs_of(tokens_BL)
    changed = tokens_BL.clone()
    changed[:, 5:14] = (changed[:, 5:14] + 1) % quantizer.codebook_size  # scale 2: 9 codes
    changed_inputs = quantizer.inputs_of(changed)
    # Inputs begin with scale 1: 4 of it, 9 of scale 2, 16 of scale 3.
    assert torch.equal(changed_inputs[:, :13], inputs[:, :13])
    assert (changed_inputs[:, 13:] != inputs[:, 13:]).any(2).all()


def test_codes_and_inputs_are_in_raster_order():
    quantizer = random_quantizer(patch_nums=(1, 2, 4), quant_resi=0.0)
    quantizer.embedding.weight[0] = 0  # a code that adds nothing
    tokens_BL = torch.zeros(1, quantizer.num_tokens, dtype=torch.int64)
    tokens_BL[0, 1 + 4 + 6] = 7  # last scale, row 1, column 2
    f_hat = quantizer.f_hat(tokens_BL)
    assert torch.equal(f_hat[0, :, 1, 2], quantizer.embedding.weight[7])
    assert f_hat.count_nonzero() == 6

    tokens_BL = torch.zeros(1, quantizer.num_tokens, dtype=torch.int64)
    tokens_BL[0, 1 + 2] = 7  # scale 1, row 1, column 0
    next_inputs = quantizer.inputs_of(tokens_BL)[0, 4:].norm(dim=1).view(4, 4)
    assert next_inputs.view(2, 2, 2, 2).mean((1, 3)).argmax() == 2


@pytest.mark.parametrize("num_phi", [0, 4])
def test_search_is_greedy_over_what_is_left(num_phi):
    quantizer = random_quantizer(num_phi=num_phi)
    latent = torch.randn(5, 6, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    codes = quantizer.embedding.weight.double()
    phis = quantizer.quant_resi if num_phi == 0 else quantizer.quant_resi["qresi_ls"]
    expected, rest = [], latent
    for scale, side in enumerate(quantizer.patch_nums):
        wanted = F.adaptive_avg_pool2d(rest, side).flatten(2).mT
        chosen = torch.cdist(wanted, codes.expand(5, -1, -1)).argmin(2)
        enlarged = F.interpolate(
            codes[chosen].mT.unflatten(2, (side, side)), (4, 4), mode="bicubic"
        )
        weight, bias = phis[scale].weight.double(), phis[scale].bias.double()
        convolved = F.conv2d(enlarged, weight, bias, padding=1)
        rest = rest - (enlarged + convolved) / 2
        expected.append(chosen)
    quantized = quantizer.quantize(latent.float())
    assert torch.equal(quantized.tokens_BL, torch.cat(expected, 1))
    assert torch.equal(quantizer.encode(latent.float()), quantized.tokens_BL)
    left = latent - quantizer.f_hat(quantized.tokens_BL)
    assert (left - rest).abs().max() < 1e-5, "float32 against float64"


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"num_phi": 4}, [f"quant_resi.qresi_ls.{k}." for k in range(4)]),
        ({"num_phi": 1}, ["quant_resi.qresi."]),
        ({"num_phi": 0}, [f"quant_resi.{k}." for k in range(4)]),
        ({"quant_resi": 0.0}, []),
    ],
)
def test_names_are_the_public_ones_however_phi_is_shared(fields, names):
    own = set(random_quantizer(**fields).state_dict())
    phis = {name + part for name in names for part in ("weight", "bias")}
    assert own == phis | {"embedding.weight"}


def test_a_copy_has_phis_of_its_own():
    quantizer = random_quantizer()
    tokens_BL = random_tokens(quantizer)
    twin = copy.deepcopy(quantizer)
    for parameter in twin.parameters():
        parameter.zero_()
    assert twin.f_hat(tokens_BL).count_nonzero() == 0
    assert quantizer.f_hat(tokens_BL).count_nonzero() > 0


@pytest.mark.parametrize("sides", [(4,), (1, 3, 3), (4, 2), (0, 1), ()])
def test_scales_that_do_not_grow_are_refused(sides):
    with pytest.raises(ConfigError, match=r"patch_nums = \[.*grow"):
        MultiScaleConfig(codebook_size=8, code_dim=4, patch_nums=sides)


def test_a_tokenizer_whose_scales_miss_its_grid_is_refused():
    with pytest.raises(ConfigError, match=r"image_size = 32 is not 4 times.*\[1, 2, 3, 4\]"):
        MultiScaleConvVQConfig(image_size=32)


@pytest.fixture(scope="module")
def data():
    return load_digits_data(CONFIG)


@pytest.fixture(scope="module")
def trained(data):
    return train_multiscale_tokenizer(data, CONFIG)


def test_gradients_reach_every_weight():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = MultiScaleConvVQ(MultiScaleConvVQConfig(codebook_size=20))
    output = tokenizer(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    output.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in tokenizer.parameters())
    touched = tokenizer.quantize.embedding.weight.grad.abs().sum(1).nonzero().flatten()
    assert torch.equal(output.tokens_BL.unique(), touched), "exactly the chosen codes are pulled"


def test_every_scale_improves_the_reconstruction_of_heldout_digits(trained, data):
    images_01 = data.heldout.images_rgb_01
    tokens_BL = trained.encode(images_01)
    assert tokens_BL.shape == (len(images_01), trained.num_tokens) == (len(images_01), 30)
    assert len(tokens_BL.unique()) > 32
    with torch.no_grad():
        latents = trained.encoder(images_01[:, :1] * 2 - 1)
        left = [(latents - s).pow(2).mean() for s in trained.quantize.partial_sums(tokens_BL)]
    assert left == sorted(left, reverse=True)
    decoded = trained.decode(tokens_BL)
    assert decoded.min() >= 0 and decoded.max() <= 1
    # The mean image leaves 0.1, 120 steps 0.01; 0.025 leaves room for other machines.
    assert (decoded - images_01).pow(2).mean() < 0.025


def test_training_is_deterministic_and_leaves_the_global_generator_alone(data):
    short = CONFIG.model_copy(update={"tokenizer_steps": 3})
    first = train_multiscale_tokenizer(data, short).state_dict()
    torch.rand(3)
    before = torch.get_rng_state()
    seen = []
    again = train_multiscale_tokenizer(data, short, on_step=lambda *steps: seen.append(steps))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, first[name]) for name, tensor in again.state_dict().items())
    other = train_multiscale_tokenizer(data, short.model_copy(update={"seed": 5}))
    assert not torch.equal(other.quantize.embedding.weight, again.quantize.embedding.weight)


def test_file_round_trip(trained, data, tmp_path):
    path = str(tmp_path / "tokenizer.safetensors")
    save_tokenizer(path, trained)
    loaded = load_tokenizer(path, device="cpu")
    assert isinstance(loaded, MultiScaleConvVQ)
    assert loaded.config == trained.config
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    images_01 = data.heldout.images_rgb_01[:32]
    assert torch.equal(loaded.encode(images_01), trained.encode(images_01))
    tokens_BL = trained.encode(images_01)
    assert torch.equal(loaded.decode(tokens_BL), trained.decode(tokens_BL))


@pytest.mark.parametrize(("grid_size", "sides"), [(4, (1, 2, 3, 4)), (8, (1, 2, 3, 4, 5, 7, 8))])
def test_sides_grow_to_the_grid(grid_size, sides):
    assert growing_sides(grid_size) == sides
