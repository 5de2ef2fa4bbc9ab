"""Reading and writing bytes by path or fsspec URL.

Owns the difference between local files and object stores, the limits on what a call to either may
take, the cache of downloaded files, and the rule that a reader never sees a half-written file.
Must not know what the bytes mean.
"""

import fcntl
import functools
import hashlib
import json
import os
import re
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec

from rlgen.errors import CheckpointError, RlgenError, StorageError

# What filesystems tell of a file's version: HTTP, S3, GCS, memory and others.
_VERSION_FIELDS = ("etag", "generation", "lastmodified", "mtime", "created", "size")
# One request to S3; s3fs repeats those that time out up to five times.
_S3_LIMITS = {
    "connect_timeout": 5,
    "read_timeout": 20,
    "retries": {"mode": "standard", "total_max_attempts": 2},
}
_PROBE_TIMEOUT_S = 60.0

T = TypeVar("T")


def is_url(location: str) -> bool:
    """Whether a location names a filesystem other than the local one."""
    return "://" in location and not location.startswith("file://")


def without_credentials(location: str) -> str:
    """Return the location without user:password@ and query, for logs and messages."""
    return re.sub(r"://[^/@]*@", "://", location).partition("?")[0]


def filesystem_of(location: str) -> tuple[Any, str]:
    """Return fsspec's filesystem for a path or URL, and the path in it.

    Requests to S3 are bounded in time; FSSPEC_S3_CONFIG_KWARGS overrides the limits. What the
    filesystem remembers of folders is forgotten, because other processes write there too.
    """
    options: dict[str, Any] = {}
    if location.partition("://")[0] in ("s3", "s3a"):
        configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {**_S3_LIMITS, **configured}
    filesystem, path = fsspec.core.url_to_fs(location, **options)
    filesystem.invalidate_cache()
    return filesystem, path


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
    with reading(location):
        filesystem, path = filesystem_of(location)
        with filesystem.open(path, "rb") as stream:
            yield stream


@contextmanager
def reading(location: str) -> Iterator[None]:
    """Turn whatever a filesystem raises in the block into a StorageError about this location."""
    shown = without_credentials(location)
    try:
        yield
    except RlgenError:
        raise
    except FileNotFoundError as error:
        # fsspec's HTTP says this of every failure, and the cause tells which.
        cause = "" if error.__cause__ is None else f" ({_told(error.__cause__)})"
        raise StorageError(f"{shown} does not exist{cause}; check the path or URL.") from error
    except Exception as error:  # backends raise types of their own, such as botocore's
        raise StorageError(
            f"{shown} can't be read ({_told(error)}); check the path or URL, its permissions and, "
            "for object stores, the credentials in the environment."
        ) from error


def _told(error: BaseException) -> str:
    """Type and message of an error; some repeat a URL with all that is secret in it."""
    secrets = r"(\w+://)(?:[^/@\s'\"]*@)?([^?\s'\")]*)(?:\?[^\s'\")]*)?"
    return f"{type(error).__name__}: " + re.sub(secrets, r"\1\2", str(error))


def write_bytes(location: str, payload: bytes) -> None:
    """Write a whole file; it appears complete or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        if is_url(location):
            filesystem, path = filesystem_of(location)
            # Not by a stream: closing one after an error would publish the part that was sent.
            filesystem.pipe_file(path, payload)
            return
        target = Path(location.removeprefix("file://"))
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as partial:
            partial.write_bytes(payload)
    except Exception as error:  # backends raise types of their own, such as botocore's
        raise StorageError(
            f"{without_credentials(location)} can't be written ({_told(error)}); check the path or "
            "URL, its permissions, the free space and, for object stores, the credentials in the "
            "environment."
        ) from error


def remove(location: str, *, recursive: bool = False) -> None:
    """Delete a file, or with `recursive` a folder and all in it.

    Raises:
        StorageError: it does not exist, or may not be deleted.
    """
    try:
        filesystem, path = filesystem_of(location)
        filesystem.rm(path, recursive=recursive)
    except Exception as error:  # backends raise types of their own, such as botocore's
        raise StorageError(
            f"{without_credentials(location)} can't be deleted ({_told(error)}); grant the right "
            "to delete."
        ) from error


def check_writable(root: str, *, timeout_s: float = _PROBE_TIMEOUT_S) -> None:
    """Write, read and delete a small file at a root that may not exist yet; leaves nothing behind.

    Raises:
        StorageError: one of the three is not possible, or takes longer than timeout_s.
    """
    place = root
    if not is_url(root):
        local = Path(root.removeprefix("file://")).absolute()
        place = str(next(parent for parent in (local, *local.parents) if parent.exists()))
    probe = join(place, f".probe-{uuid.uuid4().hex[:8]}")

    def try_all() -> None:
        write_bytes(probe, b"rlgen")
        found = read_bytes(probe)
        remove(probe)
        if found != b"rlgen":
            raise StorageError(f"{without_credentials(root)} gave back other bytes than written.")

    try:
        in_background(try_all, name="storage-probe").result(timeout_s)
    except TimeoutError:
        raise StorageError(
            f"{without_credentials(root)} took longer than {timeout_s:g} s to write, read and "
            "delete five bytes; check that it is mounted, or that its server answers "
            "(AWS_ENDPOINT_URL for S3)."
        ) from None


def in_background(work: Callable[[], T], *, name: str) -> "Future[T]":
    """Start work in a thread that does not keep the process alive; the future has its outcome."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


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


def cache_root() -> Path:
    """RLGEN_CACHE, or rlgen in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlgen"
    return Path(os.environ.get("RLGEN_CACHE", default))


def cached_file(location: str, *, sha256: str | None = None) -> Path:
    """Return a local path to the file, downloading a URL once per machine and version.

    A file is known by its URL and by what the server tells of its version (ETag, modification
    time, size); a server that tells none is trusted not to change it. Processes that want the
    same file wait for the one that downloads it.

    Args:
        location: a local path, which is returned as it is, or an fsspec URL.
        sha256: digest that the file must have; None checks nothing.
    Raises:
        StorageError: it does not exist, can't be read, came incomplete, or the cache can't be
            written.
        CheckpointError: another digest; names both, and the cache does not keep the file.
    """
    if not is_url(location):
        path = Path(location.removeprefix("file://"))
        if not path.is_file():
            raise StorageError(f"{path} is no file; check the path.")
        _check_sha256(path, sha256, location)
        return path
    size, target = _cache_place(location)
    with _lock(target.with_name(f".{target.name}.lock")):
        if not target.is_file():
            _download(location, size, target)
        try:
            _check_sha256(target, sha256, location)
        except CheckpointError:
            target.unlink()
            raise
    return target


def _cache_place(location: str) -> tuple[int | None, Path]:
    """The size of a remote file, if its server tells, and the path of its copy."""
    with reading(location):
        filesystem, path = filesystem_of(location)
        info: Mapping[str, Any] = filesystem.info(path)
    told = {key.lower().replace("-", ""): str(value) for key, value in info.items()}
    version = {field: told[field] for field in _VERSION_FIELDS if field in told}
    # The query may choose the file, so it is part of the key; a user's name and password are not.
    address = re.sub(r"://[^/@]*@", "://", location)
    key = sha256_hex(json.dumps([address, version], sort_keys=True).encode())[:16]
    name = re.sub(r"[^\w.+-]", "_", without_credentials(location).rstrip("/").rsplit("/", 1)[-1])
    return info.get("size"), cache_root() / "files" / f"{key}-{name[-100:]}"


def _download(location: str, size: int | None, target: Path) -> None:
    for left_behind in target.parent.glob(f".{target.name}.*.partial"):  # by a killed process
        left_behind.unlink()
    with atomic_path(target) as partial, reading(location):
        filesystem, path = filesystem_of(location)
        filesystem.get_file(path, str(partial))
        received = partial.stat().st_size
        if size is not None and received != size:
            raise StorageError(
                f"{without_credentials(location)} came incomplete: {received} of {size} bytes; "
                "run again."
            )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel frees when the process dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("w")
    except OSError as error:
        raise StorageError(
            f"the cache {path.parent} can't be written ({error}); set RLGEN_CACHE to a folder "
            "that can."
        ) from error
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _check_sha256(path: Path, sha256: str | None, location: str) -> None:
    if sha256 is None:
        return
    status = path.stat()
    found = _sha256_of_file(str(path), status.st_size, status.st_mtime_ns)
    if found != sha256.lower():
        raise CheckpointError(
            f"{without_credentials(location)} has the sha256 {found}, not {sha256}: it is another "
            "version, or damaged. Get the file again, or correct the digest."
        )


@functools.lru_cache(maxsize=64)
def _sha256_of_file(path: str, num_bytes: int, mtime_ns: int) -> str:
    """Digest of a file; size and time are there to tell when it is another one."""
    del num_bytes, mtime_ns
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def join(root: str, *parts: str) -> str:
    """Join a root path or URL with parts by forward slashes."""
    return "/".join([root.rstrip("/"), *parts])


def sha256_hex(payload: bytes | memoryview) -> str:
    """Return the sha256 of bytes as 64 hexadecimal digits."""
    return hashlib.sha256(payload).hexdigest()
