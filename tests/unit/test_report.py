"""The report and the grids: real numbers appear, gaps are tolerated, text is escaped."""

import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlgen.errors import ConfigError
from rlgen.evaluation.grid import GAP_PIXELS, arrange_by_class, write_grid
from rlgen.jobs.report import build_report, main

BEFORE = {
    "judge_fid": 20.0,
    "judge_fid_best_cfg": 10.0,
    "best_cfg_scale": 1.5,
    "precision": 0.6,
    "recall": 0.85,
    "accuracy": 0.66,
    "clip": 0.25,
    "preference": 0.5,
    "images_per_s": 7000.0,
    "images_per_s_cfg": 3500.0,
}
AFTER = BEFORE | {"judge_fid": 5.0, "judge_fid_best_cfg": 4.5, "recall": 0.87, "clip": 0.2}
SUMMARY = {
    "before": BEFORE,
    "after": AFTER,
    "seed": 3,
    "steps": 40,
    "groups": {"generated": 2400, "trained": 2390, "dropped": {"stale": 10}},
    "restarts": {"rollout": 1},
    "wall_s": 95.0,
    "peak_pss_gib": 3.2,
    "config_sha256": "c" * 64,
    "policy_sha256": "d" * 64,
    "sweep": {"before": {"1": 20.0, "1.5": 10.0, "3": 31.25}, "after": {"1": 5.0, "1.5": 4.5}},
}


def write_metrics(run_dir: Path, rows: list[dict], tail: str = "") -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    rows: list[dict] = [{"step": 0, "time_s": 0.0, "judge/fid": 20.0, "judge/recall": 0.85}]
    rows += [
        {"step": step, "time_s": 1.0 * step, "reward/clip": step / 100, "reward/novel": 1.0}
        for step in range(40)
    ]
    rows += [{"step": 40, "time_s": 40.0, "judge/fid": 5.0, "judge/recall": 0.87}]
    write_metrics(folder, rows)
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "config.yaml").write_text("seed: 3\ntracking:\n  uri: http://me:hush@host/\n")
    for step in (0, 20, 40):
        images = np.full((4, 3, 16, 16), step, dtype=np.uint8)
        write_grid(folder / f"grids/step_{step:05}.png", images, columns=2)
    return folder


def text_of(path: Path) -> str:
    class Text(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.words: list[str] = []

        def handle_data(self, data: str) -> None:
            self.words.append(data)

    parser = Text()
    parser.feed(path.read_text())
    return " ".join(" ".join(parser.words).split())


def test_the_numbers_of_the_summary_appear(run_dir: Path) -> None:
    report = build_report(run_dir)
    assert report == run_dir / "report.html"
    text = text_of(report)
    # 5 / 20, 5 / 10, .87 - .85, 7000 / 3500
    for number in ("0.25 ×", "0.50 ×", "+0.020", "2.0 ×"):
        assert number in text
    assert "from 20.00 to 5.00" in text
    assert "10.00 (scale 1.5)" in text
    assert "31.25" in text
    assert "stale 10" in text and "rollout 1" in text and "1 min 35 s" in text
    assert "hush" not in report.read_text()


def test_better_and_worse_are_told_apart(run_dir: Path) -> None:
    cells = re.findall(r'class="(better|worse)">([^<]*)<', build_report(run_dir).read_text())
    assert ("better", "5.00") in cells
    assert ("better", "0.870") in cells
    assert ("worse", "0.200") in cells


def test_first_and_last_grid_and_every_reward_have_a_picture(run_dir: Path) -> None:
    page = build_report(run_dir).read_text()
    alts = re.findall(r'<img [^>]*alt="([^"]*)"', page)
    assert len(alts) == page.count("<img ") and all(alts)
    assert [a.split(":")[0] for a in alts if "samples" in a] == ["Base", "After 40 steps"]
    assert any(a.startswith("Reward: novel") for a in alts)
    assert "Judge FID, no guidance: 20 at step 0, 5 at step 40" in alts


def test_nothing_is_loaded_from_outside(run_dir: Path) -> None:
    page = build_report(run_dir).read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert "@import" not in page and "url(" not in page


def test_an_unfinished_run_has_a_report(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink()
    text = text_of(build_report(run_dir))
    assert "not finished; it recorded 40 steps" in text
    assert "from 20.00 to 5.00 at step 40" in text
    assert "Before and after" not in text


def test_sparse_and_torn_metrics(tmp_path: Path) -> None:
    rows = [{"step": 0, "reward/clip": float("nan")}, {"step": 1, "reward/clip": float("inf")}]
    write_metrics(tmp_path, rows, tail='{"step": 2, "rew')
    assert "it recorded 1 steps" in text_of(build_report(tmp_path))
    write_metrics(tmp_path, [])
    assert "it recorded 0 steps" in text_of(build_report(tmp_path))


def test_a_summary_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"before": BEFORE, "after": AFTER}))
    assert "from 20.00 to 5.00" in text_of(build_report(tmp_path))


def test_text_is_escaped(run_dir: Path) -> None:
    attack = "<script>alert(1)</script>"
    (run_dir / "config.yaml").write_text(
        f"class_names: ['{attack}']\nevaluation: {{grid_classes: 9}}"
    )
    write_metrics(run_dir, [{"step": 0, f"reward/{attack}": 1.0, f'reward/"{attack[:8]}"': 1.0}])
    page = build_report(run_dir).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_a_wrong_folder_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "no run folder" in captured.err
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match="no JSON"):
        build_report(tmp_path)


def test_help_is_fast() -> None:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "rlgen.jobs.report", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "RUN_DIR" in done.stdout
    assert time.perf_counter() - began < 2.0
    for slow in ("matplotlib", "mlflow", "torch", "jinja2"):
        assert f" {slow}\n" not in done.stderr


def test_grid_order_zoom_and_gaps(tmp_path: Path) -> None:
    images = np.zeros((6, 3, 16, 16), dtype=np.uint8)
    images[:, 0] = np.arange(6)[:, None, None]  # image i is of class i % 3
    arranged = arrange_by_class(images, 3, 2)
    assert arranged[:, 0, 0, 0].tolist() == [0, 3, 1, 4, 2, 5]
    write_grid(tmp_path / "deep/grid.png", arranged, columns=2)
    with Image.open(tmp_path / "deep/grid.png") as image:
        pixels = np.asarray(image)
    cell = 48
    assert pixels.shape == (3 * cell + 2 * GAP_PIXELS, 2 * cell + GAP_PIXELS, 3)
    rows = pixels[:: cell + GAP_PIXELS, :: cell + GAP_PIXELS, 0]
    assert rows.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["grid.png"]


def test_large_images_keep_their_size_and_a_short_row_stays_empty(tmp_path: Path) -> None:
    write_grid(tmp_path / "g.png", np.zeros((3, 3, 64, 64), dtype=np.uint8), columns=2)
    with Image.open(tmp_path / "g.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (130, 130, 3)
    assert pixels[:64, :64].max() == 0 and pixels[70:, 70:].min() > 200
