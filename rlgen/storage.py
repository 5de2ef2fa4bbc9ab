"""Reading and writing bytes by path or fsspec URL.

Owns the difference between local files and object stores, and the rule that a reader never
sees a half-written file. Must not know what the bytes mean.
"""

import hashlib
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import fsspec

from rlgen.errors import RlgenError, StorageError


def is_url(location: str) -> bool:
    """Whether a location names a filesystem other than the local one."""
    return "://" in location and not location.startswith("file://")


def without_credentials(location: str) -> str:
    """Return the location without user:password@ and query, for logs and messages."""
    return re.sub(r"://[^/@]*@", "://", location).partition("?")[0]


def read_bytes(location: str) -> bytes:
    """Read a whole file.

    Args:
        location: a local path or an fsspec URL.
    Raises:
        StorageError: it does not exist or cannot be read.
    """
    with open_binary(location) as stream:
        return stream.read()


@contextmanager
def open_binary(location: str) -> Iterator[BinaryIO]:
    """Open a file for reading; seekable, so that a header can be read without the rest.

    Raises:
        StorageError: it does not exist or cannot be read, also later in the block.
    """
    shown = without_credentials(location)
    try:
        with fsspec.open(location, "rb") as stream:
            yield stream
    except RlgenError:
        raise
    except FileNotFoundError as error:
        raise StorageError(f"{shown} does not exist; check the path or URL.") from error
    except Exception as error:  # backends raise types of their own, such as botocore's
        raise StorageError(
            f"{shown} can't be read ({type(error).__name__}: {error}); check the path or URL, "
            "its permissions and, for object stores, the credentials in the environment."
        ) from error


def write_bytes(location: str, payload: bytes) -> None:
    """Write a whole file; a local file appears complete or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        if is_url(location):
            with fsspec.open(location, "wb") as stream:
                stream.write(payload)
            return
        target = Path(location.removeprefix("file://"))
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as partial:
            partial.write_bytes(payload)
    except Exception as error:  # backends raise types of their own, such as botocore's
        raise StorageError(
            f"{without_credentials(location)} can't be written ({type(error).__name__}: {error}); "
            "check the path or URL, its permissions, the free space and, for object stores, the "
            "credentials in the environment."
        ) from error


def check_writable(root: str) -> None:
    """Write and delete a small file at a root that may not exist yet; leaves nothing behind.

    Raises:
        StorageError: one of the two is not possible.
    """
    place = root
    if not is_url(root):
        local = Path(root.removeprefix("file://")).absolute()
        place = str(next(parent for parent in (local, *local.parents) if parent.exists()))
    probe = join(place, f".probe-{uuid.uuid4().hex[:8]}")
    write_bytes(probe, b"rlgen")
    filesystem, path = fsspec.core.url_to_fs(probe)
    try:
        filesystem.rm(path)
    except OSError as error:
        raise StorageError(
            f"{without_credentials(root)} takes files but does not let them be deleted ({error}); "
            "old checkpoints could not be removed: grant the right to delete."
        ) from error


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside the target; rename it onto the target on success."""
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def local_copy(location: str) -> Iterator[Path]:
    """Yield a local path to the file: itself if it is local, else a copy for the block."""
    if not is_url(location):
        yield Path(location.removeprefix("file://"))
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / location.rsplit("/", 1)[-1]
        copy.write_bytes(read_bytes(location))
        yield copy


def join(root: str, *parts: str) -> str:
    """Join a root path or URL with parts by forward slashes."""
    return "/".join([root.rstrip("/"), *parts])


def sha256_hex(payload: bytes | memoryview) -> str:
    """Return the sha256 of bytes as 64 hexadecimal digits."""
    return hashlib.sha256(payload).hexdigest()
