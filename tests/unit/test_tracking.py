"""Tracking against a real sqlite store, and against servers that are away or refuse."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlgen.errors import ConfigError
from rlgen.tracking import (
    SPOOL_NAME,
    Tracker,
    check_tracking_uri,
    flatten_params,
    main,
    tracked_run,
    ui_command,
)


def start(uri: str, run_dir: Path, run_id: str | None = None) -> Tracker:
    return Tracker(uri, experiment="digits", run_name="first", spool_dir=run_dir, run_id=run_id)


def spooled(run_dir: Path, kind: str) -> list[dict]:
    lines = (run_dir / SPOOL_NAME).read_text().splitlines()
    return [r for r in (json.loads(line) for line in lines if line) if r["kind"] == kind]


def grid(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 60, 3), shade, dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def sqlite_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """Two attempts at one run; the second goes back to step 40, as a resumed job does."""
    root = tmp_path_factory.mktemp("runs")
    uri, run_dir = f"sqlite:///{root}/mlflow.db", root / "first"
    tracker = start(uri, run_dir)
    tracker.log_params({"seed": 3, "rollout": {"top_p": 1.0}, "steps": 100})
    for step in range(60):
        tracker.log_metrics(step, {"reward/clip": step / 100, "loss/kl": np.float32(0.5)})
    tracker.log_image(0, grid(run_dir / "grids/step_00000.png", 10))
    tracker.log_image(40, grid(run_dir / "grids/step_00040.png", 200))
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints/weights.bin").write_bytes(b"abc")
    tracker.log_artifact(run_dir / "checkpoints")
    tracker.close("FAILED", timeout_s=120)
    assert tracker.warnings == []
    run_id = tracker.run_id
    assert run_id is not None

    resumed = start(uri, run_dir, run_id)
    resumed.log_params({"seed": 3, "rollout": {"top_p": 1.0}, "steps": 120})
    resumed.set_tags({"restart": "1", "source": "https://user:pw@host/model"})
    for step in range(40, 120):
        resumed.log_metrics(step, {"reward/clip": step / 100, "judge/fid": float("nan")})
    resumed.log_image(40, grid(run_dir / "grids/step_00040.png", 200))
    (run_dir / "report.html").write_text("<p>done</p>")
    resumed.log_artifact(run_dir / "report.html")
    assert resumed.wait_for_run_id(60) == run_id
    resumed.close(timeout_s=120)
    assert resumed.warnings == []
    return uri, run_dir, run_id


def test_sqlite_holds_what_was_logged(sqlite_run: tuple[str, Path, str]) -> None:
    from mlflow import MlflowClient

    uri, _, run_id = sqlite_run
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert client.get_experiment(run.info.experiment_id).name == "digits"
    assert run.data.params == {"seed": "3", "rollout.top_p": "1.0", "steps": "100"}
    assert np.isnan(run.data.metrics["judge/fid"])
    assert run.data.metrics["loss/kl"] == 0.5
    assert {file.path for file in client.list_artifacts(run_id)} == {
        "images",
        "checkpoints",
        "report.html",
    }
    assert [f.path for f in client.list_artifacts(run_id, "checkpoints")] == [
        "checkpoints/weights.bin"
    ]


def test_resume_goes_on_with_the_run_and_repeats_nothing(
    sqlite_run: tuple[str, Path, str],
) -> None:
    from mlflow import MlflowClient

    uri, run_dir, run_id = sqlite_run
    client = MlflowClient(tracking_uri=uri)
    points = client.get_metric_history(run_id, "reward/clip")
    assert [(p.step, p.value) for p in points] == [(s, s / 100) for s in range(120)]
    tags = client.get_run(run_id).data.tags
    assert tags["restart"] == "1"
    assert tags["resumed.steps"] == "120"
    assert tags["source"] == "https://host/model"
    pictures = [f.path for f in client.list_artifacts(run_id, "images") if f.path.endswith("png")]
    assert sorted(p.split("+")[2] for p in pictures) == ["0", "40"]
    assert tracked_run(run_dir) == (uri, run_id)


def test_artifacts_lie_beside_the_database(sqlite_run: tuple[str, Path, str]) -> None:
    _, run_dir, run_id = sqlite_run
    root = run_dir.parent
    assert (root / f"mlartifacts/{run_id}/artifacts/report.html").is_file()
    assert {path.name for path in root.iterdir()} == {"mlflow.db", "mlartifacts", "first"}


def test_start_is_instant_and_nothing_is_printed_or_left_in_the_folder(tmp_path: Path) -> None:
    code = """
import time
from pathlib import Path
from rlgen.tracking import Tracker
start = time.perf_counter()
names = {"experiment": "e", "run_name": "n"}
tracker = Tracker("sqlite:///runs/mlflow.db", **names, spool_dir=Path("runs/a"))
took = time.perf_counter() - start
assert took < 0.5, took
tracker.log_metrics(0, {"a": 1.0})
tracker.close(timeout_s=120)
assert tracker.warnings == [], tracker.warnings
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == ["runs"]


def test_a_refusing_port_costs_nothing_and_gives_one_warning(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        uri = f"http://user:hush@127.0.0.1:{holder.getsockname()[1]}"
        tracker = start(uri, tmp_path)
        began = time.perf_counter()
        for step in range(200):
            tracker.log_metrics(step, {"reward/clip": 0.1})
        # Measured 0.02 ms a call; the bound leaves room for a loaded machine.
        assert time.perf_counter() - began < 1.0
        time.sleep(3.0)
        began = time.perf_counter()
        tracker.close(timeout_s=3.0)
        assert time.perf_counter() - began < 4.0
    assert tracker.run_id is None
    (warning,) = tracker.warnings
    assert str(tmp_path / SPOOL_NAME) in warning
    assert "python -m rlgen.tracking" in warning
    assert "hush" not in warning
    assert len(spooled(tmp_path, "metrics")) == 200


def test_a_spool_can_be_sent_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    run_dir, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    tracker = start("http://127.0.0.1:9", run_dir)
    tracker.log_params({"lr": 0.1})
    tracker.log_metrics(7, {"judge/fid": 4.5})
    tracker.close(timeout_s=0.1)
    with (run_dir / SPOOL_NAME).open("a") as stream:
        stream.write('{"kind": "metr')  # what a killed process leaves

    assert main([str(run_dir), uri]) == 0
    _, run_id = tracked_run(run_dir) or ("", "")
    run = MlflowClient(tracking_uri=uri).get_run(run_id)
    assert (run.data.params, run.data.metrics) == ({"lr": "0.1"}, {"judge/fid": 4.5})
    assert run.info.status == "FINISHED"
    assert main([str(tmp_path / "nowhere"), uri]) == 2
    assert "name a run folder" in capsys.readouterr().err


class Broken(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(500)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def broken_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_with_errors_gives_one_warning_that_names_them(
    broken_server: str, tmp_path: Path
) -> None:
    tracker = start(broken_server, tmp_path)
    tracker.log_metrics(0, {"a": 1.0})
    time.sleep(4.0)
    tracker.close(timeout_s=4.0)
    (warning,) = tracker.warnings
    assert "500" in warning


def test_a_file_that_is_gone_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = start(uri, tmp_path / "run")
    tracker.log_artifact(tmp_path / "gone.html")
    tracker.log_metrics(1, {"a": 1.0})
    tracker.close(timeout_s=120)
    (warning,) = tracker.warnings
    assert "gone.html" in warning
    assert MlflowClient(tracking_uri=uri).get_run(tracker.run_id).data.metrics == {"a": 1.0}


def test_more_metrics_than_one_call_takes(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = start(uri, tmp_path / "run")
    for step in range(250):
        tracker.log_metrics(step, {f"m/{i}": float(step) for i in range(10)})
    tracker.log_params({f"p{i}": i for i in range(150)})
    tracker.close(timeout_s=120)
    client = MlflowClient(tracking_uri=uri)
    assert len(client.get_metric_history(tracker.run_id, "m/9")) == 250
    assert len(client.get_run(tracker.run_id).data.params) == 150


def test_none_does_nothing(tmp_path: Path) -> None:
    tracker = start("none", tmp_path / "run")
    tracker.log_metrics(0, {"a": 1.0})
    tracker.close()
    assert tracker.run_id is None
    assert tracker.wait_for_run_id(10.0) is None
    assert not (tmp_path / "run").exists()


def test_params_are_flat_and_hold_no_secret() -> None:
    flat = flatten_params(
        {
            "tracking": {"uri": "http://me:hush@server:5000/x", "experiment": "e"},
            "storage": {"aws_secret_access_key": "hush", "hf_token": "hush", "password": None},
            "scorers": [{"type": "clip", "weight": 0.25}],
            "cfg_scales": (1.25, 2.0),
            "signed": "https://bucket/file?signature=hush",
            "db": "sqlite:////data/mlflow.db",
            "tokenizer": {"checkpoint": "embedded"},
        }
    )
    assert "hush" not in json.dumps(flat)
    assert flat["tracking.uri"] == "http://server:5000/x"
    assert flat["storage.hf_token"] == "***"
    assert flat["scorers.0.weight"] == "0.25"
    assert flat["cfg_scales"] == "[1.25, 2.0]"
    assert flat["db"] == "sqlite:////data/mlflow.db"
    assert flat["tokenizer.checkpoint"] == "embedded"


@pytest.mark.parametrize(
    ("uri", "way_out"),
    [
        ("runs/mlruns", "sqlite:///runs/mlruns/mlflow.db"),
        ("file:///data/mlruns", "sqlite:////data/mlruns/mlflow.db"),
        ("./mlruns", "sqlite:///./mlruns/mlflow.db"),
        ("postgresql://me:hush@host/db", "sqlite:///"),
        ("sqlite://mlflow.db", "sqlite:///"),
        ("sqlite:///:memory:", "sqlite:///"),
        ("http://", "http://HOST:PORT"),
    ],
)
def test_a_uri_that_cannot_work_is_refused_early(uri: str, way_out: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_tracking_uri(uri)
    assert way_out in str(caught.value)
    assert "hush" not in str(caught.value)


def test_the_command_that_opens_the_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/runs/mlflow.db --port 5000"
    assert ui_command("sqlite:///runs/mlflow.db") == expected
    assert ui_command("http://me:hush@server:5000") == "python -m webbrowser http://server:5000"
    assert ui_command("none") == ""


def test_a_run_tracked_in_another_store_goes_on_as_a_new_run(tmp_path: Path) -> None:
    """Resuming under another root waited a minute for a run that its store never had."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = Tracker(
        uri, experiment="rlgen", run_name="resumed", spool_dir=tmp_path, run_id="0" * 32
    )
    tracker.log_metrics(1, {"loss/total": 1.0})
    tracker.close(timeout_s=60)
    assert tracker.warnings == []
    assert tracker.run_id is not None and tracker.run_id != "0" * 32
    run = MlflowClient(uri).get_run(tracker.run_id)
    assert run.data.metrics == {"loss/total": 1.0}
    assert run.data.tags["rlgen.resumed_from"] == "0" * 32
