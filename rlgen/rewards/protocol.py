"""What an instance scorer is, and the check that every score goes through.

Owns the contract; must not know any scorer. Shapes: P conditions, G group, B = P*G images,
condition-major.
"""

import sysconfig
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rlgen.errors import RewardError

_NOBODYS_CODE = ("<", sysconfig.get_path("stdlib"), str(Path(__file__).parents[1]))


class InstanceScorer(Protocol):
    """Images and what they were asked for to one number each; higher is better."""

    def __call__(self, images_01: Tensor, prompts: Sequence[str], class_ids_B: Tensor) -> Tensor:
        """Map [B, 3, H, W] in [0, 1], B prompts and int64 [B] classes to float32 [B], finite."""


@dataclass(frozen=True)
class Asked:
    """What a batch of images was asked to show; for scorers, and for messages about them."""

    class_ids_B: Tensor
    """int64 [B], on the CPU."""
    class_names_B: Sequence[str]
    group_size: int = 1
    """G: images of a condition lie next to each other."""
    condition_indices_P: Sequence[int] | None = None
    """Place of each condition in the step; None counts from 0."""

    def condition(self, image: int) -> str:
        """Name the condition of an image: its place, class id and class name."""
        place = image // self.group_size
        index = place if self.condition_indices_P is None else self.condition_indices_P[place]
        return (
            f"condition {index} (class {int(self.class_ids_B[image])}, "
            f"{self.class_names_B[image]!r})"
        )


def check_scores(name: str, scores_B: object, asked: Asked, prompts: Sequence[str]) -> Tensor:
    """Refuse scores that would poison a run.

    Args:
        name: the scorer, for the message.
        scores_B: what the scorer returned.
        asked: what the B images were asked to show.
        prompts: the B captions that the scorer was given.
    Returns:
        the scores, float32 [B], finite.
    Raises:
        RewardError: not a float32 tensor of shape [B], or a score is not finite.
    """
    num_images = len(asked.class_ids_B)
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
        raise RewardError(
            f"scorer {name!r} returned {scores_B[bad[0]].item()} for {asked.condition(bad[0])}, "
            f"sample {bad[0] % asked.group_size}, asked for {prompts[bad[0]]!r}; {len(bad)} of "
            f"{num_images} scores are not finite. Check the scorer's weights and its input images."
        )
    return scores_B


def scorer_failed(name: str, error: Exception, asked: Asked) -> RewardError:
    """Tell which scorer raised what on which conditions."""
    num_images = len(asked.class_ids_B)
    first, last = asked.condition(0), asked.condition(num_images - 1)
    where = first if first == last else f"{first} to {last}"
    return RewardError(f"scorer {name!r} failed on {num_images} images of {where}: {told(error)}.")


def told(error: BaseException) -> str:
    """Type and message of an error, with the last line of its owner's code instead of a traceback.

    Lines of rlgen, Python and, if there are others, installed packages are left out.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_NOBODYS_CODE) or "-packages" in frame.filename
    ]
    own = [frame for frame in frames if "-packages" not in frame.filename] or frames
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{place}"
