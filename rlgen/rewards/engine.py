"""The reward engine: tokens in, scores and features out. The plain object in a reward actor.

Owns the decoder, the scorers, the feature extractor and the judge. Must not know Ray, nor
what the scores are used for. Pixels stay here but for a few thumbnails.

Shapes: P conditions, G group, B = P*G images, L image tokens, F features, C the judge's classes,
S the judge's spatial features.
"""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlgen.config.run import RunConfig
from rlgen.features.extractor import FeatureExtractor, load_extractor
from rlgen.rewards.instance import InstanceReward
from rlgen.rewards.load import load_reward
from rlgen.rewards.protocol import Asked
from rlgen.rewards.reference import load_class_means
from rlgen.tokenizers.protocol import Tokenizer
from rlgen.tokenizers.published import open_tokenizer
from rlgen.types import Rollout, ScoredRollout


class _Judged(NamedTuple):
    """The judge's outputs as arrays; nothing if it was not asked."""

    features_BF: np.ndarray | None = None
    logits_BC: np.ndarray | None = None
    spatial_BS: np.ndarray | None = None


@dataclass
class RewardEngine:
    """Decodes and scores rollouts."""

    tokenizer: Tokenizer
    scorers: tuple[InstanceReward, ...]
    class_names: tuple[str, ...]
    extractor: FeatureExtractor | None
    judge: FeatureExtractor
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    class_means_KF: np.ndarray | None = None
    """What is taken from rewarded features, by class id; None if the reward knows no classes."""

    @classmethod
    def load(cls, config: RunConfig, *, device: torch.device) -> "RewardEngine":
        """Read every model that the configuration names.

        Raises:
            CheckpointError: one of them is missing, damaged or of another kind.
            ConfigError: a user's scorer can't be imported or made.
        """
        active = config.reward.active_scorers
        loo_fid = config.reward.loo_fid
        return cls(
            tokenizer=open_tokenizer(config.tokenizer, device=device),
            scorers=tuple(load_reward(name, scorer, device) for name, scorer in active.items()),
            class_names=config.class_names,
            extractor=None if loo_fid is None else load_extractor(loo_fid.extractor, device),
            judge=load_extractor(config.evaluation.judge, device),
            device=device,
            class_means_KF=load_class_means(config),
        )

    @torch.inference_mode()
    def score(self, rollout: Rollout) -> ScoredRollout:
        """Decode and score; which parts run depends on the purpose of the unit.

        Training needs rewards and features, the bootstrap features, an evaluation rewards and
        the judge; a detailed unit of an evaluation needs everything.

        Raises:
            RewardError: a scorer fails, or returns another shape, type or a non-finite score.
        """
        start = time.perf_counter()
        unit = rollout.unit
        tokens_BL = torch.from_numpy(rollout.tokens_BL.astype(np.int64)).to(self.device)
        class_ids_B = torch.from_numpy(np.repeat(unit.class_ids_P, unit.group_size))
        images_01 = self.tokenizer.decode(tokens_BL)
        rewards: dict[str, np.ndarray] = {}
        features = None
        if unit.purpose != "bootstrap":
            asked = Asked(
                class_ids_B,
                [self.class_names[class_id] for class_id in class_ids_B.tolist()],
                group_size=unit.group_size,
                condition_indices_P=unit.condition_indices_P.tolist(),
            )
            for scorer in self.scorers:
                rewards[scorer.name] = scorer(images_01, asked).float().cpu().numpy()
        if (unit.purpose != "evaluate" or unit.is_detailed) and self.extractor is not None:
            features = self.extractor(images_01).float().cpu().numpy()
            if unit.purpose != "evaluate" and self.class_means_KF is not None:
                features = (features - self.class_means_KF[class_ids_B.numpy()]).astype(np.float32)
        judged = _Judged()
        if unit.purpose == "evaluate":
            judged = _Judged(*map(_to_numpy, self.judge.outputs(images_01)))
        kept = images_01[list(unit.kept_images)]
        return ScoredRollout(
            rollout=rollout,
            rewards=rewards,
            features_BF=features,
            judge_features_BF=judged.features_BF,
            judge_hits_B=self._judge_hits(judged.logits_BC, class_ids_B),
            images_u8=(kept * 255).round().to(torch.uint8).cpu().numpy() if len(kept) else None,
            scoring_s=time.perf_counter() - start,
            judge_logits_BC=judged.logits_BC if unit.is_detailed else None,
            judge_spatial_BS=judged.spatial_BS if unit.is_detailed else None,
        )

    def _judge_hits(self, logits_BC: np.ndarray | None, class_ids_B: Tensor) -> np.ndarray | None:
        if logits_BC is None or logits_BC.shape[1] != len(self.class_names):
            return None  # the judge knows no classes, or others
        return logits_BC.argmax(axis=1) == class_ids_B.numpy()


def _to_numpy(tensor: Tensor | None) -> np.ndarray | None:
    """On the CPU, in float32."""
    return None if tensor is None else tensor.float().cpu().numpy()
