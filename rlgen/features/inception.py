"""FID's Inception: the network of 2015 that FID and the Inception score are defined on.

Owns the architecture under its public names and the input path that comparable numbers need. Must
not know distances. torchvision's Inception shares names and shapes with it but for the classifier,
and is another feature space: other weights, other pools, another resize.

Shapes: B images, F = 2048 features, C = 1008 logits, S = 2023 spatial features.
Source: TensorFlow's classify_image_graph_def.pb of 2015-12-05 as ported to
pt_inception-2015-12-05-6726825d.pth; torch-fidelity computes the same. Spatial features are those
of ADM's evaluation, arXiv:2105.05233: `mixed_6/conv` of that graph.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlgen.errors import CheckpointError
from rlgen.features.outputs import ExtractorOutputs
from rlgen.features.resize import resize_like_tf1, to_levels
from rlgen.nn.weights import load_state, state_sha256

NUM_LOGITS = 1008
INPUT_SIZE = 299
FIRST_KEY = "Conv2d_1a_3x3.conv.weight"
"""Tells an Inception among weight files."""
_BATCH_SIZE = 64
_SPATIAL_CHANNELS = 7
"""Of the 192 that Mixed_6d's first branch has at each of 17 x 17 places."""
_COUNTER = ".num_batches_tracked"


class _Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
        eps: float,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_in, num_out, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(num_out, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _average_pool(x: Tensor) -> Tensor:
    """3 x 3; at the border, the mean of those pixels that exist."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _MixedA(nn.Module):
    """At 35 x 35: branches of 1, 5 and twice 3, and a pool."""

    def __init__(self, num_in: int, pool_features: int, *, eps: float) -> None:
        super().__init__()
        self.branch1x1 = _Conv(num_in, 64, 1, eps=eps)
        self.branch5x5_1 = _Conv(num_in, 48, 1, eps=eps)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2, eps=eps)
        self.branch3x3dbl_1 = _Conv(num_in, 64, 1, eps=eps)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1, eps=eps)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1, eps=eps)
        self.branch_pool = _Conv(num_in, pool_features, 1, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        pooled = self.branch_pool(_average_pool(x))
        return torch.cat(
            [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, pooled], 1
        )


class _MixedB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, num_in: int, *, eps: float) -> None:
        super().__init__()
        self.branch3x3 = _Conv(num_in, 384, 3, stride=2, eps=eps)
        self.branch3x3dbl_1 = _Conv(num_in, 64, 1, eps=eps)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1, eps=eps)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class _MixedC(nn.Module):
    """At 17 x 17: branches of 1, 7 and twice 7, each 7 x 7 as a row and a column, and a pool."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        row = {"kernel": (1, 7), "padding": (0, 3)}
        column = {"kernel": (7, 1), "padding": (3, 0)}

        def conv(num_in: int, num_out: int, shape: dict[str, tuple[int, int]]) -> _Conv:
            return _Conv(num_in, num_out, shape["kernel"], padding=shape["padding"], eps=eps)

        self.branch1x1 = _Conv(768, 192, 1, eps=eps)
        self.branch7x7_1 = _Conv(768, width, 1, eps=eps)
        self.branch7x7_2 = conv(width, width, row)
        self.branch7x7_3 = conv(width, 192, column)
        self.branch7x7dbl_1 = _Conv(768, width, 1, eps=eps)
        self.branch7x7dbl_2 = conv(width, width, column)
        self.branch7x7dbl_3 = conv(width, width, row)
        self.branch7x7dbl_4 = conv(width, width, column)
        self.branch7x7dbl_5 = conv(width, 192, row)
        self.branch_pool = _Conv(768, 192, 1, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        pooled = self.branch_pool(_average_pool(x))
        return torch.cat([self.branch1x1(x), single, double, pooled], 1)


class _MixedD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, num_in: int, *, eps: float) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(num_in, 192, 1, eps=eps)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2, eps=eps)
        self.branch7x7x3_1 = _Conv(num_in, 192, 1, eps=eps)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding=(0, 3), eps=eps)
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding=(3, 0), eps=eps)
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat(
            [
                self.branch3x3_2(self.branch3x3_1(x)),
                self.branch7x7x3_4(seven),
                F.max_pool2d(x, 3, stride=2),
            ],
            1,
        )


class _MixedE(nn.Module):
    """At 8 x 8: branches that end in a row and a column side by side, and a pool.

    The last block of the network pools by maximum, against the paper, and so must we.
    """

    def __init__(self, num_in: int, *, is_last: bool, eps: float) -> None:
        super().__init__()
        self.is_last = is_last
        self.branch1x1 = _Conv(num_in, 320, 1, eps=eps)
        self.branch3x3_1 = _Conv(num_in, 384, 1, eps=eps)
        self.branch3x3_2a = _Conv(384, 384, (1, 3), padding=(0, 1), eps=eps)
        self.branch3x3_2b = _Conv(384, 384, (3, 1), padding=(1, 0), eps=eps)
        self.branch3x3dbl_1 = _Conv(num_in, 448, 1, eps=eps)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1, eps=eps)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3), padding=(0, 1), eps=eps)
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1), padding=(1, 0), eps=eps)
        self.branch_pool = _Conv(num_in, 192, 1, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.is_last else _average_pool(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(single),
                self.branch3x3_2b(single),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class Inception(nn.Module):
    """The network alone, from its normalised input; tensors keep their public names."""

    def __init__(self, *, num_logits: int = NUM_LOGITS, eps: float = 1e-3) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2, eps=eps)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, eps=eps)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1, eps=eps)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1, eps=eps)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, eps=eps)
        self.Mixed_5b = _MixedA(192, 32, eps=eps)
        self.Mixed_5c = _MixedA(256, 64, eps=eps)
        self.Mixed_5d = _MixedA(288, 64, eps=eps)
        self.Mixed_6a = _MixedB(288, eps=eps)
        self.Mixed_6b = _MixedC(128, eps=eps)
        self.Mixed_6c = _MixedC(160, eps=eps)
        self.Mixed_6d = _MixedC(160, eps=eps)
        self.Mixed_6e = _MixedC(192, eps=eps)
        self.Mixed_7a = _MixedD(768, eps=eps)
        self.Mixed_7b = _MixedE(1280, is_last=False, eps=eps)
        self.Mixed_7c = _MixedE(2048, is_last=True, eps=eps)
        self.fc = nn.Linear(2048, num_logits)
        self.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Map [B, 3, 299, 299] in about [-1, 1] to the layers that metrics are taken from.

        Returns:
            pooled features by their width (64, 192, 768, 2048), and `spatial` [B, 2023].
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        taken = {"64": (x := F.max_pool2d(x, 3, stride=2))}
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        taken["192"] = x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
        spatial = x[:, :_SPATIAL_CHANNELS].flatten(1)
        taken["768"] = x = self.Mixed_6e(x)
        taken["2048"] = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return {name: layer.mean((2, 3)) for name, layer in taken.items()} | {"spatial": spatial}

    def unbiased_logits(self, features_BF: Tensor) -> Tensor:
        """Map the 2048 features to [B, C], leaving out the bias."""
        return F.linear(features_BF, self.fc.weight)

    def load_public_state_dict(self, state: Mapping[str, Tensor], location: str) -> None:
        """Load a published state; counters of training steps, which some files lack, play no part.

        Raises:
            CheckpointError: torchvision's ImageNet weights, or tensors that do not fit.
        """
        if "AuxLogits.conv0.conv.weight" in state or (
            "fc.weight" in state and len(state["fc.weight"]) == 1000
        ):
            raise CheckpointError(
                f"{location} is torchvision's ImageNet Inception (1000 classes); it is another "
                "feature space than FID's, and a distance in it must not be called FID. Name "
                "pt_inception-2015-12-05-6726825d.pth, which pytorch-fid and torch-fidelity use."
            )
        own = {name: tensor for name, tensor in self.state_dict().items() if _COUNTER in name}
        given = {name: tensor for name, tensor in state.items() if _COUNTER not in name}
        load_state(self, own | given, location)


def normalize_levels(levels: Tensor, size: int = INPUT_SIZE) -> Tensor:
    """Map images of 8-bit levels, [B, 3, H, W], to the network's input as the 2015 graph does."""
    return (resize_like_tf1(levels, (size, size)) - 128) / 128


class InceptionExtractor:
    """FID's features; images are rounded to 8 bits, as if they had been saved first."""

    num_features = 2048

    def __init__(self, net: Inception) -> None:
        self.net = net.requires_grad_(False).eval()
        digest = state_sha256(
            {name: t for name, t in net.state_dict().items() if _COUNTER not in name}
        )
        self.feature_space = f"fid-inception-2015:u8-tf1-{INPUT_SIZE}:{digest[:16]}"

    def __call__(self, images_01: Tensor) -> Tensor:
        """Map [B, 3, H, W] in [0, 1] to the 2048 pooled features, float32."""
        return self.outputs(images_01).features_BF

    @torch.inference_mode()
    def outputs(self, images_01: Tensor) -> ExtractorOutputs:
        """Map [B, 3, H, W] in [0, 1] to what FID, the Inception score and sFID take.

        The logits are without the classifier's bias, as published Inception scores are.
        """
        parts = [
            self.net(normalize_levels(to_levels(part))) for part in images_01.split(_BATCH_SIZE)
        ]
        features_BF = torch.cat([part["2048"] for part in parts])
        return ExtractorOutputs(
            features_BF,
            self.net.unbiased_logits(features_BF),
            torch.cat([part["spatial"] for part in parts]),
        )


def inception_from_state(
    state: Mapping[str, Tensor], location: str, device: torch.device | str = "cpu"
) -> InceptionExtractor:
    """Build the extractor from a published state.

    Raises:
        CheckpointError: as for `Inception.load_public_state_dict`.
    """
    net = Inception()
    net.load_public_state_dict(state, location)
    return InceptionExtractor(net.to(device))
