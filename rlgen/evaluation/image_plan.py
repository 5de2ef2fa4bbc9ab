"""From the name of a source to the shards that workers read.

Owns listing folders, globs, lists, tars and parquets, and a cut into shards that depends on the
source alone, never on who reads them. Nothing is held but listings.

The class of an image is the folder that it lies in, a webdataset's `.cls` beside it, or a
parquet's label column; None if there is no such thing.
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import fsspec

from rlgen.errors import ConfigError, StorageError
from rlgen.evaluation.images import (
    IMAGE_SUFFIXES,
    FilePiece,
    ParquetPiece,
    Piece,
    Shard,
    TarPiece,
    is_image,
)
from rlgen.storage import is_url, open_binary, read_bytes, sha256_hex, without_credentials

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LIST_SUFFIXES = (".txt", ".lst")
PARQUET = ".parquet"
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "cls")
MAX_SHARDS = 128
SHARD_IMAGES = (256, 16384)
"""Fewest and most images of a shard where the source says how many there are."""


@dataclass(frozen=True)
class ImagePlan:
    """All shards of a source."""

    shards: tuple[Shard, ...]
    num_images: int | None
    """Images that will be read; None if the source does not tell before it is read."""
    digest: str
    """sha256 of the listing: paths, sizes of tars and parquets, classes, and what is left out."""


def plan_images(locations: Sequence[str], *, limit: int | None = None) -> ImagePlan:
    """List a source and cut it into shards.

    Args:
        locations: folders (searched recursively), tars, parquets, text files with a path a line,
            images, or glob patterns of these; paths or fsspec URLs.
        limit: keep that many images, evenly spread over the source; None keeps all. Tars are
            then counted first.
    Raises:
        ConfigError: nothing is found at a location, or a file is not what its name says.
        StorageError: a location can't be read.
    """
    pieces: list[Piece] = []
    files: list[tuple[str, str | None]] = []
    for location in (found for given in locations for found in _expand(given)):
        name = location.lower()
        if name.endswith(TAR_SUFFIXES):
            pieces.append(TarPiece(location, _size(location)))
        elif name.endswith(PARQUET):
            pieces.append(_open_parquet(location))
        elif name.endswith(LIST_SUFFIXES):
            files += _listed(location)
        elif name.endswith(IMAGE_SUFFIXES):
            files.append((location, _parent(location)))
        else:
            files += _found_below(location)
    if limit is not None:
        with ThreadPoolExecutor(8) as pool:
            pieces = list(pool.map(lambda p: p.counted() if isinstance(p, TarPiece) else p, pieces))
    num_known = len(files) + sum(piece.num_images or 0 for piece in pieces)
    size = min(max(num_known // MAX_SHARDS * 2, SHARD_IMAGES[0]), SHARD_IMAGES[1])
    cut: list[Piece] = [part for piece in pieces for part in _cut(piece, size)]
    for start in range(0, len(files), size):
        paths, labels = zip(*files[start : start + size], strict=True)
        cut.append(FilePiece(paths, labels))
    is_counted = all(piece.num_images is not None for piece in cut)
    shards = _pack(cut, size)
    kept = num_known if limit is None else min(limit, num_known)
    if limit is not None:
        shards = _thinned(shards, kept, num_known)
    listing = json.dumps([[type(p).__name__, asdict(p)] for p in cut] + [limit], sort_keys=True)
    return ImagePlan(tuple(shards), kept if is_counted else None, sha256_hex(listing.encode()))


def _cut(piece: Piece, size: int) -> Iterator[Piece]:
    """A parquet in runs of row groups of at least that many rows; others stay whole."""
    if not isinstance(piece, ParquetPiece):
        yield piece
        return
    start, rows = 0, 0
    for end, group_size in enumerate(piece.group_sizes, start=1):
        rows += group_size
        if rows >= size or end == len(piece.group_sizes):
            groups, sizes = piece.row_groups[start:end], piece.group_sizes[start:end]
            yield replace(piece, row_groups=groups, group_sizes=sizes)
            start, rows = end, 0


def _pack(pieces: Sequence[Piece], size: int) -> list[Shard]:
    """Consecutive pieces until a shard is full; uncounted tars are shared out by number."""
    num_uncounted = sum(piece.num_images is None for piece in pieces)
    share = size / max(-(-num_uncounted // MAX_SHARDS), 1)
    shards: list[Shard] = []
    packed: list[Piece] = []
    filled = 0.0
    for piece in pieces:
        packed.append(piece)
        filled += share if piece.num_images is None else piece.num_images
        if filled >= size:
            shards.append(Shard(len(shards), tuple(packed)))
            packed, filled = [], 0.0
    return [*shards, Shard(len(shards), tuple(packed))] if packed else shards


def _thinned(shards: Sequence[Shard], num_kept: int, total: int) -> list[Shard]:
    thinned, first = [], 0
    for shard in shards:
        thinned.append(replace(shard, first=first, num_kept=num_kept, total=max(total, 1)))
        first += sum(piece.num_images or 0 for piece in shard.pieces)
    return thinned


def _expand(location: str) -> list[str]:
    """The files of a glob pattern, sorted; anything else as it is. Local paths become absolute."""
    if not is_url(location):
        location = os.path.abspath(location.removeprefix("file://"))
        if os.path.exists(location):
            return [location]
    if not any(mark in location for mark in "*?["):
        return [location]
    found = _list(location, glob=True)
    if not found:
        raise ConfigError(f"--images {without_credentials(location)}: no file has such a name.")
    return found


def _list(location: str, *, glob: bool = False) -> list[str]:
    """Sorted paths or URLs of a pattern's or folder's files."""
    try:
        filesystem, path = fsspec.core.url_to_fs(location)
        found = filesystem.glob(path) if glob else filesystem.find(path)
    except Exception as error:  # backends raise types of their own, such as botocore's
        raise StorageError(
            f"{without_credentials(location)} can't be listed ({type(error).__name__}: {error}); "
            "check the path or URL, its permissions and the credentials in the environment."
        ) from error
    return sorted(filesystem.unstrip_protocol(p) if is_url(location) else str(p) for p in found)


def _found_below(folder: str) -> list[tuple[str, str | None]]:
    """Image files of a folder and its subfolders, with the name of the subfolder they lie in."""
    if is_url(folder):
        files = _list(folder)
    elif not os.path.isdir(folder):
        raise ConfigError(f"--images {folder} does not exist; check the path.")
    else:
        walk = os.walk(folder, followlinks=True)
        files = sorted(os.path.join(root, name) for root, _, names in walk for name in names)
    images = [file for file in files if is_image(file.rsplit("/", 1)[-1])]
    if not images:
        others = sorted({PurePosixPath(file).suffix for file in files} - {""})
        what = f"{len(files)} files ({', '.join(others[:5])})" if files else "nothing"
        raise ConfigError(
            f"--images {without_credentials(folder)}: no image below it, {what} found; give a "
            f"folder with {', '.join(IMAGE_SUFFIXES[:4])} files, or tars, parquets or a list by "
            "their names ('folder/*.tar')."
        )
    top = folder.rstrip("/")
    return [(file, None if file.rsplit("/", 1)[0] == top else _parent(file)) for file in images]


def _listed(location: str) -> list[tuple[str, str | None]]:
    """Paths of a text file; relative ones are meant from its folder."""
    lines = [line.strip() for line in read_bytes(location).decode("utf-8").splitlines()]
    folder = location.rsplit("/", 1)[0]
    paths = [
        line if is_url(line) or line.startswith("/") else f"{folder}/{line}"
        for line in lines
        if line and not line.startswith("#")
    ]
    if not paths:
        raise ConfigError(f"--images {without_credentials(location)} lists no path.")
    return [(path, _parent(path)) for path in paths]


def _open_parquet(location: str) -> ParquetPiece:
    import pyarrow
    import pyarrow.parquet

    shown = without_credentials(location)
    try:
        with open_binary(location) as stream:
            metadata = pyarrow.parquet.read_metadata(stream)
    except StorageError as error:
        if isinstance(error.__cause__, pyarrow.ArrowInvalid):
            raise ConfigError(f"--images {shown} is no parquet file ({error.__cause__}).") from None
        raise
    schema = metadata.schema.to_arrow_schema()
    images = [field.name for field in schema if _holds_bytes(field.type)]
    preferred = [name for name in images if name in ("image", "img")]
    chosen = preferred or images
    if len(chosen) != 1:
        raise ConfigError(
            f"--images {shown} has the columns {', '.join(schema.names)}, of which "
            f"{', '.join(images) or 'none'} hold bytes; one of them must be named `image`."
        )
    sizes = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    labels = [name for name in LABEL_COLUMNS if name in schema.names]
    return ParquetPiece(
        location,
        _size(location),
        row_groups=tuple(range(len(sizes))),
        group_sizes=sizes,
        image_column=chosen[0],
        label_column=labels[0] if labels else None,
    )


def _holds_bytes(type_: Any) -> bool:
    """Binary, or Hugging Face's struct of bytes and path."""
    from pyarrow import types

    if types.is_struct(type_):
        return any(f.name == "bytes" and _holds_bytes(f.type) for f in type_)
    return types.is_binary(type_) or types.is_large_binary(type_)


def _parent(location: str) -> str | None:
    return PurePosixPath(location).parent.name or None


def _size(location: str) -> int | None:
    """Bytes of a file; part of what tells two sources apart."""
    try:
        filesystem, path = fsspec.core.url_to_fs(location)
        return filesystem.info(path).get("size")
    except FileNotFoundError as error:
        raise ConfigError(f"--images {without_credentials(location)} does not exist.") from error
