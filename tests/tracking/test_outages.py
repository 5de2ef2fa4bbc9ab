"""Trouble with a real MLflow server in the middle of a run: what it costs a step, and what is lost.

The steps sleep, so that their length is known and other work on the machine hardly matters. What a
step waits for MLflow is what the tracker's calls take on the step's own thread; the steps' whole
length is compared as well, because the tracker's thread shares the interpreter with them.
`pytest tests/tracking tests/storage --outage-s 60` is the full form.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from PIL import Image

from rlgen.storage import in_background
from rlgen.tracking import Tracker
from tests.mlflow_server import Gate, MlflowServer

pytestmark = pytest.mark.timing

STEP_S = 0.25
MAX_RATIO = 1.05
PER_STEP = 30
"""Metrics; a run of the digits has about as many."""
FEW = 3
"""Records that wait for the tracker's next round."""
_DEADLINE_S = 60.0


@dataclass
class Run:
    """A run of steps that do nothing but sleep and report."""

    tracker: Tracker
    folder: Path
    step: int = 0
    logged: dict[tuple[str, int], float] = field(default_factory=dict)
    lengths: list[float] = field(default_factory=list)
    """Of the steps since the last `measured`, in seconds."""
    calls: list[float] = field(default_factory=list)
    """What of it was spent in the tracker's calls."""

    def steps(self, seconds: float) -> None:
        """Go on for a while."""
        for _ in range(round(seconds / STEP_S)):
            began = time.perf_counter()
            time.sleep(STEP_S)
            called = time.perf_counter()
            self._report()
            ended = time.perf_counter()
            self.lengths.append(ended - began)
            self.calls.append(ended - called)
            self.step += 1

    def steps_until(self, is_reached: Callable[[], bool]) -> None:
        """Go on until something is so."""
        end = time.monotonic() + _DEADLINE_S
        while not is_reached():
            assert time.monotonic() < end, self.tracker.warnings
            self.steps(STEP_S)

    def measured(self) -> "Steps":
        """Lengths and calls of the steps since this was asked last."""
        found = self.lengths, self.calls
        self.lengths, self.calls = [], []
        return found

    def _report(self) -> None:
        values = {f"loss/{i}": self.step + i / 100 for i in range(PER_STEP)}
        self.tracker.log_metrics(self.step, values)
        self.logged |= {(name, self.step): value for name, value in values.items()}
        if self.step % 10 == 0:
            self.tracker.log_image(self.step, picture(self.folder, self.step))

    def close(self, uri: str) -> None:
        """End it, and compare what MLflow has with what was logged, point by point."""
        from mlflow import MlflowClient

        self.tracker.close(timeout_s=120.0)
        assert self.tracker.warnings == []
        client = MlflowClient(uri)
        run_id = self.tracker.run_id
        found = [
            ((f"loss/{i}", point.step), point.value)
            for i in range(PER_STEP)
            for point in client.get_metric_history(run_id, f"loss/{i}")
        ]
        assert len(found) == len(self.logged), "no point twice"
        assert dict(found) == self.logged
        images = client.list_artifacts(run_id, "images")
        steps = {int(file.path.split("+")[2]) for file in images}
        assert steps == set(range(0, self.step, 10))
        assert client.get_run(run_id).info.status == "FINISHED"


def picture(folder: Path, step: int) -> Path:
    path = folder / f"grids/step_{step:05d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 60, 3), step % 256, dtype=np.uint8)).save(path)
    return path


Steps = tuple[list[float], list[float]]
"""Lengths of steps, and their times in the tracker's calls."""


def check_steps(measure: Callable[[str], tuple[Steps, Steps]]) -> None:
    """No step waits for MLflow, and steps are as long as they are without trouble.

    Measured once more if that does not hold: what else runs on a machine can only slow it down.

    Args:
        measure: makes a run of this name; returns its steps without and with trouble.
    """
    if all(held for _, held in found_of(*measure("first"))):
        return
    found = found_of(*measure("second"))
    assert all(held for _, held in found), [what for what, _ in found]


def found_of(undisturbed: Steps, troubled: Steps) -> list[tuple[str, bool]]:
    """What was found, in words, and whether it is as it must be."""
    lengths, calls = troubled
    usual, ninth_tenth = median(undisturbed[0]), sorted(lengths)[int(0.9 * len(lengths))]
    return [
        (f"{max(calls):.4f} s in calls", max(calls) <= (MAX_RATIO - 1) * STEP_S),
        (f"{ninth_tenth:.4f} s, not {usual:.4f} s", ninth_tenth <= MAX_RATIO * usual),
    ]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path / "server") as server:
        yield server


def start(uri: str, folder: Path, told: list[str]) -> Run:
    tracker = Tracker(
        uri, experiment="digits", run_name="steps", spool_dir=folder, tell=told.append
    )
    run = Run(tracker, folder)
    run.steps_until(lambda: tracker.run_id is not None)
    run.measured()
    return run


def test_a_server_that_is_gone_for_a_while(
    server: MlflowServer, tmp_path: Path, outage_s: float
) -> None:
    def measure(name: str) -> tuple[Steps, Steps]:
        told: list[str] = []
        run = start(server.uri, tmp_path / name, told)
        run.steps(3.0)
        undisturbed = run.measured()
        server.stop()
        run.steps(outage_s)
        back = in_background(server.start, name="server")
        run.steps_until(lambda: back.done() and run.tracker.num_unsent <= FEW)
        back.result()
        troubled = run.measured()
        run.close(server.uri)
        assert len(told) == 1, told
        assert "doesn't take records" in told[0] and str(tmp_path / name) in told[0]
        return undisturbed, troubled

    check_steps(measure)


def test_a_server_that_is_slow_or_refuses(server: MlflowServer, tmp_path: Path) -> None:
    def measure(name: str) -> tuple[Steps, Steps]:
        told: list[str] = []
        with Gate(server.uri) as gate:
            run = start(gate.uri, tmp_path / name, told)
            run.steps(3.0)
            undisturbed = run.measured()
            gate.delay_s = 2.0
            trouble(gate, run, told, "is slow")
            gate.refusal = 500
            trouble(gate, run, told, "500")
            gate.refusal = 401
            trouble(gate, run, told, "401")
            troubled = run.measured()
            run.close(server.uri)
            assert len(told) == 3, told
        return undisturbed, troubled

    check_steps(measure)


def trouble(gate: Gate, run: Run, told: list[str], words: str) -> None:
    """Go on until the user is told, a while longer, and until the records have arrived."""
    before = len(told)
    run.steps_until(lambda: len(told) > before)
    run.steps(1.0)
    gate.refusal, gate.delay_s = None, 0.0
    run.steps_until(lambda: run.tracker.num_unsent <= FEW)
    assert len(told) == before + 1 and words in told[-1], told
