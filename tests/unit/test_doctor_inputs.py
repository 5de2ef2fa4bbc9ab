"""The doctor before inputs, storage and servers that are missing, wrong, silent or refuse."""

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import fsspec
import pytest

from rlgen.config import RunConfig, load_config
from rlgen.jobs.doctor_check import Finding
from rlgen.jobs.doctor_cluster import check_job_server
from rlgen.jobs.doctor_inputs import find_config, find_mlflow, find_storage, find_weights


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def config_of(*settings: str) -> RunConfig:
    return load_config(None, settings)


def test_paths_that_are_left_open_are_listed() -> None:
    jobs = Path(__file__).resolve().parents[2] / "jobs"
    (found,) = find_config(load_config(str(jobs / "llamagen-b-256.yaml")))
    assert found.verdict == "failure" and "policy.checkpoint" in found.remedy
    (found,) = find_config(config_of("rollout.top_k=5", "rollout.dtype=bfloat16"))
    assert found.verdict == "failure" and "rollout.top_k = 5" in found.found


def test_storage_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    (found,) = find_storage(config_of(f"checkpoint.uri={tmp_path}/new"), timeout_s=10)
    assert found.verdict == "ok" and list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    (found,) = find_storage(config_of(f"checkpoint.uri={tmp_path}/file/run"), timeout_s=10)
    assert found.verdict == "failure" and "can't be written" in found.found and found.remedy


def test_weights_are_there_and_have_their_digest(tmp_path: Path) -> None:
    file = tmp_path / "policy.safetensors"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()

    def verdicts(*settings: str) -> dict[str, Finding]:
        config = config_of(*settings)
        return {f.name: f for f in find_weights(config, timeout_s=10)}

    key = "weights policy.checkpoint"
    missing = verdicts(f"policy.checkpoint={tmp_path}/other")[key]
    assert missing.verdict == "failure" and "does not exist" in missing.found
    right = verdicts(f"policy.checkpoint={file}", f"policy.sha256={digest}")
    assert right[key].verdict == "ok" and "7 bytes, sha256 as given" in right[key].found
    # The digest is right, and yet no weights are in it: what a run opens is opened here too.
    assert right["weights opened"].verdict == "failure"
    wrong = verdicts(f"policy.checkpoint={file}", f"policy.sha256={'f' * 64}")[key]
    assert wrong.verdict == "failure" and digest in wrong.found


def test_remote_weights_are_read_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLGEN_CACHE", str(tmp_path))
    with fsspec.open("memory://doctor/weights", "wb") as stream:
        stream.write(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()

    def finding(sha256: str, timeout_s: float = 10.0) -> Finding:
        settings = ["policy.checkpoint=memory://doctor/weights", f"policy.sha256={sha256}"]
        return find_weights(config_of(*settings), timeout_s=timeout_s)[0]

    assert finding(digest).verdict == "ok"
    assert finding("f" * 64).verdict == "failure" and digest in finding("f" * 64).found
    assert finding(digest, timeout_s=0.0).verdict == "warning", "no time to read it"
    assert list(tmp_path.iterdir()) == []


@contextmanager
def server(answers: dict[str, tuple[int, str]]) -> Iterator[str]:
    """A server that gives each path, up to the query, a status and a text; others get a 404."""
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = answers.get(self.path.partition("?")[0], (404, ""))
            if "token" in answers and self.headers["Authorization"] != answers["token"][1]:
                status = 401
            if status == 0:
                released.wait(20.0)
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    running = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"127.0.0.1:{running.server_port}"
    finally:
        released.set()
        running.shutdown()
        running.server_close()


EXPERIMENT = "/api/2.0/mlflow/experiments/get-by-name"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"


def mlflow_findings(uri: str, timeout_s: float = 5.0) -> dict[str, Finding]:
    return {f.name: f for f in find_mlflow(config_of(f"tracking.uri={uri}"), timeout_s=timeout_s)}


@pytest.mark.parametrize(
    ("experiment", "artifacts", "verdicts"),
    [
        ((200, "{}"), (200, "{}"), {"mlflow": "ok", "mlflow artifacts": "ok"}),
        ((404, "RESOURCE_DOES_NOT_EXIST"), (503, ""), {"mlflow": "ok"}),
        ((200, "{}"), (500, ""), {"mlflow": "ok", "mlflow artifacts": "failure"}),
        ((401, ""), (200, ""), {"mlflow": "failure"}),
        ((403, ""), (200, ""), {"mlflow": "failure"}),
        ((404, "no such page"), (200, ""), {"mlflow": "failure"}),
    ],
)
def test_an_mlflow_server_is_judged_by_what_it_answers(
    experiment: tuple[int, str], artifacts: tuple[int, str], verdicts: dict[str, str]
) -> None:
    with server({EXPERIMENT: experiment, ARTIFACTS: artifacts}) as address:
        found = mlflow_findings(f"http://{address}")
    assert {name: f.verdict for name, f in found.items()} == verdicts
    assert all(f.remedy for f in found.values() if f.verdict == "failure")
    is_refused = experiment[0] in (401, 403)
    assert ("MLFLOW_TRACKING_TOKEN" in found["mlflow"].remedy) == is_refused


def test_credentials_are_sent_and_not_shown() -> None:
    allowed = "Basic dXNlcjpzM2NyZXQ="  # user:s3cret
    answers = {EXPERIMENT: (200, "{}"), ARTIFACTS: (200, "{}"), "token": (200, allowed)}
    with server(answers) as address:
        assert mlflow_findings(f"http://user:s3cret@{address}")["mlflow"].verdict == "ok"
        found = mlflow_findings(f"http://user:s3crets@{address}")["mlflow"]
    assert found.verdict == "failure" and "s3cret" not in found.found


def test_an_mlflow_that_is_away_or_silent_costs_seconds() -> None:
    found = mlflow_findings(f"http://127.0.0.1:{closed_port()}")["mlflow"]
    assert found.verdict == "failure" and "doesn't answer" in found.found
    start = time.monotonic()
    with server({EXPERIMENT: (0, "")}) as address:
        assert mlflow_findings(f"http://{address}", timeout_s=0.3)["mlflow"].verdict == "failure"
        assert time.monotonic() - start < 2.0


def test_a_tracking_file_must_be_a_database(tmp_path: Path) -> None:
    assert mlflow_findings(f"sqlite:///{tmp_path}/new.db")["mlflow"].verdict == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mlflow.db").write_text("no database, but long enough to look like one" * 50)
    found = mlflow_findings(f"sqlite:///{tmp_path}/mlflow.db")["mlflow"]
    assert found.verdict == "failure" and "no database" in found.found
    assert mlflow_findings("file:runs")["mlflow"].verdict == "failure"
    assert mlflow_findings("none")["mlflow"].verdict == "ok"


def test_a_job_server_may_want_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with server({"/api/version": (200, "{}"), "token": (200, "Bearer right")}) as address:
        monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
        found = check_job_server(f"http://{address}", timeout_s=5)
        assert found.verdict == "warning" and "ray job submit" in found.remedy
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        found = check_job_server(f"http://{address}", timeout_s=5)
        assert found.verdict == "failure" and "refuses the token of RAY_AUTH_TOKEN" in found.found
