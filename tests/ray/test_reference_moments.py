"""Real images measured on actors: the same result as in one process, also when one is killed."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from ray.util.state import list_actors

from rlgen.actors.feature_worker import CrewSize, measure_on_ray
from rlgen.actors.placement import connect
from rlgen.config import RunConfig
from rlgen.errors import ConfigError, PlacementError, RlgenError
from rlgen.evaluation.image_moments import MeasureSettings
from rlgen.evaluation.image_plan import ImagePlan, plan_images
from rlgen.evaluation.partial import add_up, done_shards
from rlgen.jobs.reference_moments import main
from rlgen.moments.reference import load_reference
from tests.image_sources import SIDE, digit_files, write_extractor, write_folder, write_tar

pytestmark = pytest.mark.ray

FILES = digit_files()


@pytest.fixture
def source(tmp_path: Path) -> list[str]:
    """Six shards: four tars, and a folder that makes two."""
    for index in range(4):
        write_tar(tmp_path / f"{index}.tar", FILES[index * 80 : index * 80 + 80])
    return [str(tmp_path / "*.tar"), str(write_folder(tmp_path / "images", FILES[320:]))]


@pytest.fixture
def extractor(tmp_path: Path) -> str:
    return str(write_extractor(tmp_path / "net.safetensors"))


@pytest.fixture
def cluster() -> Iterator[None]:
    connect(RunConfig())
    yield
    ray.shutdown()


def test_actors_give_the_same_file_as_one_process(
    tmp_path: Path, source: list[str], extractor: str
) -> None:
    for num_workers in (1, 2):
        given = ["--extractor", extractor, "--output", str(tmp_path / f"{num_workers}.npz")]
        size = ["--image-size", str(SIDE), "--num-workers", str(num_workers)]
        limits = ["--num-cpus", "0.25", "--threads", "1"]
        assert main(["--images", *source, *given, *size, *limits]) == 0
    assert not ray.is_initialized()
    alone, crew = load_reference(tmp_path / "1.npz"), load_reference(tmp_path / "2.npz")
    assert alone.count == crew.count == 700
    assert alone.images_sha256 == crew.images_sha256
    # The same shards are added in the same order; only the network's threads could differ.
    for x, y in ((alone.mean_F, crew.mean_F), (alone.cov_FF, crew.cov_FF)):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12 * float(x.abs().max()))


def settings_of(folder: Path) -> MeasureSettings:
    return MeasureSettings(
        image_size=SIDE,
        batch_size=64,
        threads=1,
        keeps_features=False,
        stops_at_problem=True,
        folder=str(folder),
    )


def measure(plan: ImagePlan, extractor: str, settings: MeasureSettings, on_shard=None) -> None:
    measure_on_ray(
        plan.shards,
        extractor=extractor,
        settings=settings,
        size=CrewSize(2, 0.25, 0.0),
        on_shard=on_shard or (lambda *_: None),
    )


def test_killed_workers_are_replaced_and_change_nothing(
    tmp_path: Path, source: list[str], extractor: str, cluster: None
) -> None:
    plan = plan_images(source)
    undisturbed = settings_of(tmp_path / "undisturbed")
    measure(plan, extractor, undisturbed)
    settings = settings_of(tmp_path / "killed")
    killed: set[int] = set()

    def kill_the_others(index: int, num_images: int) -> None:
        alive = list_actors(
            address=ray.get_runtime_context().gcs_address,
            filters=[("class_name", "=", "FeatureWorker"), ("state", "=", "ALIVE")],
        )
        if len(killed) < 2:
            pid = max(actor.pid for actor in alive)
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)

    measure(plan, extractor, settings, kill_the_others)
    assert len(killed) == 2
    assert done_shards(settings.folder, plan.shards) == done_shards(undisturbed.folder, plan.shards)
    a, b = add_up(settings.folder, plan.shards), add_up(undisturbed.folder, plan.shards)
    assert a.moments is not None and b.moments is not None
    assert torch.equal(a.moments.cov_FF, b.moments.cov_FF) and a.digest == b.digest


def test_an_error_on_purpose_arrives_as_what_it_is(
    tmp_path: Path, source: list[str], extractor: str, cluster: None
) -> None:
    (tmp_path / "images" / "zero" / "broken.png").write_bytes(b"rubbish")
    with pytest.raises(ConfigError, match=r"zero/broken\.png .*--max-bad"):
        measure(plan_images(source), extractor, settings_of(tmp_path / "partial"))
    with pytest.raises(RlgenError, match=r"can't load .*gone\.safetensors.* does not exist"):
        measure(
            plan_images(source), str(tmp_path / "gone.safetensors"), settings_of(tmp_path / "new")
        )
    with pytest.raises(PlacementError, match=r"no room for a feature worker .*--num-gpus"):
        measure_on_ray(
            plan_images(source).shards,
            extractor=extractor,
            settings=settings_of(tmp_path / "partial"),
            size=CrewSize(1, 1.0, 64.0),
            on_shard=lambda *_: None,
        )
