"""Class means in the reference, and the reference of class-centred features."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlgen.errors import ConfigError
from rlgen.moments.classes import ClassMeans, sort_class_names
from rlgen.moments.frechet import frechet_distance
from rlgen.moments.moments import Moments, batch_moments
from rlgen.moments.reference import ReferenceMoments, load_reference, save_reference

NAMES = ("ant", "bee", "cat")
COUNTS = (40, 10, 70)


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Features [120, 4] and class ids [120]."""
    generator = torch.Generator().manual_seed(0)
    ids_N = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    centres_KF = torch.tensor([[0.0, 0, 1, 5], [3, 0, 0, 5], [-2, 1, 0, 5]]).double()
    noise_NF = torch.randn(120, 4, generator=generator, dtype=torch.float64)
    return centres_KF[ids_N] + noise_NF, ids_N


def means_of(rows_NF: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
    return torch.stack([rows_NF[ids_N == k].mean(dim=0) for k in range(3)])


def reference() -> ReferenceMoments:
    rows_NF, ids_N = samples()
    moments = batch_moments(rows_NF)
    classes = ClassMeans(NAMES, COUNTS, means_of(rows_NF, ids_N))
    return ReferenceMoments("toy", 120, moments.mean_F, moments.cov_FF, "", "0" * 64, classes)


def test_class_means_and_the_digest_come_back(tmp_path: Path) -> None:
    save_reference(tmp_path / "r.npz", reference())
    found = load_reference(tmp_path / "r.npz")
    assert found.images_sha256 == "0" * 64
    assert found.classes is not None
    assert (found.classes.names, found.classes.counts) == (NAMES, COUNTS)
    expected = reference().classes
    assert expected is not None and torch.equal(found.classes.means_KF, expected.means_KF)
    plain = replace(reference(), classes=None, images_sha256="")
    save_reference(tmp_path / "plain.npz", plain)
    found = load_reference(tmp_path / "plain.npz")
    assert found.classes is None and found.images_sha256 == ""


def test_class_centred_features_have_the_reference_that_is_derived() -> None:
    rows_NF, ids_N = samples()
    centred = batch_moments(rows_NF - means_of(rows_NF, ids_N)[ids_N])
    found = reference().within_classes()
    torch.testing.assert_close(found.cov_FF, centred.cov_FF, rtol=0, atol=1e-14)
    assert not found.mean_F.any() and found.classes is None and found.count == 120


def test_exchanged_classes_show_although_the_mixture_is_the_same() -> None:
    rows_NF, ids_N = samples()
    means_KF = means_of(rows_NF, ids_N)
    exchanged_N = torch.tensor([2, 1, 0])[ids_N]  # asked for a cat, and an ant came
    within = reference().within_classes().moments
    right = batch_moments(rows_NF - means_KF[ids_N])
    wrong = batch_moments(rows_NF - means_KF[exchanged_N])
    whole = reference().moments
    assert frechet_distance(batch_moments(rows_NF), whole) < 1e-6, "blind without classes"
    assert frechet_distance(right, within) < 1e-6
    assert frechet_distance(wrong, within) > 1.0


def test_classes_shifted_against_each_other_show_as_covariance() -> None:
    rows_NF, ids_N = samples()
    centred_NF = rows_NF - means_of(rows_NF, ids_N)[ids_N]
    # Ants to the left and cats to the right, so that the mean of all stays: 40 * 1.75 = 70 * 1.
    shift_NF = torch.tensor([1.75, 0.0, -1.0]).double()[ids_N, None] * torch.tensor([1.0, 0, 0, 0])
    shifted: Moments = batch_moments(centred_NF + shift_NF)
    assert abs(shifted.mean_F).max() < 1e-12
    assert frechet_distance(shifted, reference().within_classes().moments) > 0.2


def test_classes_are_taken_by_name_or_by_the_order_of_numbers() -> None:
    classes = reference().classes
    assert classes is not None
    found = classes.in_order_of(("cat", "ant"), path="r.npz")
    assert torch.equal(found, classes.means_KF[[2, 0]])
    synsets = replace(classes, names=("n01", "n02", "n03"))
    assert torch.equal(synsets.in_order_of(NAMES, path="r.npz"), classes.means_KF)
    for names in (("ant", "dog"), ("dog", "emu"), ("ant", "bee", "dog")):
        with pytest.raises(ConfigError, match=r"r\.npz have means of 3 classes \(ant, bee, cat"):
            classes.in_order_of(names, path="r.npz")
    assert sort_class_names(["10", "9", "1"]) == ["1", "9", "10"]
    assert sort_class_names(["n10", "n9"]) == ["n10", "n9"]


def test_a_reference_without_classes_says_how_to_get_them() -> None:
    with pytest.raises(ConfigError, match="one folder per class"):
        replace(reference(), classes=None).within_classes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("ant", "bee")}, "2 class names, 3 counts"),
        ({"names": ("ant", "ant", "cat")}, "2 different names of 3"),
        ({"counts": (40, 10, 71)}, "121 images"),
        ({"counts": (50, 0, 70)}, "at least 0 each"),
        ({"means_KF": torch.zeros(3, 4).double()}, "differ from the mean"),
        ({"means_KF": torch.full((3, 4), float("nan")).double()}, "differ from the mean by nan"),
        ({"means_KF": torch.zeros(3, 5).double()}, r"shape \[3, 5\]"),
    ],
)
def test_class_means_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    classes = reference().classes
    assert classes is not None
    broken = replace(reference(), classes=replace(classes, **changes))
    with pytest.raises(ConfigError, match=message):
        save_reference(io.BytesIO(), broken)
