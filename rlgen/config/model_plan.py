"""How large a published model's run is: parameters, tokens, and memory of each process.

Owns the estimates that `--dry-run` prints. They are made before anything is loaded, by formulas
over sizes alone. Must not import torch.
"""

from dataclasses import dataclass

from rlgen.config.base import Dtype
from rlgen.config.model_sizes import PolicySizes, num_parameters, policy_sizes
from rlgen.config.models import architecture_of, model_spec
from rlgen.config.run import PublicFile, RunConfig

GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class MemoryEstimate:
    """What one process of a role needs on its device."""

    role: str
    parts: dict[str, float]
    """Bytes by what they are for."""

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())


def describe_models(config: RunConfig) -> list[str]:
    """Sizes of a run with published models, line by line; nothing if policy.model is not set.

    Raises:
        ConfigError: policy.architecture or tokenizer.architecture has a field that the model lacks.
    """
    if config.policy.model is None:
        return []
    sizes = _sizes(config)
    total, trained = _num_parameters(config.policy), _num_trained(config)
    share = "all trained" if trained == total else f"{trained:,} in adapters trained"
    lines = ["", "Models", f"  policy {config.policy.model}: {total:,} parameters, {share}"]
    if config.tokenizer.model is not None:
        count = _num_parameters(config.tokenizer)
        lines.append(f"  tokenizer {config.tokenizer.model}: {count:,} parameters")
    lines += [
        f"  {sizes.num_tokens:,} tokens of {sizes.codebook_size:,} codes an image, "
        f"{sizes.num_tokens * config.images_per_step:,} tokens a step",
        f"  new weights for each rollout worker after a step: {total * 4 / GIB:.2f} GiB",
        "",
        "Memory of a process, estimated",
    ]
    for estimate in memory_estimates(config):
        parts = ", ".join(
            f"{name} {size / GIB:.2f}" for name, size in estimate.parts.items() if size
        )
        lines.append(f"  {estimate.role:<8} {estimate.total / GIB:7.2f} GiB: {parts}")
    return lines


def memory_estimates(config: RunConfig) -> list[MemoryEstimate]:
    """Device memory of one process of each role; policy.model must be set.

    N parameters of which T are trained; D width, L tokens, V codes, s bytes of the role's dtype.
    Rollout: weights s N; key-value cache 2 s D L per layer and row, where a unit of training or
    evaluation has one row per image, two with guidance; logits three times (as they come, as they
    are sampled from, and the noise) 4 V for each row and each token drawn at once.
    Learner: weights 4 N and, in bfloat16, their cast 2 N; gradients and AdamW's two moments 12 T;
    a frozen or EMA reference 4 N if there is a KL, none with LoRA; logits three times (as they
    come, their log-softmax, its gradient) 4 V per row and token of a micro-batch; activations: see
    `activation_bytes`. Under fsdp each of R ranks holds 1 / R of weights, gradients, moments and
    reference, and whole: what is gathered, 4 bytes for each parameter outside the blocks, of the
    block that computes and of the one fetched ahead; the cast, which autocast keeps of every block
    until the backward pass; and 4 T of gradients that wait for the last of several micro-batches.
    Reward: the tokenizer, 4 bytes a parameter. Scorers, extractor and judge come on top.
    What the allocator, kernels and CUDA itself take is not counted: leave a tenth.
    """
    sizes, total = _sizes(config), _num_parameters(config.policy)
    estimates = [
        MemoryEstimate("rollout", _rollout(config, sizes, total)),
        MemoryEstimate("learner", _learner(config, sizes, total)),
    ]
    if config.tokenizer.model is not None:
        tokenizer = {"tokenizer": 4.0 * _num_parameters(config.tokenizer)}
        estimates.insert(1, MemoryEstimate("reward", tokenizer))
    return estimates


def _rollout(config: RunConfig, sizes: PolicySizes, total: int) -> dict[str, float]:
    rollout, evaluation = config.rollout, config.evaluation
    training = rollout.conditions_per_unit * rollout.group_size * (1 + (rollout.cfg_scale > 1))
    rows = max(training, evaluation.images_per_unit * (1 + bool(evaluation.cfg_scales)))
    size = _BYTES[rollout.dtype]
    cache = 2 * size * sizes.num_layers * sizes.width * sizes.num_tokens * rows
    logits = 3 * 4 * sizes.codebook_size * max(sizes.block_sizes) * rows
    return {"weights": size * total, "key-value cache": cache, "logits": logits}


def _learner(config: RunConfig, sizes: PolicySizes, total: int) -> dict[str, float]:
    learner, trained = config.learner, _num_trained(config)
    size = _BYTES[learner.dtype]
    has_copy = config.grpo.kl_coef > 0 and learner.lora is None
    per_rank = config.images_per_step // learner.num_workers
    images = min(learner.micro_batch_size, per_rank)
    rows = images * (1 + (config.rollout.cfg_scale > 1))
    is_sharded = learner.sharding == "fsdp" and learner.num_workers > 1
    ranks = learner.num_workers if is_sharded else 1
    return {
        "weights": 4 * total / ranks + (size if size < 4 else 0) * total,
        "gathered": is_sharded * 4 * _num_gathered(config, total),
        "gradients and optimiser": 12 * trained / ranks,
        "whole gradients": is_sharded * (per_rank > images) * 4 * trained,
        "reference": 4 * total * has_copy / ranks,
        "logits": 3 * 4 * sizes.codebook_size * sizes.num_tokens * rows,
        "activations": activation_bytes(
            sizes, rows, dtype=learner.dtype, is_checkpointed=learner.gradient_checkpointing
        ),
    }


def _num_gathered(config: RunConfig, total: int) -> int:
    """Parameters that fsdp holds whole at once: the root and two of its blocks."""
    assert config.policy.model is not None, "only called for published models"
    spec = model_spec(config.policy.model)
    architecture = architecture_of(spec.name, config.policy.architecture)
    depth = "depth" if spec.family == "var" else "num_layers"
    num_blocks = architecture[depth]
    block = total - num_parameters(spec.family, architecture | {depth: num_blocks - 1})
    return total - max(num_blocks - 2, 0) * block


def activation_bytes(
    sizes: PolicySizes, rows: int, *, dtype: Dtype, is_checkpointed: bool
) -> float:
    """What the blocks keep for the backward pass, `PolicySizes.kept_widths` per layer and token.

    With checkpointing that of one layer, and one float32 value of the width for each layer.
    """
    positions = rows * sizes.num_tokens
    in_format, in_float32 = sizes.kept_widths
    layer = positions * sizes.width * (_BYTES[dtype] * in_format + 4 * in_float32)
    if is_checkpointed:
        return layer + sizes.num_layers * positions * 4 * sizes.width
    return sizes.num_layers * layer


def num_policy_parameters(config: RunConfig) -> int:
    """Parameters of the policy; policy.model must be set."""
    return _num_parameters(config.policy)


def _sizes(config: RunConfig) -> PolicySizes:
    assert config.policy.model is not None, "only called for published models"
    spec = model_spec(config.policy.model)
    return policy_sizes(spec.family, architecture_of(spec.name, config.policy.architecture))


def _num_parameters(file: PublicFile) -> int:
    assert file.model is not None, "only called for published models"
    spec = model_spec(file.model)
    return num_parameters(spec.family, architecture_of(spec.name, file.architecture))


def _num_trained(config: RunConfig) -> int:
    lora = config.learner.lora
    if lora is None:
        return _num_parameters(config.policy)
    return _sizes(config).num_lora_parameters(lora.rank)
