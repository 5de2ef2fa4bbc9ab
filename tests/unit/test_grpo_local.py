"""The main job in one process, with the tiny embedded default."""

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
