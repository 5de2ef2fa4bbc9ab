"""Images as a stream of encoded bytes that can begin anywhere.

Owns reading image files, tars, parquets and shards of these. Must not know how a source is cut
into shards (image_plan.py does), what an image's bytes mean (pixels.py does), nor what is
computed from them. Memory holds one image and, of a parquet, 64 rows.
"""

import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from rlgen.errors import ConfigError
from rlgen.storage import open_binary, read_bytes, without_credentials

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")

Wanted = Callable[[int], bool]
"""Whether the image at this place of a piece is asked for; others are passed over unread."""


@dataclass(frozen=True)
class ImageItem:
    """One image that has not been read yet, or not decoded."""

    name: str
    """Where it comes from, for messages."""
    label: str | None
    read: Callable[[], bytes]
    """Its file's bytes; raises StorageError."""


@dataclass(frozen=True)
class FilePiece:
    """Image files by path or URL."""

    locations: tuple[str, ...]
    labels: tuple[str | None, ...]

    @property
    def num_images(self) -> int | None:
        """How many."""
        return len(self.locations)

    def items(self, wanted: Wanted) -> Iterator[ImageItem]:
        """Name the files; each is read when its item is."""
        for place, (location, label) in enumerate(zip(self.locations, self.labels, strict=True)):
            if wanted(place):
                shown = without_credentials(location)
                yield ImageItem(shown, label, partial(read_bytes, location))


@dataclass(frozen=True)
class TarPiece:
    """A tar, read front to back."""

    location: str
    num_bytes: int | None
    num_images: int | None = None
    """None as long as nobody counted."""

    def items(self, wanted: Wanted) -> Iterator[ImageItem]:
        """Stream the images; a `.cls` file of the same name stem, before or after, has the class.

        Raises:
            ConfigError: it is no tar, or ends early.
            StorageError: it can't be read.
        """
        place, stem, label = 0, "", None
        waiting: list[ImageItem] = []
        for member, archive in _tar_members(self.location, mode="r|*"):
            path = PurePosixPath(member.name)
            if _stem(path) != stem:
                yield from (replace(item, label=label or item.label) for item in waiting)
                stem, label, waiting = _stem(path), None, []
            if path.suffix == ".cls":
                label = self._content(archive, member).decode("utf-8", "replace").strip()
            elif is_image(path.name):
                if wanted(place):
                    name = f"{without_credentials(self.location)}:{member.name}"
                    payload = self._content(archive, member)
                    read = partial(bytes, payload)
                    waiting.append(ImageItem(name, path.parent.name or None, read))
                place += 1
        yield from (replace(item, label=label or item.label) for item in waiting)

    def counted(self) -> "TarPiece":
        """The same with the number of images, from the headers alone where it can seek."""
        members = _tar_members(self.location, mode="r:*")
        return replace(self, num_images=sum(is_image(member.name) for member, _ in members))

    def _content(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        with _tar_errors(self.location):
            return (archive.extractfile(member) or io.BytesIO()).read()


@dataclass(frozen=True)
class ParquetPiece:
    """Row groups of one parquet file."""

    location: str
    num_bytes: int | None
    row_groups: tuple[int, ...]
    group_sizes: tuple[int, ...]
    image_column: str
    label_column: str | None

    @property
    def num_images(self) -> int | None:
        """Rows, each with one image."""
        return sum(self.group_sizes)

    def items(self, wanted: Wanted) -> Iterator[ImageItem]:
        """Stream the rows; row groups of which nothing is wanted are not read.

        Raises:
            StorageError: it can't be read.
        """
        import pyarrow.parquet

        shown = without_credentials(self.location)
        columns = [c for c in (self.image_column, self.label_column) if c is not None]
        place = 0
        with open_binary(self.location) as stream:
            table = pyarrow.parquet.ParquetFile(stream)
            for group, size in zip(self.row_groups, self.group_sizes, strict=True):
                places = range(place, place + size)
                place += size
                if not any(map(wanted, places)):
                    continue
                batches = table.iter_batches(batch_size=64, row_groups=[group], columns=columns)
                rows = (row for batch in batches for row in batch.to_pylist())
                for row_place, row in zip(places, rows, strict=True):
                    if not wanted(row_place):
                        continue
                    cell = row[self.image_column]
                    payload = (cell.get("bytes") if isinstance(cell, dict) else cell) or b""
                    label = None if self.label_column is None else row[self.label_column]
                    name = f"{shown}: row {row_place - places.start} of row group {group}"
                    label = None if label is None else str(label)
                    yield ImageItem(name, label, partial(bytes, payload))


Piece = FilePiece | TarPiece | ParquetPiece


@dataclass(frozen=True)
class Shard:
    """What one worker reads in one go, in a fixed order."""

    index: int
    pieces: tuple[Piece, ...]
    first: int = 0
    """Place of its first image among all of the source; known where images are left out."""
    num_kept: int = 1
    total: int = 1
    """Of every `total` images of the source, `num_kept` are kept, evenly spread."""

    def items(self, *, skip: int = 0) -> Iterator[ImageItem]:
        """Stream the kept images but for the first ones.

        Raises:
            ConfigError, StorageError: a file is not what it says, or can't be read.
        """
        begin = self.first * self.num_kept // self.total

        def wanted(place: int, *, before: int) -> bool:
            at = self.first + before + place
            rank = at * self.num_kept // self.total
            return (at + 1) * self.num_kept // self.total > rank and rank - begin >= skip

        before = 0
        for piece in self.pieces:
            if piece.num_images is not None:
                yield from piece.items(partial(wanted, before=before))
                before += piece.num_images
                continue
            num_passed = 0

            def counting(place: int, *, before: int = before) -> bool:
                nonlocal num_passed
                num_passed = place + 1
                return wanted(place, before=before)

            yield from piece.items(counting)
            before += num_passed


def _tar_members(location: str, *, mode: Any) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Regular files of a tar."""
    with (
        open_binary(location) as stream,
        _tar_errors(location),
        tarfile.open(fileobj=stream, mode=mode) as archive,
    ):
        for member in archive:
            if member.isfile():
                yield member, archive


@contextmanager
def _tar_errors(location: str) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"--images {without_credentials(location)} is no tar, or a damaged one ({error}); get "
            "it again."
        ) from error


def _stem(path: PurePosixPath) -> str:
    """What a webdataset's files of one sample share: the path up to the name's first dot."""
    return str(path.parent / path.name.partition(".")[0])


def is_image(name: str) -> bool:
    """By suffix; hidden files, such as the `._` ones that macOS makes, are none."""
    base = name.rsplit("/", 1)[-1]
    return base.lower().endswith(IMAGE_SUFFIXES) and not base.startswith(".")
