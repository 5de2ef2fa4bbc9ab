"""The configuration of the loss, the entropy controller and the optimiser.

Must not import torch.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlgen.config.base import Dtype, Fraction, NonNegative, Positive, PositiveInt, Section


class GrpoConfig(Section):
    """The policy loss."""

    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or of the whole image (mean log-prob)."""
    ratio_clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Ratios under 1 minus this gain nothing more."""
    ratio_clip_high: Positive = 0.2
    """Ratios over 1 plus this gain nothing more."""
    kl_coef: NonNegative = 0.004
    """Weight of the k3 KL to the reference policy; 0 saves the reference pass."""
    kl_level: Literal["token", "sequence"] = "token"
    """k3 of each token, or of the image's mean log-prob."""
    reference: Literal["frozen", "ema"] = "frozen"
    """Reference policy: the base, or a moving average of the trained one."""
    reference_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    """Decay per step of an `ema` reference."""
    inner_epochs: PositiveInt = 1
    """Optimiser steps on each batch."""
    importance_cap: Annotated[float, Field(ge=1.0)] = 2.0
    """What an older policy sampled counts min(p_before / p_sampler, this) times, p_before being
    the policy before the update; only with `max_policy_lag` of 1 or more."""
    ratio_tolerance: Positive = 1e-4
    """Largest |ratio - 1| allowed at the first update, when policy and sampler are equal; in
    bfloat16 the gap is only measured."""
    scale_weight_alpha: NonNegative = 0.0
    """A token of a VAR scale of h x w tokens counts 1/(h*w)^alpha, normalised to mean 1."""


class EntropyConfig(Section):
    """Adaptive entropy bonus: a controller on normalised entropy H / ln(codebook size)."""

    base_coef: NonNegative = 0.0
    """Coefficient at the target; 0 switches the controller off."""
    target: Fraction = 0.6
    """Normalised entropy to hold."""
    dead_band: Fraction = 0.015
    """Deviations up to this are ignored."""
    gain: NonNegative = 3.0
    """The coefficient is base_coef * exp(gain * (target - entropy))."""
    min_coef: NonNegative = 0.0
    """Lower limit of the coefficient."""
    max_coef: NonNegative = 0.02
    """Upper limit of the coefficient."""
    smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the running mean of the measured entropy."""
    warmup_fraction: Fraction = 0.05
    """Share of the run over which the bonus rises linearly from 0."""
    decay_start_fraction: Fraction = 0.85
    """From this share of the run on the bonus falls to 0 along half a cosine."""

    @model_validator(mode="after")
    def _limits_are_ordered(self) -> Self:
        if self.min_coef > self.max_coef:
            raise ValueError(
                f"min_coef = {self.min_coef} is above max_coef = {self.max_coef}; swap them"
            )
        return self


class LoraConfig(Section):
    """Low-rank adaptation: W + alpha / rank * B A, with B starting at zero."""

    rank: PositiveInt = 16
    """Rows of A and columns of B."""
    alpha: Positive = 32.0
    """Scale of the addition, divided by the rank."""


class LearnerConfig(Section):
    """Optimisation of the policy."""

    num_workers: PositiveInt = 1
    """Learner ranks; the loss does not depend on it."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """What a rank of several holds: `ddp` the whole policy, reference and optimiser, `fsdp` (FSDP2)
    a share of each, for policies that are too large for one device."""
    threads: PositiveInt = 1
    """CPU threads of each rank."""
    num_cpus: NonNegative = 0.25
    """CPUs that Ray sets aside for each rank."""
    num_gpus: NonNegative = 0.0
    """GPUs for each rank."""
    label_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes for the ranks and the moment store, which hold the run's state, such as
    `ray.io/market-type: on-demand`."""
    dtype: Dtype = "float32"
    """Number format of the arithmetic; weights and optimiser stay float32."""
    lora: LoraConfig | None = None
    """Train low-rank additions to the linear layers instead of the weights; null trains all."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    micro_batch_size: PositiveInt = 480
    """Images in one forward and backward pass of a rank; the loss does not depend on it."""
    lr: Positive = 2e-4
    """AdamW's learning rate at the start."""
    final_lr_fraction: Fraction = 0.1
    """The rate falls linearly to this share at the last step."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """AdamW's first decay."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """AdamW's second decay."""
    weight_decay: NonNegative = 0.0
    """AdamW's weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
