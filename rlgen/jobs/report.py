"""The report of a run: one self-contained HTML file, made from the run folder.

Owns what the page says; report_charts.py draws its charts, report_template.html has the layout.
Must not need anything but the folder: it works during a run, after a crash, on another machine.
"""

import argparse
import base64
import io
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlgen.errors import ConfigError, RlgenError
from rlgen.jobs.console import fail, summary_rows
from rlgen.jobs.report_charts import Series, curve_charts, sweep_chart
from rlgen.storage import write_bytes
from rlgen.tracking import tracked_run, ui_command

MAX_EMBEDDED_BYTES = 1_500_000
MAX_GRID_PIXELS = 1200


def build_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder from what is there; return its path.

    Raises:
        ConfigError: it isn't a run folder, or a file in it can't be read.
    """
    if not any((run_dir / name).is_file() for name in ("metrics.jsonl", "summary.json")):
        raise ConfigError(
            f"{run_dir} is no run folder (it has neither metrics.jsonl nor summary.json); name the "
            "folder that a job wrote, such as runs/<time>."
        )
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("rlgen.jobs", "."), autoescape=True)
    page = environment.get_template("report_template.html").render(**_page(run_dir))
    target = run_dir / "report.html"
    write_bytes(str(target), page.encode())
    return target


def _page(run_dir: Path) -> dict[str, Any]:
    summary = _read_summary(run_dir)
    series = _read_metrics(run_dir)
    config_text = _read_config(run_dir)
    config = yaml.safe_load(config_text) or {}
    grids = sorted((run_dir / "grids").glob("step_*.png"))
    return {
        "name": run_dir.absolute().name,
        "headline": _headline(summary, series),
        "tiles": _tiles(summary),
        "rows": summary_rows(summary),
        "sweep": _sweep(summary),
        "sweep_chart": sweep_chart(summary),
        "grids": [_grid(path) for path in _first_and_last(grids)],
        "row_names": _row_names(config),
        "charts": curve_charts(series, summary),
        "facts": _facts(summary),
        "config": config_text,
        "places": _places(run_dir),
        "tracking": _tracking(run_dir),
    }


def _read_summary(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "summary.json"
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} is no JSON ({error}); remove it to get the report of an unfinished run."
        ) from None


def _read_metrics(run_dir: Path) -> Series:
    path = run_dir / "metrics.jsonl"
    series: Series = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line being written
        for key, value in row.items():
            if "/" in key and isinstance(value, (int, float)):
                series.setdefault(key, []).append((row["step"], float(value)))
    # A resumed run repeats steps: the later line counts.
    return {key: sorted(dict(points).items()) for key, points in series.items()}


def _read_config(run_dir: Path) -> str:
    path = run_dir / "config.yaml"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return re.sub(r"://[^/\s@]+@", "://***@", text)


def _headline(summary: Mapping[str, Any], series: Series) -> str:
    before, after = summary.get("before") or {}, summary.get("after") or {}
    if "judge_fid" in before and "judge_fid" in after:
        sentence = (
            f"GRPO took the judge FID from {before['judge_fid']:.2f} to {after['judge_fid']:.2f} "
            f"without guidance: {_ratio(after, before):.2f} of the base's"
        )
        if before.get("judge_fid_best_cfg"):
            sentence += (
                f", and {after['judge_fid'] / before['judge_fid_best_cfg']:.2f} of the base's best "
                f"with guidance ({before['judge_fid_best_cfg']:.2f} at scale "
                f"{before.get('best_cfg_scale', 0):g}), which costs two forward passes a token"
            )
        return f"{sentence}."
    steps = max((points[-1][0] for points in series.values()), default=0)
    judged = series.get("judge/fid", [])
    sentence = f"This run is not finished; it recorded {steps} steps."
    if len(judged) > 1:
        (_, first), (last_step, last) = judged[0], judged[-1]
        sentence += f" The judge FID went from {first:.2f} to {last:.2f} at step {last_step}."
    return sentence


def _ratio(after: Mapping[str, Any], before: Mapping[str, Any]) -> float:
    return after["judge_fid"] / before["judge_fid"]


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    before, after = summary.get("before") or {}, summary.get("after") or {}
    tiles: list[tuple[str, str]] = []
    if "judge_fid" in before and "judge_fid" in after:
        tiles.append((f"{_ratio(after, before):.2f} ×", "of the base's judge FID, both unguided"))
        if before.get("judge_fid_best_cfg"):
            share = after["judge_fid"] / before["judge_fid_best_cfg"]
            tiles.append((f"{share:.2f} ×", "of the base's best judge FID with guidance"))
    if "recall" in before and "recall" in after:
        tiles.append((f"{after['recall'] - before['recall']:+.3f}", "recall, after minus base"))
    if after.get("images_per_s") and after.get("images_per_s_cfg"):
        # Both from one evaluation: a machine's speed drifts between the ends of a run.
        speed = after["images_per_s"] / after["images_per_s_cfg"]
        tiles.append((f"{speed:.1f} ×", "images/s without guidance, against with"))
    return tiles


def _sweep(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    sweep = summary.get("sweep") or {}
    before, after = sweep.get("before") or {}, sweep.get("after") or {}
    scales = sorted({*before, *after}, key=float)

    def shown(side: Mapping[str, float], scale: str) -> str:
        return f"{side[scale]:.2f}" if scale in side else "–"

    return [
        ("none" if float(scale) == 1 else scale, shown(before, scale), shown(after, scale))
        for scale in scales
    ]


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    groups = summary.get("groups") or {}
    dropped = groups.get("dropped") or {}
    restarts = summary.get("restarts") or {}
    peak_gib = summary.get("peak_pss_gib")
    facts = [
        ("Steps", summary.get("steps")),
        ("Seed", summary.get("seed")),
        ("Wall time", _duration(summary.get("wall_s"))),
        ("Peak memory (PSS)", None if peak_gib is None else f"{peak_gib:.2f} GiB"),
        ("Groups generated", groups.get("generated")),
        ("Groups trained on", groups.get("trained")),
        ("Groups dropped", _counts(dropped) if groups else None),
        ("Restarts", _counts(restarts) if "restarts" in summary else None),
        ("Config sha256", summary.get("config_sha256")),
        ("Policy sha256", summary.get("policy_sha256")),
    ]
    return [(name, str(value)) for name, value in facts if value is not None]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "none"


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s" if seconds >= 60 else f"{seconds:.0f} s"


def _places(run_dir: Path) -> list[tuple[str, str]]:
    known = {
        "summary.json": "the numbers of this page",
        "metrics.jsonl": "every metric of every step",
        "config.yaml": "the resolved config; give it to --config to repeat the run",
        "checkpoints": "weights and run state",
        "grids": "fixed-seed grids by step",
    }
    return [(name, text) for name, text in known.items() if (run_dir / name).exists()]


def _tracking(run_dir: Path) -> dict[str, str] | None:
    tracked = tracked_run(run_dir)
    if tracked is None:
        return None
    uri, run_id = tracked
    return {"command": ui_command(uri), "run_id": run_id}


def _row_names(config: Any) -> list[str]:
    if not isinstance(config, dict):
        return []
    evaluation = config.get("evaluation")
    num_rows = evaluation.get("grid_classes") if isinstance(evaluation, dict) else None
    names = config.get("class_names")
    return [str(name) for name in names[:num_rows]] if isinstance(names, list) and num_rows else []


def _first_and_last(grids: list[Path]) -> list[Path]:
    return [grids[0], grids[-1]] if len(grids) > 1 else grids


def _grid(path: Path) -> dict[str, str]:
    step = int(path.stem.removeprefix("step_"))
    title = "Base" if step == 0 else f"After {step} steps"
    return {"title": title, "source": _embedded_image(path)}


def _embedded_image(path: Path) -> str:
    payload, kind = path.read_bytes(), "png"
    if len(payload) > MAX_EMBEDDED_BYTES:
        from PIL import Image

        with Image.open(path) as image:
            smaller = image.convert("RGB")
        smaller.thumbnail((MAX_GRID_PIXELS, 2 * MAX_GRID_PIXELS))
        buffer = io.BytesIO()
        smaller.save(buffer, format="JPEG", quality=88)
        payload, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(payload).decode()}"


def main(arguments: list[str] | None = None) -> int:
    """Rebuild the report of a run folder; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rlgen.jobs.report",
        description="Write RUN_DIR/report.html from what the run folder holds.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the folder of a run")
    options = parser.parse_args(arguments)
    try:
        print(build_report(options.run_dir))
    except RlgenError as error:
        fail(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
