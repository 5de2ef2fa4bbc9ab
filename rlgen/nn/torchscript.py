"""The tensors of a TorchScript archive, read without running or compiling what else is in it.

OpenAI publishes CLIP this way. Owns that container; must not know the models. torch.jit.load would
compile the program inside; here its objects become inert containers, so only tensors come out.
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlgen.errors import CheckpointError

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Node:
    """Stands for any object of the archive; pickle fills its attributes in."""

    def __init__(self, *_: Any) -> None:
        pass


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, by its content."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript_state(path: Path, shown: str) -> dict[str, Tensor]:
    """Read the parameters, buffers and other tensors of the archived module by their names.

    Args:
        path: a local TorchScript archive.
        shown: its location, for messages.
    Raises:
        CheckpointError: it is damaged, or holds an object that is no part of a module.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            [index] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            reader = _Reader(archive, index)
            return dict(_tensors(reader.load()))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{shown} is a TorchScript archive with {error}, which rlgen does not read; save its "
            "state dict where you trust it: torch.save(torch.jit.load(path).state_dict(), new_path)"
        ) from None
    except Exception as error:  # a damaged pickle makes the reader fail in any way
        raise CheckpointError(
            f"{shown} can't be read as a TorchScript archive ({type(error).__name__}: {error}); "
            "it is probably damaged: get it again."
        ) from error


class _Reader(pickle.Unpickler):
    """Unpickles an archive's module tree; every class in it becomes a `_Node`."""

    def __init__(self, archive: zipfile.ZipFile, index: str) -> None:
        super().__init__(io.BytesIO(archive.read(index)))
        self.archive = archive
        self.root = index.removesuffix("data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__" or (module, name) == ("torch", "device"):
            return _Node
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _view
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch.jit._pickle":  # typed lists, and values with their type beside
            return _first
        raise pickle.UnpicklingError(f"an object of {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        # Copied, because torch wants memory that it may write to.
        payload = bytearray(self.archive.read(f"{self.root}data/{key}"))
        return torch.frombuffer(payload, dtype=dtype)


def _view(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _first(value: Any, *_: Any) -> Any:
    return value


def _tensors(node: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(node).items() if isinstance(node, _Node) else ():
        if isinstance(value, Tensor):
            yield prefix + name, value
        else:
            yield from _tensors(value, f"{prefix}{name}.")
