"""What is known of the images of a shard, and of all shards: kept on disk, and added up.

Owns the files in the folder of partial results. The sum depends on the shards alone: not on how
many workers read them, nor on interruptions. Must not know how images become features.

Shapes: N images of a shard, F features, S spatial features.
"""

import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rlgen.errors import StorageError
from rlgen.evaluation.images import Shard
from rlgen.moments.moments import Moments, merge
from rlgen.storage import join, open_binary, read_bytes, write_bytes

FORMAT = 2
"""Of the files; another one is not gone on from."""
SHOWN_PROBLEMS = 5
DIGEST_RANGE = 2**256


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
    spatial: Moments | None = None
    """Of the spatial features, where features are kept and the extractor has any."""
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
        self.digest = (self.digest + other.digest) % DIGEST_RANGE
        self.moments = _merged(self.moments, other.moments)
        self.features += other.features
        self.spatial = _merged(self.spatial, other.spatial)
        for name, (count, sum_F) in other.class_sums.items():
            ours, our_sum_F = self.class_sums.get(name, (0, torch.zeros_like(sum_F)))
            self.class_sums[name] = (ours + count, our_sum_F + sum_F)
        self.num_unlabelled += other.num_unlabelled


def _merged(first: Moments | None, second: Moments | None) -> Moments | None:
    if first is None or second is None:
        return first or second
    return merge(first, second)


def _location(folder: str, shard: Shard) -> str:
    return join(folder, f"shard-{shard.index:05d}.npz")


def write_partial(folder: str, shard: Shard, done: Partial) -> None:
    """Keep what is known of a shard, in place of what was kept before.

    Raises:
        StorageError: it can't be written.
    """
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
    if done.spatial is not None:
        arrays["spatial_mean"] = done.spatial.mean_F.numpy()
        arrays["spatial_cov"] = done.spatial.cov_FF.numpy()
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
    if "spatial_mean" in tensor:
        done.spatial = Moments(
            float(done.num_images), tensor["spatial_mean"], tensor["spatial_cov"]
        )
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
