"""From a shard of images to its share of the reference moments. The plain object in an actor.

Owns the arithmetic of one shard, what is kept of it on disk, and the sum of all shards. The sum
depends on the shards alone: not on how many workers read them, nor on interruptions.

Shapes: B images of a batch, N images of a shard, F features.
"""

import io
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rlgen.errors import ConfigError, NumericsError, StorageError
from rlgen.evaluation.images import ImageItem, Shard
from rlgen.evaluation.pixels import Picture, decode
from rlgen.features.extractor import FeatureExtractor
from rlgen.moments.moments import Moments, batch_moments, merge
from rlgen.storage import join, open_binary, read_bytes, write_bytes

FOLD = 1024
"""Images whose features are turned into moments at once; a restart begins after a fold."""
SAVE_EVERY_S = 60.0
SHOWN_PROBLEMS = 5
_DIGEST_RANGE = 2**256


@dataclass(frozen=True)
class MeasureSettings:
    """How images become features, and where a shard's result is kept."""

    image_size: int
    batch_size: int
    threads: int
    """Threads that decode."""
    keeps_features: bool
    """Keep every feature vector, as a judge's reference needs, instead of moments."""
    stops_at_problem: bool
    """Whether the first image that can't be decoded is an error."""
    folder: str
    """Path or URL of the results of shards; every worker must see it."""


@dataclass
class Partial:
    """What is known of the first images of a shard."""

    num_seen: int = 0
    """Images read, decodable or not."""
    num_bad: int = 0
    problems: list[str] = field(default_factory=list)
    """The first few of those that could not be decoded."""
    digest: int = 0
    """Sum of the files' sha256, modulo 2^256: the same in any order and any packing."""
    moments: Moments | None = None
    features: list[Tensor] = field(default_factory=list)
    """float32 [., F] each, in order."""
    class_sums: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    """Number of images and sum of features [F] float64 of each class."""
    num_unlabelled: int = 0
    is_complete: bool = False

    @property
    def num_images(self) -> int:
        """Images that count."""
        return self.num_seen - self.num_bad

    def add(self, other: "Partial") -> None:
        """Take in the images that follow."""
        self.num_seen += other.num_seen
        self.num_bad += other.num_bad
        self.problems = (self.problems + other.problems)[:SHOWN_PROBLEMS]
        self.digest = (self.digest + other.digest) % _DIGEST_RANGE
        if self.moments is None or other.moments is None:
            self.moments = self.moments or other.moments
        else:
            self.moments = merge(self.moments, other.moments)
        self.features += other.features
        for name, (count, sum_F) in other.class_sums.items():
            ours, our_sum_F = self.class_sums.get(name, (0, torch.zeros_like(sum_F)))
            self.class_sums[name] = (ours + count, our_sum_F + sum_F)
        self.num_unlabelled += other.num_unlabelled


class ShardReader:
    """Turns shards into partial results on disk."""

    def __init__(
        self, extractor: FeatureExtractor, settings: MeasureSettings, *, device: torch.device
    ) -> None:
        """Hold the network; nothing is read yet."""
        self._extractor = extractor
        self._settings = settings
        self._device = device

    def measure(self, shard: Shard, on_images: Callable[[int], None] = lambda _: None) -> int:
        """Read a shard, from where an earlier attempt stopped, and keep what came out.

        Args:
            shard: what to read.
            on_images: called with the number of images done at each fold, this shard's only.
        Returns:
            Images seen, decodable or not.
        Raises:
            ConfigError: a file is no tar or parquet, or an image can't be decoded and that is an
                error at once.
            StorageError: a file can't be read, or the result can't be written.
            NumericsError: features are not finite; names the image.
        """
        done = read_partial(self._settings.folder, shard) or Partial()
        if done.is_complete:
            return done.num_seen
        saved_s = time.monotonic()
        with ThreadPoolExecutor(self._settings.threads) as pool:
            pictures = self._pictures(pool, shard.items(skip=done.num_seen))
            while (fold := self._fold(pictures)).num_seen:
                done.add(fold)
                on_images(done.num_seen)
                if time.monotonic() - saved_s > SAVE_EVERY_S:
                    _write_partial(self._settings.folder, shard, done)
                    saved_s = time.monotonic()
        done.is_complete = True
        _write_partial(self._settings.folder, shard, done)
        return done.num_seen

    def _pictures(self, pool: ThreadPoolExecutor, items: Iterable[ImageItem]) -> Iterator[Picture]:
        """Decode in threads, a batch ahead; the order stays."""
        ahead = self._settings.batch_size + self._settings.threads
        waiting: deque[Future[Picture]] = deque()
        for item in items:
            waiting.append(pool.submit(decode, item, image_size=self._settings.image_size))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _fold(self, pictures: Iterator[Picture]) -> Partial:
        """The next FOLD images; fewer at the shard's end."""
        fold = Partial()
        rows: list[Tensor] = []
        labels: list[str | None] = []
        batch: list[Picture] = []
        while fold.num_seen < FOLD and (picture := next(pictures, None)) is not None:
            fold.num_seen += 1
            if picture.pixels_u8 is None:
                self._note_problem(fold, picture)
                continue
            fold.digest = (fold.digest + picture.file_sha256) % _DIGEST_RANGE
            labels.append(picture.label)
            batch.append(picture)
            if len(batch) == self._settings.batch_size:
                rows.append(self._features(batch))
                batch = []
        if batch:
            rows.append(self._features(batch))
        if not rows:
            return fold
        features_NF = torch.cat(rows)
        if self._settings.keeps_features:
            fold.features = [features_NF.float().cpu()]
            return fold
        moments = batch_moments(features_NF)
        fold.moments = Moments(moments.count, moments.mean_F.cpu(), moments.cov_FF.cpu())
        fold.class_sums = _sum_by_class(features_NF.double().cpu(), labels)
        fold.num_unlabelled = labels.count(None)
        return fold

    def _note_problem(self, fold: Partial, picture: Picture) -> None:
        told = f"{picture.name} ({picture.problem})"
        if self._settings.stops_at_problem:
            raise ConfigError(
                f"{told} is no image that can be decoded; repair or remove it, or allow a share of "
                "such images by --max-bad 0.001. What was read is kept: the same command goes on."
            )
        fold.num_bad += 1
        fold.problems = [*fold.problems, told][:SHOWN_PROBLEMS]

    def _features(self, batch: list[Picture]) -> Tensor:
        pixels = np.stack([p.pixels_u8 for p in batch if p.pixels_u8 is not None])
        images_01 = torch.from_numpy(pixels).to(self._device).float() / 255
        with torch.inference_mode():
            features_BF = self._extractor(images_01)
        if not torch.isfinite(features_BF).all():
            bad = int((~torch.isfinite(features_BF).all(dim=1)).nonzero()[0])
            raise NumericsError(
                f"the features of {batch[bad].name} are not finite; check --extractor."
            )
        return features_BF


def _sum_by_class(features_NF: Tensor, labels: list[str | None]) -> dict[str, tuple[int, Tensor]]:
    names = sorted({label for label in labels if label is not None})
    places = {name: place for place, name in enumerate(names)}
    rows = [row for row, label in enumerate(labels) if label is not None]
    classes = torch.tensor(
        [places[label] for label in labels if label is not None], dtype=torch.long
    )
    sums_KF = torch.zeros(len(names), features_NF.shape[1], dtype=torch.float64)
    sums_KF.index_add_(0, classes, features_NF[rows])
    counts = torch.bincount(classes, minlength=len(names)).tolist()
    return {name: (counts[place], sums_KF[place]) for name, place in places.items()}


def _location(folder: str, shard: Shard) -> str:
    return join(folder, f"shard-{shard.index:05d}.npz")


def _write_partial(folder: str, shard: Shard, done: Partial) -> None:
    arrays: dict[str, np.ndarray] = {
        "numbers": np.array(
            [done.num_seen, done.num_bad, done.num_unlabelled, done.is_complete], dtype=np.int64
        ),
        "problems": np.array(done.problems, dtype=np.str_),
        "digest": np.array(f"{done.digest:064x}"),
        "class_names": np.array(list(done.class_sums), dtype=np.str_),
        "class_counts": np.array([count for count, _ in done.class_sums.values()], dtype=np.int64),
    }
    if done.class_sums:
        arrays["class_sums"] = np.stack([total.numpy() for _, total in done.class_sums.values()])
    if done.moments is not None:
        arrays |= {"mean": done.moments.mean_F.numpy(), "cov": done.moments.cov_FF.numpy()}
    if done.features:
        arrays["features"] = torch.cat(done.features).numpy()
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    write_bytes(_location(folder, shard), stream.getvalue())


def done_shards(folder: str, shards: Iterable[Shard]) -> dict[int, int]:
    """Images seen, by index, of the shards whose results are complete; reads no moments.

    Raises:
        StorageError: a result is there and can't be read.
    """
    done = {}
    for shard in shards:
        try:
            with open_binary(_location(folder, shard)) as stream, np.load(stream) as archive:
                num_seen, _, _, is_complete = archive["numbers"].tolist()
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                continue
            raise
        if is_complete:
            done[shard.index] = num_seen
    return done


def read_partial(folder: str, shard: Shard) -> Partial | None:
    """Read what is kept of a shard; None if nothing is.

    Raises:
        StorageError: it is there and can't be read.
    """
    location = _location(folder, shard)
    try:
        payload = read_bytes(location)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    try:
        with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise StorageError(f"{location} is damaged ({error}); delete it and run again.") from error
    num_seen, num_bad, num_unlabelled, is_complete = arrays["numbers"].tolist()
    done = Partial(num_seen, num_bad, arrays["problems"].tolist(), int(str(arrays["digest"]), 16))
    done.num_unlabelled, done.is_complete = num_unlabelled, bool(is_complete)
    tensor = {k: torch.from_numpy(v) for k, v in arrays.items() if v.dtype.kind == "f"}
    if "mean" in tensor:
        done.moments = Moments(float(done.num_images), tensor["mean"], tensor["cov"])
    if "features" in tensor:
        done.features = [tensor["features"]]
    names, counts = arrays["class_names"].tolist(), arrays["class_counts"].tolist()
    for place, (name, count) in enumerate(zip(names, counts, strict=True)):
        done.class_sums[name] = (count, tensor["class_sums"][place])
    return done


def add_up(folder: str, shards: Iterable[Shard]) -> Partial:
    """Merge the results of all shards, in their order.

    Raises:
        StorageError: a result is missing or can't be read.
    """
    whole = Partial()
    for shard in shards:
        part = read_partial(folder, shard)
        if part is None or not part.is_complete:
            raise StorageError(
                f"a shard's result is missing in {folder}; every worker must write to the folder "
                "that this process reads, so put --output on shared storage or in an object store."
            )
        whole.add(part)
    return whole
