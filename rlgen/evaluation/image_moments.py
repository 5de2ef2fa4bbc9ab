"""From a shard of images to its share of the reference moments. The plain object in an actor.

Owns the arithmetic of one shard. Must not know what is kept of it on disk (partial.py does) nor
who reads which shard.

Shapes: B images of a batch, N images of a shard, F features, S spatial features.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlgen.errors import ConfigError, NumericsError
from rlgen.evaluation.images import ImageItem, Shard
from rlgen.evaluation.partial import (
    DIGEST_RANGE,
    SHOWN_PROBLEMS,
    Partial,
    read_partial,
    write_partial,
)
from rlgen.evaluation.pixels import Picture, decode
from rlgen.features.extractor import FeatureExtractor
from rlgen.features.outputs import ExtractorOutputs
from rlgen.moments.moments import Moments, batch_moments

FOLD = 1024
"""Images whose features are turned into moments at once; a restart begins after a fold."""
SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class MeasureSettings:
    """How images become features, and where a shard's result is kept."""

    image_size: int
    batch_size: int
    threads: int
    """Threads that decode."""
    keeps_features: bool
    """Keep every feature vector, and the moments of spatial features, as a judge's reference needs;
    else the moments of the features."""
    stops_at_problem: bool
    """Whether the first image that can't be decoded is an error."""
    folder: str
    """Path or URL of the results of shards; every worker must see it."""


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
                    write_partial(self._settings.folder, shard, done)
                    saved_s = time.monotonic()
        done.is_complete = True
        write_partial(self._settings.folder, shard, done)
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
        parts: list[ExtractorOutputs] = []
        labels: list[str | None] = []
        batch: list[Picture] = []
        while fold.num_seen < FOLD and (picture := next(pictures, None)) is not None:
            fold.num_seen += 1
            if picture.pixels_u8 is None:
                self._note_problem(fold, picture)
                continue
            fold.digest = (fold.digest + picture.file_sha256) % DIGEST_RANGE
            labels.append(picture.label)
            batch.append(picture)
            if len(batch) == self._settings.batch_size:
                parts.append(self._outputs(batch))
                batch = []
        if batch:
            parts.append(self._outputs(batch))
        if not parts:
            return fold
        features_NF = torch.cat([part.features_BF for part in parts])
        if self._settings.keeps_features:
            fold.features = [features_NF.float().cpu()]
            spatial = [part.spatial_BS for part in parts if part.spatial_BS is not None]
            if spatial:
                fold.spatial = _moments_on_cpu(torch.cat(spatial))
            return fold
        fold.moments = _moments_on_cpu(features_NF)
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

    def _outputs(self, batch: list[Picture]) -> ExtractorOutputs:
        pixels = np.stack([p.pixels_u8 for p in batch if p.pixels_u8 is not None])
        images_01 = torch.from_numpy(pixels).to(self._device).float() / 255
        with torch.inference_mode():
            outputs = self._extractor.outputs(images_01)
        finite_B = torch.isfinite(outputs.features_BF).all(dim=1)
        if not finite_B.all():
            bad = int((~finite_B).nonzero()[0])
            raise NumericsError(
                f"the features of {batch[bad].name} are not finite; check --extractor."
            )
        return outputs


def _moments_on_cpu(rows_NF: Tensor) -> Moments:
    moments = batch_moments(rows_NF)
    return Moments(moments.count, moments.mean_F.cpu(), moments.cov_FF.cpu())


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
