"""Which numbers are exported, and what happens to a run whose export fails."""

import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlgen.config import RunConfig
from rlgen.errors import GuardError, Stopped
from rlgen.jobs import metrics_export
from rlgen.jobs.metrics_export import EXPORTS, MetricsExport, exported, match


class Instrument:
    """Ray's metric, as far as the export uses it."""

    def __init__(self, name: str, log: list[tuple[str, float, dict[str, str]]]) -> None:
        self._name, self._log = name, log

    def set(self, value: float, tags: dict[str, str]) -> None:
        self._log.append((self._name, value, tags))

    _record = set


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, dict[str, str]]]:
    """What would go to Ray."""
    found: list[tuple[str, float, dict[str, str]]] = []
    monkeypatch.setattr(metrics_export, "_metric", lambda export: Instrument(export.name, found))
    return found


def values_of(log: list[tuple[str, float, dict[str, str]]], name: str) -> list[float]:
    return [value for found, value, _ in log if found == name]


def test_names_follow_the_rules_of_prometheus() -> None:
    names = [export.name for export in EXPORTS]
    assert len(set(names)) == len(names)
    for export in EXPORTS:
        assert re.fullmatch(r"rlgen_[a-z]+(_[a-z]+)*", export.name)
        assert not re.search(r"_(s|gib|frac|steps_done|count|sum|bucket)$", export.name)
        assert export.help.endswith(".")
        assert ("*" in export.source) == bool(export.tag)


def test_totals_become_increments_and_begin_at_zero(log: list[Any]) -> None:
    config = RunConfig().with_values({"rollout.group_size": 4})
    export = MetricsExport(config, run="r")
    for done in (20.0, 40.0, 40.0):
        row = {"groups/generated": done, "restarts/rollout": done / 20, "time/step_s": 2.0}
        export.put(int(done), row, num_unsent=3)
    export.close()
    assert values_of(log, "rlgen_images_total") == [0.0, 80.0, 80.0]
    restarts = [(v, t["role"]) for n, v, t in log if n == "rlgen_restarts_total"]
    assert [value for value, role in restarts if role == "rollout"] == [0.0, 1.0, 1.0]
    assert [value for value, role in restarts if role == "learner"] == [0.0]
    assert values_of(log, "rlgen_step") == [0.0, 20.0, 40.0, 40.0]
    assert values_of(log, "rlgen_unsent_records")[-1] == 3.0
    assert all(tags["run"] == "r" for _, _, tags in log)


def test_a_reward_and_a_part_of_the_step_become_tags() -> None:
    clip = match("reward/clip")
    part = match("time/rollout_and_score_s")
    step = match("time/step_s")
    assert clip is not None and (clip[0].name, clip[1]) == ("rlgen_reward_mean", "clip")
    assert part is not None and (part[0].tag, part[1]) == ("part", "rollout_and_score")
    assert step is not None and (step[0].name, step[1]) == ("rlgen_step_seconds", "")
    assert match("loss/total") is None


def test_what_ray_raises_is_told_once_and_stays_in_the_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    def broken(export: Any) -> Any:
        calls.append(threading.current_thread().name)
        raise RuntimeError("no agent")

    monkeypatch.setattr(metrics_export, "_metric", broken)
    export = MetricsExport(RunConfig(), run="r")
    for step in range(5):
        export.put(step, {"time/step_s": 1.0}, num_unsent=0)
    export.close()
    assert len(calls) == 6 and set(calls) == {"metrics"}
    assert [record.getMessage() for record in caplog.records] == [
        "metrics are not exported: RuntimeError: no agent"
    ]


@pytest.mark.parametrize(
    ("error", "active"),
    [(None, [1.0, 0.0]), (Stopped("asked"), [1.0, 0.0]), (GuardError("x"), [1.0])],
)
def test_only_a_run_that_ends_as_it_should_is_marked_as_ended(
    log: list[Any], error: Exception | None, active: list[float]
) -> None:
    recorder: Any = SimpleNamespace(folder=Path("runs/r"), export=None)
    try:
        with exported(RunConfig(), recorder):
            assert recorder.export is not None
            if error is not None:
                raise error
    except (Stopped, GuardError) as caught:
        assert caught is error
    assert recorder.export is None
    assert values_of(log, "rlgen_run_active") == active


def test_a_run_without_ray_exports_nothing() -> None:
    recorder: Any = SimpleNamespace(folder=Path("runs/r"), export=None)
    with exported(RunConfig().with_values({"runtime": "local"}), recorder):
        assert recorder.export is None


def test_gauges_are_repeated_while_nothing_happens(
    log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_export, "_REPEAT_S", 0.01)
    export = MetricsExport(RunConfig(), run="r")
    export.put(1, {"time/step_s": 2.0, "groups/generated": 20.0}, num_unsent=0)
    deadline = time.monotonic() + 10
    while len(values_of(log, "rlgen_step_seconds")) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    export.close()
    assert set(values_of(log, "rlgen_step_seconds")[:5]) == {2.0}
    assert sum(values_of(log, "rlgen_groups_generated_total")) == 20.0, "a total only once"
