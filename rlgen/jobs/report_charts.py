"""The charts of a run's report, each an SVG picture with the text that stands beside it.

Owns which metrics get a chart and the look of them. Must not read files.
"""

import base64
import io
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # matplotlib takes a second to import; --help must not
    from matplotlib.axes import Axes

Series = dict[str, list[tuple[int, float]]]

INK, MUTED, LINE, ACCENT, SECOND = "#1f2328", "#6b7280", "#d9dce1", "#2457c5", "#c2571a"
FONT_SIZE = 10.5
REWARD_TITLES = {
    "reward/clip": "Reward: CLIP",
    "reward/preference": "Reward: preference",
    "reward/loo_fid": "Reward: leave-one-out FID",
}
# Title, metric keys with their legend, and what the reader should look for.
CURVES: tuple[tuple[str, dict[str, str], str], ...] = (
    (
        "FID in the reward's features",
        {"moments/ema_fid": "EMA, what the reward sees", "moments/batch_fid": "this step's own"},
        "falls with the judge's",
    ),
    (
        "Precision and recall",
        {"judge/precision": "precision", "judge/recall": "recall"},
        "recall must not fall",
    ),
    ("Normalised entropy", {"policy/entropy_normalized": ""}, "1 is uniform over the codebook"),
    ("KL to the reference", {"loss/kl": ""}, "nats per token"),
    ("Gradient norm", {"policy/grad_norm": ""}, "before clipping"),
    ("Seconds per step", {"time/step_s": ""}, "sampling, scoring and learning"),
)


def curve_charts(series: Series, summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Draw every metric that has points over the steps; a chart is title, note, source and alt."""
    charts = []
    before = summary.get("before") or {}
    if "judge/fid" in series:
        best = before.get("judge_fid_best_cfg")
        level = (best, f"base's best guidance, {best:.1f}") if best else None
        charts.append(
            _chart("Judge FID, no guidance", {"": series["judge/fid"]}, "lower is better", level)
        )
    for key in sorted(key for key in series if key.startswith("reward/") and key.count("/") == 1):
        title = REWARD_TITLES.get(key, f"Reward: {key.removeprefix('reward/')}")
        charts.append(_chart(title, {"": series[key]}, "mean over the step's images"))
    for title, keys, note in CURVES:
        lines = {name: series[key] for key, name in keys.items() if key in series}
        if lines:
            charts.append(_chart(title, lines, note))
    return charts


def _chart(
    title: str,
    lines: Series,
    note: str,
    level: tuple[float, str] | None = None,
) -> dict[str, str]:
    axes = _axes()
    for (name, points), color in zip(lines.items(), (ACCENT, SECOND), strict=False):
        steps, values = [p[0] for p in points], [p[1] for p in points]
        if len(points) > 30:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
            axes.plot(steps, _smoothed(values), color=color, linewidth=1.8, label=name)
        else:
            axes.plot(steps, values, color=color, linewidth=1.8, marker="o", ms=4, label=name)
    if level is not None:
        axes.axhline(level[0], color=SECOND, linewidth=1.4, linestyle=(0, (5, 3)), label=level[1])
        axes.set_ylim(bottom=0)
    if level is not None or len(lines) > 1:
        axes.legend(frameon=False, fontsize=FONT_SIZE, labelcolor=INK)
    axes.set_xlabel("step", color=MUTED, fontsize=FONT_SIZE)
    ends = "; ".join(
        f"{name + ' ' if name else ''}{points[0][1]:.3g} at step {points[0][0]}, "
        f"{points[-1][1]:.3g} at step {points[-1][0]}"
        for name, points in lines.items()
    )
    return {"title": title, "note": note, "source": _svg(axes), "alt": f"{title}: {ends}"}


def sweep_chart(summary: Mapping[str, Any]) -> dict[str, str] | None:
    """Draw the judge FID over the guidance scale; None if there was no sweep."""
    sweep = summary.get("sweep") or {}
    if not sweep.get("before") and not sweep.get("after"):
        return None
    axes = _axes()
    for side, name, color in (("before", "base", SECOND), ("after", "after GRPO", ACCENT)):
        points = sorted((float(scale), fid) for scale, fid in (sweep.get(side) or {}).items())
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        axes.plot(xs, ys, color=color, linewidth=1.8, marker="o", ms=4, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("guidance scale (1 is none)", color=MUTED, fontsize=FONT_SIZE)
    axes.legend(frameon=False, fontsize=FONT_SIZE, labelcolor=INK)
    return {
        "title": "Judge FID over the guidance scale",
        "note": "lower is better",
        "source": _svg(axes),
        "alt": "Judge FID over the guidance scale, base and after; the table has the numbers",
    }


def _smoothed(values: list[float]) -> list[float]:
    """Centred running mean, so that the line has no lag; values that aren't finite are left out."""
    radius = max(2, len(values) // 24)
    smoothed = []
    for i, value in enumerate(values):
        window = [v for v in values[max(0, i - radius) : i + radius + 1] if math.isfinite(v)]
        smoothed.append(sum(window) / len(window) if window else value)
    return smoothed


def _axes() -> "Axes":
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.3, 2.55), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=FONT_SIZE, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.locator_params(axis="both", nbins=6)
    return axes


def _svg(axes: "Axes") -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = axes.figure
    assert isinstance(figure, Figure), "_axes makes a plain figure"
    buffer = io.BytesIO()
    # Text stays text: the browser's own font, and a tenth of the size of outlines.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "rlgen"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", buffer.getvalue().decode())
    return f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}"
