"""Weight files that say what they hold: safetensors whose metadata name a kind and a config.

Owns reading, writing and checking of weight files. Must not know which kinds exist: the
caller names the one it expects, builds the module from the config and loads the state.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rlgen.errors import CheckpointError, StorageError
from rlgen.nn.fit import mismatches
from rlgen.storage import local_copy, open_binary, without_credentials, write_bytes

ConfigT = TypeVar("ConfigT")

KIND_KEY = "rlgen.kind"
CONFIG_KEY = "rlgen.config"
_PICKLE_SUFFIXES = {".pt", ".pth", ".ckpt", ".bin", ".pkl"}
# A ViT-H names 686 tensors in 80 kB; a length beyond this is not a length.
_MAX_HEADER_BYTES = 100_000_000


def save_weights(
    location: str, weights: nn.Module | Mapping[str, Tensor], *, kind: str, config: dict[str, Any]
) -> None:
    """Write a weight file that `read_weights` understands.

    Args:
        location: a local path or an fsspec URL.
        weights: a module, or the state dict of one; tied tensors are written twice.
        kind: what builds a module from the config, such as "conv_vq".
        config: plain JSON values, enough to build the module.
    Raises:
        StorageError: it cannot be written.
    """
    write_bytes(location, weight_bytes(weights, kind=kind, config=config))


def weight_bytes(
    weights: nn.Module | Mapping[str, Tensor], *, kind: str, config: dict[str, Any]
) -> bytes:
    """Return the bytes of the file that `save_weights` writes."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    metadata = {KIND_KEY: kind, CONFIG_KEY: json.dumps(config, sort_keys=True)}
    return tensors_to_bytes(state, metadata)


def tensors_to_bytes(state: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return a state dict as the bytes of a safetensors file, the same for the same content."""
    # Cloned, because safetensors refuses tensors that share storage (tied weights, views).
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in state.items()}
    payload = save(tensors, metadata)
    # safetensors writes its metadata in a random order, and files are known by their digest.
    start = 8 + struct.unpack("<Q", payload[:8])[0]
    header = json.loads(payload[8:start])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return struct.pack("<Q", len(text)) + text + payload[start:]


def read_weights(location: str, *, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a weight file of a known kind.

    Returns:
        The config it was saved with, and its tensors on the CPU.
    Raises:
        CheckpointError: it is missing, no safetensors file, cut short, without rlgen's
            metadata, or of another kind.
    """
    metadata = peek_metadata(location)
    if metadata["kind"] != kind:
        raise CheckpointError(
            f"{without_credentials(location)} holds weights of kind {metadata['kind']!r}, but "
            f"{kind!r} is needed here; name a file of kind {kind!r} instead."
        )
    return metadata["config"], read_tensors(location)


def read_tensors(location: str) -> dict[str, Tensor]:
    """Read all tensors of any safetensors file onto the CPU.

    Raises:
        CheckpointError: it is missing, no safetensors file, or cut short.
    """
    read_header(location)
    try:
        with local_copy(location) as path:
            return load_file(path)
    except (SafetensorError, StorageError, OSError) as error:
        raise CheckpointError(
            f"{without_credentials(location)} can't be read as safetensors ({error}); "
            "it is probably damaged: copy or train it again."
        ) from error


def peek_metadata(location: str) -> dict[str, Any]:
    """Return {"kind": str, "config": dict} from the header alone, however large the file is.

    Raises:
        CheckpointError: as for `read_weights`, except for the kind.
    """
    metadata = read_header(location).get("__metadata__") or {}
    shown = without_credentials(location)
    if KIND_KEY not in metadata or CONFIG_KEY not in metadata:
        raise CheckpointError(
            f"{shown} is a safetensors file without the metadata {KIND_KEY!r} and {CONFIG_KEY!r}, "
            "so rlgen can't tell what it holds. If it is a published model's, name that, such as "
            "policy.model=llamagen-l-256; else write it with rlgen.nn.weights.save_weights."
        )
    try:
        config = json.loads(metadata[CONFIG_KEY])
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{shown} has metadata {CONFIG_KEY!r} that is not JSON ({error}); "
            "write it again with rlgen.nn.weights.save_weights."
        ) from error
    return {"kind": metadata[KIND_KEY], "config": config}


def read_header(location: str) -> dict[str, Any]:
    """Return the JSON header of a safetensors file: tensor names to dtype, shape and offsets.

    Reads no tensor, but checks that the file is long enough to hold all of them.

    Raises:
        CheckpointError: it is missing, no safetensors file, or cut short.
    """
    shown = without_credentials(location)
    if PurePosixPath(location).suffix.lower() in _PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{shown} is a pickled checkpoint, which does not say what it holds and can run code "
            "when it is loaded. If it is a published model's, name that, such as "
            "policy.model=llamagen-l-256 or tokenizer.model=llamagen-vq-ds16. Else convert it once "
            "where you trust it: state = torch.load(path, weights_only=True), then "
            "rlgen.nn.weights.save_weights('x.safetensors', state, kind=..., config=...)."
        )
    try:
        with open_binary(location) as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES
            payload = stream.read(length) if length < _MAX_HEADER_BYTES else b""
            num_bytes = stream.seek(0, 2)
    except StorageError as error:
        raise CheckpointError(str(error)) from error
    if not payload.startswith(b"{"):
        raise CheckpointError(
            f"{shown} is not a safetensors file (it begins with {prefix!r}); "
            "name a .safetensors file, or convert this one."
        )
    num_expected = 8 + length
    if num_bytes >= num_expected:
        header = _parse_header(payload, shown)
        num_expected += max(
            (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"),
            default=0,
        )
    if num_bytes < num_expected:
        raise CheckpointError(
            f"{shown} is cut short: {num_bytes} of {num_expected} bytes; copy or train it again."
        )
    return header


def _parse_header(payload: bytes, shown: str) -> dict[str, Any]:
    try:
        return json.loads(payload)
    except ValueError as error:
        raise CheckpointError(
            f"{shown} is not a safetensors file (its header is not JSON: {error}); "
            "name a .safetensors file, or convert this one."
        ) from error


def make_config(config_type: type[ConfigT], fields: dict[str, Any], location: str) -> ConfigT:
    """Build a config dataclass from the fields that a weight file holds.

    Raises:
        CheckpointError: the fields are not those of the dataclass.
    """
    try:
        return config_type(**fields)
    except TypeError as error:
        raise CheckpointError(
            f"{without_credentials(location)} has a config that is not a {config_type.__name__} "
            f"({error}); write the file again with this version of rlgen."
        ) from error


def load_state(module: nn.Module, state: Mapping[str, Tensor], location: str) -> None:
    """Load a state dict that must fit exactly.

    Args:
        location: where the state came from, for the message.
    Raises:
        CheckpointError: names the missing, unexpected and mis-shaped tensors.
    """
    problems = mismatches(shapes_of(module.state_dict()), shapes_of(state))
    if problems:
        raise CheckpointError(
            f"{without_credentials(location)} does not fit {type(module).__name__}: tensors "
            f"{problems}. Check that the file belongs to this model and config."
        )
    module.load_state_dict(dict(state))


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state dict."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 over the names, types, shapes and bytes of tensors, in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
        # As bytes, because numpy has no bfloat16.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
