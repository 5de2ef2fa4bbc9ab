"""The list of a run's checkpoints: what each came from, and the candidate that it gives."""

import json
from pathlib import Path

import pytest

from rlgen.errors import ConfigError
from rlgen.evaluation.judge import Quality
from rlgen.jobs.lineage import Judge, Lineage, candidate_of, read_lineage
from rlgen.learner.checkpoint import checkpoint_uri
from rlgen.learner.state_io import POLICY
from tests.tiny import tiny_config


def quality(fid: float) -> Quality:
    return Quality(judge_fid=fid, precision=0.7, recall=0.9, accuracy=None, rewards={})


def sha256(step: int) -> str:
    return f"{step:064x}"


def lineage(folder: Path, root: str, *steps: int) -> Lineage:
    found = Lineage(folder)
    found.judged_by(judges(folder))
    for step in steps:
        found.committed(step, checkpoint_uri(root, step), sha256(step))
    return found


def judges(folder: Path) -> object:
    folder.mkdir(exist_ok=True)
    (folder / "judge.pt").write_bytes(b"judge")
    (folder / "real.npz").write_bytes(b"real")
    return tiny_config(
        evaluation__judge=str(folder / "judge.pt"),
        evaluation__judge_reference=str(folder / "real.npz"),
        evaluation__num_images=300,
    )


def chain(folder: Path) -> list[tuple[str, str | None]]:
    entries = read_lineage(folder)["checkpoints"]
    return [(entry["uri"], entry["came_from"]) for entry in entries]


def test_each_checkpoint_names_the_one_before(tmp_path: Path) -> None:
    lineage(tmp_path, "s3://key:secret@bucket/run", 0, 40, 80)
    assert chain(tmp_path) == [
        ("s3://bucket/run/step-00000", None),
        ("s3://bucket/run/step-00040", "s3://bucket/run/step-00000"),
        ("s3://bucket/run/step-00080", "s3://bucket/run/step-00040"),
    ]
    entry = read_lineage(tmp_path)["checkpoints"][1]
    assert (entry["step"], entry["policy_sha256"]) == (40, sha256(40))


def test_what_came_after_the_checkpoint_of_a_rollback_is_forgotten(tmp_path: Path) -> None:
    found = lineage(tmp_path, "/runs/a", 0)
    held = found.state_dict()  # what checkpoint 40 holds; its own entry is not in it
    found.committed(40, "/runs/a/step-00040", sha256(40))
    found.committed(80, "/runs/a/step-00080", sha256(80))
    found.went_on_from("/runs/a/step-00040", 40, sha256(40), held)
    found.committed(80, "/runs/a/step-00080", sha256(81))
    assert chain(tmp_path)[1:] == [
        ("/runs/a/step-00040", "/runs/a/step-00000"),
        ("/runs/a/step-00080", "/runs/a/step-00040"),
    ]
    assert read_lineage(tmp_path)["checkpoints"][-1]["policy_sha256"] == sha256(81)


def test_a_run_in_another_folder_keeps_the_checkpoints_that_it_came_from(tmp_path: Path) -> None:
    first = lineage(tmp_path / "a", "/runs/a", 0)
    first.judged(40, quality(7.5))
    held = json.loads(json.dumps(first.state_dict()))
    second = Lineage(tmp_path / "b")
    second.went_on_from("/runs/a/step-00040", 40, sha256(40), held)
    second.committed(80, "/runs/b/step-00080", sha256(80))
    assert chain(tmp_path / "b") == [
        ("/runs/a/step-00000", None),
        ("/runs/a/step-00040", "/runs/a/step-00000"),
        ("/runs/b/step-00080", "/runs/a/step-00040"),
    ]
    assert read_lineage(tmp_path / "b")["checkpoints"][1]["judge_fid"] == 7.5


def test_a_new_process_in_the_same_folder_goes_on_with_the_list(tmp_path: Path) -> None:
    first = lineage(tmp_path, "/runs/a", 0)
    held = first.state_dict()
    first.committed(40, "/runs/a/step-00040", sha256(40))
    second = Lineage(tmp_path)
    second.went_on_from("/runs/a/step-00040", 40, sha256(40), held)
    second.committed(80, "/runs/a/step-00080", sha256(80))
    assert [uri for uri, _ in chain(tmp_path)] == [
        "/runs/a/step-00000",
        "/runs/a/step-00040",
        "/runs/a/step-00080",
    ]


def test_a_step_that_is_saved_twice_is_listed_once(tmp_path: Path) -> None:
    lineage(tmp_path, "/runs/a", 0, 40, 40)
    assert chain(tmp_path) == [
        ("/runs/a/step-00000", None),
        ("/runs/a/step-00040", "/runs/a/step-00000"),
    ]


def test_a_judgement_counts_before_and_after_its_checkpoint(tmp_path: Path) -> None:
    found = lineage(tmp_path, "/runs/a", 0)
    found.judged(40, quality(7.5))
    found.committed(40, "/runs/a/step-00040", sha256(40))
    found.committed(80, "/runs/a/step-00080", sha256(80))
    found.judged(80, quality(2.5))
    fids = [entry.get("judge_fid") for entry in read_lineage(tmp_path)["checkpoints"]]
    assert fids == [None, 7.5, 2.5]


def test_the_candidate_is_the_last_checkpoint_or_the_one_that_is_named(tmp_path: Path) -> None:
    found = lineage(tmp_path, "/runs/a", 40, 80)
    found.judged(40, quality(7.5))
    found.judged(80, quality(2.5))
    last = candidate_of(tmp_path, model="digits")
    assert (last.step, last.judge_fid, last.recall, last.cfg_scale) == (80, 2.5, 0.9, 1.0)
    assert last.policy == f"/runs/a/step-00080/{POLICY}"
    assert last.policy_sha256 == sha256(80)
    assert (last.model, last.num_images) == ("digits", 300)
    assert candidate_of(tmp_path, model="digits", step=40).judge_fid == 7.5


def test_a_checkpoint_that_was_not_judged_is_no_candidate(tmp_path: Path) -> None:
    found = lineage(tmp_path, "/runs/a", 40, 80)
    found.judged(40, quality(7.5))
    with pytest.raises(ConfigError, match=r"step 80 \(judged are 40\)"):
        candidate_of(tmp_path, model="digits")
    with pytest.raises(ConfigError, match="name the folder of a run"):
        candidate_of(tmp_path / "nowhere", model="digits")


def test_a_judge_is_known_by_the_content_of_its_files(tmp_path: Path) -> None:
    one, same, other = (Judge.of(judges(tmp_path / name)) for name in ("a", "b", "c"))
    assert one == same == other
    (tmp_path / "c/real.npz").write_bytes(b"other")
    changed = tiny_config(
        evaluation__judge=str(tmp_path / "c/judge.pt"),
        evaluation__judge_reference=str(tmp_path / "c/real.npz"),
        evaluation__num_images=300,
    )
    assert Judge.of(changed).judge_reference_sha256 != one.judge_reference_sha256
    assert Judge.of(changed).judge_sha256 == one.judge_sha256
