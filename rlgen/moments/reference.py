"""The file of reference moments: what a policy's images are compared with.

Owns the .npz format and its checks. Must not know where a file lies (callers open remote files
and pass the open file) nor what the moments are used for.

Format version 1, one .npz: `format_version` int, `feature_space` str (the id of network, layer
and width), `preprocessing` str (free text, for people), `count` int, `mean` [F] float64, `cov`
[F, F] float64, biased. Optional, and unknown to older readers: `images_sha256` str; and, all
three or none, `class_names` [K] str, `class_counts` [K] int, `class_means` [K, F] float64.

Shapes: F feature dimensions, K classes.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, replace
from os import PathLike
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from rlgen.errors import ConfigError
from rlgen.moments.classes import ClassMeans, check_class_means
from rlgen.moments.moments import Moments

FORMAT_VERSION = 1
KEYS = ("format_version", "feature_space", "preprocessing", "count", "mean", "cov")
CLASS_KEYS = ("class_names", "class_counts", "class_means")
SYMMETRY_TOLERANCE = 1e-9
"""Relative to the largest entry: files written from float64 sums differ by rounding only."""


@dataclass(frozen=True, eq=False)
class ReferenceMoments:
    """Moments of a reference set in one feature space."""

    feature_space: str
    """Id of the feature network, its layer and its width; must equal the policy's."""
    count: int
    """Number of reference samples, >= 1."""
    mean_F: Tensor
    """[F] float64, CPU."""
    cov_FF: Tensor
    """[F, F] float64, symmetric, divisor count, CPU."""
    preprocessing: str = ""
    """How images became features, for people to read."""
    images_sha256: str = ""
    """Sum of the image files' sha256 modulo 2^256, 64 hexadecimal digits; empty if unknown."""
    classes: ClassMeans | None = None
    """Means of the classes, if every image has one."""

    @property
    def moments(self) -> Moments:
        """The same numbers without their origin."""
        return Moments(float(self.count), self.mean_F, self.cov_FF)

    def known_classes(self) -> ClassMeans:
        """The class means.

        Raises:
            ConfigError: they are not known.
        """
        if self.classes is None:
            raise ConfigError(
                f"reference moments of {self.feature_space!r} hold no class means; make the file "
                "from images in one folder per class, or set "
                "reward.loo_fid.class_conditional=false."
            )
        return self.classes

    def within_classes(self) -> ReferenceMoments:
        """The reference of class-centred features: mean 0, covariance within classes.

        Raises:
            ConfigError: the class means are not known.
        """
        cov_FF = self.cov_FF - self.known_classes().scatter(self.mean_F)
        return replace(self, mean_F=torch.zeros_like(self.mean_F), cov_FF=cov_FF, classes=None)


def save_reference(file: str | PathLike[str] | BinaryIO, reference: ReferenceMoments) -> None:
    """Write reference moments as .npz.

    Args:
        file: a local path, or a file open for binary writing.
        reference: the moments; checked as on loading.
    Raises:
        ConfigError: the moments are inconsistent or not finite.
    """
    name = _name(file)
    checked = _check_values(
        reference.feature_space,
        reference.preprocessing,
        reference.count,
        reference.mean_F.detach().cpu().numpy(),
        reference.cov_FF.detach().cpu().numpy(),
        name=name,
    )
    checked = _with_details(checked, reference.images_sha256, reference.classes, name=name)
    if isinstance(file, (str, PathLike)):
        # Opened here because np.savez adds ".npz" to a path that lacks it.
        with open(file, "wb") as opened:
            _write(opened, checked)
    else:
        _write(file, checked)


def _write(file: BinaryIO, reference: ReferenceMoments) -> None:
    details: dict[str, np.ndarray] = {}
    if reference.images_sha256:
        details["images_sha256"] = np.array(reference.images_sha256)
    if reference.classes is not None:
        details["class_names"] = np.array(reference.classes.names, dtype=np.str_)
        details["class_counts"] = np.array(reference.classes.counts, dtype=np.int64)
        details["class_means"] = reference.classes.means_KF.numpy()
    np.savez(
        file,
        format_version=np.int64(FORMAT_VERSION),
        feature_space=np.str_(reference.feature_space),
        preprocessing=np.str_(reference.preprocessing),
        count=np.int64(reference.count),
        mean=reference.mean_F.numpy(),
        cov=reference.cov_FF.numpy(),
        **details,  # type: ignore[arg-type]
    )


def load_reference(file: str | PathLike[str] | BinaryIO) -> ReferenceMoments:
    """Read reference moments from .npz.

    Args:
        file: a local path, or a seekable file open for binary reading.
    Returns:
        ReferenceMoments on the CPU, float64, symmetric to the last bit.
    Raises:
        ConfigError: unreadable, keys missing, another format version, shapes that don't fit,
            not finite, not symmetric; names the file.
    """
    name = _name(file)
    try:
        loaded = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it holds one plain array")
        with loaded as archive:
            missing = [key for key in KEYS if key not in archive.files]
            if missing:
                raise ConfigError(
                    f"reference moments {name} lack {', '.join(missing)} (found: "
                    f"{', '.join(archive.files) or 'nothing'}); make the file with "
                    "rlgen.moments.reference.save_reference."
                )
            optional = [k for k in ("images_sha256", *CLASS_KEYS) if k in archive.files]
            arrays = {key: archive[key] for key in (*KEYS, *optional)}
    except ConfigError:
        raise
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(
            f"can't read reference moments {name}: {error}; give an .npz file in format "
            f"{FORMAT_VERSION}."
        ) from error
    if any(arrays[key].ndim != 0 for key in KEYS[:4]):
        raise ConfigError(f"reference moments {name}: {', '.join(KEYS[:4])} must be scalars.")
    version = str(arrays["format_version"])
    if version != str(FORMAT_VERSION):
        raise ConfigError(
            f"reference moments {name} have format version {version}, this rlgen reads "
            f"{FORMAT_VERSION}; make the file again."
        )
    checked = _check_values(
        str(arrays["feature_space"]),
        str(arrays["preprocessing"]),
        int(arrays["count"]),
        arrays["mean"],
        arrays["cov"],
        name=name,
    )
    images_sha256 = str(arrays.get("images_sha256", ""))
    return _with_details(checked, images_sha256, _class_means(arrays, name=name), name=name)


def check_reference(
    reference: ReferenceMoments, *, feature_space: str, num_features: int, path: str
) -> None:
    """Check that a reference belongs to the features that will be compared with it.

    Args:
        reference: the loaded moments.
        feature_space: the id of the features of this run.
        num_features: their width F.
        path: where the reference came from, for the message.
    Raises:
        ConfigError: another feature space or width; names both and the way out.
    """
    width = reference.mean_F.numel()
    if reference.feature_space == feature_space and width == num_features:
        return
    raise ConfigError(
        f"reference moments {path} are of feature space {reference.feature_space!r} with {width} "
        f"dimensions, but the features are {feature_space!r} with {num_features}; compute the "
        "reference with the same features, or choose the features that it was made with."
    )


def _name(file: str | PathLike[str] | BinaryIO) -> str:
    if isinstance(file, (str, PathLike)):
        return str(file)
    return str(getattr(file, "name", "(open file)"))


def _class_means(arrays: dict[str, np.ndarray], *, name: str) -> ClassMeans | None:
    found = [key for key in CLASS_KEYS if key in arrays]
    if not found:
        return None
    if len(found) < len(CLASS_KEYS) or arrays["class_means"].dtype.kind != "f":
        raise ConfigError(
            f"reference moments {name}: of {', '.join(CLASS_KEYS)} only {', '.join(found)} can be "
            "used; make the file again."
        )
    names = tuple(str(n) for n in np.atleast_1d(arrays["class_names"]))
    counts = tuple(int(n) for n in np.atleast_1d(arrays["class_counts"]))
    return ClassMeans(names, counts, torch.from_numpy(arrays["class_means"].astype(np.float64)))


def _with_details(
    reference: ReferenceMoments, images_sha256: str, classes: ClassMeans | None, *, name: str
) -> ReferenceMoments:
    if classes is not None:
        wrong = check_class_means(classes, reference.mean_F, reference.cov_FF, reference.count)
        if wrong:
            raise ConfigError(f"reference moments {name}: {wrong}; make the file again.")
    return replace(reference, images_sha256=images_sha256, classes=classes)


def _check_values(
    feature_space: str,
    preprocessing: str,
    count: int,
    mean_F: np.ndarray,
    cov_FF: np.ndarray,
    *,
    name: str,
) -> ReferenceMoments:
    """Validate, convert to float64 and make the covariance exactly symmetric."""
    width = mean_F.shape[0] if mean_F.ndim == 1 else 0
    if width == 0 or cov_FF.shape != (width, width):
        raise ConfigError(
            f"reference moments {name}: mean has shape {list(mean_F.shape)} and cov "
            f"{list(cov_FF.shape)}; expected [F] and [F, F]."
        )
    if count < 1 or not feature_space:
        raise ConfigError(
            f"reference moments {name}: count = {count} and feature_space = {feature_space!r}; "
            "expected count >= 1 and a non-empty id."
        )
    if mean_F.dtype.kind != "f" or cov_FF.dtype.kind != "f":
        raise ConfigError(
            f"reference moments {name}: mean is {mean_F.dtype} and cov {cov_FF.dtype}; expected "
            "floating point."
        )
    mean_F, cov_FF = mean_F.astype(np.float64), cov_FF.astype(np.float64)
    if not (np.isfinite(mean_F).all() and np.isfinite(cov_FF).all()):
        raise ConfigError(
            f"reference moments {name} hold values that are not finite; drop broken samples and "
            "compute them again."
        )
    if (np.diag(cov_FF) < 0).any():
        raise ConfigError(f"reference moments {name}: cov has a negative variance.")
    asymmetry = float(np.abs(cov_FF - cov_FF.T).max())
    if asymmetry > SYMMETRY_TOLERANCE * float(np.abs(cov_FF).max()):
        raise ConfigError(
            f"reference moments {name}: cov is not symmetric, entries differ by {asymmetry:.3g}."
        )
    return ReferenceMoments(
        feature_space,
        int(count),
        torch.from_numpy(mean_F),
        torch.from_numpy((cov_FF + cov_FF.T) / 2),
        preprocessing,
    )
