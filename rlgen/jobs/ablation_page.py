"""The ablation as a page and as Markdown.

Owns the wording and the layout, with ablation_template.html; must not compute results.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, get_args

from rlgen.jobs.ablation_findings import Finding, Outcome
from rlgen.jobs.ablation_plan import Experiment

Table = Sequence[Mapping[str, Any]]
"""Rows with `title`, `variant`, `is_base`, the `values` of all seeds by column, and `forms`."""


def markdown(
    chosen: Sequence[Experiment],
    tables: Mapping[str, Table],
    found: Sequence[Finding],
    num_seeds: int,
) -> str:
    """Lay out findings and tables for a README."""
    spread = f", ± standard deviation over {num_seeds} seeds" if num_seeds > 1 else ""
    parts = [
        _markdown_table(
            ["claim", "measured here", "mean (each seed)", "outcome"],
            [[f"{f.claim} ({f.source})", f.measured, _numbers(f), f.outcome] for f in found],
        )
    ]
    for experiment in chosen:
        rows = tables[experiment.name]
        titles = list(rows[0]["values"])
        parts.append(f"**{experiment.question}** Means{spread}.")
        parts.append(_markdown_table(["", *titles], [[row["title"], *_cells(row)] for row in rows]))
    return "\n\n".join(parts) + "\n"


def page(
    chosen: Sequence[Experiment],
    tables: Mapping[str, Table],
    found: Sequence[Finding],
    facts: Mapping[str, Any],
    folders: Mapping[str, Path],
) -> str:
    """Make the self-contained HTML page.

    Args:
        tables: by experiment.
        facts: about the runs as a whole.
        folders: by variant the folder of the first seed's run, whose grids are shown.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("rlgen.jobs", "."), autoescape=True)
    return environment.get_template("ablation_template.html").render(
        headline=_headline(found),
        facts=_facts(facts),
        findings=[{"finding": f, "numbers": _numbers(f)} for f in found],
        sections=[
            {
                "experiment": experiment,
                "columns": list(tables[experiment.name][0]["values"]),
                "rows": [
                    {"title": row["title"], "cells": _cells(row), "is_base": row["is_base"]}
                    for row in tables[experiment.name]
                ],
                "grids": _grids(tables[experiment.name], folders),
            }
            for experiment in chosen
        ],
        variants=[
            (variant.name, " ".join(variant.settings) or "the default")
            for variant in {v.name: v for e in chosen for v in e.variants}.values()
        ],
    )


def _headline(found: Sequence[Finding]) -> str:
    counts = {outcome: sum(f.outcome == outcome for f in found) for outcome in get_args(Outcome)}
    return (
        f"On handwritten digits {counts['agrees']} of {len(found)} claims hold on every seed, "
        f"{counts['mixed']} on some seeds, and {counts['contradicts']} on none."
    )


def _facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    seeds = ", ".join(str(seed) for seed in facts["seeds"])
    return [
        ("Runs", f"{facts['runs']}, each an ordinary run of the main job; seeds {seeds}"),
        ("Settings of all runs", " ".join(facts["settings"])),
        ("Sum of the runs' wall time", f"{facts['runs_wall_s'] / 60:.0f} min"),
        ("Side by side", f"{facts['jobs']} on {facts['cpus']} CPUs ({facts['machine']})"),
    ]


def _numbers(finding: Finding) -> str:
    each = ", ".join(f"{value:.3f}" for value in finding.per_seed)
    return f"{finding.value:.3f} ({each})"


def _cells(row: Mapping[str, Any]) -> list[str]:
    """Mean and standard deviation of each column."""
    cells = []
    for title, values in row["values"].items():
        numbers, form = [value for value in values if value is not None], row["forms"][title]
        if not numbers:
            cells.append("–")
            continue
        spread = f" ± {stdev(numbers):{form}}" if len(numbers) > 1 else ""
        cells.append(f"{mean(numbers):{form}}{spread}")
    return cells


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _grids(rows: Table, folders: Mapping[str, Path]) -> list[dict[str, str]]:
    """Pictures of the first seed: the base where a row tells of it, else the trained policy."""
    grids = []
    for row in rows:
        files = sorted((folders[row["variant"]] / "grids").glob("step_*.png"))
        if not files:
            continue
        file = files[0] if row["is_base"] else files[-1]
        payload = base64.b64encode(file.read_bytes()).decode()
        grids.append({"title": row["title"], "source": f"data:image/png;base64,{payload}"})
    return grids
