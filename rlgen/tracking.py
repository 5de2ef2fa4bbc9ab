"""Experiment tracking in MLflow, off the hot path.

Owns the tracker: which records a run makes, and where they may go. Must not know what is trained. A
call writes one line to the spool and returns; the spool's thread does everything that talks to
MLflow (mlflow_run.py), so a slow, refusing or absent server costs a step nothing.
`python -m rlgen.tracking RUN_DIR URI` sends later what a run could not send.
"""

import argparse
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlgen.errors import ConfigError, RlgenError
from rlgen.mlflow_registry import Candidate
from rlgen.mlflow_run import MlflowRun, prepare_mlflow
from rlgen.mlflow_system import SystemSampler
from rlgen.spool import (
    SPOOL_NAME,
    Record,
    Spool,
    Status,
    flatten_params,
    last_status,
    read_spool,
    redacted,
    without_password,
)

NO_TRACKING = "none"
SLOW_CALL_S = 1.5
"""A call that asks for one run and takes so long is told to the user."""


def check_tracking_uri(uri: str) -> None:
    """Refuse a tracking URI that MLflow would refuse later, before anything starts.

    Raises:
        ConfigError: it is neither `none`, sqlite:///FILE nor http(s)://HOST; says what to use.
    """
    if uri == NO_TRACKING or re.match(r"https?://[^/]", uri):
        return
    shown = without_password(uri)
    if uri.startswith("sqlite:///") and uri[10:] not in ("", "/", ":memory:"):
        if Path(uri[10:]).is_dir():
            raise ConfigError(f"tracking.uri = {shown} is a folder; name a file in it.")
        return
    if "://" not in uri or uri.startswith("file:"):
        folder = re.sub(r"^file:(//)?", "", uri).rstrip("/") or "runs"
        raise ConfigError(
            f"tracking.uri = {shown} is a file store, which MLflow 3 refuses; use "
            f"sqlite:///{folder}/mlflow.db, a server's http:// URL, or none."
        )
    raise ConfigError(
        f"tracking.uri = {shown} isn't supported; use sqlite:///PATH/mlflow.db, "
        "a server's http://HOST:PORT, or none."
    )


def absolute_uri(uri: str) -> str:
    """Return the URI as it is known whatever the working directory."""
    if not uri.startswith("sqlite:"):
        return uri
    return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"


def ui_command(uri: str) -> str:
    """Return the shell command that opens the user interface; empty for `none`."""
    if uri == NO_TRACKING:
        return ""
    if uri.startswith("sqlite:"):
        return f"mlflow ui --backend-store-uri {shlex.quote(absolute_uri(uri))} --port 5000"
    return f"python -m webbrowser {shlex.quote(without_password(uri))}"


def tracked_run(run_dir: Path) -> tuple[str, str] | None:
    """Return (tracking URI without credentials, run id) of a run folder, if it has been tracked."""
    runs = [(r["uri"], r["run_id"]) for r in read_spool(run_dir) if r["kind"] == "run"]
    return runs[-1] if runs else None


class Tracker:
    """Sends params, metrics, images and files of one run to MLflow.

    No method raises for, or waits on, MLflow. Points of a metric count once per step: on resuming
    a run, what an earlier attempt logged is not logged again. With the URI `none` every method
    does nothing.
    """

    def __init__(
        self,
        uri: str,
        *,
        experiment: str,
        run_name: str,
        spool_dir: Path,
        run_id: str | None = None,
        system_metrics_s: float = 0.0,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Start the thread and return at once.

        Args:
            uri: sqlite:///FILE, http(s)://HOST or `none`.
            spool_dir: the run folder; records that an earlier attempt left unsent go first.
            run_id: the MLflow run to go on with; by default the one that the spool names.
            system_metrics_s: seconds between samples of this machine's use; 0 takes none.
            tell: called on the thread with a line for the user: of an outage when it begins, of a
                slow server once, of a policy that was registered.
        Raises:
            ConfigError: the URI can't work.
        """
        check_tracking_uri(uri)
        self._uri = absolute_uri(uri)
        self._names = (experiment, run_name)
        self._run_id = run_id
        self._run: MlflowRun | None = None
        self._run_id_known = threading.Event()
        self._is_on = uri != NO_TRACKING
        if not self._is_on:
            return
        self._tell = tell
        self._is_slow = False
        self._system_metrics_s = system_metrics_s
        self._sampler: SystemSampler | None = None
        self._spool = Spool(spool_dir, self._uri, self._send, tell=self._say)
        if run_id is None:
            self._run_id = self._spool.run_id
        prepare_mlflow()
        self._spool.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until MLflow has answered."""
        return self._run_id

    @property
    def num_unsent(self) -> int:
        """Records that MLflow has not taken yet."""
        return self._spool.num_waiting if self._is_on else 0

    @property
    def warnings(self) -> list[str]:
        """What the user should be told, one line per problem."""
        if not self._is_on:
            return []
        refusals = [] if self._run is None else self._run.refusals
        refused = [
            f"MLflow at {self._spool.shown_uri} refused {len(refusals)} times; the first: {first}. "
            f"What it refused stays in {self._spool.path}."
            for first in refusals[:1]
        ]
        return self._spool.warnings + refused

    def wait_for_run_id(self, timeout_s: float) -> str | None:
        """Wait until MLflow has opened the run, or the time is over."""
        if self._is_on:
            self._run_id_known.wait(timeout_s)
        return self._run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings, nested or flat; secrets are replaced."""
        self._put("params", values=flatten_params(params))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; a later value replaces an earlier one."""
        self._put("tags", values={name: str(redacted(name, v)) for name, v in tags.items()})

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the numbers of one step."""
        self._put("metrics", step=step, values={k: float(v) for k, v in metrics.items()})

    def log_image(self, step: int, path: Path) -> None:
        """Log an image file under `samples`, which MLflow leafs through by step."""
        self._put("image", step=step, path=str(path.absolute()))

    def log_artifact(self, path: Path) -> None:
        """Log a file, or a folder with all that is in it."""
        self._put("artifact", path=str(path.absolute()))

    def register(self, candidate: Candidate) -> None:
        """Register a policy, and make it champion if it is the best of its judge."""
        self._put("register", candidate=asdict(candidate))

    def close(self, status: Status = "FINISHED", *, timeout_s: float = 30.0) -> None:
        """Send what is left and end the run; give up with one warning after `timeout_s`.

        In an outage it gives up within seconds.
        """
        if self._is_on and not self._spool.is_closed:
            if self._sampler is not None:
                self._sampler.stop()
            self._spool.put("end", status=status)
            self._spool.close(timeout_s)

    def _put(self, kind: str, **fields: Any) -> None:
        if self._is_on:
            self._spool.put(kind, **fields)

    def _send(self, batch: list[Record]) -> None:
        """Send a batch, from the spool's thread; the first call opens the run."""
        if self._system_metrics_s and self._sampler is None and not self._spool.is_closed:
            self._start_sampler()
        run = self._run = self._run or self._open_run()
        if not batch:
            return
        if self._spool.is_away:
            self._ping(run)
        run.log_values([record for record in batch if "values" in record])
        self._ping(run)
        files = [record for record in batch if "path" in record]
        # A file that changes, such as the list of checkpoints, goes once.
        newest = {(r["kind"], r["path"], r.get("step")): r for r in files}
        for record in newest.values():
            if self._spool.is_abandoned:
                raise TimeoutError("closed with files unsent")  # the batch stays unsent
            run.log_file(record)
        for record in batch:
            if record["kind"] == "register" and not record.get("is_done"):
                self._say(run.register(Candidate(**record["candidate"])))
                record["is_done"] = True
        ends = [record["status"] for record in batch if record["kind"] == "end"]
        if ends:
            run.end(ends[-1])

    def _ping(self, run: MlflowRun) -> None:
        """Raise if MLflow is away, so that no file is blamed for it; tell if it is slow."""
        began = time.monotonic()
        run.ping()
        self._spool.answered()
        took_s = time.monotonic() - began
        if took_s > SLOW_CALL_S and not self._is_slow:
            self._is_slow = True
            self._say(
                f"MLflow at {self._spool.shown_uri} is slow ({took_s:.1f} s for one call); the run "
                "goes on at its own pace, and records follow."
            )

    def _start_sampler(self) -> None:
        try:
            self._sampler = SystemSampler(self._system_metrics_s, self._log_system)
        except Exception as error:
            # What drivers and containers do to these calls must not hold up the records.
            self._system_metrics_s = 0.0
            self._say(f"no system metrics: they can't be sampled here ({error!r})")

    def _say(self, line: str) -> None:
        with suppress(OSError):  # a closed terminal must not end the thread
            self._tell(line)

    def _log_system(self, values: dict[str, float]) -> None:
        if not self._spool.is_closed:
            self._spool.put("system", values=values)

    def _open_run(self) -> MlflowRun:
        run = MlflowRun(self._uri, *self._names, run_id=self._run_id)
        self._run_id = run.run_id
        self._run_id_known.set()
        self._spool.put_run(run.run_id)
        return run


def main(arguments: list[str] | None = None) -> int:
    """Send what a run folder's spool still holds; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rlgen.tracking",
        description="Send to MLflow what a run could not send.",
    )
    parser.add_argument("run_dir", type=Path, help="the run folder")
    parser.add_argument("uri", help="tracking URI: sqlite:///FILE or http(s)://HOST:PORT")
    parser.add_argument("--experiment", default="rlgen", help="used if the run is not there yet")
    options = parser.parse_args(arguments)
    try:
        if not (options.run_dir / SPOOL_NAME).exists():
            raise ConfigError(f"{options.run_dir} has no {SPOOL_NAME}; name a run folder.")
        tracker = Tracker(
            options.uri,
            experiment=options.experiment,
            run_name=options.run_dir.name,
            spool_dir=options.run_dir,
            tell=print,
        )
        tracker.close(last_status(options.run_dir), timeout_s=600.0)
    except RlgenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for warning in tracker.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if tracker.warnings:
        return 1
    print(f"run {tracker.run_id} at {without_password(options.uri)} is complete.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
