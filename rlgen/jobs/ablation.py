"""The published works' claims in small: variants of the main job on digits, over several seeds.

`python -m rlgen.jobs.ablation` runs what is not finished yet, and leaves a page with tables and
pictures, a table in Markdown and a JSON with every number. Each run is the main job, started like
a user's. ablation_plan.py says what is run and ablation_findings.py what is concluded.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlgen.config import RunConfig
from rlgen.errors import ConfigError
from rlgen.jobs.ablation_findings import Finding, findings
from rlgen.jobs.ablation_plan import Experiment, choose_experiments
from rlgen.jobs.cli import run_job
from rlgen.jobs.variants import (
    Launch,
    SeededRun,
    execute_all,
    launch_process,
    parse_seeds,
)
from rlgen.storage import write_bytes

RESULT_NAME = "ablation.json"
_FLUSH_S = 60.0


def main(arguments: Sequence[str] | None = None, *, launch: Launch = launch_process) -> int:
    """Plan, run what is missing, and write down what came out.

    Args:
        launch: starts one run of the main job.
    """
    request = _parser().parse_intermixed_args(arguments)
    seeds = parse_seeds(request.seeds)
    chosen = choose_experiments(request.experiment, request.style_config, request.styles)
    if request.jobs < 1:
        raise ConfigError(f"--jobs {request.jobs} must be at least 1.")
    settings = ("runtime=local", *request.settings)
    variants = {variant.name: variant for item in chosen for variant in item.variants}
    runs = {
        name: [SeededRun(variant, seed, request.output, settings) for seed in seeds]
        for name, variant in variants.items()
    }
    # Seed by seed, so that an interrupted ablation has whole seeds.
    ordered = [of_variant[i] for i in range(len(seeds)) for of_variant in runs.values()]
    resolved = [run.resolved() for run in ordered]  # a wrong setting must not show after an hour
    if request.dry_run:
        print("\n".join(f"{run.folder}: {' '.join(run.arguments)}" for run in ordered))
        return 0
    started = time.monotonic()
    _prepare(resolved)
    execute_all(ordered, jobs=request.jobs, launch=launch, logs=True, say=_say)
    seconds = time.monotonic() - started
    results = _Results(request.output, seeds, chosen, runs, settings, request.jobs, seconds)
    results.write()
    results.track(resolved[0].tracking.uri, resolved[0].tracking.experiment)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rlgen.jobs.ablation",
        description=(__doc__ or "").split("\n")[0],
        epilog="Settings (section.key=value) apply to every run and win over the variants' own.",
    )
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; default 0,1,2")
    parser.add_argument(
        "--experiment",
        metavar="NAME,...",
        help="some of rewards, covariance, entropy, guidance, style; default: all",
    )
    parser.add_argument("--styles", metavar="NAME,...", help="some of slanted, thick, inverted")
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; default 1")
    parser.add_argument(
        "--style-config",
        metavar="FILE",
        default="jobs/digits_style.yaml",
        help="preset of the style experiment; default jobs/digits_style.yaml",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the runs and stop")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    return parser


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _prepare(configs: Sequence[RunConfig]) -> None:
    """Train what several runs share before they start, so that no two of them train it."""
    from rlgen.config.plan import uses_embedded
    from rlgen.digits.assets import ensure_assets, locate_assets

    def report(name: str, done: int, total: int) -> None:
        if done == 1:
            _say(f"training the embedded default, once: {name}, {total} steps")

    for config in configs:
        if uses_embedded(config) and not locate_assets(config.digits).exist:
            ensure_assets(config.digits, report)


class _Results:
    """What all runs left, and the files and the MLflow run made of it."""

    def __init__(
        self,
        output: Path,
        seeds: Sequence[int],
        chosen: Sequence[Experiment],
        runs: dict[str, list[SeededRun]],
        settings: Sequence[str],
        jobs: int,
        seconds: float,
    ) -> None:
        self.output = output
        self.seeds = list(seeds)
        self.chosen = chosen
        self.runs = runs
        self.values = {
            name: [run.summary() | {"series": read_series(run.folder)} for run in of_variant]
            for name, of_variant in runs.items()
        }
        self.findings: list[Finding] = findings([item.name for item in chosen], self.values)
        self.facts = {
            "seeds": self.seeds,
            "settings": list(settings),
            "runs": sum(len(of_variant) for of_variant in runs.values()),
            "runs_wall_s": sum(v["wall_s"] for values in self.values.values() for v in values),
            "this_call_s": seconds,
            "jobs": jobs,
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
        }

    def table(self, experiment: Experiment) -> list[dict[str, Any]]:
        """Rows of an experiment: per column the values of each seed."""
        return [
            {
                "title": row.title,
                "variant": row.variant,
                "is_base": row.is_base,
                "values": {
                    column.title: [column.measure(values) for values in self.values[row.variant]]
                    for column in row.columns
                },
                "forms": {column.title: column.form for column in row.columns},
            }
            for row in experiment.rows
        ]

    def write(self) -> None:
        """Write JSON, Markdown and the page."""
        from rlgen.jobs.ablation_page import markdown, page

        tables = {item.name: self.table(item) for item in self.chosen}
        content = {
            "facts": self.facts,
            "findings": [finding.as_json() for finding in self.findings],
            "experiments": tables,
            "variants": {
                name: {
                    "settings": of_variant[0].variant.settings,
                    # The series are in each run's metrics.jsonl, a hundred times as long.
                    "seeds": [run.summary() for run in of_variant],
                }
                for name, of_variant in self.runs.items()
            },
        }
        self._put(RESULT_NAME, json.dumps(content, indent=1) + "\n")
        self._put("ablation.md", markdown(self.chosen, tables, self.findings, len(self.seeds)))
        folders = {name: of_variant[0].folder for name, of_variant in self.runs.items()}
        self._put("ablation.html", page(self.chosen, tables, self.findings, self.facts, folders))
        for name in (RESULT_NAME, "ablation.md", "ablation.html"):
            _say(f"wrote {self.output / name}")

    def track(self, uri: str | None, experiment: str) -> None:
        """Log numbers and files to MLflow, in a run of its own beside those of the runs."""
        from rlgen.tracking import Tracker, ui_command

        uri = uri or f"sqlite:///{self.output.resolve() / 'mlflow.db'}"
        tracker = Tracker(
            uri, experiment=experiment, run_name=self.output.name, spool_dir=self.output
        )
        tracker.set_tags({"rlgen.job": "ablation"})
        tracker.log_params(
            {"variants": {n: " ".join(r[0].arguments) for n, r in self.runs.items()}}
        )
        # Later calls with more runs give new points.
        tracker.log_metrics(self.facts["runs"], dict(self._metrics()))
        for name in (RESULT_NAME, "ablation.md", "ablation.html"):
            tracker.log_artifact(self.output / name)
        tracker.close("FINISHED", timeout_s=_FLUSH_S)
        for warning in tracker.warnings:
            _say(warning)
        if command := ui_command(uri):
            _say(f"MLflow: {command}")

    def _metrics(self) -> list[tuple[str, float]]:
        """Means over the seeds by a name that MLflow takes."""
        found = []
        for item in self.chosen:
            for row in self.table(item):
                for column, values in row["values"].items():
                    numbers = [value for value in values if value is not None]
                    if numbers:
                        name = f"{item.name}/{row['title']}/{column}"
                        kept = "".join(c if c.isalnum() or c in "/_-. " else "" for c in name)
                        found.append((kept, sum(numbers) / len(numbers)))
        return found

    def _put(self, name: str, text: str) -> None:
        write_bytes(str(self.output / name), text.encode())


def read_series(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Read every metric of a finished run by step."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key, value in row.items():
            if "/" in key:
                series.setdefault(key, []).append((row["step"], float(value)))
    return series


if __name__ == "__main__":
    sys.exit(run_job(main))
