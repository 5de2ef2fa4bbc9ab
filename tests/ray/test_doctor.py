"""The doctor before a real cluster that asks for a token."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlgen.config import load_config
from rlgen.jobs.doctor_check import Finding
from rlgen.jobs.doctor_cluster import find_ray
from tests.heads import Head, closed_port, ray_head

pytestmark = pytest.mark.ray

_START_S = 120.0
_ANSWER_S = 60.0


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head("--include-dashboard=false") as head:
        yield head


@pytest.fixture
def found(head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What the doctor finds of the cluster, by what the environment says of tokens."""
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    monkeypatch.setenv("HOME", str(tmp_path))  # whose .ray/auth_token would be taken
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)

    def find(*settings: str, **environment: str) -> list[Finding]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return find_ray(load_config(None, settings), timeout_s=_ANSWER_S)

    return find


@pytest.mark.parametrize(
    ("environment", "said", "remedy"),
    [
        ({}, "RAY_AUTH_MODE is not set", "set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE is disabled", "set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_MODE": "token"}, "there is none", "RAY_AUTH_TOKEN_PATH"),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64},
            "refuses the token of RAY_AUTH_TOKEN",
            "the head was started with",
        ),
    ],
)
def test_a_missing_or_wrong_token_is_told_apart_from_an_absent_cluster(
    found, environment: dict[str, str], said: str, remedy: str
) -> None:
    start = time.monotonic()
    (finding,) = found(**environment)
    assert finding.verdict == "failure"
    assert said in finding.found and remedy in finding.remedy
    assert "b" * 64 not in str(finding)
    assert time.monotonic() - start < 30, "Ray by itself tries again for twenty seconds"


def test_with_the_token_the_nodes_are_seen_and_an_unmet_bundle_is_named(found, head: Head) -> None:
    right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token}
    reached, placed = found(**right)
    assert (reached.verdict, placed.verdict) == ("ok", "ok")
    assert reached.found == f"{head.address}: 1 node(s), 2 CPU, 0 GPU"
    reached, placed = found("learner.num_gpus=1", "rollout.num_cpus=0.5", **right)
    assert (reached.verdict, placed.verdict) == ("ok", "failure")
    assert "no room for a learner process with 0.25 CPU and 1 GPU. Nodes" in placed.found


def test_nothing_at_the_address_is_told_at_once(found) -> None:
    start = time.monotonic()
    (finding,) = found(RAY_ADDRESS=f"127.0.0.1:{closed_port()}")
    assert finding.verdict == "failure" and "nothing listens there" in finding.found
    assert "RAY_ADDRESS" in finding.remedy
    assert time.monotonic() - start < 30
