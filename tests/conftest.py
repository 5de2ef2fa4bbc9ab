"""Fixtures that several folders of tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Small tensors gain nothing from threads, and results must not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY_DIGITS = [
    "digits.tokenizer_steps=120",
    "digits.feature_steps=60",
    "digits.clip_steps=40",
    "digits.preference_steps=20",
    "digits.policy_steps=60",
]
"""An embedded default that is trained in seconds: real components, poor images."""
TRACKED = "tracking.uri=null"
"""MLflow where it is by default: in a file beside the run's folder."""

TINY_RUN = [
    *TINY_DIGITS,
    "steps=3",
    "rollout.num_workers=1",
    "rollout.conditions_per_step=20",
    "rollout.group_size=4",
    "rollout.conditions_per_unit=5",
    "evaluation.num_images=200",
    "evaluation.images_per_unit=100",
    "evaluation.cfg_scales=[1.5]",
    "reward.loo_fid.bootstrap_images=200",
    "checkpoint.every_steps=2",
    "cluster.address=local",
    "tracking.uri=none",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """How hard to try: by default a reduced form, for a machine that checks every change."""
    parser.addoption(
        "--chaos-rounds", type=int, default=1, help="how often each role is killed in one run"
    )
    parser.addoption(
        "--outage-s", type=float, default=6.0, help="how long MLflow and S3 are away in mid-run"
    )


@pytest.fixture(scope="session")
def outage_s(pytestconfig: pytest.Config) -> float:
    return pytestconfig.getoption("--outage-s")


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache of the embedded default for the whole session."""
    folder = Path(os.environ.get("RLGEN_TEST_CACHE", tmp_path_factory.mktemp("cache")))
    before = os.environ.get("RLGEN_CACHE")
    os.environ["RLGEN_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["RLGEN_CACHE"]
    else:
        os.environ["RLGEN_CACHE"] = before
