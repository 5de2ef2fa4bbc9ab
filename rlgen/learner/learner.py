"""The learner: one policy update from one step's batch. Runs with or without process groups.

Owns the policy that is trained, its reference, the optimiser and the entropy controller. Must
not know Ray, rewards or where the batch came from.

Shapes: B images of this rank, L image tokens.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rlgen.config.run import RunConfig
from rlgen.errors import CheckpointError, NumericsError
from rlgen.grpo.entropy import EntropyController
from rlgen.grpo.loss import block_weights, clipped_surrogate, k3_divergence, token_mean
from rlgen.learner.totals import Totals
from rlgen.nn.lora import adapter_state, add_lora, lora_disabled, merged_state
from rlgen.nn.precision import autocast
from rlgen.sampling.scoring import Forward, score_tokens
from rlgen.sampling.units import training_settings
from rlgen.types import LearnerBatch

_LARGEST_MEAN_GAP = 0.1
"""In bfloat16: nats a token, far above rounding and far below another distribution."""


class Learner:
    """Applies GRPO to a policy; each rank of a group holds one."""

    def __init__(self, policy: Any, config: RunConfig, *, device: torch.device) -> None:
        """Take over a policy module.

        Args:
            policy: an nn.Module that follows the Policy protocol, already on the device.
            config: the run.
            device: where batches go.
        """
        self.policy = policy
        self.config = config
        self.device = device
        self.settings = training_settings(config)
        self.policy_version = 0
        self._gate_is_open = False
        self.entropy = EntropyController()
        self.reference: Any = None
        lora = config.learner.lora
        if config.grpo.kl_coef > 0 and lora is None:
            self.reference = copy.deepcopy(policy).requires_grad_(False)
        if lora is not None:
            add_lora(policy, rank=lora.rank, alpha=lora.alpha, seed=config.seed)
        policy.gradient_checkpointing = config.learner.gradient_checkpointing
        weights_L = block_weights(policy.block_sizes, config.grpo.scale_weight_alpha)
        self._weights_L = None if weights_L is None else weights_L.to(device)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in policy.parameters() if parameter.requires_grad],
            lr=config.learner.lr,
            betas=(config.learner.beta1, config.learner.beta2),
            weight_decay=config.learner.weight_decay,
        )
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._wrapped: nn.Module = policy
        if self.world_size > 1:
            self._wrapped = DistributedDataParallel(policy)

    def update(self, batch: LearnerBatch) -> dict[str, float]:
        """Run the inner epochs on one step's batch; the policy version becomes step + 1.

        Args:
            batch: this rank's whole groups.
        Returns:
            metrics over all ranks.
        Raises:
            NumericsError: the ratio gate, or a loss or gradient that is not finite. The policy
                is then as it was before the optimiser step that failed.
        """
        class_ids, tokens, rollout_logprobs, advantages = (
            torch.from_numpy(array).to(self.device)
            for array in (
                batch.class_ids_B,
                batch.tokens_BL.astype("int64"),
                batch.rollout_logprobs_BL,
                batch.advantages_B,
            )
        )
        pieces = list(
            zip(
                *(
                    x.split(self.config.learner.micro_batch_size)
                    for x in (class_ids, tokens, rollout_logprobs, advantages)
                ),
                strict=True,
            )
        )
        references = [self._reference_logprobs(piece[0], piece[1]) for piece in pieces]
        coef = self.entropy.coefficient(
            self.config.entropy, step=batch.step, num_steps=self.config.steps
        )
        metrics: dict[str, float] = {}
        for epoch in range(self.config.grpo.inner_epochs):
            totals = self._accumulate_gradients(
                pieces, references, coef, num_images=batch.num_images_total
            )
            epoch_metrics = totals.reduced(batch.num_images_total)
            if epoch == 0:
                metrics = epoch_metrics
                if not self._gate_is_open and batch.policy_version == self.policy_version:
                    self._check_ratio_gate(metrics)
            metrics["policy/grad_norm"] = self._step_optimizer(batch.step)
            metrics["policy/ratio_clipped_frac"] = epoch_metrics["policy/ratio_clipped_frac"]
        self.entropy = self.entropy.observed(
            metrics["policy/entropy_normalized"], smoothing=self.config.entropy.smoothing
        )
        self._move_reference()
        metrics["policy/entropy_coef"] = coef
        metrics["policy/lr"] = self._learning_rate(batch.step)
        metrics["policy/lag_steps"] = float(self.policy_version - batch.policy_version)
        self.policy_version = batch.step + 1
        return metrics

    def policy_state(self) -> dict[str, Tensor]:
        """The policy's weights under its public names, LoRA merged in."""
        return merged_state(self.policy)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the policy's weights: optimiser, controller, version, EMA reference;
        with LoRA the adapters, as the merged weights can't be taken apart."""
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "policy_version": self.policy_version,
            "mean_entropy": self.entropy.mean_entropy,
        }
        if self.reference is not None:
            state["reference"] = self.reference.state_dict()
        if self.config.learner.lora is not None:
            state["lora"] = adapter_state(self.policy)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict gave; the policy's weights are loaded apart.

        Raises:
            CheckpointError: the state belongs to another configuration.
        """
        if ("reference" in state) != (self.reference is not None):
            raise CheckpointError(
                f"the checkpoint {'has' if 'reference' in state else 'lacks'} a reference policy "
                f"and grpo.kl_coef = {self.config.grpo.kl_coef}; resume with the kl_coef that the "
                "run was started with."
            )
        if ("lora" in state) != (self.config.learner.lora is not None):
            raise CheckpointError(
                f"the checkpoint was written {'with' if 'lora' in state else 'without'} LoRA and "
                f"learner.lora = {self.config.learner.lora}; resume with the run's own setting."
            )
        self.policy.load_state_dict(state.get("lora", {}), strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.policy_version = int(state["policy_version"])
        self.entropy = EntropyController(state["mean_entropy"])
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])

    def _reference_logprobs(self, class_ids_B: Tensor, tokens_BL: Tensor) -> Tensor | None:
        if self.config.grpo.kl_coef == 0:
            return None
        with torch.no_grad(), autocast(self.device, self.config.learner.dtype):
            if self.reference is not None:
                return score_tokens(self.reference, class_ids_B, tokens_BL, self.settings)[0]
            with lora_disabled(self.policy):  # the frozen weights are the base
                return score_tokens(self.policy, class_ids_B, tokens_BL, self.settings)[0]

    def _accumulate_gradients(
        self,
        pieces: list[tuple[Tensor, ...]],
        references: list[Tensor | None],
        entropy_coef: float,
        *,
        num_images: int,
    ) -> Totals:
        grpo = self.config.grpo
        totals = Totals(self.device)
        forward: Forward = self._wrapped
        for index, (piece, reference) in enumerate(zip(pieces, references, strict=True)):
            class_ids, tokens, rollout_logprobs, advantages = piece
            if isinstance(self._wrapped, DistributedDataParallel):
                # Gradients travel once, with the last micro-batch.
                self._wrapped.require_backward_grad_sync = index == len(pieces) - 1
            with autocast(self.device, self.config.learner.dtype):
                logprobs, entropies = score_tokens(
                    self.policy, class_ids, tokens, self.settings, forward=forward
                )
            surrogate = clipped_surrogate(
                logprobs,
                rollout_logprobs,
                advantages,
                ratio=grpo.ratio,
                clip_low=grpo.ratio_clip_low,
                clip_high=grpo.ratio_clip_high,
                weights_L=self._weights_L,
            )
            loss_B = surrogate.loss_B - entropy_coef * token_mean(entropies, self._weights_L)
            kl_B = torch.zeros_like(loss_B)
            if reference is not None:
                kl_B = k3_divergence(logprobs, reference, self._weights_L, level=grpo.kl_level)
                loss_B = loss_B + grpo.kl_coef * kl_B
            # DDP averages over ranks; the step's loss is a mean over all images of all ranks.
            (loss_B.sum() * (self.world_size / num_images)).backward()
            gaps = logprobs - rollout_logprobs
            totals.add(surrogate, loss_B, kl_B, entropies, gaps, self.policy.codebook_size)
        return totals

    def _step_optimizer(self, step: int) -> float:
        norm = nn.utils.clip_grad_norm_(
            self.policy.parameters(), self.config.learner.max_grad_norm
        ).item()
        if not norm < float("inf"):
            self.optimizer.zero_grad(set_to_none=True)
            raise NumericsError(
                f"the gradient norm is {norm} at step {step}; the optimiser was not stepped. "
                "Look at the rewards and log-probs of this step, or lower learner.lr."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _learning_rate(self, step: int) -> float:
        learner = self.config.learner
        progress = step / max(self.config.steps - 1, 1)
        return learner.lr * (1.0 - (1.0 - learner.final_lr_fraction) * progress)

    def _move_reference(self) -> None:
        if self.reference is None or self.config.grpo.reference != "ema":
            return
        decay = self.config.grpo.reference_decay
        with torch.no_grad():
            for kept, new in zip(
                self.reference.parameters(), self.policy.parameters(), strict=True
            ):
                kept.lerp_(new, 1.0 - decay)

    def _check_ratio_gate(self, metrics: dict[str, float]) -> None:
        deviation = metrics["policy/ratio_max_deviation"]
        clipped = metrics["policy/ratio_clipped_frac"]
        gap = metrics["policy/logprob_gap_mean"]
        tolerance = self.config.grpo.ratio_tolerance
        if self.config.is_exact:
            self._gate_is_open = deviation < tolerance and clipped == 0.0
            found = (
                f"|ratio - 1| reaches {deviation:.3g} (allowed: {tolerance:g}) and "
                f"{clipped:.3g} of the ratios are clipped"
            )
        else:
            self._gate_is_open = gap < _LARGEST_MEAN_GAP
            found = (
                f"they differ by {gap:.3g} nats a token (allowed in bfloat16: "
                f"{_LARGEST_MEAN_GAP:g})"
            )
        if self._gate_is_open:
            return
        self.optimizer.zero_grad(set_to_none=True)
        raise NumericsError(
            f"before the first update the policy's log-probs must equal the sampler's, but "
            f"{found}. The learner scores another distribution than was sampled: compare the "
            "weights' digests on both sides, the dtype, and that cfg_scale, temperature, top_k "
            "and top_p are the same for both; dropout must be off."
        )
