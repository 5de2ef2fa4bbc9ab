"""What counts as a loss, to start again from, and what as a fault, which ends the run."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError

from rlgen.actors import learner_group
from rlgen.actors.learner_group import LearnerGroup, _is_loss, _reasons
from rlgen.actors.shell import brief
from rlgen.errors import CheckpointError, NumericsError, StorageError
from rlgen.jobs.run_folder import choose_folder, claim_folder
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("error", "alone", "in_a_group"),
    [
        (ActorDiedError(), True, True),
        (StorageError("the bucket is away"), True, True),
        (RuntimeError("Connection closed by peer"), False, True),
        (dist.DistBackendError("NCCL"), False, True),
        (torch.OutOfMemoryError("CUDA out of memory"), False, False),
        (TypeError("a bug"), False, False),
        (NumericsError("nan"), False, False),
        (CheckpointError("of another model"), False, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_loss_is_told_from_a_fault(
    error: Exception, alone: bool, in_a_group: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for world_size, expected in ((1, alone), (2, in_a_group)):
        monkeypatch.setattr(dist, "get_world_size", lambda size=world_size: size)
        assert _is_loss(error) is expected


@pytest.mark.parametrize("is_let_go", [False, True])
def test_an_end_that_was_asked_for_is_no_loss(
    is_let_go: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    ends = threading.Event()

    class Trainer:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def fit(self) -> None:
            assert ends.wait(30)
            raise ConnectionError("Ray is gone")

    def lose(attempt: int, reason: str) -> None:
        calls.append(reason)

    coordinator = SimpleNamespace(lose_learners=SimpleNamespace(remote=lose))
    monkeypatch.setattr(learner_group, "TorchTrainer", Trainer)
    monkeypatch.setattr(learner_group.ray, "get", lambda value: value)
    group = LearnerGroup(
        tiny_config(), coordinator=coordinator, weights=None, attempt=0, run_name="x", storage="/x"
    )
    if is_let_go:
        assert not group.join(0.0)
    ends.set()
    group._thread.join(30)
    assert calls == ([] if is_let_go else ["Ray is gone"])


def test_a_report_of_ray_becomes_a_line_for_each_rank() -> None:
    traceback = 'Traceback (most recent call last):\n  File "x.py", line 1\nValueError: too small\n'
    died = "The actor died unexpectedly.\n\tclass_name: RayTrainWorker"
    error = WorkerGroupError("long", {0: Exception(traceback), 1: Exception(died)})
    told = "rank 0: ValueError: too small; rank 1: The actor died unexpectedly."
    assert _reasons(error) == told
    assert _reasons(Exception("no controller\nmore")) == "no controller"
    assert brief(Exception("x" * 500)) == "x" * 160 + "..."


def test_a_folder_of_a_dead_process_is_gone_on_with_and_that_of_a_living_one_is_not(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess
    import sys

    monkeypatch.chdir(tmp_path)
    config = tiny_config()
    folder = choose_folder(config, None)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", lambda: child.pid)
            claim_folder(folder, config)
        assert choose_folder(config, None) != folder, "it is being written"
    finally:
        child.kill()
        child.wait()
    assert choose_folder(config, None) == folder
    assert choose_folder(tiny_config(seed=5), None) != folder, "of other settings"
    (folder / "summary.json").write_text("{}")
    assert choose_folder(config, None) != folder, "it is finished"
