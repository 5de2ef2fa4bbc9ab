"""Experiment tracking in MLflow, off the hot path.

Owns the tracker and the only import of MLflow in rlgen. Must not know what is trained. A call
writes one line to the spool and returns; the spool's thread does everything that talks to MLflow,
so a slow, refusing or absent server costs a step nothing. `python -m rlgen.tracking RUN_DIR URI`
sends later what a run could not send.
"""

import argparse
import logging
import os
import re
import shlex
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlgen.errors import ConfigError, RlgenError
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
FILE_ATTEMPTS = 3
METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
# Retries are the spool's business, and telemetry would call a foreign host.
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


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


def ui_command(uri: str) -> str:
    """Return the shell command that opens the user interface; empty for `none`."""
    if uri == NO_TRACKING:
        return ""
    if uri.startswith("sqlite:"):
        return f"mlflow ui --backend-store-uri {shlex.quote(_absolute(uri))} --port 5000"
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
    ) -> None:
        """Start the thread and return at once.

        Args:
            uri: sqlite:///FILE, http(s)://HOST or `none`.
            spool_dir: the run folder; records that an earlier attempt left unsent go first.
            run_id: the MLflow run to go on with; by default the one that the spool names.
        Raises:
            ConfigError: the URI can't work.
        """
        check_tracking_uri(uri)
        self._uri = _absolute(uri) if uri.startswith("sqlite:") else uri
        self._names = (experiment, run_name)
        self._run_id = run_id
        self._run: _MlflowRun | None = None
        self._run_id_known = threading.Event()
        self._is_on = uri != NO_TRACKING
        if not self._is_on:
            return
        self._spool = Spool(spool_dir, self._uri, self._send)
        if run_id is None:
            self._run_id = self._spool.run_id
        for name, value in MLFLOW_SETTINGS.items():
            os.environ.setdefault(name, value)
        self._spool.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until MLflow has answered."""
        return self._run_id

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

    def close(self, status: Status = "FINISHED", *, timeout_s: float = 30.0) -> None:
        """Send what is left and end the run; give up with one warning after `timeout_s`."""
        if self._is_on and not self._spool.is_closed:
            self._spool.put("end", status=status)
            self._spool.close(timeout_s)

    def _put(self, kind: str, **fields: Any) -> None:
        if self._is_on:
            self._spool.put(kind, **fields)

    def _send(self, batch: list[Record]) -> None:
        """Send a batch, from the spool's thread; the first call opens the run."""
        run = self._run = self._run or self._open_run()
        if not batch:
            return
        run.log_values([record for record in batch if "values" in record])
        run.ping()
        for record in batch:
            if "path" in record:
                if self._spool.is_abandoned:
                    raise TimeoutError("closed with files unsent")  # the batch stays unsent
                run.log_file(record)
        ends = [record["status"] for record in batch if record["kind"] == "end"]
        if ends:
            run.end(ends[-1])

    def _open_run(self) -> "_MlflowRun":
        run = _MlflowRun(self._uri, *self._names, run_id=self._run_id)
        self._run_id = run.run_id
        self._run_id_known.set()
        self._spool.put_run(run.run_id)
        return run


class _MlflowRun:
    """One MLflow run as the tracking thread sees it: every call blocks, and may be repeated."""

    def __init__(self, uri: str, experiment: str, run_name: str, *, run_id: str | None) -> None:
        # The import takes seconds; only this thread pays.
        from mlflow import MlflowClient

        # urllib3 prints every retry; the tracker tells the user once.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        artifacts: str | None = None
        if uri.startswith("sqlite:"):
            folder = Path(uri.removeprefix("sqlite:///")).parent
            folder.mkdir(parents=True, exist_ok=True)
            artifacts = str(folder / "mlartifacts")
        self._client = MlflowClient(tracking_uri=uri)
        run = None if run_id is None else self._reopened(run_id)
        self._is_resumed = run is not None
        if run is None:
            found = self._client.get_experiment_by_name(experiment)
            experiment_id = (
                found.experiment_id
                if found is not None
                else self._client.create_experiment(experiment, artifact_location=artifacts)
            )
            tags = None if run_id is None else {"rlgen.resumed_from": run_id}
            run = self._client.create_run(experiment_id, run_name=run_name, tags=tags)
        self.run_id: str = run.info.run_id
        self.refusals: list[str] = []
        self._params: dict[str, str] = dict(run.data.params)
        self._last_steps: dict[str, int] = {}
        self._image_steps = self._logged_image_steps() if self._is_resumed else set()
        self._failures: dict[str, int] = {}

    def _reopened(self, run_id: str) -> Any:
        """Return the run, or None if this store has no such run: it was tracked elsewhere."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(run_id, status="RUNNING")
            return self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def log_values(self, records: list[Record]) -> None:
        """Send params, tags and metrics in as few calls as MLflow's limits allow."""
        from mlflow.entities import Metric, Param, RunTag

        tags: dict[str, str] = {}
        params: dict[str, str] = {}
        metrics: list[Any] = []
        for record in records:
            if record["kind"] == "tags":
                tags |= record["values"]
            elif record["kind"] == "params":
                params |= record["values"]
            else:
                metrics += [
                    Metric(name, value, record["time_ms"], record["step"])
                    for name, value in record["values"].items()
                    if record["step"] > self._last_step(name)
                ]
        # A param can't change in MLflow; what a resumed run changed becomes a tag.
        for name, value in params.items():
            if self._params.get(name, value) != value:
                tags[f"resumed.{name}"] = value
        new_params = [Param(k, v) for k, v in params.items() if k not in self._params]
        for i in range(0, len(new_params), PARAMS_PER_CALL):
            chunk = new_params[i : i + PARAMS_PER_CALL]
            self._log_batch(params=chunk)
            self._params |= {param.key: param.value for param in chunk}
        if tags:
            self._log_batch(tags=[RunTag(name, value) for name, value in tags.items()])
        for i in range(0, len(metrics), METRICS_PER_CALL):
            points = metrics[i : i + METRICS_PER_CALL]
            self._log_batch(metrics=points)
            for point in points:
                self._last_steps[point.key] = max(self._last_steps[point.key], point.step)

    def ping(self) -> None:
        """Raise if MLflow is away, so that no file is blamed for it."""
        self._client.get_run(self.run_id)

    def log_file(self, record: Record) -> None:
        """Send an image or a file; after a few failures count it as refused and go on."""
        path = Path(record["path"])
        if record.get("is_done"):
            return
        try:
            if record["kind"] == "image":
                self._log_image(path, record)
            elif path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), artifact_path=path.name)
            else:
                self._client.log_artifact(self.run_id, str(path))
        except Exception as error:
            # Artifact stores raise their own types; a file that never goes must not block others.
            self._failures[str(path)] = self._failures.get(str(path), 0) + 1
            if path.exists() and self._failures[str(path)] < FILE_ATTEMPTS:
                raise
            self.refusals.append(f"{path} ({type(error).__name__}: {error})")
        record["is_done"] = True

    def end(self, status: Status) -> None:
        """Mark the run as over."""
        self._client.set_terminated(self.run_id, status=status)

    def _log_batch(self, **batch: list[Any]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self.run_id, synchronous=True, **batch)
        except MlflowException as error:
            # 400 means never: sending it again would block all that follows.
            if error.get_http_status_code() != 400:
                raise
            self.refusals.append(str(error).splitlines()[0])

    def _last_step(self, name: str) -> int:
        if name not in self._last_steps:
            history = self._client.get_metric_history(self.run_id, name) if self._is_resumed else []
            self._last_steps[name] = max((point.step for point in history), default=-1)
        return self._last_steps[name]

    def _log_image(self, path: Path, record: Record) -> None:
        from PIL import Image

        if record["step"] in self._image_steps:
            return
        with Image.open(path) as image:
            self._client.log_image(
                self.run_id,
                image.convert("RGB"),
                key="samples",
                step=record["step"],
                timestamp=record["time_ms"],
                synchronous=True,
            )
        self._image_steps.add(record["step"])

    def _logged_image_steps(self) -> set[int]:
        files = self._client.list_artifacts(self.run_id, "images")
        found = (re.search(r"samples\+step\+(\d+)\+", file.path) for file in files)
        return {int(match[1]) for match in found if match}


def _absolute(uri: str) -> str:
    return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"


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
