"""The reward engine: tokens in, scores and features out. The plain object in a reward actor.

Owns the decoder, the scorers, the feature extractor and the judge. Must not know Ray, nor
what the scores are used for. Pixels stay here but for a few thumbnails.

Shapes: P conditions, G group, B = P*G images, L image tokens, F features, C the judge's classes.
"""

import time
from dataclasses import dataclass, field

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
        features = judge_features = logits_BC = None
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
        if unit.purpose == "evaluate":
            judge_features = self.judge(images_01).float().cpu().numpy()
            logits_BC = self._judge_logits(images_01, is_detailed=unit.is_detailed)
        kept = images_01[list(unit.kept_images)]
        return ScoredRollout(
            rollout=rollout,
            rewards=rewards,
            features_BF=features,
            judge_features_BF=judge_features,
            judge_hits_B=self._judge_hits(logits_BC, class_ids_B),
            images_u8=(kept * 255).round().to(torch.uint8).cpu().numpy() if len(kept) else None,
            scoring_s=time.perf_counter() - start,
            judge_logits_BC=logits_BC if unit.is_detailed else None,
        )

    def _judge_logits(self, images_01: Tensor, *, is_detailed: bool) -> np.ndarray | None:
        """Logits of a judge that knows the images' classes or, for the Inception score, others."""
        classify = getattr(self.judge, "classify", None)
        if classify is None and is_detailed:
            classify = getattr(self.judge, "logits", None)
        return None if classify is None else classify(images_01).float().cpu().numpy()

    def _judge_hits(self, logits_BC: np.ndarray | None, class_ids_B: Tensor) -> np.ndarray | None:
        if logits_BC is None or logits_BC.shape[1] != len(self.class_names):
            return None  # the judge knows no classes, or others
        return logits_BC.argmax(axis=1) == class_ids_B.numpy()
