"""What a person sees in the terminal while a job runs, and at its end.

Owns wording and layout on the console. Must not compute anything that a result depends on.
"""

import re
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from rlgen.config.secrets import scrubbed

SHORT_NAMES = {"preference": "pref", "loo_fid": "loo-fid"}
STAGE_INTERVAL_S = 10.0


class RunProgress:
    """A progress bar of the run; plain lines where the output is no terminal.

    `stage` tells of start-up phases, `step` of finished steps, `say` prints a line that stays.
    """

    def __init__(
        self,
        steps: int,
        *,
        first_step: int = 0,
        plain_every: int = 10,
        console: Console | None = None,
    ) -> None:
        """Prepare; nothing is shown until the `with` block begins.

        Args:
            steps: steps of the whole run.
            first_step: steps that were done before this job (a resumed run).
            plain_every: steps between two lines where the output is no terminal.
        """
        self._console = console or Console(highlight=False)
        self._steps, self._first_step, self._plain_every = steps, first_step, plain_every
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._latest: dict[str, float] = {}
        self._began_s = self._steps_began_s = self._stage_told_s = time.monotonic()
        self._stage_head = ""
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[numbers]}", style="cyan", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._is_live,
        )
        self._stage_task: TaskID | None = None
        self._step_task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def stage(self, text: str, *, done: int | None = None, total: int | None = None) -> None:
        """Tell what is going on outside the steps; repeat it with `done` as it proceeds."""
        if not self._is_live:
            self._tell_stage(text, done, total)
            return
        count = "" if done is None else f"{done}/{total}"
        if self._stage_task is None or text != self._stage_head:
            self._remove_stage()
            self._stage_task = self._progress.add_task(text, total=total, count="", numbers="")
            self._stage_head = text
        self._progress.update(self._stage_task, completed=done or 0, total=total, count=count)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell that `step` steps of the run are done, and what the last one measured.

        Call it again for an evaluation after the step; numbers that `metrics` lacks stay.
        """
        self._latest |= metrics  # an evaluation has no rewards, a step no judge
        numbers = _short_numbers(self._latest)
        if self._step_task is None:
            self._remove_stage()
            self._steps_began_s = time.monotonic()
            self._step_task = self._progress.add_task(
                "GRPO", total=self._steps, completed=self._first_step, count="", numbers=""
            )
        if self._is_live:
            self._progress.update(
                self._step_task, completed=step, count=f"{step}/{self._steps}", numbers=numbers
            )
        elif (
            step % self._plain_every == 0
            or step in (self._first_step + 1, self._steps)
            or "judge/fid" in metrics
        ):
            self._print(f"step {step}/{self._steps}  {numbers}  {self._times(step)}")

    def show(self, table: Table) -> None:
        """Print a table that stays."""
        self._progress.console.print(table)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._progress.console.print(Text(scrubbed(text)), soft_wrap=True)

    def _tell_stage(self, text: str, done: int | None, total: int | None) -> None:
        # Counters inside the text aren't news: "tokenizer 300/600" follows "tokenizer 1/600".
        head = re.sub(r"\d+", "", text)
        now_s = time.monotonic()
        if head == self._stage_head and now_s - self._stage_told_s < STAGE_INTERVAL_S:
            return
        self._stage_head, self._stage_told_s = head, now_s
        count = "" if done is None else f" {done}/{total}"
        self._print(f"{text}{count}  [{_clock(now_s - self._began_s)}]")

    def _remove_stage(self) -> None:
        if self._stage_task is not None:
            self._progress.remove_task(self._stage_task)
            self._stage_task = None

    def _times(self, step: int) -> str:
        took_s = time.monotonic() - self._steps_began_s
        done = step - self._first_step
        elapsed = _clock(time.monotonic() - self._began_s)
        if done < 2:
            return f"[{elapsed}]"
        # The first step is not timed: the clock starts when it is told.
        return f"[{elapsed}, {_clock(took_s / (done - 1) * (self._steps - step))} left]"

    def _print(self, text: str) -> None:
        self._console.print(Text(scrubbed(text)), soft_wrap=True)


def _short_numbers(metrics: Mapping[str, float]) -> str:
    parts = [
        f"{SHORT_NAMES.get(name.removeprefix('reward/'), name.removeprefix('reward/'))} {value:.3g}"
        for name, value in metrics.items()
        if name.startswith("reward/") and name.count("/") == 1
    ]
    if "judge/fid" in metrics:
        parts.append(f"judge FID {metrics['judge/fid']:.3g}")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


# Row title, key in before/after, format, and whether larger is better (None: neither).
SUMMARY_ROWS: tuple[tuple[str, str, str, bool | None], ...] = (
    ("Judge FID, no guidance", "judge_fid", ".2f", False),
    ("Judge FID, best guidance", "judge_fid_best_cfg", ".2f", False),
    ("Precision", "precision", ".3f", True),
    ("Recall", "recall", ".3f", True),
    ("Accuracy (judge)", "accuracy", ".3f", True),
    ("CLIP", "clip", ".3f", True),
    ("Preference", "preference", ".3f", True),
    ("Images/s, no guidance", "images_per_s", ",.0f", None),
    ("Images/s, with guidance", "images_per_s_cfg", ",.0f", None),
)


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, bool | None]]:
    """Return (title, before, after, is better) of every number that the summary has.

    "is better" is None where the numbers are equal as shown, or no direction is better.
    """
    before, after = summary.get("before") or {}, summary.get("after") or {}
    rows: list[tuple[str, str, str, bool | None]] = []
    for title, key, form, larger_is_better in SUMMARY_ROWS:
        if before.get(key) is None and after.get(key) is None:
            continue
        texts = [_shown(side, key, form) for side in (before, after)]
        is_better: bool | None = None
        if larger_is_better is not None and texts[0] != texts[1] and "–" not in texts:
            is_better = (after[key] > before[key]) == larger_is_better
        rows.append((title, texts[0], texts[1], is_better))
    return rows


def _shown(side: Mapping[str, Any], key: str, form: str) -> str:
    value = side.get(key)
    if value is None:
        return "–"
    scale = side.get("best_cfg_scale") if key == "judge_fid_best_cfg" else None
    return f"{value:{form}}" + (f" (scale {scale:g})" if scale is not None else "")


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Lay out the numbers before and after."""
    table = Table(title="Before and after", title_justify="left")
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("after GRPO", justify="right")
    for title, before, after, is_better in summary_rows(summary):
        style = {True: "green", False: "yellow", None: ""}[is_better]
        table.add_row(title, before, Text(after, style=style))
    return table


def fail(error: Exception) -> None:
    """Print an error that a user can act on as one paragraph on stderr, without a traceback."""
    paragraph = scrubbed(" ".join(str(error).split()))
    Console(stderr=True, highlight=False).print(
        Text.assemble(("error: ", "bold red"), paragraph), soft_wrap=True
    )
