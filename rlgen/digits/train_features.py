"""Training of the classifiers: two whose features serve as feature spaces, and the style judge.

Owns their recipes. The reward's net and the judge differ in architecture, seed and input
noise, so that what pleases the one need not please the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlgen.config.digits import DigitsConfig
from rlgen.digits.data import CLASS_NAMES, DigitsData
from rlgen.digits.optimise import OnStep, draw_rows, minimize, seeded_init
from rlgen.digits.style_judge import joint_ids
from rlgen.digits.styles import STYLES
from rlgen.features.convnet import ConvNet, ConvNetConfig

BATCH_SIZE = 128
MAX_LR = 4e-3
PIXEL_NOISE_STD = 0.05
"""In units of the 0..1 range; makes the features vary smoothly around real digits."""
JUDGE_SEED_OFFSET = 1000
STYLE_JUDGE_SEED_OFFSET = 3000


def train_feature_net(
    data: DigitsData, config: DigitsConfig, *, on_step: OnStep | None = None
) -> ConvNet:
    """Train the net in whose features the LOO-FID reward is taken."""
    net_config = ConvNetConfig(architecture="plain", image_size=config.image_size, width=32)
    return _train(data, net_config, config.feature_steps, seed=config.seed, on_step=on_step)


def train_judge(
    data: DigitsData, config: DigitsConfig, *, on_step: OnStep | None = None
) -> ConvNet:
    """Train the net that only evaluations see."""
    net_config = ConvNetConfig(architecture="residual", image_size=config.image_size, width=24)
    seed = config.seed + JUDGE_SEED_OFFSET
    return _train(data, net_config, config.feature_steps, seed=seed, on_step=on_step)


def train_style_judge(
    data: DigitsData, config: DigitsConfig, *, on_step: OnStep | None = None
) -> ConvNet:
    """Train the net that tells class and style of digits in all styles; no reward sees it."""
    net_config = ConvNetConfig(
        architecture="residual",
        image_size=config.image_size,
        width=32,
        num_classes=len(STYLES) * len(CLASS_NAMES),
    )
    targets_N = joint_ids(data.train.labels_N, data.train.styles_N)
    seed = config.seed + STYLE_JUDGE_SEED_OFFSET
    steps = config.feature_steps
    return _train(data, net_config, steps, seed=seed, on_step=on_step, targets_N=targets_N)


def _train(
    data: DigitsData,
    net_config: ConvNetConfig,
    num_steps: int,
    *,
    seed: int,
    on_step: OnStep | None,
    targets_N: Tensor | None = None,
) -> ConvNet:
    targets_N = data.train.labels_N if targets_N is None else targets_N
    with seeded_init(seed):
        net = ConvNet(net_config)
    generator = torch.Generator().manual_seed(seed)

    def loss_at(step: int) -> Tensor:
        rows = draw_rows(len(data.train.labels_N), BATCH_SIZE, generator)
        images_01 = data.train.images_01[rows]
        noise = torch.randn(images_01.shape, generator=generator) * PIXEL_NOISE_STD
        return F.cross_entropy(net.classify(images_01 + noise), targets_N[rows])

    minimize(net, loss_at, num_steps=num_steps, max_lr=MAX_LR, on_step=on_step)
    return net
