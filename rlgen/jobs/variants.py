"""Runs of several variants over several seeds, each the main job in a process of its own.

Owns which folder belongs to which run, and what is finished and therefore not run again. The seed
also makes another base policy. Must not know what the variants mean.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlgen.config import RunConfig, load_config
from rlgen.config.load import config_sha256
from rlgen.errors import ConfigError, RlgenError
from rlgen.storage import write_bytes

REQUEST_NAME = "request.json"
SUMMARY_NAME = "summary.json"

Launch = Callable[[Sequence[str], Path | None], int]
"""(arguments of the main job, log file or None for the console) to its exit status."""


@dataclass(frozen=True)
class Variant:
    """A way of configuring the main job."""

    name: str
    settings: tuple[str, ...] = ()
    """`section.key=value` each."""
    config: str | None = None
    """YAML file; None for the embedded default."""


@dataclass(frozen=True)
class SeededRun:
    """One run of a variant."""

    variant: Variant
    seed: int
    output: Path
    """Folder of all runs."""
    settings: tuple[str, ...] = ()
    """Of all runs; they win over the variant's."""

    @property
    def folder(self) -> Path:
        """Folder of this run alone."""
        return self.output / f"{self.variant.name}-seed{self.seed}"

    @property
    def arguments(self) -> list[str]:
        """What the main job's command line gets, without the output folder."""
        config = [] if self.variant.config is None else ["--config", self.variant.config]
        return [*config, *self._all_settings]

    @property
    def _all_settings(self) -> list[str]:
        seeding = [f"seed={self.seed}", f"digits.policy_seed={self.seed}"]
        return [*seeding, *self.variant.settings, *self.settings]

    def resolved(self) -> RunConfig:
        """Return the configuration, with `embedded` unresolved.

        Raises:
            ConfigError: it can't be used.
        """
        return load_config(self.variant.config, self._all_settings)

    def is_finished(self) -> bool:
        """Whether the folder holds the result of this very configuration.

        Raises:
            ConfigError: it holds a result of another one.
        """
        if not (self.folder / SUMMARY_NAME).exists():
            return False
        request = self.folder / REQUEST_NAME
        asked = json.loads(request.read_text()) if request.exists() else {}
        if asked.get("config_sha256") != config_sha256(self.resolved()):
            raise ConfigError(
                f"{self.folder} holds a run with other settings ({asked.get('settings')}, not "
                f"{self._all_settings}); name another --output, or delete that folder."
            )
        return True

    def summary(self) -> dict[str, Any]:
        """What the finished run left."""
        return json.loads((self.folder / SUMMARY_NAME).read_text())

    def execute(self, launch: Launch, *, logs: bool) -> None:
        """Run the main job; what an interrupted attempt left in the folder goes.

        Raises:
            RlgenError: it failed; names the log.
        """
        if (self.folder / REQUEST_NAME).exists():
            shutil.rmtree(self.folder)
        request = {"config_sha256": config_sha256(self.resolved()), "settings": self._all_settings}
        write_bytes(str(self.folder / REQUEST_NAME), json.dumps(request, indent=1).encode())
        log = self.folder / "log.txt" if logs else None
        status = launch(["--output", str(self.folder), *self.arguments], log)
        if status:
            where = "above" if log is None else log
            raise RlgenError(f"the run in {self.folder} ended with status {status}; see {where}.")


def launch_process(arguments: Sequence[str], log: Path | None) -> int:
    """Start the main job with this Python and wait for it."""
    command = [sys.executable, "-m", "rlgen.jobs.grpo", *arguments]
    if log is None:
        return subprocess.run(command, check=False).returncode
    # Runs side by side must not take each other's cores; a step is too small to gain from threads.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with log.open("w") as stream:
        return subprocess.run(
            command, check=False, stdout=stream, stderr=subprocess.STDOUT, env=environment
        ).returncode


def execute_all(
    runs: Sequence[SeededRun],
    *,
    jobs: int = 1,
    launch: Launch = launch_process,
    logs: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Execute the runs that are not finished, a few at a time.

    Args:
        jobs: processes side by side.
        logs: whether each run writes to log.txt in its folder instead of the console.
        say: told of every run.
    Raises:
        ConfigError: a folder holds a run with other settings; nothing was started.
        RlgenError: a run failed, after those that were under way have ended.
    """
    due = [run for run in runs if not run.is_finished()]
    if done := len(runs) - len(due):
        say(f"{done} of {len(runs)} runs are finished already")

    is_over = threading.Event()

    def execute(number: int, run: SeededRun) -> None:
        if is_over.is_set():
            return
        say(f"run {number} of {len(due)}: {run.folder.name}")
        try:
            run.execute(launch, logs=logs)
        except BaseException:
            is_over.set()
            raise

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(execute, number, run) for number, run in enumerate(due, 1)]
        try:
            for future in futures:
                future.result()
        finally:
            is_over.set()  # an interrupted wait must not start the rest


def parse_seeds(text: str) -> list[int]:
    """Read a comma-separated list.

    Raises:
        ConfigError: it is none, or names a seed twice.
    """
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text} is no list like 0,1,2.") from None
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text} names a seed twice.")
    return seeds
