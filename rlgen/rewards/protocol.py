"""What an instance scorer is, and the check that every score goes through.

Owns the contract; must not know any scorer. Shapes: B = P*G images, condition-major.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rlgen.errors import RewardError


class InstanceScorer(Protocol):
    """Images and what they were asked for to one number each; higher is better."""

    def __call__(self, images_01: Tensor, prompts: Sequence[str], class_ids_B: Tensor) -> Tensor:
        """Map [B, 3, H, W] in [0, 1], B prompts and int64 [B] classes to float32 [B], finite."""


def check_scores(name: str, scores_B: object, class_ids_B: Tensor, *, group_size: int = 1) -> None:
    """Refuse scores that would poison a run.

    Args:
        name: the scorer, for the message.
        scores_B: what the scorer returned.
        class_ids_B: int64 [B], the class of each image.
        group_size: G, so that the message can name condition and sample.
    Raises:
        RewardError: not a float32 tensor of shape [B], or a score is not finite.
    """
    num_images = len(class_ids_B)
    if not isinstance(scores_B, Tensor):
        raise RewardError(
            f"scorer {name!r} returned {type(scores_B).__name__}; "
            f"return a float32 tensor of shape [{num_images}]."
        )
    if tuple(scores_B.shape) != (num_images,) or scores_B.dtype != torch.float32:
        raise RewardError(
            f"scorer {name!r} returned {scores_B.dtype} of shape {list(scores_B.shape)} for "
            f"{num_images} images; return torch.float32 of shape [{num_images}]."
        )
    bad = (~torch.isfinite(scores_B)).nonzero().flatten().tolist()
    if bad:
        condition, sample = divmod(bad[0], group_size)
        raise RewardError(
            f"scorer {name!r} returned {scores_B[bad[0]].item()} for condition {condition} "
            f"(class {int(class_ids_B[bad[0]])}), sample {sample}; {len(bad)} of {num_images} "
            "scores are not finite. Check the scorer's weights and its input images."
        )
