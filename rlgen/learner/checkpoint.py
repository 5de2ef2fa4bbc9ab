"""Run checkpoints: several parts written by several roles, one commit marker last.

Owns the layout `ROOT/step-00040/{parts..., COMMIT.json}`, its checks, and which checkpoint is the
newest. A folder without a valid marker is not a checkpoint. Must not know what the parts hold.
"""

import hashlib
import json
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from rlgen.config.run import CheckpointConfig
from rlgen.errors import CheckpointError, StorageError
from rlgen.storage import (
    filesystem_of,
    join,
    open_binary,
    read_bytes,
    reading,
    remove,
    sha256_hex,
    without_credentials,
    write_bytes,
)

MARKER = "COMMIT.json"
_DEFAULT_SETTINGS = CheckpointConfig()
_LONGEST_PAUSE_S = 30.0
_CHUNK_BYTES = 16 * 2**20

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint, as the marker records it."""

    name: str
    num_bytes: int
    sha256: str
    num_retries: int = 0
    """Attempts to write it that failed."""


def checkpoint_uri(root: str, step: int) -> str:
    """Folder of the checkpoint after `step` updates."""
    return join(root, f"step-{step:05d}")


def write_parts(
    uri: str,
    parts: Mapping[str, Callable[[], bytes]],
    settings: CheckpointConfig = _DEFAULT_SETTINGS,
) -> list[Part]:
    """Write files of a checkpoint that is not committed yet.

    Args:
        uri: the checkpoint's folder.
        parts: what makes the content of each file, by name; called one after another.
        settings: how often and how long to try.
    Raises:
        StorageError: one of them can't be written.
    """
    deadline = time.monotonic() + settings.timeout_s
    written = []
    for name, make in parts.items():
        payload = make()
        num_retries = _persist(uri, name, payload, settings, deadline)
        written.append(Part(name, len(payload), sha256_hex(payload), num_retries))
    return written


def commit_checkpoint(
    uri: str,
    parts: list[Part],
    *,
    meta: Mapping[str, Any],
    settings: CheckpointConfig = _DEFAULT_SETTINGS,
) -> None:
    """Write the marker, which makes the parts a checkpoint.

    Raises:
        StorageError: it can't be written.
    """
    listed = [
        {"name": part.name, "num_bytes": part.num_bytes, "sha256": part.sha256} for part in parts
    ]
    marker = json.dumps({"parts": listed, "meta": meta}, indent=1).encode()
    _persist(uri, MARKER, marker, settings, time.monotonic() + settings.timeout_s)


def _persist(
    uri: str, name: str, payload: bytes, settings: CheckpointConfig, deadline: float
) -> int:
    """Write a file, again after a growing pause if it fails; returns how often it failed."""
    for num_failed in range(settings.retries + 1):
        try:
            write_bytes(join(uri, name), payload)
            return num_failed
        except StorageError:
            pause_s = min(2.0**num_failed, _LONGEST_PAUSE_S)
            if num_failed == settings.retries or time.monotonic() + pause_s > deadline:
                raise
            time.sleep(pause_s)
    raise AssertionError("the last attempt returns or raises")


def read_meta(uri: str) -> dict[str, Any]:
    """Return what commit_checkpoint was given as meta.

    Raises:
        CheckpointError: there is no committed checkpoint here.
        StorageError: the place can't be read.
    """
    return _read_marker(uri)["meta"]


def part_digests(uri: str) -> dict[str, str]:
    """Return the sha256 of every file of a committed checkpoint, as the marker records it.

    Raises:
        CheckpointError: there is no committed checkpoint here.
        StorageError: the place can't be read.
    """
    return {part["name"]: part["sha256"] for part in _read_marker(uri)["parts"]}


def read_part(uri: str, name: str) -> bytes:
    """Read one file of a committed checkpoint and check its digest.

    Raises:
        CheckpointError: not committed, part unknown, or damaged.
    """
    recorded = {part["name"]: part for part in _read_marker(uri)["parts"]}
    shown = without_credentials(uri)
    if name not in recorded:
        raise CheckpointError(
            f"checkpoint {shown} has no {name} (it has {', '.join(sorted(recorded))}); it was "
            "written by a run with other settings."
        )
    try:
        payload = read_bytes(join(uri, name))
    except StorageError as error:
        raise CheckpointError(f"checkpoint {shown} can't be read: {error}") from error
    if sha256_hex(payload) != recorded[name]["sha256"]:
        raise CheckpointError(
            f"{join(shown, name)} is damaged: {len(payload)} bytes whose sha256 differs from the "
            "one committed; resume from an earlier checkpoint."
        )
    return payload


def newest_checkpoint(root: str, *, resume_key: str) -> str | None:
    """Find the newest checkpoint under a root that is whole: what a run goes on from.

    Every part is read and compared with its digest. A damaged one is passed over with a warning,
    and stays where it is.

    Args:
        root: folder or URL; it may not exist yet.
        resume_key: what the run is known by (`config.identity.resume_key`).
    Returns:
        its URI, or None if there is none.
    Raises:
        CheckpointError: the newest belongs to another run.
        StorageError: the root can't be read.
    """
    for uri in reversed(committed_checkpoints(root)):
        try:
            meta = read_meta(uri)
            _refuse_other_run(uri, meta, resume_key)
            _check_parts(uri)
        except _Damaged as damage:
            warnings.warn(f"{damage} Passing over this checkpoint.", stacklevel=2)
            continue
        return uri
    return None


def committed_checkpoints(root: str) -> list[str]:
    """URIs of the folders with a marker, oldest first; damaged ones count.

    Raises:
        StorageError: the root can't be read.
    """
    with reading(root):
        filesystem, path = filesystem_of(root)
        markers = filesystem.glob(f"{path.rstrip('/')}/step-*/{MARKER}")
    names = [marker.split("/")[-2] for marker in markers]
    # Shorter names first, because step-100000 is newer than step-99999.
    return [join(root, name) for name in sorted(names, key=lambda name: (len(name), name))]


def refuse_other_runs(root: str, *, resume_key: str) -> None:
    """Check that the newest checkpoint under a root, if there is one, is this run's.

    Raises:
        CheckpointError: it belongs to another run.
        StorageError: the root can't be read.
    """
    for uri in reversed(committed_checkpoints(root)):
        try:
            meta = read_meta(uri)
        except _Damaged:
            continue
        _refuse_other_run(uri, meta, resume_key)
        return


def _refuse_other_run(uri: str, meta: Mapping[str, Any], resume_key: str) -> None:
    """A run is known by the settings that it was asked for, or by those that it went on with."""
    keys = [meta.get("run_key", ""), meta.get("resume_key", "")]
    if resume_key not in keys:
        shown, _, name = without_credentials(uri).rpartition("/")
        raise CheckpointError(
            f"{shown} holds the checkpoints of another run ({name} has the key {keys[0][:12]}, "
            f"this run {resume_key[:12]}): give this run another checkpoint.uri or --output, or "
            "the settings in that run's config.yaml."
        )


def _check_parts(uri: str) -> None:
    """Read every part and compare sizes and digests."""
    for part in _read_marker(uri)["parts"]:
        location = join(uri, part["name"])
        digest, num_bytes = hashlib.sha256(), 0
        try:
            with open_binary(location) as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    num_bytes += len(chunk)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise _Damaged(f"{without_credentials(location)} is missing.") from error
            raise  # the server is away: an older checkpoint would be the wrong one
        if digest.hexdigest() != part["sha256"]:
            raise _Damaged(
                f"{without_credentials(location)} is damaged: {num_bytes} of {part['num_bytes']} "
                "bytes, and another sha256 than committed."
            )


def discard_checkpoint(uri: str) -> None:
    """Delete a checkpoint; the marker goes first, so that a half-deleted one counts for nothing.

    Raises:
        StorageError: something may not be deleted.
    """
    with reading(uri):
        filesystem, path = filesystem_of(uri)
        is_committed = filesystem.exists(join(path, MARKER))
        is_there = is_committed or filesystem.exists(path)
    if is_committed:
        remove(join(uri, MARKER))
    if is_there:
        remove(uri, recursive=True)


def discard_uncommitted(root: str) -> None:
    """Delete what killed or failed runs left under a root that no one else writes to.

    Raises:
        StorageError: the root can't be read, or something may not be deleted.
    """
    with reading(root):
        filesystem, path = filesystem_of(root)
        folders = filesystem.glob(f"{path.rstrip('/')}/step-*")
    names = {folder.rstrip("/").rpartition("/")[2] for folder in folders}
    committed = {uri.rpartition("/")[2] for uri in committed_checkpoints(root)}
    for name in names - committed:
        if re.fullmatch(r"step-\d{5,}", name):
            discard_checkpoint(join(root, name))


def prune_checkpoints(root: str, *, keep: int, protected: tuple[str | None, ...] = ()) -> None:
    """Delete all but the newest `keep` committed checkpoints.

    Args:
        root: folder or URL of the checkpoints.
        keep: how many to keep.
        protected: URIs of checkpoints that stay as well.
    Raises:
        StorageError: the root can't be read, or something may not be deleted.
    """
    kept_names = {uri.rstrip("/").rpartition("/")[2] for uri in protected if uri is not None}
    for uri in committed_checkpoints(root)[:-keep]:
        if uri.rpartition("/")[2] not in kept_names:
            discard_checkpoint(uri)


class _Damaged(CheckpointError):
    """A checkpoint that is not whole, in contrast to one that can't be reached."""


def _read_marker(uri: str) -> dict[str, Any]:
    shown = without_credentials(uri)
    try:
        marker = json.loads(read_bytes(join(uri, MARKER)))
    except (StorageError, ValueError) as error:
        if isinstance(error, StorageError) and not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise _Damaged(
            f"{shown} is no committed checkpoint ({error}); name a folder such as "
            ".../checkpoints/step-00040 that holds COMMIT.json."
        ) from None
    fields = {"name", "num_bytes", "sha256"}
    if (
        not isinstance(marker, dict)
        or not {"parts", "meta"} <= marker.keys()
        or not all(isinstance(part, dict) and fields <= part.keys() for part in marker["parts"])
    ):
        raise _Damaged(f"{join(shown, MARKER)} is damaged; use another checkpoint.")
    return marker
