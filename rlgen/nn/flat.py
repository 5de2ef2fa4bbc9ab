"""A model's weights as one flat buffer with a manifest: few large messages, not one per tensor.

Owns the byte layout and the digest. Must not know how the buffer travels.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from rlgen.errors import WeightTransferError
from rlgen.storage import sha256_hex
from rlgen.types import TensorSpec, WeightManifest


def pack_weights(state: Mapping[str, Tensor], *, version: int) -> tuple[WeightManifest, np.ndarray]:
    """Copy tensors, in name order, into one buffer.

    Returns:
        the manifest and a uint8 array, a copy of the tensors.
    """
    specs: list[TensorSpec] = []
    offset = 0
    for name in sorted(state):
        tensor = state[name]
        size = tensor.numel() * tensor.element_size()
        dtype = str(tensor.dtype).removeprefix("torch.")
        specs.append(TensorSpec(name, dtype, tuple(tensor.shape), offset, size))
        offset += -(-size // 16) * 16  # every tensor starts aligned
    buffer = torch.zeros(offset, dtype=torch.uint8)
    for spec in specs:
        source = state[spec.name].detach().contiguous()
        buffer[spec.offset : spec.offset + spec.num_bytes].view(source.dtype).copy_(
            source.flatten()
        )
    array = buffer.numpy()
    return WeightManifest(version, sha256_hex(array.data), tuple(specs)), array


def unpack_weights(manifest: WeightManifest, buffer: np.ndarray, module: nn.Module) -> None:
    """Copy a flat buffer into a module's own tensors, after checking the digest.

    Args:
        manifest: what pack_weights returned.
        buffer: uint8; may be read-only shared memory, it is never written to or kept.
        module: receives the values in place.
    Raises:
        WeightTransferError: digest, names or shapes differ; nothing was copied.
    """
    digest = sha256_hex(buffer.data)
    if digest != manifest.sha256:
        raise WeightTransferError(
            f"weights version {manifest.version} arrived with sha256 {digest[:16]}..., published "
            f"was {manifest.sha256[:16]}...; the transfer damaged them, publish again."
        )
    own = module.state_dict()
    theirs = {spec.name: spec.shape for spec in manifest.tensors}
    if theirs != {name: tuple(tensor.shape) for name, tensor in own.items()}:
        different = sorted(set(theirs.items()) ^ {(n, tuple(t.shape)) for n, t in own.items()})
        raise WeightTransferError(
            f"weights version {manifest.version} have other tensors than the sampler's model, "
            f"first {different[:3]}; learner and rollout workers must load the same checkpoint."
        )
    with torch.no_grad():
        for spec in manifest.tensors:
            piece = np.array(buffer[spec.offset : spec.offset + spec.num_bytes])
            values = torch.from_numpy(piece).view(getattr(torch, spec.dtype))
            own[spec.name].copy_(values.view(spec.shape))
