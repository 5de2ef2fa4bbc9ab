"""The table of published models: sizes against published numbers and modules, and the estimates."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlgen.config.load import load_config
from rlgen.config.model_plan import activation_bytes, describe_models, memory_estimates
from rlgen.config.model_sizes import num_parameters, policy_sizes
from rlgen.config.models import MODELS, architecture_of, model_spec
from rlgen.errors import ConfigError
from rlgen.nn.fit import read_sizes
from rlgen.nn.lora import add_lora
from rlgen.nn.weights import shapes_of
from tests.published import TINY, build

# Sums over the tensors of the public implementations.
PARAMETERS = {
    "llamagen-b-256": 110_888_448,
    "llamagen-l-256": 342_910_976,
    "llamagen-xl-256": 774_699_520,
    "llamagen-xxl-256": 1_410_972_672,
    "llamagen-3b-256": 3_096_659_200,
    "llamagen-b-384": 110_888_448,
    "llamagen-l-384": 342_910_976,
    "llamagen-xl-384": 774_699_520,
    "llamagen-xxl-384": 1_410_972_672,
    "llamagen-3b-384": 3_096_659_200,
    "var-d16-256": 310_283_520,
    "var-d20-256": 600_917_136,
    "var-d24-256": 1_033_399_360,
    "var-d30-256": 2_010_020_356,
    "var-d36-512": 2_353_893_904,
    "llamagen-vq-ds16": 71_883_403,
    "llamagen-vq-ds8": 70_109_835,
    "var-vq": 108_948_355,
    "vqgan-f16-1024": 72_141_699,
}


def test_every_model_is_named_after_itself_and_has_its_tokenizer() -> None:
    for name, spec in MODELS.items():
        assert spec.name == name
        assert spec.is_tokenizer == (spec.tokenizer is None)
        if spec.tokenizer is not None:
            assert MODELS[spec.tokenizer].is_tokenizer


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_formula_gives_the_published_number_of_parameters(name: str) -> None:
    spec = model_spec(name)
    assert num_parameters(spec.family, spec.architecture) == PARAMETERS[name]


@pytest.mark.parametrize("name", MODELS)
def test_the_formula_counts_what_the_module_has(name: str) -> None:
    spec = model_spec(name)
    module = build(name)
    counted = sum(parameter.numel() for parameter in module.parameters())
    assert num_parameters(spec.family, spec.architecture) == counted


@pytest.mark.parametrize("name", [n for n, spec in MODELS.items() if not spec.is_tokenizer])
def test_tokens_and_adapters_are_those_of_the_module(name: str) -> None:
    spec = model_spec(name)
    sizes = policy_sizes(spec.family, spec.architecture)
    module: Any = build(name)
    assert sizes.num_tokens == module.num_tokens
    assert sizes.block_sizes == tuple(module.block_sizes)
    assert sizes.codebook_size == module.codebook_size
    assert math.isqrt(sizes.block_sizes[-1] if spec.family == "var" else sizes.num_tokens) == (
        spec.image_size // 16
    )
    add_lora(module, rank=16, alpha=16.0, seed=0)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert sizes.num_lora_parameters(16) == trained


@pytest.mark.parametrize("name", MODELS)
def test_sizes_read_off_the_tensors_are_those_of_the_table(name: str) -> None:
    spec = model_spec(name)
    found = read_sizes(shapes_of(build(name).state_dict()))
    assert found is not None and found[0] == spec.family
    told = {key: value for key, value in found[1].items() if key in spec.architecture}
    assert told == {key: spec.architecture[key] for key in told} and len(told) >= 2


@pytest.mark.parametrize("name", [n for n in TINY if not model_spec(n).is_tokenizer])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_estimated_as_autograd_keeps_them(name: str, dtype: Any) -> None:
    """Measured as what autograd keeps, in the difference of four layers and two."""
    depth = "depth" if name == "var-d16-256" else "num_layers"

    def kept(num_layers: int) -> int:
        module: Any = build(name, "cpu", **TINY[name] | {depth: num_layers})
        own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        # Casts of weights, and their transposes, are counted with the weights.
        weights = {shape for p in module.parameters() for shape in (p.shape, p.shape[::-1])}
        sizes: dict[int, int] = {}
        held = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held.append(tensor)  # no address may be used twice
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and tensor.shape not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        labels = torch.zeros(7, dtype=torch.long)
        tokens = torch.zeros(7, module.num_tokens, dtype=torch.long)
        is_mixed = dtype == "bfloat16"
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_mixed),
        ):
            module.teacher_forced(labels, tokens)
        return sum(sizes.values())

    spec = model_spec(name)
    sizes = policy_sizes(spec.family, architecture_of(name, TINY[name]))
    estimated = activation_bytes(sizes, 7, dtype=dtype, is_checkpointed=False)
    assert estimated == pytest.approx(kept(4) - kept(2), rel=0.15)


def test_an_unknown_model_or_field_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no published model 'llamagen-m'.*llamagen-l-256"):
        model_spec("llamagen-m")
    with pytest.raises(ConfigError, match=r"num_layer, but llamagen-l-256 has only num_layers"):
        architecture_of("llamagen-l-256", {"num_layer": 3})
    assert architecture_of("var-vq", {"patch_nums": [1, 2]})["patch_nums"] == (1, 2)


def config_of(*overrides: str) -> Any:
    return load_config(
        None,
        [
            "policy.model=llamagen-l-256",
            "policy.checkpoint=required",
            "tokenizer.model=llamagen-vq-ds16",
            *overrides,
        ],
    )


def parts_of(role: str, *overrides: str) -> dict[str, float]:
    estimates = {e.role: e for e in memory_estimates(config_of(*overrides))}
    assert estimates[role].total == sum(estimates[role].parts.values())
    return estimates[role].parts


def test_learner_memory_follows_its_settings() -> None:
    count = PARAMETERS["llamagen-l-256"]
    full = parts_of("learner")
    assert full["weights"] == 4 * count and full["reference"] == 4 * count
    assert full["gradients and optimiser"] == 12 * count
    assert parts_of("learner", "grpo.kl_coef=0")["reference"] == 0
    assert parts_of("learner", "learner.dtype=bfloat16")["weights"] == 6 * count
    lora = parts_of("learner", "learner.lora={rank: 8}")
    assert lora["reference"] == 0
    assert lora["gradients and optimiser"] < 0.03 * full["gradients and optimiser"]
    less = parts_of("learner", "learner.gradient_checkpointing=true")
    assert less["activations"] < 0.15 * full["activations"]
    halved = parts_of("learner", "learner.micro_batch_size=240")
    assert halved["logits"] == full["logits"] / 2
    assert full["logits"] == 3 * 4 * 16384 * 256 * 480
    assert parts_of("learner", "rollout.cfg_scale=2")["logits"] == 2 * full["logits"]


def test_rollout_memory_is_that_of_the_larger_unit() -> None:
    per_row = 2 * 4 * 24 * 1024 * 256
    evaluating = parts_of("rollout", "evaluation.images_per_unit=250")
    assert evaluating["key-value cache"] == per_row * 500, "an evaluation's sweep is guided"
    training = parts_of("rollout", "evaluation.images_per_unit=10")
    assert training["key-value cache"] == per_row * 15 * 8
    unguided = parts_of("rollout", "evaluation.cfg_scales=[]", "rollout.dtype=bfloat16")
    assert unguided["key-value cache"] == per_row // 2 * 250
    assert unguided["weights"] == 2 * PARAMETERS["llamagen-l-256"]


def test_the_plan_counts_changed_architectures() -> None:
    lines = "\n".join(describe_models(config_of("policy.architecture={num_classes: 10}")))
    assert f"{PARAMETERS['llamagen-l-256'] - 990 * 1024:,} parameters" in lines
    assert "71,883,403" in lines
    assert describe_models(load_config()) == [], "the embedded default has no published model"


def test_models_are_known_without_torch() -> None:
    package = Path(__file__).resolve().parents[2] / "rlgen" / "config"
    for path in package.glob("model*.py"):
        assert "\nimport torch" not in path.read_text(), path
