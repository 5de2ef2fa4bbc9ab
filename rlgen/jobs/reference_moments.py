"""Measure real images in a feature space: the reference of the distribution reward, or the judge's.

`python -m rlgen.jobs.reference_moments --images train/ --extractor net.safetensors --output r.npz`
An interrupted job goes on with the same command. With --judge-features N the file is what
evaluation.judge_reference wants, and the extractor is the judge.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlgen.errors import CheckpointError, ConfigError, StorageError
from rlgen.jobs.cli import run_job
from rlgen.storage import is_url, join, sha256_hex

if TYPE_CHECKING:  # torch takes seconds to import; --help must not
    from rlgen.evaluation.image_moments import MeasureSettings
    from rlgen.evaluation.image_plan import ImagePlan
    from rlgen.evaluation.partial import Partial
    from rlgen.features.extractor import FeatureExtractor
    from rlgen.jobs.console import RunProgress


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, plan, measure, add up, write."""
    given = _parse(arguments)
    _check_output(given)
    from rlgen.evaluation.image_plan import plan_images
    from rlgen.evaluation.partial import add_up
    from rlgen.jobs.console import RunProgress

    with RunProgress(1) as progress:
        progress.stage("listing images")
        plan = plan_images(given.images, limit=given.judge_features or given.limit)
        extractor = _load_extractor(given)
        settings = _settings(given, plan, extractor.feature_space)
        _measure(given, plan, extractor, settings, progress)
        progress.stage("adding up")
        whole = add_up(settings.folder, plan.shards)
        _check_problems(whole, max_bad=given.max_bad)
        _write(given, whole, extractor.feature_space)
        _remove(given.output + ".partial")
        for line in _told(given, whole, extractor):
            progress.say(line)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rlgen.jobs.reference_moments", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add(
        "--images",
        required=True,
        nargs="+",
        metavar="SOURCE",
        help="folders (with their subfolders, whose names are the classes), .tar, .parquet, text "
        "files with a path a line, or patterns such as 'shard-*.tar'; paths or URLs (s3://...)",
    )
    add("--extractor", required=True, metavar="FILE", help="path or URL of the feature extractor")
    add("--output", required=True, metavar="FILE", help="path or URL of the .npz to write")
    add("--image-size", type=_positive, default=256, metavar="PIXELS", help="default: 256")
    add("--limit", type=_positive, metavar="N", help="use N images, evenly spread over the source")
    add(
        "--judge-features",
        type=_positive,
        metavar="N",
        help="write the features of N images, as evaluation.judge_reference wants them",
    )
    add(
        "--neighbors",
        type=_positive,
        default=10000,
        metavar="M",
        help="of these, how many precision and recall compare with; default: 10000",
    )
    add(
        "--max-bad",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of images that may be unreadable; default: 0",
    )
    add("--num-workers", type=_positive, default=1, help="more than 1 are Ray actors; default: 1")
    add("--num-cpus", type=float, default=1.0, help="CPUs for each actor; default: 1")
    add("--num-gpus", type=float, default=0.0, help="GPUs for each actor; default: 0")
    add("--threads", type=_positive, default=2, help="threads of each worker; default: 2")
    add("--batch", type=_positive, default=64, help="images a forward pass; default: 64")
    add("--force", action="store_true", help="replace the output if it exists")
    given = parser.parse_args(arguments)
    for name in ("extractor", "output"):  # workers may have another working directory
        location = getattr(given, name)
        if not is_url(location):
            setattr(given, name, os.path.abspath(location.removeprefix("file://")))
    return given


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)


def _check_output(given: argparse.Namespace) -> None:
    """Refuse before time is spent."""
    if not 0 <= given.max_bad < 1:
        raise ConfigError(f"--max-bad {given.max_bad:g} is no share; use 0 <= share < 1.")
    if given.judge_features and given.limit:
        raise ConfigError("--limit and --judge-features both say how many images; drop --limit.")
    if not given.output.endswith(".npz"):
        raise ConfigError(f"--output {given.output} must end in .npz.")
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(given.output)
    if not given.force and filesystem.exists(path):
        raise ConfigError(
            f"--output {given.output} exists; name another file, or replace it by --force."
        )


def _load_extractor(given: argparse.Namespace) -> "FeatureExtractor":
    import torch

    from rlgen.features.extractor import load_extractor

    torch.set_num_threads(given.threads)
    try:
        is_here = given.num_workers == 1 and torch.cuda.is_available()
        return load_extractor(given.extractor, torch.device("cuda" if is_here else "cpu"))
    except (CheckpointError, StorageError) as error:
        raise ConfigError(
            f"--extractor {given.extractor} is no feature extractor: {error}"
        ) from None


def _settings(
    given: argparse.Namespace, plan: "ImagePlan", feature_space: str
) -> "MeasureSettings":
    """Shards' results lie under a key of all that they depend on; another key begins anew."""
    from rlgen.evaluation.image_moments import FOLD, MeasureSettings
    from rlgen.evaluation.partial import FORMAT
    from rlgen.evaluation.pixels import describe_preprocessing

    preprocessing = describe_preprocessing(given.image_size)
    keeps_features = given.judge_features is not None
    numbers = [str(FORMAT), str(FOLD), str(keeps_features)]
    content = "\n".join([plan.digest, feature_space, preprocessing, *numbers])
    return MeasureSettings(
        image_size=given.image_size,
        batch_size=given.batch,
        threads=given.threads,
        keeps_features=keeps_features,
        stops_at_problem=given.max_bad == 0,
        folder=join(given.output + ".partial", sha256_hex(content.encode())[:16]),
    )


def _measure(
    given: argparse.Namespace,
    plan: "ImagePlan",
    extractor: "FeatureExtractor",
    settings: "MeasureSettings",
    progress: "RunProgress",
) -> None:
    """Measure the shards that are not done, here or on Ray."""
    import torch

    from rlgen.evaluation.image_moments import ShardReader
    from rlgen.evaluation.partial import done_shards

    kept = done_shards(settings.folder, plan.shards)
    if kept:
        progress.say(f"{len(kept)} of {len(plan.shards)} shards are done: going on from there")
    counts = dict(kept)
    left = [shard for shard in plan.shards if shard.index not in kept]

    def tell(index: int, num_images: int) -> None:
        counts[index] = num_images
        done, total = sum(counts.values()), plan.num_images
        progress.stage(
            f"{extractor.feature_space}: {done} images" if total is None else "measuring images",
            done=None if total is None else done,
            total=total,
        )

    if given.num_workers == 1:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        reader = ShardReader(extractor, settings, device=device)
        for shard in left:
            reader.measure(shard, lambda done, index=shard.index: tell(index, done))  # type: ignore[misc]
        return
    if not left:
        return
    import ray

    from rlgen.actors.feature_worker import CrewSize, measure_on_ray
    from rlgen.actors.placement import connect
    from rlgen.config import RunConfig

    connect(RunConfig())
    try:
        measure_on_ray(
            left,
            extractor=given.extractor,
            settings=settings,
            size=CrewSize(given.num_workers, given.num_cpus, given.num_gpus),
            on_shard=tell,
        )
    finally:
        ray.shutdown()


def _check_problems(whole: "Partial", *, max_bad: float) -> None:
    """Refuse a reference of too few images, or of none."""
    if whole.num_seen == 0:
        raise ConfigError("--images holds no image; check the files, and --limit.")
    share = whole.num_bad / whole.num_seen
    if share > max_bad or whole.num_images == 0:
        raise ConfigError(
            f"{whole.num_bad} of {whole.num_seen} images ({share:.2%}) can't be decoded, and "
            f"--max-bad allows {max_bad:.2%}: {'; '.join(whole.problems)}. Repair or remove them, "
            "or allow more; what was measured is kept for the next attempt."
        )


def _write(given: argparse.Namespace, whole: "Partial", feature_space: str) -> None:
    """Write the output, complete or not at all."""
    from rlgen.evaluation.reference_file import save_judge_features, to_reference
    from rlgen.moments.reference import save_reference
    from rlgen.storage import write_bytes

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "output.npz"
        if given.judge_features:
            save_judge_features(path, whole, feature_space, num_neighbors=given.neighbors)
        else:
            save_reference(path, to_reference(whole, feature_space, image_size=given.image_size))
        write_bytes(given.output, path.read_bytes())


def _remove(folder: str) -> None:
    """Delete the shards' results, which the output replaces."""
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(folder)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def _told(given: argparse.Namespace, whole: "Partial", extractor: "FeatureExtractor") -> list[str]:
    """What came out, for people."""
    lines = [f"{given.output}: {whole.num_images} images in {extractor.feature_space}"]
    if len(whole.class_sums) > 1:
        missing = f", {whole.num_unlabelled} images have none: no class means"
        lines[0] += f", {len(whole.class_sums)} classes"
        lines[0] += missing if whole.num_unlabelled else " with a mean each"
    if whole.spatial is not None:
        lines[0] += f", and statistics of {whole.spatial.mean_F.numel()} spatial features"
    if whole.num_bad:
        lines.append(f"left out, as they can't be decoded: {whole.num_bad}, such as")
        lines += [f"  {problem}" for problem in whole.problems]
    if whole.num_images < 2 * extractor.num_features:
        lines.append(
            f"warning: {whole.num_images} images are few for {extractor.num_features} feature "
            f"dimensions; a covariance wants at least {2 * extractor.num_features}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(run_job(main))
