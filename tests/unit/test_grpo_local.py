"""The main job in one process, with the tiny embedded default."""

import json
from pathlib import Path

import pytest
import torch

from rlgen.config import load_config
from rlgen.digits.assets import ensure_assets
from rlgen.jobs import grpo
from rlgen.jobs.cli import run_job
from rlgen.rewards.open_clip_model import load_open_clip, read_open_clip_config, save_open_clip
from tests.conftest import TINY_RUN

LOCAL = [*TINY_RUN, "runtime=local"]


def test_vqgan_is_trained_without_a_null_class(cache_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = ["--config", "jobs/digits_vqgan.yaml", *LOCAL, "evaluation.cfg_scales=[]"]
    assert grpo.main(["--output", str(output), *settings]) == 0
    rows = [json.loads(row) for row in (output / "metrics.jsonl").read_text().splitlines()]
    deviations = [row["policy/ratio_max_deviation"] for row in rows if "loss/total" in row]
    assert len(deviations) == 3 and deviations[0] < 1e-4
    assert max(row.get("policy/grad_norm", 0.0) for row in rows) > 0.0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["before"]["best_cfg_scale"] == summary["after"]["best_cfg_scale"] == 1.0
    assert summary["groups"] == {"generated": 60, "trained": 60, "dropped": {}}


def test_a_scorer_that_returns_nan_stops_the_run_with_its_name(
    cache_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assets = ensure_assets(load_config(None, TINY_RUN).digits, lambda *_: None)
    source = str(assets.folder / "clip")
    model, _, _ = load_open_clip(source)
    model.visual.proj.data.fill_(torch.nan)
    save_open_clip(str(tmp_path / "clip"), model, read_open_clip_config(source)["model_cfg"])
    words = [*LOCAL, f"reward.scorers.clip.checkpoint={tmp_path / 'clip'}"]
    status = run_job(lambda: grpo.main(["--output", str(tmp_path / "run"), *words]))
    message = capsys.readouterr().err
    assert status == 2
    assert "'clip'" in message and "nan" in message
    assert "Traceback" not in message
    assert not (tmp_path / "run" / "summary.json").exists()
