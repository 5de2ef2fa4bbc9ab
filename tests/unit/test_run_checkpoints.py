"""When a run's checkpoints are written, skipped, given up and committed; with a real learner."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rlgen.learner.checkpoint
from rlgen.config.identity import resume_key
from rlgen.config.run import RunConfig
from rlgen.errors import CheckpointError, StorageError
from rlgen.jobs.checkpoints import RunCheckpoints, resumed_config
from rlgen.learner.checkpoint import MARKER, Part, newest_checkpoint, read_meta, read_part
from rlgen.learner.learner import Learner
from rlgen.learner.preflight import check_resume
from rlgen.learner.state_io import (
    LEARNER,
    MOMENTS,
    POLICY,
    LearnerSaver,
    SaveOutcome,
    parse_state,
    restore_learner,
)
from rlgen.storage import write_bytes
from tests.tiny import CPU, sampled_batch, tiny_config, tiny_policy

DONE_S = 30.0


class Roles:
    """A learner and moments, as a runtime has them."""

    def __init__(self, config: RunConfig) -> None:
        self.learner = Learner(tiny_policy(), config, device=CPU)
        self._saves: dict[str, SaveOutcome] = {}
        self._saver = LearnerSaver(self._saves.__setitem__)

    def save_learner(self, uri: str) -> None:
        self._saves.clear()
        self._saver.start(self.learner, uri)

    def learner_saved(self, uri: str) -> Any:
        outcome = self._saves.get(uri)
        if isinstance(outcome, StorageError):
            raise outcome
        return outcome

    def moment_state(self) -> dict[str, Any]:
        return {"mean": torch.ones(3, dtype=torch.float64)}


class Record:
    """What a recorder has to give and to take."""

    def __init__(self, root: Path) -> None:
        self.checkpoint_root = str(root)
        self.best_checkpoint: str | None = None
        self.last_checkpoint: str | None = None
        self.notes: list[str] = []
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.groups = {"trained": 0}

    def note(self, text: str) -> None:
        self.notes.append(text)

    def log_metrics(self, step: int, row: dict[str, float]) -> None:
        self.metrics.append((step, row))

    def log_checkpoint(self, step: int, uri: str, parts: list[Part]) -> None:
        self.last_checkpoint = uri

    def wait_for_run_id(self, timeout_s: float) -> str:
        return "run-7"

    def state(self) -> dict[str, Any]:
        return {"mlflow_run_id": None, "groups": self.groups}

    def logged(self, name: str) -> list[tuple[int, float]]:
        return [(step, row[name]) for step, row in self.metrics if name in row]


class Disk:
    """Stands before write_bytes: lets it through, holds it up, or is full for a large file."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.is_open.set()
        self.is_full = False

    def write(self, location: str, payload: bytes) -> None:
        self.is_open.wait()
        if self.is_full and location.endswith(LEARNER):
            raise StorageError(f"{location} can't be written: no space left.")
        write_bytes(location, payload)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(rlgen.learner.checkpoint, "write_bytes", disk.write)
    yield disk
    disk.is_open.set()


@pytest.fixture
def config() -> RunConfig:
    return tiny_config(checkpoint__retries=0, checkpoint__keep=2)


def committed(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob(f"*/{MARKER}"))


def test_a_checkpoint_holds_the_whole_run(config: RunConfig, tmp_path: Path, disk: Disk) -> None:
    record, roles = Record(tmp_path), Roles(config)
    roles.learner.update(sampled_batch(roles.learner.policy, config))
    with RunCheckpoints(config, record) as checkpoints:
        record.groups["trained"] = 4
        disk.is_open.clear()
        checkpoints.save(config, roles, 1)
        record.groups["trained"] = 8  # the training goes on
        roles.learner.update(sampled_batch(roles.learner.policy, config, step=1, version=1))
        disk.is_open.set()
        assert checkpoints.settle(timeout_s=DONE_S) is None
    uri = record.last_checkpoint
    assert uri == newest_checkpoint(str(tmp_path), resume_key=resume_key(config))
    meta = read_meta(uri)
    assert (meta["step"], meta["groups"], meta["mlflow_run_id"]) == (1, {"trained": 4}, "run-7")
    assert parse_state(read_part(uri, MOMENTS), uri)["mean"].tolist() == [1.0, 1.0, 1.0]
    assert b"checkpoint:" in read_part(uri, "config.yaml")
    assert {POLICY, LEARNER} <= {path.name for path in Path(uri).iterdir()}
    # The copy was made before the training went on.
    once, again = Roles(config).learner, Roles(config).learner
    once.update(sampled_batch(once.policy, config))
    restore_learner(again, uri)
    for mine, theirs in zip(
        once.policy_state().values(), again.policy_state().values(), strict=True
    ):
        assert torch.equal(mine, theirs)
    moments = [s["exp_avg"] for s in again.optimizer.state_dict()["state"].values()]
    expected = [s["exp_avg"] for s in once.optimizer.state_dict()["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, expected, strict=True))
    assert again.policy_version == 1 and again.entropy == once.entropy


def test_training_does_not_wait_and_what_comes_due_meanwhile_is_skipped(
    config: RunConfig, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlgen.jobs.checkpoints._PATIENCE_S", 0.05)
    record, roles = Record(tmp_path), Roles(config)
    with RunCheckpoints(config, record) as checkpoints:
        disk.is_open.clear()
        checkpoints.save(config, roles, 1)
        checkpoints.save(config, roles, 2)
        checkpoints.save(config, roles, 3)
        assert committed(tmp_path) == []
        assert record.logged("checkpoint/skipped") == [(2, 1.0), (3, 2.0)]
        disk.is_open.set()
        checkpoints.save(config, roles, 4, must_commit=True)  # waits for the one in flight
    assert committed(tmp_path) == ["step-00001", "step-00004"]
    assert [step for step, _ in record.logged("checkpoint/pause_s")] == [1, 4]
    assert all(0 < value < DONE_S for _, value in record.logged("checkpoint/seconds"))


def test_a_run_that_may_roll_back_skips_none(tmp_path: Path, disk: Disk) -> None:
    config = tiny_config(guard__action="rollback", guard__every=1, checkpoint__keep=1)
    record, roles = Record(tmp_path), Roles(config)
    with RunCheckpoints(config, record) as checkpoints:
        for step in range(1, 4):
            checkpoints.save(config, roles, step)
            record.best_checkpoint = f"{tmp_path}/step-00002"
        assert checkpoints.committed(record.best_checkpoint) == record.best_checkpoint
        assert committed(tmp_path) == ["step-00002", "step-00003"], "the newest and the best"
        checkpoints.forget_after(record.best_checkpoint)
        assert committed(tmp_path) == ["step-00002"]
        assert checkpoints.committed(f"{tmp_path}/step-00003") is None
        assert record.last_checkpoint == record.best_checkpoint
    assert record.logged("checkpoint/skipped") == []


def test_an_outage_is_told_once_and_its_end_too(
    config: RunConfig, tmp_path: Path, disk: Disk
) -> None:
    record, roles = Record(tmp_path), Roles(config)
    with RunCheckpoints(config, record) as checkpoints:
        for step in range(1, 6):
            disk.is_full = step in (2, 3)
            checkpoints.save(config, roles, step)
            assert (checkpoints.settle(timeout_s=DONE_S) is None) == (not disk.is_full)
    assert [note for note in record.notes if "could not be written" in note] == [record.notes[0]], (
        "once"
    )
    assert "step 2" in record.notes[0] and "no space left" in record.notes[0]
    assert record.notes[1] == "checkpoints are written again: step 4"
    assert record.logged("checkpoint/failed")[-1] == (5, 2.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00004", "step-00005"]


def test_one_that_must_commit_and_can_not_ends_the_run(
    config: RunConfig, tmp_path: Path, disk: Disk
) -> None:
    record, roles = Record(tmp_path), Roles(config)
    with RunCheckpoints(config, record) as checkpoints:
        checkpoints.save(config, roles, 1, must_commit=True)
        disk.is_full = True
        with pytest.raises(CheckpointError, match=r"of step 2 can't.*no space.*step-00001"):
            checkpoints.save(config, roles, 2, must_commit=True)
    assert committed(tmp_path) == ["step-00001"]


def test_one_that_takes_too_long_is_given_up_and_never_committed(
    tmp_path: Path, disk: Disk
) -> None:
    config = tiny_config(checkpoint__retries=0, checkpoint__timeout_s=0.2)
    record, roles = Record(tmp_path), Roles(config)
    with RunCheckpoints(config, record) as checkpoints:
        disk.is_open.clear()
        with pytest.raises(
            CheckpointError, match=r"not written within checkpoint.timeout_s = 0\.2"
        ):
            checkpoints.save(config, roles, 1, must_commit=True)
        assert record.logged("checkpoint/failed") == [(1, 1.0)]
        late = [t for t in threading.enumerate() if t.name.startswith("checkpoint")]
        disk.is_open.set()
        for thread in late:
            if thread.name != "checkpoint-claim":
                thread.join(DONE_S)
    assert committed(tmp_path) == []


def test_what_is_let_go_of_is_never_committed(
    config: RunConfig, tmp_path: Path, disk: Disk
) -> None:
    record, roles = Record(tmp_path), Roles(config)
    with RunCheckpoints(config, record) as checkpoints:
        disk.is_open.clear()
        checkpoints.save(config, roles, 1)
        checkpoints.let_go(timeout_s=0.05)
        disk.is_open.set()
        for thread in threading.enumerate():
            if thread.name in ("checkpoint", "checkpoint-learner"):
                thread.join(DONE_S)
        assert committed(tmp_path) == []
        checkpoints.save(config, roles, 1, must_commit=True)  # done again after a loss
    assert committed(tmp_path) == ["step-00001"]


def test_old_checkpoints_that_can_not_be_deleted_stop_nothing(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(location: str, *, recursive: bool = False) -> None:
        raise StorageError(f"{location} can't be deleted.")

    monkeypatch.setattr(rlgen.learner.checkpoint, "remove", refuses)
    record, roles = Record(tmp_path), Roles(config)
    with RunCheckpoints(config, record) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(config, roles, step, must_commit=True)
    assert len(committed(tmp_path)) == 4
    assert any("old checkpoints stay" in note for note in record.notes)
    assert record.logged("checkpoint/failed")[-1] == (4, 0.0)


def test_what_a_rollback_changed_stays_changed_when_the_same_command_is_given(
    config: RunConfig, tmp_path: Path
) -> None:
    record, roles = Record(tmp_path), Roles(config)
    lower = config.with_values({"learner.lr": config.learner.lr / 2})
    with RunCheckpoints(config, record) as checkpoints:
        checkpoints.save(config, roles, 1, must_commit=True)
        checkpoints.save(lower, roles, 2, must_commit=True)
    newest = newest_checkpoint(str(tmp_path), resume_key=resume_key(config))
    assert newest is not None and newest.endswith("step-00002")
    again = resumed_config(config, newest)
    assert again.learner.lr == lower.learner.lr
    assert again.checkpoint.resume_from == newest
    assert read_meta(newest)["resume_key"] == resume_key(again), "so preflight lets it through"


def test_a_checkpoint_of_other_settings_is_refused_with_what_differs(
    config: RunConfig, tmp_path: Path
) -> None:
    record = Record(tmp_path)
    with RunCheckpoints(config, record) as checkpoints:
        checkpoints.save(config, Roles(config), 1, must_commit=True)
    uri = str(record.last_checkpoint)
    check_resume(config.with_values({"learner.num_workers": 2, "cluster.address": "local"}), uri)
    other = config.with_values({"learner.lr": 0.5})
    with pytest.raises(CheckpointError, match=rf"learner\.lr \({config.learner.lr}, now 0\.5\)"):
        check_resume(other, uri)
