"""What the terminal shows, with and without a TTY, and the memory figure."""

import io
import subprocess
import sys
import time

import pytest
from rich.console import Console

from rlgen.errors import ConfigError
from rlgen.jobs.console import RunProgress, fail, summary_rows, summary_table
from rlgen.jobs.memory import PeakMemory

BEFORE = {
    "judge_fid": 22.5,
    "judge_fid_best_cfg": 10.9,
    "best_cfg_scale": 1.5,
    "precision": 0.68,
    "recall": 0.87,
    "accuracy": 0.65,
    "clip": 0.21,
    "preference": 0.12,
    "images_per_s": 7477.0,
    "images_per_s_cfg": 4115.0,
}
AFTER = BEFORE | {"judge_fid": 4.62, "judge_fid_best_cfg": 4.62, "best_cfg_scale": 1.0}


def console(*, is_terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=140, highlight=False)


def written(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def run_steps(target: Console, *, steps: int = 100, first_step: int = 0) -> str:
    with RunProgress(steps, first_step=first_step, console=target) as progress:
        for i in range(300):
            progress.stage("training the embedded default: tokenizer", done=i, total=300)
        progress.stage("starting Ray")
        for step in range(first_step + 1, steps + 1):
            progress.step(step, {"reward/clip": 0.3123, "reward/loo_fid": 0.01, "loss/kl": 9.0})
            if step % 20 == 0:
                progress.step(step, {"judge/fid": 22.5 - step / 10})
        progress.say("checkpoint [1/2] saved")
    return written(target)


def test_without_a_terminal_there_are_few_plain_lines() -> None:
    text = run_steps(console(is_terminal=False))
    lines = text.splitlines()
    assert "\x1b" not in text and "\r" not in text
    assert len(lines) == 2 + 11 + 5 + 1  # stages, first and every 10th step, evaluations, say
    assert lines[0].startswith("training the embedded default: tokenizer 0/300")
    assert lines[1].startswith("starting Ray")
    assert "step 1/100  clip 0.312  loo-fid 0.01  [" in lines[2]
    # The evaluation keeps the rewards, and later steps keep the judge's number.
    assert "step 30/100  clip 0.312  loo-fid 0.01  judge FID 20.5  [" in text
    assert "left]" in text
    assert lines[-1] == "checkpoint [1/2] saved"


def test_a_terminal_gets_a_bar_that_leaves_nothing_behind() -> None:
    text = run_steps(console(is_terminal=True), steps=5)
    assert "5/5" in text and "clip 0.312" in text and "left" in text
    assert "checkpoint [1/2] saved" in text


def test_a_resumed_run_counts_from_where_it_was() -> None:
    text = run_steps(console(is_terminal=False), steps=50, first_step=40)
    assert "step 41/50" in text and "step 50/50" in text and "step 40/50" not in text


def test_summary_table_shows_both_sides() -> None:
    target = console(is_terminal=False)
    target.print(summary_table({"before": BEFORE, "after": AFTER}))
    text = written(target)
    for shown in ("22.50", "4.62", "10.90 (scale 1.5)", "7,477", "4,115", "Accuracy (judge)"):
        assert shown in text


def test_summary_rows_know_what_is_better_and_tolerate_gaps() -> None:
    rows = {title: rest for title, *rest in summary_rows({"before": BEFORE, "after": AFTER})}
    assert rows["Judge FID, no guidance"] == ["22.50", "4.62", True]
    assert rows["Recall"] == ["0.870", "0.870", None]
    before = {key: value for key, value in BEFORE.items() if key != "accuracy"}
    unfinished = {title: rest for title, *rest in summary_rows({"before": before, "after": None})}
    assert unfinished["Judge FID, no guidance"] == ["22.50", "–", None]
    assert "Accuracy (judge)" not in unfinished
    assert summary_rows({}) == []


def test_fail_is_one_paragraph_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    fail(ConfigError("rollout.num_workers = 0 is\n  too few; use [bold]1 or more."))
    captured = capsys.readouterr()
    assert captured.out == ""
    expected = "error: rollout.num_workers = 0 is too few; use [bold]1 or more.\n"
    assert captured.err == expected


def test_peak_memory_counts_children_and_keeps_the_peak() -> None:
    code = "block = b'x' * 300_000_000; print(flush=True); input()"
    with PeakMemory(interval_s=0.1) as memory:
        alone_gib = memory.sample()
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.5)
        child.communicate(b"\n")
        after_gib = memory.sample()
    # 300 MB are 0.279 GiB; the rest is the child's interpreter.
    assert 0.27 < memory.peak_gib - alone_gib < 0.40
    assert after_gib < memory.peak_gib - 0.2
