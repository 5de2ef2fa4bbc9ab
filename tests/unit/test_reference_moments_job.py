"""The job that measures real images: all packings, resuming, refusals, and S3.

Shapes: N images, F features.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import s3fs
import torch
from moto.server import ThreadedMotoServer

import rlgen.evaluation.image_moments as image_moments
from rlgen.errors import ConfigError, NumericsError, StorageError
from rlgen.evaluation.image_moments import MeasureSettings, ShardReader
from rlgen.evaluation.image_plan import plan_images
from rlgen.evaluation.images import Shard
from rlgen.evaluation.judge import load_real_features
from rlgen.evaluation.partial import Partial, add_up, done_shards, read_partial
from rlgen.evaluation.reference_file import save_judge_features
from rlgen.features.extractor import load_extractor
from rlgen.features.outputs import ExtractorOutputs
from rlgen.jobs.reference_moments import main
from rlgen.moments.moments import batch_moments
from rlgen.moments.reference import ReferenceMoments, check_reference, load_reference
from tests.image_sources import (
    NAMES,
    NUM_FEATURES,
    SIDE,
    digit_files,
    pixels_of,
    write_extractor,
    write_folder,
    write_list,
    write_parquet,
    write_tar,
)

FILES = digit_files()


@pytest.fixture
def extractor(tmp_path: Path) -> Path:
    return write_extractor(tmp_path / "net.safetensors")


def features_of(extractor: Path, files: list[Any] = FILES) -> torch.Tensor:
    return load_extractor(str(extractor))(pixels_of(files))


def run(source: Any, extractor: Any, output: Any, *more: str) -> int:
    sources = [str(s) for s in source] if isinstance(source, list) else [str(source)]
    fixed = ["--image-size", str(SIDE), "--extractor", str(extractor), "--output", str(output)]
    return main(["--images", *sources, *fixed, "--threads", "1", *more])


def made(source: Any, extractor: Path, output: Path, *more: str) -> ReferenceMoments:
    assert run(source, extractor, output, *more) == 0
    assert not output.with_name(output.name + ".partial").exists(), "partial results go"
    return load_reference(output)


def assert_same(a: ReferenceMoments, b: ReferenceMoments, *, rtol: float) -> None:
    """Relative to the largest entry: features are float32 of another batching at worst."""
    assert a.count == b.count and a.feature_space == b.feature_space
    for x, y in ((a.mean_F, b.mean_F), (a.cov_FF, b.cov_FF)):
        torch.testing.assert_close(x, y, rtol=0, atol=rtol * float(y.abs().max()))


@pytest.mark.parametrize("packing", ["folder", "tar", "parquet", "list", "three tars"])
def test_every_packing_gives_the_moments_computed_directly(
    tmp_path: Path, extractor: Path, packing: str
) -> None:
    folder = write_folder(tmp_path / "images", FILES)
    source: Any = {
        "folder": lambda: folder,
        "tar": lambda: write_tar(tmp_path / "digits.tar", FILES),
        "parquet": lambda: write_parquet(tmp_path / "digits.parquet", FILES),
        "list": lambda: write_list(tmp_path / "list.txt", folder, FILES),
        "three tars": lambda: [
            write_tar(tmp_path / f"{place}.tar", FILES[start : start + 250])
            for place, start in enumerate((0, 250, 500))
        ],
    }[packing]()
    found = made(source, extractor, tmp_path / "out.npz")

    features_NF = features_of(extractor)
    moments = batch_moments(features_NF)
    space = load_extractor(str(extractor)).feature_space
    direct = ReferenceMoments(space, len(FILES), moments.mean_F, moments.cov_FF)
    # The network runs in float32 on other batches than the direct computation.
    assert_same(found, direct, rtol=1e-6)
    assert found.classes is not None and found.classes.names == tuple(sorted(NAMES))
    labels = np.array([label for _, label, _ in FILES])
    for name, count, mean_F in zip(
        found.classes.names, found.classes.counts, found.classes.means_KF, strict=True
    ):
        rows_NF = features_NF[torch.from_numpy(labels == name)].double()
        assert count == len(rows_NF)
        torch.testing.assert_close(mean_F, rows_NF.mean(dim=0), rtol=0, atol=1e-6)
    assert f"{SIDE} x {SIDE}" in found.preprocessing


def test_the_digest_tells_images_and_not_their_packing(tmp_path: Path, extractor: Path) -> None:
    some, others = FILES[:60], FILES[:59] + FILES[60:61]
    a = made(write_folder(tmp_path / "a", some), extractor, tmp_path / "a.npz")
    b = made(write_tar(tmp_path / "b.tar", some[::-1]), extractor, tmp_path / "b.npz")
    c = made(write_tar(tmp_path / "c.tar", others), extractor, tmp_path / "c.npz")
    assert a.images_sha256 == b.images_sha256 != c.images_sha256
    assert len(a.images_sha256) == 64


def test_images_without_classes_or_of_one_class_give_no_class_means(
    tmp_path: Path, extractor: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for name, _, payload in FILES[:60]:
        (flat / name).write_bytes(payload)
    assert made(flat, extractor, tmp_path / "a.npz").classes is None
    one = [file for file in FILES if file[1] == "three"]
    assert made(write_tar(tmp_path / "b.tar", one), extractor, tmp_path / "b.npz").classes is None
    mixed = made([tmp_path / "b.tar", flat], extractor, tmp_path / "c.npz")
    assert mixed.classes is None and mixed.count == 60 + len(one)


def test_class_names_that_are_numbers_are_sorted_by_value(tmp_path: Path, extractor: Path) -> None:
    numbered = [(name, str(place % 12), payload) for place, (name, _, payload) in enumerate(FILES)]
    found = made(write_folder(tmp_path / "a", numbered), extractor, tmp_path / "a.npz")
    assert found.classes is not None
    assert found.classes.names == tuple(str(number) for number in range(12))


def test_a_crash_in_the_middle_loses_nothing(
    tmp_path: Path, extractor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_moments, "FOLD", 100)
    monkeypatch.setattr(image_moments, "SAVE_EVERY_S", 0.0)
    source = write_tar(tmp_path / "digits.tar", FILES)
    whole = made(source, extractor, tmp_path / "whole.npz")

    crashed = tmp_path / "crashed.npz"
    decoded: list[str] = []
    original = image_moments.decode

    def counting(item: Any, **options: Any) -> Any:
        decoded.append(item.name)
        if len(decoded) == 455:
            raise MemoryError("as if killed")
        return original(item, **options)

    monkeypatch.setattr(image_moments, "decode", counting)
    with pytest.raises(MemoryError):
        run(source, extractor, crashed)
    assert not crashed.exists()
    (folder,) = (tmp_path / "crashed.npz.partial").iterdir()
    (shard,) = plan_images([str(source)]).shards
    kept = read_partial(str(folder), shard)
    assert kept is not None and not kept.is_complete
    # Decoding runs up to a batch ahead of the fold that was saved last.
    assert kept.num_seen in (300, 400)

    decoded.clear()
    resumed = made(source, extractor, crashed)
    assert len(decoded) == len(FILES) - kept.num_seen
    assert_same(resumed, whole, rtol=0)
    assert resumed.images_sha256 == whole.images_sha256
    assert resumed.classes is not None and whole.classes is not None
    assert torch.equal(resumed.classes.means_KF, whole.classes.means_KF)


def test_shards_that_are_done_are_not_read_again(
    tmp_path: Path, extractor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [write_tar(tmp_path / f"{i}.tar", FILES[i * 200 : i * 200 + 200]) for i in range(3)]
    measured: list[int] = []
    original = ShardReader.measure

    def failing(self: ShardReader, shard: Any, on_images: Any) -> int:
        measured.append(shard.index)
        if measured == [0, 1]:
            raise StorageError("as if the store went away")
        return original(self, shard, on_images)

    monkeypatch.setattr(ShardReader, "measure", failing)
    with pytest.raises(StorageError, match="went away"):
        run(sources, extractor, tmp_path / "out.npz")
    made(sources, extractor, tmp_path / "out.npz")
    assert measured == [0, 1, 1, 2]


@pytest.mark.parametrize("what", ["extractor", "size", "source", "limit", "features"])
def test_results_of_other_settings_are_not_taken(
    tmp_path: Path, extractor: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    source = write_tar(tmp_path / "a.tar", FILES[:300])
    output = tmp_path / "out.npz"
    with monkeypatch.context() as patch:
        patch.setattr("rlgen.jobs.reference_moments._write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(source, extractor, output)
    more: list[str] = []
    if what == "extractor":
        extractor = write_extractor(tmp_path / "other.safetensors", seed=1)
    elif what == "size":
        more = ["--image-size", "32"]
        extractor = extractor_of_32(tmp_path)
    elif what == "source":
        source = write_tar(tmp_path / "a.tar", FILES[:320])
    elif what == "limit":
        more = ["--limit", "100"]
    else:
        more = ["--judge-features", "100"]
    run(source, extractor, output, *more)
    fresh = tmp_path / "fresh.npz"
    run(source, extractor, fresh, *more)
    assert output.read_bytes() == fresh.read_bytes()


def extractor_of_32(folder: Path) -> Path:
    from rlgen.features.convnet import ConvNet, ConvNetConfig
    from rlgen.features.extractor import save_convnet

    path = folder / "large.safetensors"
    save_convnet(str(path), ConvNet(ConvNetConfig(image_size=32, num_features=NUM_FEATURES)))
    return path


def test_judge_features_are_what_an_evaluation_reads(tmp_path: Path, extractor: Path) -> None:
    source = write_folder(tmp_path / "images", FILES)
    output = tmp_path / "judge.npz"
    run(source, extractor, output, "--judge-features", "200", "--neighbors", "50")
    real = load_real_features(str(output))
    kept = [FILES[g] for g in range(700) if (g + 1) * 200 // 700 > g * 200 // 700]
    assert real.feature_space == load_extractor(str(extractor)).feature_space
    torch.testing.assert_close(real.features_RF, features_of(extractor, kept), rtol=0, atol=1e-5)
    assert real.neighbors_NF.shape == (50, NUM_FEATURES)
    is_same_NR = (real.neighbors_NF[:, None] == real.features_RF[None]).all(dim=2)
    assert is_same_NR.any(dim=1).all(), "neighbours are some of the features"
    assert len(real.neighbors_NF.unique(dim=0)) == 50


def test_unreadable_images_are_refused_or_counted(
    tmp_path: Path, extractor: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "images", FILES[:300])
    good = made(folder, extractor, tmp_path / "good.npz")
    for number in range(3):
        (folder / "one" / f"broken{number}.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(ConfigError, match=r"one/broken0\.png .*--max-bad 0\.001"):
        run(folder, extractor, tmp_path / "a.npz")
    with pytest.raises(ConfigError, match=r"3 of 303 images \(0\.99%\).*allows 0\.50%.*broken1"):
        run(folder, extractor, tmp_path / "a.npz", "--max-bad", "0.005")
    assert not (tmp_path / "a.npz").exists()
    capsys.readouterr()
    found = made(folder, extractor, tmp_path / "a.npz", "--max-bad", "0.01")
    # The same images in other batches of float32.
    assert_same(found, good, rtol=1e-6)
    assert found.images_sha256 == good.images_sha256
    told = capsys.readouterr().out
    assert "can't be decoded: 3" in told and "broken2.png" in told


def test_a_source_of_broken_images_alone_is_refused(tmp_path: Path, extractor: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"1 of 1 images \(100.00%\)"):
        run(tmp_path / "a.png", extractor, tmp_path / "a.npz", "--max-bad", "0.9")


def test_requests_that_cannot_be_met_are_refused_before_anything_is_read(
    tmp_path: Path, extractor: Path
) -> None:
    source = write_tar(tmp_path / "a.tar", FILES[:30])
    (tmp_path / "taken.npz").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"taken\.npz exists.*--force"):
        run(source, extractor, tmp_path / "taken.npz")
    made(source, extractor, tmp_path / "taken.npz", "--force")
    with pytest.raises(ConfigError, match=r"must end in \.npz"):
        run(source, extractor, tmp_path / "a.bin")
    with pytest.raises(ConfigError, match=r"a\.tar is no feature extractor"):
        run(source, source, tmp_path / "b.npz")
    with pytest.raises(ConfigError, match=r"gone\.safetensors is no feature extractor"):
        run(source, tmp_path / "gone.safetensors", tmp_path / "b.npz")
    with pytest.raises(ConfigError, match="drop --limit"):
        run(source, extractor, tmp_path / "b.npz", "--limit", "5", "--judge-features", "5")
    empty = write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(ConfigError, match="holds no image"):
        run(empty, extractor, tmp_path / "b.npz")


def test_another_extractors_moments_are_refused_by_a_run(tmp_path: Path, extractor: Path) -> None:
    found = made(write_tar(tmp_path / "a.tar", FILES[:60]), extractor, tmp_path / "a.npz")
    other = load_extractor(str(write_extractor(tmp_path / "other.safetensors", seed=1)))
    with pytest.raises(ConfigError, match="compute the reference with the same features"):
        check_reference(
            found, feature_space=other.feature_space, num_features=NUM_FEATURES, path="a.npz"
        )


def test_features_that_are_not_finite_name_the_image(tmp_path: Path) -> None:
    class Broken:
        feature_space, num_features = "broken:2", 2

        def __call__(self, images_01: torch.Tensor) -> torch.Tensor:
            features = images_01.mean(dim=(2, 3))[:, :2]
            features[3] = float("nan")
            return features

        def outputs(self, images_01: torch.Tensor) -> ExtractorOutputs:
            return ExtractorOutputs(self(images_01))

    (shard,) = plan_images([str(write_folder(tmp_path / "a", FILES[:20]))]).shards
    settings = MeasureSettings(SIDE, 8, 2, False, True, str(tmp_path / "partial"))
    with pytest.raises(NumericsError, match=FILES[3][0]):
        ShardReader(Broken(), settings, device=torch.device("cpu")).measure(shard)


def test_partial_results_add_up_and_survive_storage(tmp_path: Path, extractor: Path) -> None:
    write_folder(tmp_path / "a", FILES)
    plan = plan_images([str(tmp_path / "a")])
    settings = MeasureSettings(SIDE, 64, 2, False, True, str(tmp_path / "partial"))
    reader = ShardReader(load_extractor(str(extractor)), settings, device=torch.device("cpu"))
    with pytest.raises(StorageError, match="result is missing"):
        add_up(settings.folder, plan.shards)
    for shard in reversed(plan.shards):
        reader.measure(shard)
    assert done_shards(settings.folder, plan.shards) == {0: 256, 1: 256, 2: 188}
    forwards, backwards = add_up(settings.folder, plan.shards), Partial()
    for shard in reversed(plan.shards):
        backwards.add(read_partial(settings.folder, shard) or Partial())
    assert forwards.moments is not None and backwards.moments is not None
    # Numbers of order 1, added in two orders in float64.
    torch.testing.assert_close(
        forwards.moments.cov_FF, backwards.moments.cov_FF, rtol=0, atol=1e-14
    )
    assert forwards.digest == backwards.digest and forwards.num_seen == 700
    again = add_up(settings.folder, plan.shards)
    assert again.moments is not None
    assert torch.equal(again.moments.cov_FF, forwards.moments.cov_FF)


class Quarters:
    """Mean and spread as features; the four quarters' means as features with a place."""

    feature_space, num_features = "quarters:2", 2

    def __call__(self, images_01: torch.Tensor) -> torch.Tensor:
        return torch.stack([images_01.mean(dim=(1, 2, 3)), images_01.std(dim=(1, 2, 3))], dim=1)

    def outputs(self, images_01: torch.Tensor) -> ExtractorOutputs:
        quarters = torch.nn.functional.avg_pool2d(images_01.mean(dim=1), SIDE // 2)
        return ExtractorOutputs(self(images_01), spatial_BS=quarters.flatten(1))


def test_a_judges_reference_carries_the_moments_of_spatial_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_moments, "FOLD", 100)
    monkeypatch.setattr(image_moments, "SAVE_EVERY_S", 0.0)
    plan = plan_images([str(write_folder(tmp_path / "a", FILES))])
    settings = MeasureSettings(SIDE, 64, 1, True, True, str(tmp_path / "partial"))
    judge = Quarters()
    with pytest.raises(KeyboardInterrupt):
        measure_or_die(judge, settings, plan.shards[0], after=1)
    kept = read_partial(settings.folder, plan.shards[0])
    assert kept is not None and kept.num_seen == 100 and not kept.is_complete
    for shard in plan.shards:  # the first one goes on from there
        ShardReader(judge, settings, device=torch.device("cpu")).measure(shard)
    whole = add_up(settings.folder, plan.shards)
    path = tmp_path / "judge.npz"
    save_judge_features(path, whole, judge.feature_space, num_neighbors=50)
    real = load_real_features(str(path))
    expected = judge.outputs(pixels_of(FILES))
    assert expected.spatial_BS is not None and real.spatial is not None
    torch.testing.assert_close(real.features_RF, expected.features_BF, rtol=1e-5, atol=1e-6)
    direct = batch_moments(expected.spatial_BS)
    assert real.spatial.count == len(FILES) == direct.count
    # Means of float32 pixels, added in another order.
    torch.testing.assert_close(real.spatial.mean_F, direct.mean_F, rtol=0, atol=1e-6)
    torch.testing.assert_close(real.spatial.cov_FF, direct.cov_FF, rtol=0, atol=1e-6)


def measure_or_die(judge: Quarters, settings: MeasureSettings, shard: Shard, *, after: int) -> None:
    """Read a shard and be interrupted after that many folds are kept."""
    folds = 0

    def interrupt(_: int) -> None:
        nonlocal folds
        folds += 1
        if folds > after:
            raise KeyboardInterrupt

    ShardReader(judge, settings, device=torch.device("cpu")).measure(shard, interrupt)


def test_a_reference_of_the_reward_holds_no_spatial_moments(tmp_path: Path) -> None:
    plan = plan_images([str(write_folder(tmp_path / "a", FILES[:20]))])
    settings = MeasureSettings(SIDE, 8, 1, False, True, str(tmp_path / "partial"))
    ShardReader(Quarters(), settings, device=torch.device("cpu")).measure(plan.shards[0])
    whole = add_up(settings.folder, plan.shards)
    assert whole.moments is not None and whole.spatial is None


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    store = ThreadedMotoServer(port=0)
    store.start()
    host, port = store.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("data")
    yield
    s3fs.S3FileSystem.clear_instance_cache()
    store.stop()


def test_s3_for_everything(tmp_path: Path, extractor: Path, s3: None) -> None:
    local = made(write_folder(tmp_path / "a", FILES[:300]), extractor, tmp_path / "a.npz")
    filesystem = s3fs.S3FileSystem()
    for name, label, payload in FILES[:40]:
        filesystem.pipe(f"data/images/{label}/{name}", payload)
    filesystem.put(str(extractor), "data/net.safetensors")
    filesystem.put(str(write_tar(tmp_path / "a.tar", FILES[40:200])), "data/shards/0.tar")
    filesystem.put(str(write_parquet(tmp_path / "a.parquet", FILES[200:300])), "data/1.parquet")
    sources = ["s3://data/images", "s3://data/shards/*.tar", "s3://data/1.parquet"]
    output = "s3://data/results/moments.npz"
    assert run(sources, "s3://data/net.safetensors", output) == 0
    with fsspec.open(output, "rb") as stream:
        found = load_reference(stream)
    # The same images in other batches of float32.
    assert_same(found, local, rtol=1e-6)
    assert found.images_sha256 == local.images_sha256
    assert found.classes is not None and local.classes is not None
    assert found.classes.counts == local.classes.counts
    assert filesystem.find("data/results") == ["data/results/moments.npz"]
    with pytest.raises(ConfigError, match="exists"):
        run(sources, "s3://data/net.safetensors", output)
    with pytest.raises(ConfigError, match=r"nothing found"):
        run("s3://data/nowhere", extractor, tmp_path / "b.npz")
