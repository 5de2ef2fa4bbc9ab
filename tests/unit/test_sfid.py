"""sFID from real images to the table, with FID's Inception on weights of the parity rule."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlgen.features.extractor import load_extractor
from rlgen.features.inception import Inception
from rlgen.jobs import evaluate, reference_moments
from rlgen.parity.rule import is_made, make_tensor
from tests.conftest import TINY_DIGITS
from tests.image_sources import SIDE, digit_files, pixels_of, write_folder

NUM_IMAGES = 12
FILES = digit_files(15)
FILES_WITHOUT_SPATIAL = ("feature_space", "features", "neighbors")


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as pt_inception-2015-12-05-6726825d.pth."""
    state = {
        name: make_tensor(3, name, tensor.shape) if is_made(name) else tensor
        for name, tensor in Inception().state_dict().items()
    }
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def reference(judge: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The judge's features of real digits, from the job that makes them."""
    folder = tmp_path_factory.mktemp("real")
    images = write_folder(folder / "images", FILES)
    path = folder / "judge.npz"
    arguments = ["--images", str(images), "--extractor", str(judge), "--output", str(path)]
    sizes = ["--image-size", str(SIDE), "--judge-features", "15", "--neighbors", "15"]
    assert reference_moments.main([*arguments, *sizes, "--threads", "1"]) == 0
    return path


def run(output: Path, judge: Path, reference: Path) -> dict[str, Any]:
    """The row of the only scale."""
    arguments = ["--output", str(output), "--num-images", str(NUM_IMAGES), "--scales", "1"]
    models = [f"evaluation.judge={judge}", f"evaluation.judge_reference={reference}"]
    settings = [*TINY_DIGITS, "runtime=local", "tracking.uri=none", *models]
    assert evaluate.main([*arguments, *settings]) == 0
    return json.loads((output / "evaluate.json").read_text())["scales"]["1"]


def frechet_by_svd(ours_NS: np.ndarray, real_RS: np.ndarray) -> float:
    """Of fewer images than features, by the nuclear norm of the centred features' product."""
    x, y = (rows.astype(np.float64) - rows.mean(axis=0, dtype=float) for rows in (ours_NS, real_RS))
    x, y = x / np.sqrt(len(x) - 1), y / np.sqrt(len(y) - 1)
    gap = ours_NS.mean(axis=0, dtype=float) - real_RS.mean(axis=0, dtype=float)
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(gap @ gap + (x**2).sum() + (y**2).sum() - 2 * cross)


def test_sfid_compares_spatial_features_and_says_why_where_there_are_none(
    judge: Path,
    reference: Path,
    cache_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "evaluation"
    row = run(output, judge, reference)
    [unit] = (output / "units" / "scale-1").glob("*.npz")
    with np.load(unit) as archive:
        ours_NS = archive["judge_spatial"]
    assert ours_NS.shape == (NUM_IMAGES, 2023)
    real_RS = load_extractor(str(judge)).outputs(pixels_of(FILES)).spatial_BS
    expected = frechet_by_svd(ours_NS, real_RS.numpy())
    assert expected > 1e-3
    # Real features are float32 of another batching.
    assert row["sfid"] == pytest.approx(expected, rel=1e-4)
    assert row["inception_score"] >= 1 and "sfid" not in row["missing"]
    assert re.search(r"sFID \(judge\)\W+[0-9.]+", capsys.readouterr().out)

    old = tmp_path / "old.npz"
    with np.load(reference) as archive:
        np.savez(old, **{name: archive[name] for name in FILES_WITHOUT_SPATIAL})
    again = run(output, judge, old)  # the units are there
    assert again["sfid"] is None and again["fid"] == row["fid"]
    assert "judge_reference has no statistics of spatial features" in again["missing"]["sfid"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "no sFID (judge): evaluation.judge_reference has no statistics" in shown
