"""What an image is compared with: captions from templates, and one score over several of them.

Owns the filling of templates and the arithmetic; must not know any scorer.
Shapes: B images, T templates, the wanted ones first and the negative ones after them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlgen.config.reward import CLASS_PLACEHOLDER, AestheticRewardConfig, AnyScorerConfig


@dataclass(frozen=True)
class Prompts:
    """The templates of one scorer."""

    templates: tuple[str, ...] = (CLASS_PLACEHOLDER,)
    """At least one; {class} stands for the condition's name."""
    negatives: tuple[str, ...] = ()
    """What an image should not fit."""
    negative_weight: float = 1.0

    def fill(self, class_names_B: Sequence[str]) -> list[list[str]]:
        """Return the captions of B images for each of the T templates, T lists of length B."""
        return [
            [template.replace(CLASS_PLACEHOLDER, name) for name in class_names_B]
            for template in (*self.templates, *self.negatives)
        ]

    def combine(self, scores_TB: Sequence[Tensor]) -> Tensor:
        """Return mean(wanted) - negative_weight * mean(negative), float32 [B].

        For cosines the mean over templates is the product with the mean of the unit text vectors,
        which is not stretched to length 1 again: templates that disagree pull less.

        Args:
            scores_TB: T tensors, float32 [B]. A single one comes back as it is, bit by bit.
        """
        num_wanted = len(self.templates)
        wanted_B = _mean(scores_TB[:num_wanted])
        if not self.negatives:
            return wanted_B
        return wanted_B - self.negative_weight * _mean(scores_TB[num_wanted:])


def prompts_of(config: AnyScorerConfig) -> Prompts:
    """Return a scorer's templates; the aesthetic one, which reads none, gets plain names."""
    if isinstance(config, AestheticRewardConfig):
        return Prompts()
    templates = (config.prompt,) if isinstance(config.prompt, str) else config.prompt
    return Prompts(templates, config.negative_prompts, config.negative_weight)


def _mean(scores_TB: Sequence[Tensor]) -> Tensor:
    return scores_TB[0] if len(scores_TB) == 1 else torch.stack(list(scores_TB)).mean(dim=0)
