"""The report of a realistic run, seen by a real browser."""

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from rlgen.evaluation.grid import arrange_by_class, write_grid
from rlgen.jobs.report import build_report
from tests.browser.chromium import CHROMIUM, FLAGS, needs_chromium, picture

pytestmark = [pytest.mark.browser, needs_chromium]

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def make_run(run_dir: Path, *, steps: int = 120) -> Path:
    """A run folder with the shape and the size of numbers that digits give."""
    rng = np.random.default_rng(0)
    run_dir.mkdir(parents=True)
    rows = [{"step": 0, "time_s": 0.0, **judged(0.0)}]
    for step in range(steps):
        done = 1 - math.exp(-step / 25)
        noise = rng.normal(0, 0.03, 8)
        rows.append(
            {
                "step": step,
                "time_s": step * 0.3,
                "reward/clip": 0.21 + 0.07 * done + 0.1 * noise[0],
                "reward/preference": 0.1 + 0.9 * done + noise[1],
                "reward/loo_fid": noise[2] / 30,
                "loss/policy": noise[3] / 10,
                "loss/kl": 0.03 * done + abs(noise[4]) / 30,
                "policy/entropy_normalized": 0.70 - 0.03 * done + 0.1 * noise[5],
                "policy/grad_norm": 0.4 + noise[6],
                "moments/ema_fid": 21 - 18.5 * done + 5 * noise[7],
                "time/step_s": 0.31 + abs(noise[0]),
            }
        )
        if (step + 1) % 20 == 0:
            rows.append({"step": step + 1, "time_s": step * 0.3, **judged((step + 1) / steps)})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    digits = load_digits()
    picked = [np.flatnonzero(digits.target == i % 10)[i // 10] for i in range(80)]
    real = digits.images[picked].repeat(2, axis=1).repeat(2, axis=2) / 16 * 255
    for step, sigma in ((0, 70.0), (60, 40.0), (steps, 12.0)):
        noisy = np.clip(real + rng.normal(0, sigma, real.shape), 0, 255).astype(np.uint8)
        images = arrange_by_class(noisy[:, None].repeat(3, axis=1), 10, 8)
        write_grid(run_dir / f"grids/step_{step:05}.png", images, columns=8)
    (run_dir / "config.yaml").write_text(
        f"seed: 0\nsteps: {steps}\nclass_names: {json.dumps(NAMES)}\n"
        "rollout:\n  num_workers: 2\n  group_size: 8\n"
        "evaluation:\n  grid_classes: 10\n  cfg_scales: [1.25, 1.5, 2.0, 3.0]\n"
    )
    (run_dir / "checkpoints").mkdir()
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY))
    run = {"kind": "run", "uri": "sqlite:////home/me/runs/mlflow.db", "run_id": "4da64f50951c4627"}
    (run_dir / "mlflow_spool.jsonl").write_text(json.dumps(run) + "\n")
    return run_dir


def judged(done: float) -> dict[str, float]:
    return {
        "judge/fid": 22.5 - 17.9 * done**0.4,
        "judge/precision": 0.68 + 0.1 * done,
        "judge/recall": 0.873 + 0.02 * done,
        "judge/accuracy": 0.65 + 0.17 * done,
    }


SUMMARY = {
    "config_sha256": "5e1f" * 16,
    "policy_sha256": "a07c" * 16,
    "seed": 0,
    "steps": 120,
    "wall_s": 133.4,
    "peak_pss_gib": 3.41,
    "groups": {"generated": 7200, "trained": 7194, "dropped": {"constant reward": 6, "stale": 0}},
    "restarts": {"rollout": 0, "reward": 0},
    "before": {
        "judge_fid": 22.5,
        "judge_fid_best_cfg": 10.9,
        "best_cfg_scale": 1.5,
        "precision": 0.68,
        "recall": 0.873,
        "accuracy": 0.65,
        "clip": 0.213,
        "preference": 0.12,
        "images_per_s": 7477.0,
        "images_per_s_cfg": 4115.0,
    },
    "after": {
        "judge_fid": 4.62,
        "judge_fid_best_cfg": 4.62,
        "best_cfg_scale": 1.0,
        "precision": 0.781,
        "recall": 0.891,
        "accuracy": 0.82,
        "clip": 0.281,
        "preference": 0.98,
        "images_per_s": 7502.0,
        "images_per_s_cfg": 4098.0,
    },
    "sweep": {
        "before": {"1": 22.5, "1.25": 13.7, "1.5": 10.9, "2": 11.5, "3": 26.5},
        "after": {"1": 4.62, "1.25": 6.9, "1.5": 11.2, "2": 21.8, "3": 44.0},
    },
}


def screenshot(page: Path, target: Path, profile: Path, *, width: int, height: int) -> np.ndarray:
    assert CHROMIUM is not None
    subprocess.run(
        [
            CHROMIUM,
            "--headless",
            *FLAGS,
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            f"--screenshot={target}",
            page.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    with Image.open(target) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_shows_table_grids_and_curves(tmp_path: Path, width: int) -> None:
    report = build_report(make_run(tmp_path / "run"))
    target = picture(f"report-{width}", tmp_path)
    pixels = screenshot(report, target, tmp_path / "profile", width=width, height=3400)
    assert pixels.shape[1] == width
    # A blank page or a dialog has a handful of colours; grids and curves have thousands.
    colours = np.unique(pixels.reshape(-1, 3), axis=0)
    assert len(colours) > 500
    # Something is drawn in each sixth of the page's first 2,400 pixels.
    for band in np.array_split(pixels[:2400], 6):
        assert (band.min(axis=2) < 120).mean() > 0.002
    # Nothing sticks out to the right: the last columns are background all the way down.
    assert (pixels[:, -8:] == pixels[0, -1]).all()
