"""One instance reward: a scorer under its name, with its prompts, and a check of all it returns.

Owns the way from images to checked scores. Must not know what the scores are used for.
Shapes: B images, T templates.
"""

from dataclasses import dataclass

from torch import Tensor

from rlgen.rewards.open_clip_model import CosineScorer
from rlgen.rewards.prompts import Prompts
from rlgen.rewards.protocol import Asked, InstanceScorer, check_scores, scorer_failed


@dataclass(frozen=True)
class InstanceReward:
    """What a configured scorer gives each image."""

    name: str
    scorer: InstanceScorer
    prompts: Prompts

    def __call__(self, images_01: Tensor, asked: Asked) -> Tensor:
        """Score [B, 3, H, W] in [0, 1]: one number an image over all templates, float32 [B].

        Raises:
            RewardError: the scorer raises, or returns another shape or type or a score that is
                not finite; names the scorer, the condition and the sample.
        """
        prompts_TB = self.prompts.fill(asked.class_names_B)
        try:
            scores_TB = self._scores(images_01, prompts_TB, asked.class_ids_B)
        except Exception as error:  # whatever a user's code raises
            raise scorer_failed(self.name, error, asked) from error
        checked_TB = [
            check_scores(self.name, scores_B, asked, prompts_B)
            for scores_B, prompts_B in zip(scores_TB, prompts_TB, strict=True)
        ]
        return self.prompts.combine(checked_TB)

    def _scores(
        self, images_01: Tensor, prompts_TB: list[list[str]], class_ids_B: Tensor
    ) -> list[Tensor]:
        if isinstance(self.scorer, CosineScorer):
            # An image goes through the model once, however many templates there are.
            image_features = self.scorer.image_features(images_01)
            return [
                (image_features * self.scorer.text_features(prompts_B)).sum(-1)
                for prompts_B in prompts_TB
            ]
        # Each call gets images of its own: a scorer that writes into them must not change what
        # the next reward sees.
        return [self.scorer(images_01.clone(), list(p), class_ids_B.clone()) for p in prompts_TB]
