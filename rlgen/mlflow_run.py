"""One run in MLflow: what of it has arrived, and how more gets there.

Owns what MLflow allows: sizes of batches, params that can't change, points of a metric that would
count twice, files that it never takes. When anything is sent is the spool's business.
"""

import logging
import os
import re
from pathlib import Path
from typing import Any

from rlgen.errors import CheckpointError, ConfigError, StorageError
from rlgen.mlflow_registry import Candidate, promote
from rlgen.spool import Record, Status, without_password

FILE_ATTEMPTS = 3
METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
# Retries are the spool's business, and telemetry would call a foreign host.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_NEVER = (400, 404, 405, 501)
"""What MLflow answers to a call that can't succeed later, such as one that it does not know."""


def prepare_mlflow() -> None:
    """Set what MLflow reads from the environment, unless the user has."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def promote_now(uri: str, run_id: str, candidate: Candidate) -> str:
    """Register a policy while the caller waits; as `promote`.

    Raises:
        ConfigError, CheckpointError: as there.
        StorageError: MLflow does not answer, has no registry, or refuses; says why.
    """
    prepare_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        return promote(MlflowClient(tracking_uri=uri), run_id, candidate)
    except MlflowException as error:
        raise StorageError(
            f"{candidate.model} can't be registered at {without_password(uri)} "
            f"({_reason(error, uri)}); see that the server is up, has a model registry, and knows "
            "the run (`python -m rlgen.tracking RUN_DIR URI` sends a run to a server)."
        ) from error


def _reason(error: Exception, uri: str) -> str:
    first_line = (str(error).splitlines() or [""])[0].replace(uri, without_password(uri))
    return f"{type(error).__name__}: {first_line[:400]}"


class MlflowRun:
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
        self._uri, self._client = uri, MlflowClient(tracking_uri=uri)
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
        samples: dict[str, int] = {}
        for record in records:
            if record["kind"] == "tags":
                tags |= record["values"]
            elif record["kind"] == "params":
                params |= record["values"]
            elif record["kind"] == "system":
                # Samples have no step, and those of an earlier attempt must stay before them.
                for name, value in record["values"].items():
                    samples[name] = samples.get(name, self._last_step(name)) + 1
                    metrics.append(Metric(name, value, record["time_ms"], samples[name]))
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

    def register(self, candidate: Candidate) -> str:
        """Register a policy; returns a line for the user, also if it can't be registered."""
        from mlflow.exceptions import MlflowException

        try:
            return promote(self._client, self.run_id, candidate)
        except (CheckpointError, ConfigError) as error:
            return f"The policy was not registered: {error}"
        except Exception as error:
            # Artifact stores raise their own types; what never works must not block the rest.
            self._failures[candidate.policy] = self._failures.get(candidate.policy, 0) + 1
            is_final = isinstance(error, MlflowException) and error.get_http_status_code() in _NEVER
            if not is_final and self._failures[candidate.policy] < FILE_ATTEMPTS:
                raise
            return (
                f"{candidate.model} can't be registered ({_reason(error, self._uri)}); see that "
                "MLflow has a model registry and takes files, then use rlgen.jobs.promote."
            )

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
