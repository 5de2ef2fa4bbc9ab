"""The whole decoding loop as one CUDA graph.

Thousands of small kernels a batch cost more to launch than to run. Recorded once for a batch
size and settings, they are replayed by a single launch, with new class ids and noise copied in.
Weights may change in place between replays; the graph reads them where they are.

Shapes: B images, L image tokens.
"""

from typing import Any

import torch
from torch import Tensor

from rlgen.errors import ConfigError
from rlgen.sampling.decode import check_guidance, sample_tokens
from rlgen.types import SamplingSettings

_WARM_UPS = 2


class GraphSampler:
    """`sample_tokens` of one policy for one batch size and one distribution."""

    def __init__(self, policy: Any, *, batch: int, settings: SamplingSettings) -> None:
        """Record the graph.

        Args:
            policy: on a CUDA device, where its tensors must stay; of any family.
            batch: B of every call.
            settings: the distribution of every call.
        Raises:
            ConfigError: the policy is not on a CUDA device, or can't be guided.
        """
        check_guidance(policy, settings)
        device = next(policy.parameters()).device
        if device.type != "cuda":
            raise ConfigError(
                f"a CUDA graph needs a policy on a CUDA device, and this one is on {device}; "
                "move it there, or sample without a graph."
            )
        self._class_ids_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self._noise_BL = torch.zeros(batch, policy.num_tokens, dtype=torch.float64, device=device)
        # Libraries allocate their workspaces at first use, which a recording must not see.
        side_stream = torch.cuda.Stream(device)
        side_stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side_stream):
            for _ in range(_WARM_UPS):
                sample_tokens(policy, self._class_ids_B, self._noise_BL, settings)
        torch.cuda.current_stream(device).wait_stream(side_stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._tokens_BL, self._logprobs_BL = sample_tokens(
                policy, self._class_ids_B, self._noise_BL, settings
            )

    def __call__(self, class_ids_B: Tensor, noise_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Draw images; see sample_tokens.

        Raises:
            ConfigError: another number of images than was recorded.
        """
        if class_ids_B.shape != self._class_ids_B.shape or noise_BL.shape != self._noise_BL.shape:
            raise ConfigError(
                f"the graph was recorded for {list(self._noise_BL.shape)} numbers of noise and is "
                f"given {list(noise_BL.shape)}; make another GraphSampler for this batch."
            )
        self._class_ids_B.copy_(class_ids_B)
        self._noise_BL.copy_(noise_BL)
        self._graph.replay()
        return self._tokens_BL.clone(), self._logprobs_BL.clone()
