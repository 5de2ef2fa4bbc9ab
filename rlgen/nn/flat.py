"""A model's weights as one flat buffer with a manifest: few large messages, not one per tensor.

Owns the byte layout and the digest. Must not know how the buffer travels: it may arrive whole
or in chunks, in host memory or on a GPU.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence

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
        _copy(buffer[spec.offset : end], source.view(torch.uint8))
        buffer[end : -(-end // _ALIGNMENT) * _ALIGNMENT] = 0
    return WeightManifest(version, flat_digest([buffer]), offset, tuple(specs)), out


def unpack_weights(
    manifest: WeightManifest,
    buffer: np.ndarray | Tensor | Sequence[np.ndarray | Tensor],
    module: nn.Module,
) -> None:
    """Copy a flat buffer into a module's own tensors, after checking the digest.

    Args:
        manifest: what pack_weights returned.
        buffer: uint8, whole or in chunks; may be read-only shared memory, it is never written
            to or kept.
        module: receives the values in place.
    Raises:
        WeightTransferError: digest, names or shapes differ; nothing was copied.
    """
    pieces = [buffer] if isinstance(buffer, np.ndarray | Tensor) else buffer
    chunks = [_as_tensor(piece) for piece in pieces]
    digest = flat_digest(chunks)
    if digest != manifest.digest:
        raise WeightTransferError(
            f"weights version {manifest.version} arrived with digest {digest[:16]}..., published "
            f"was {manifest.digest[:16]}...; the transfer damaged them, publish again."
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
            target, values = own[spec.name], _bytes_of(chunks, spec)
            dtype = getattr(torch, spec.dtype)
            if target.dtype == dtype and target.is_contiguous():
                _copy(target.flatten().view(torch.uint8), values)
            else:
                target.copy_(values.view(dtype).view(spec.shape))


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


def flat_digest(chunks: Sequence[Tensor]) -> str:
    """Digest of bytes in transit; about as fast as memory, where sha256 alone is ten times slower.

    The bytes are laid out in squares of 512 x 512 64-bit words, the last filled up with zeros.
    The digest is the sha256 of every row's and every column's sum modulo 2^64, and of the
    length. Any one, two or three wrong words of a square change it, and so do squares or rows
    in another order; it is no protection against forgery.

    Args:
        chunks: uint8, on any device; all but the last a multiple of BLOCK_BYTES long.
    Returns:
        64 hexadecimal digits, the same however the bytes are cut and on every device.
    """
    digest = hashlib.sha256(sum(len(chunk) for chunk in chunks).to_bytes(8, "little"))
    for chunk in chunks:
        sums: list[Tensor] = []
        for block in chunk.split(BLOCK_BYTES):
            if len(block) < BLOCK_BYTES:
                block = torch.cat([block, block.new_zeros(BLOCK_BYTES - len(block))])
            sums += _sums_on_host(block) if block.device.type == "cpu" else _sums(block)
        digest.update(torch.cat(sums).cpu().numpy().data)
    return digest.hexdigest()


def _sums(block: Tensor) -> list[Tensor]:
    words = block.view(torch.int64).view(_SIDE, _SIDE)
    return [words.sum(0), words.sum(1)]


def _sums_on_host(block: Tensor) -> list[Tensor]:
    """The same, twice as fast: numpy adds integers with wider instructions."""
    words = block.numpy().view(np.int64).reshape(_SIDE, _SIDE)
    return [torch.from_numpy(words.sum(0)), torch.from_numpy(words.sum(1))]


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy bytes; between host memories numpy is faster than torch."""
    if target.device.type == source.device.type == "cpu":
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source)


def _bytes_of(chunks: Sequence[Tensor], spec: TensorSpec) -> Tensor:
    """One tensor's bytes; a copy if they lie in several chunks."""
    pieces: list[Tensor] = []
    start = 0
    for chunk in chunks:
        first, last = spec.offset - start, spec.offset + spec.num_bytes - start
        if first < len(chunk) and last > 0:
            pieces.append(chunk[max(first, 0) : last])
        start += len(chunk)
    if not pieces:
        return chunks[0][:0]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _as_tensor(piece: np.ndarray | Tensor) -> Tensor:
    """A view; torch warns of read-only memory, which is only read here."""
    if isinstance(piece, Tensor):
        return piece
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(piece)
