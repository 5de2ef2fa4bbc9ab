"""A model's weights as one flat buffer with a manifest: few large messages, not one per tensor.

Owns the byte layout and the digest. Must not know how the buffer travels: it may arrive whole
or in chunks, in host memory or on a GPU.
"""

import hashlib
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rlgen.errors import WeightTransferError
from rlgen.types import TensorSpec, WeightManifest

_ALIGNMENT = 16
_SIDE = 512
BLOCK_BYTES = _SIDE * _SIDE * 8
"""Chunks must be a multiple of this long, except the last."""


def pack_weights(
    state: Mapping[str, Tensor], *, version: int, out: np.ndarray | None = None
) -> tuple[WeightManifest, np.ndarray]:
    """Copy tensors, in name order, into one buffer.

    Args:
        state: tensors on any device.
        version: goes into the manifest.
        out: an earlier buffer to write into, which saves the system the work of finding memory;
            a new one is made if the size differs.
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
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT  # every tensor starts aligned
    if out is None or len(out) != offset:
        out = np.zeros(offset, dtype=np.uint8)
    buffer = torch.from_numpy(out)
    for spec in specs:
        source = state[spec.name].detach().contiguous().flatten()
        end = spec.offset + spec.num_bytes
        _copy_bytes(buffer[spec.offset : end], source.view(torch.uint8))
        buffer[end : -(-end // _ALIGNMENT) * _ALIGNMENT] = 0
    return WeightManifest(version, flat_digest([buffer]), offset, tuple(specs)), out


def unpack_weights(
    manifest: WeightManifest,
    buffer: np.ndarray | Tensor | Sequence[np.ndarray | Tensor],
    module: nn.Module,
) -> None:
    """Copy a flat buffer into a module's own tensors, and check the digest on the way.

    Each block is copied while the processor still has it from its part of the digest: so both
    take little longer than a copy.

    Args:
        manifest: what pack_weights returned.
        buffer: uint8, whole or in chunks; may be read-only shared memory, it is never written
            to or kept.
        module: receives the values in place.
    Raises:
        WeightTransferError: length, names or shapes differ, and nothing was copied; or the
            digest differs, and the module must not be used before it has other weights.
    """
    pieces = [buffer] if isinstance(buffer, np.ndarray | Tensor) else buffer
    chunks = [_as_tensor(piece) for piece in pieces]
    own = module.state_dict()
    theirs = {spec.name: spec.shape for spec in manifest.tensors}
    if theirs != {name: tuple(tensor.shape) for name, tensor in own.items()}:
        different = sorted(set(theirs.items()) ^ {(n, tuple(t.shape)) for n, t in own.items()})
        raise WeightTransferError(
            f"weights version {manifest.version} have other tensors than the sampler's model, "
            f"first {different[:3]}; learner and rollout workers must load the same checkpoint."
        )
    num_bytes = sum(len(chunk) for chunk in chunks)
    if num_bytes != manifest.num_bytes:
        raise WeightTransferError(
            f"weights version {manifest.version} arrived with {num_bytes} bytes, published were "
            f"{manifest.num_bytes}; the transfer cut them, publish again."
        )
    tensors = _Tensors(manifest.tensors, own)
    with torch.no_grad():
        digest = flat_digest(chunks, tensors.take)
    if digest != manifest.digest:
        raise WeightTransferError(
            f"weights version {manifest.version} arrived with digest {digest[:16]}..., published "
            f"was {manifest.digest[:16]}...; the transfer damaged them, publish again."
        )


class _Tensors:
    """Takes a buffer's blocks, in their order, and copies each into the tensors it belongs to."""

    def __init__(self, specs: Sequence[TensorSpec], own: Mapping[str, Tensor]) -> None:
        self._specs = deque(specs)
        self._own = own

    def take(self, start: int, block: Tensor) -> None:
        """Copy the bytes from place `start` on."""
        end = start + len(block)
        while self._specs:
            spec = self._specs[0]
            tensor_end = spec.offset + spec.num_bytes
            first, last = max(spec.offset, start), min(tensor_end, end)
            if first < last:
                # Blocks and tensors start aligned, so no number lies across a border.
                values = block[first - start : last - start].view(getattr(torch, spec.dtype))
                place = (first - spec.offset) // values.element_size()
                _copy_numbers(self._own[spec.name], place, values)
            if tensor_end > end:
                return
            self._specs.popleft()


def split_chunks(buffer: Tensor, chunk_bytes: int) -> list[Tensor]:
    """Cut a flat buffer into views of this many bytes; the last may be shorter.

    Raises:
        WeightTransferError: the digest of such chunks would not be the buffer's.
    """
    if chunk_bytes % BLOCK_BYTES:
        raise WeightTransferError(
            f"weights can't travel in chunks of {chunk_bytes} bytes; use a multiple of "
            f"{BLOCK_BYTES}."
        )
    return list(buffer.split(chunk_bytes))


def flat_digest(chunks: Sequence[Tensor], then: Callable[[int, Tensor], None] | None = None) -> str:
    """Digest of bytes in transit; about as fast as memory, where sha256 alone is ten times slower.

    The bytes are laid out in squares of 512 x 512 64-bit words, the last filled up with zeros.
    The digest is the sha256 of every row's and every column's sum modulo 2^64, and of the
    length. Any one, two or three wrong words of a square change it, and so do squares or rows
    in another order; it is no protection against forgery.

    Args:
        chunks: uint8, on any device; all but the last a multiple of BLOCK_BYTES long.
        then: called with each block and the place where it starts, in their order, straight
            after its sums.
    Returns:
        64 hexadecimal digits, the same however the bytes are cut and on every device.
    """
    digest = hashlib.sha256(sum(len(chunk) for chunk in chunks).to_bytes(8, "little"))
    start = 0
    for chunk in chunks:
        sums: list[Tensor] = []
        for block in chunk.split(BLOCK_BYTES):
            square = block
            if len(block) < BLOCK_BYTES:
                square = torch.cat([block, block.new_zeros(BLOCK_BYTES - len(block))])
            sums += _sums_on_host(square) if block.device.type == "cpu" else _sums(square)
            if then is not None:
                then(start, block)
            start += len(block)
        digest.update(torch.cat(sums).cpu().numpy().data)
    return digest.hexdigest()


def _sums(block: Tensor) -> list[Tensor]:
    words = block.view(torch.int64).view(_SIDE, _SIDE)
    return [words.sum(0), words.sum(1)]


def _sums_on_host(block: Tensor) -> list[Tensor]:
    """The same, twice as fast: numpy adds integers with wider instructions."""
    words = block.numpy().view(np.int64).reshape(_SIDE, _SIDE)
    return [torch.from_numpy(words.sum(0)), torch.from_numpy(words.sum(1))]


def _copy_numbers(target: Tensor, place: int, values: Tensor) -> None:
    """Copy into a tensor from its number `place` on."""
    if not target.is_contiguous():
        places = torch.arange(place, place + len(values), device=target.device)
        target.put_(places, values.to(target))
        return
    part = target.view(-1)[place : place + len(values)]
    if part.dtype == values.dtype:
        _copy_bytes(part.view(torch.uint8), values.view(torch.uint8))
    else:
        part.copy_(values)


def _copy_bytes(target: Tensor, source: Tensor) -> None:
    """Between host memories numpy is faster than torch."""
    if target.device.type == source.device.type == "cpu":
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source)


def _as_tensor(piece: np.ndarray | Tensor) -> Tensor:
    """A view; torch warns of read-only memory, which is only read here."""
    if isinstance(piece, Tensor):
        return piece
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(piece)
