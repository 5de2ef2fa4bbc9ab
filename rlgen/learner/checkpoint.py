"""Run checkpoints: several parts written by several roles, one commit marker last.

Owns the layout `ROOT/step-00040/{parts..., COMMIT.json}` and its checks. A folder without a
valid marker is not a checkpoint. Must not know what the parts hold.
"""

import json
from dataclasses import dataclass
from typing import Any

import fsspec

from rlgen.errors import CheckpointError, StorageError
from rlgen.storage import join, read_bytes, sha256_hex, without_credentials, write_bytes

MARKER = "COMMIT.json"


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint, as the marker records it."""

    name: str
    num_bytes: int
    sha256: str


def checkpoint_uri(root: str, step: int) -> str:
    """Folder of the checkpoint after `step` updates."""
    return join(root, f"step-{step:05d}")


def write_part(uri: str, name: str, payload: bytes) -> Part:
    """Write one file of a checkpoint that is not committed yet."""
    write_bytes(join(uri, name), payload)
    return Part(name, len(payload), sha256_hex(payload))


def commit_checkpoint(uri: str, parts: list[Part], *, meta: dict[str, Any]) -> None:
    """Write the marker, which makes the parts a checkpoint."""
    marker = {"parts": [vars(part) for part in parts], "meta": meta}
    write_bytes(join(uri, MARKER), json.dumps(marker, indent=1).encode())


def read_meta(uri: str) -> dict[str, Any]:
    """Return what commit_checkpoint was given as meta.

    Raises:
        CheckpointError: there is no committed checkpoint here.
    """
    return _read_marker(uri)["meta"]


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


def prune_checkpoints(root: str, *, keep: int, protected: str | None = None) -> None:
    """Delete all but the newest `keep` committed checkpoints; the marker goes first.

    Args:
        root: folder or URL of the checkpoints.
        keep: how many to keep.
        protected: a checkpoint's URI that stays as well.
    """
    filesystem, path = fsspec.core.url_to_fs(root)
    markers = filesystem.glob(f"{path.rstrip('/')}/step-*/{MARKER}")
    # Shorter names first, because step-100000 is newer than step-99999.
    committed = sorted(markers, key=lambda marker: (len(marker), marker))
    kept_name = None if protected is None else protected.rstrip("/").rpartition("/")[2]
    for marker in committed[:-keep]:
        if marker.split("/")[-2] == kept_name:
            continue
        filesystem.rm(marker)
        filesystem.rm(marker.rpartition("/")[0], recursive=True)


def _read_marker(uri: str) -> dict[str, Any]:
    shown = without_credentials(uri)
    try:
        marker = json.loads(read_bytes(join(uri, MARKER)))
    except (StorageError, ValueError) as error:
        raise CheckpointError(
            f"{shown} is no committed checkpoint ({error}); name a folder such as "
            ".../checkpoints/step-00040 that holds COMMIT.json."
        ) from None
    if not isinstance(marker, dict) or not {"parts", "meta"} <= marker.keys():
        raise CheckpointError(f"{join(shown, MARKER)} is damaged; use another checkpoint.")
    return marker
