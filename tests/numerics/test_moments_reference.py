"""The reference moments file: round trip and every way in which it can be wrong."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from rlgen.errors import ConfigError
from rlgen.moments.coordinates import to_coordinates
from rlgen.moments.moments import batch_moments
from rlgen.moments.reference import (
    ReferenceMoments,
    check_reference,
    load_reference,
    save_reference,
)

SPACE = "inception-fid/pool-2048"


def make() -> ReferenceMoments:
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = batch_moments(rows)
    return ReferenceMoments(SPACE, 30, moments.mean_F, moments.cov_FF, "256 px, no crop")


def assert_same(a: ReferenceMoments, b: ReferenceMoments) -> None:
    assert (a.feature_space, a.count, a.preprocessing) == (
        b.feature_space,
        b.count,
        b.preprocessing,
    )
    assert torch.equal(a.mean_F, b.mean_F)
    # Made symmetric on saving: half a unit in the last place of numbers of order 1.
    torch.testing.assert_close(a.cov_FF, b.cov_FF, rtol=0, atol=1e-15)


def test_round_trip_by_path_and_by_file(tmp_path: Path) -> None:
    path = tmp_path / "moments.bin"  # np.savez would append .npz
    save_reference(path, make())
    assert_same(load_reference(path), make())
    assert_same(load_reference(str(path)), make())
    buffer = io.BytesIO()
    save_reference(buffer, make())
    buffer.seek(0)
    loaded = load_reference(buffer)
    assert_same(loaded, make())
    assert torch.equal(loaded.cov_FF, loaded.cov_FF.T)
    assert loaded.moments.count == 30.0


def stored(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "reference.npz"
    save_reference(path, make())
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files}
    arrays.update(changes)
    with path.open("wb") as file:
        np.savez(file, **{key: value for key, value in arrays.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cov": None, "count": None}, "lack count, cov"),
        ({"format_version": np.int64(2)}, "format version 2, this rlgen reads 1"),
        ({"format_version": np.zeros(3)}, "must be scalars"),
        ({"mean": np.zeros(5)}, r"mean has shape \[5\] and cov \[6, 6\]"),
        ({"mean": np.zeros((6, 1))}, r"mean has shape \[6, 1\]"),
        ({"mean": np.full(6, np.nan)}, "not finite"),
        ({"cov": np.full((6, 6), np.inf)}, "not finite"),
        ({"cov": np.eye(6, dtype=np.int64)}, "cov int64"),
        ({"cov": -np.eye(6)}, "negative variance"),
        ({"cov": np.eye(6) + np.diag(np.ones(5), 1)}, "not symmetric"),
        ({"count": np.int64(0)}, "count = 0"),
        ({"feature_space": np.str_("")}, "feature_space = ''"),
        ({"mean": np.array([None] * 6, dtype=object)}, "can't read"),
    ],
)
def test_wrong_contents_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = stored(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        load_reference(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04broken"])
def test_unreadable_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.npz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"can't read reference moments .*broken\.npz"):
        load_reference(path)
    with pytest.raises(ConfigError, match=r"absent\.npz"):
        load_reference(tmp_path / "absent.npz")


def test_truncated_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    save_reference(path, make())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="can't read"):
        load_reference(path)
    at = content.index(make().mean_F.numpy().tobytes())
    path.write_bytes(content[:at] + b"\x00\x01\x02" + content[at + 3 :])
    with pytest.raises(ConfigError, match="can't read"):
        load_reference(path)


def test_a_plain_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "array.npy"
    np.save(path, np.zeros(3))
    with pytest.raises(ConfigError, match=r"array\.npy"):
        load_reference(path)


def test_saving_broken_moments_is_refused(tmp_path: Path) -> None:
    good = make()
    broken = ReferenceMoments(SPACE, 30, good.mean_F * float("inf"), good.cov_FF)
    with pytest.raises(ConfigError, match="not finite"):
        save_reference(tmp_path / "x.npz", broken)
    assert not (tmp_path / "x.npz").exists()


def test_check_names_both_sides() -> None:
    check_reference(make(), feature_space=SPACE, num_features=6, path="ref.npz")
    with pytest.raises(ConfigError) as caught:
        check_reference(make(), feature_space="clip/ViT-L-14", num_features=768, path="ref.npz")
    for part in ("ref.npz", SPACE, "6 dimensions", "clip/ViT-L-14", "768", "same features"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="with 7"):
        check_reference(make(), feature_space=SPACE, num_features=7, path="ref.npz")


def test_coordinates_factor_the_covariance() -> None:
    reference = make()
    coordinates = to_coordinates(reference)
    mapped = coordinates.map(torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(mapped @ mapped.T, reference.cov_FF, rtol=0, atol=1e-14)
    values = coordinates.eigenvalues_R
    assert (values[:-1] >= values[1:]).all()
    # Rank 3 of 6: the null space is dropped, the trace keeps everything.
    low = reference.cov_FF.clone()
    low[3:], low[:, 3:] = 0, 0
    singular = to_coordinates(ReferenceMoments(SPACE, 30, reference.mean_F, low))
    assert singular.eigenvalues_R.shape == (3,)
    assert not singular.is_truncated
    assert singular.trace == pytest.approx(float(low.trace()), rel=1e-14)
