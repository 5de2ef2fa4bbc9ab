"""Linear layers whose weights are laid out for a few rows at a time.

Decoding multiplies a handful of rows with every weight, once per token. On a CPU the usual
matrix product then reads weights at a fraction of the memory's speed; oneDNN's blocked layout
is two to four times as fast. Owns that layout; elsewhere the layers are called as they are.

Shapes: R rows.
"""

import torch
from torch import Tensor, nn

_MIN_ELEMENTS = 1 << 16
"""Smaller weights stay in a core's cache, where the layout gains less than it costs."""


class PackedLinears:
    """Copies of weights in oneDNN's layout, made when a layer is first used.

    The copies do not follow the weights: make an object per decoding, and use it while the
    weights stay. Where gradients or autocast are wanted, on other devices, and for layers that
    are not plain (adapters), the layers themselves are called.
    """

    def __init__(self) -> None:
        self._packed: dict[tuple[nn.Module, ...], tuple[Tensor, Tensor | None] | None] = {}

    @property
    def has_packed(self) -> bool:
        """Whether any weights were packed so far."""
        return any(packed is not None for packed in self._packed.values())

    def __call__(self, x_RD: Tensor, layer: nn.Module) -> Tensor:
        """[R, D] -> [R, D'] as the layer does."""
        return self.fused(x_RD, layer)[0]

    def fused(self, x_RD: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
        """The outputs of layers that share an input, from one product where weights are packed."""
        if layers not in self._packed:
            self._packed[layers] = _pack(layers, len(x_RD))
        packed = self._packed[layers]
        if packed is None or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return tuple(layer(x_RD) for layer in layers)
        weight, bias = packed
        x_RD = x_RD.to(weight.dtype)
        together = torch.ops.mkldnn._linear_pointwise(x_RD, weight, bias, "none", [], "")
        return together.chunk(len(layers), dim=-1) if len(layers) > 1 else (together,)


def _pack(layers: tuple[nn.Module, ...], num_rows: int) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of layers with outputs of one size; None if they can't be packed."""
    linears = [layer for layer in layers if type(layer) is nn.Linear]
    weights: list[Tensor] = [linear.weight for linear in linears]
    if len(linears) < len(layers) or not all(_is_packable(weight) for weight in weights):
        return None
    with torch.no_grad():
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
        return packed, torch.cat(biases) if biases else None


def _is_packable(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.numel() < _MIN_ELEMENTS:
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
