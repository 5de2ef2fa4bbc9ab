"""The doctor, by breaking one thing after the other."""

import hashlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import fsspec
import pytest
import torch

from rlgen.config import RunConfig, load_config
from rlgen.config.roles import Node
from rlgen.errors import ConfigError
from rlgen.jobs import doctor, doctor_versions
from rlgen.jobs.doctor_check import Check, Finding, ask_process, run_checks
from rlgen.jobs.doctor_cluster import (
    check_job_server,
    check_placement,
    check_shared_storage,
    judge_nodes,
)
from rlgen.jobs.doctor_inputs import find_config, find_mlflow, find_storage, find_weights
from rlgen.jobs.doctor_machine import (
    check_collective,
    check_shared_memory,
    check_spill,
    find_gpus,
)

GIB = 2**30


def config_of(*settings: str) -> RunConfig:
    return load_config(None, settings)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Versions


class Installed:
    """Another version of a package than the one that is installed."""

    def __init__(self, version: str, folder: Path, *, requires: tuple[str, ...] = ()) -> None:
        self.version, self.requires, self._folder = version, list(requires), folder

    def locate_file(self, path: str) -> Path:
        return self._folder / path


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Pretend that packages have these versions, or with None that they are missing."""

    def pretend(**versions: str | None) -> None:
        real = metadata.distribution

        def distribution(name: str):
            if name not in versions:
                return real(name)
            version = versions[name]
            if version is None:
                raise metadata.PackageNotFoundError(name)
            return Installed(version, tmp_path)

        monkeypatch.setattr(doctor_versions.metadata, "distribution", distribution)

    return pretend


def test_what_is_installed_here_is_fine() -> None:
    found = doctor_versions.find_versions(config_of("tracking.uri=http://mlflow:5000"))
    assert [f.verdict for f in found if f.name in ("python", "versions")] == ["ok", "ok"]
    assert f"torch {metadata.version('torch')}" in found[1].found


def test_an_old_or_missing_package_fails(install) -> None:
    install(ray="2.10.0", s3fs=None)
    found = doctor_versions.check_requirements()
    assert found.verdict == "failure" and "constraints.txt" in found.remedy
    assert "ray 2.10.0 (>=2.60)" in found.found and "s3fs missing (>=2025.3)" in found.found


def test_a_package_that_another_can_not_use_fails(install) -> None:
    install(protobuf="2.6.1")
    found = doctor_versions.check_conflicts()
    assert found.verdict == "failure"
    assert "wants protobuf" in found.found and "finds 2.6.1" in found.found


def test_a_conflict_that_only_an_extra_brings_is_found(install) -> None:
    """Ray's dashboard needs more than Ray; rlgen asks for both."""
    install(**{"aiohttp-cors": None, "aiohttp_cors": None})
    assert "aiohttp" in doctor_versions.check_conflicts().found


@pytest.mark.parametrize(
    ("torch", "torchvision", "verdict"),
    [
        ("2.15.0+cu132", "0.30.0+cpu", "failure"),
        ("2.15.0", "0.30.0+cpu", "warning"),
        ("2.15.0+cpu", "0.30.0+cpu", "ok"),
    ],
)
def test_two_makes_do_not_go_together(
    install, tmp_path: Path, torch: str, torchvision: str, verdict: str
) -> None:
    """Metadata may leave out what a package was built for, and version.py says it."""
    install(torch="2.15.0", torchvision="0.30.0")
    for name, version in (("torch", torch), ("torchvision", torchvision)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "version.py").write_text(f"__version__ = '{version}'\n")
    found = doctor_versions.check_make()
    assert found.verdict == verdict
    assert verdict == "ok" or (torch in found.found and "same index" in found.remedy)


def test_an_old_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    found = doctor_versions.check_python()
    assert found.verdict == "failure" and "3.9.1, not >=3.11" in found.found


def test_a_server_of_artifacts_on_s3_would_lack_boto3(install) -> None:
    install(boto3=None)
    found = doctor_versions.find_versions(config_of("tracking.uri=http://mlflow:5000"))[-1]
    assert (found.name, found.verdict) == ("boto3", "warning")
    assert doctor_versions.find_versions(config_of())[-1].name != "boto3"


# The machine


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_roles_that_want_gpus_are_warned_where_there_are_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (found,) = find_gpus(config_of("learner.num_gpus=1", "rollout.num_gpus=0.5"), timeout_s=60)
    assert found.verdict == "warning" and "ask for 2" in found.found
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA H200, 470.1'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (found,) = find_gpus(config_of(), timeout_s=60)
    assert found.verdict == "failure" and "1 GPUs (NVIDIA H200, 470.1)" in found.found


def test_little_shared_memory_is_told(tmp_path: Path) -> None:
    assert check_shared_memory(tmp_path, 0.001).verdict == "ok"
    found = check_shared_memory(tmp_path, 1e6)
    assert found.verdict == "warning" and "--shm-size" in found.remedy


@pytest.mark.parametrize(
    ("free_gib", "verdict"), [(50.0, "ok"), (6.0, "warning"), (4.0, "failure")]
)
def test_a_full_disk_takes_no_spilled_objects(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_gib: float, verdict: str
) -> None:
    """Of 100 GiB Ray uses up to 95; of 6 GiB free it can use 1."""
    usage = shutil._ntuple_diskusage(100 * GIB, int((100 - free_gib) * GIB), int(free_gib * GIB))
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert check_spill(tmp_path / "ray" / "not there yet").verdict == verdict


def test_two_processes_add() -> None:
    assert check_collective("gloo", timeout_s=60).verdict == "ok"


def test_a_peer_that_never_comes_is_not_waited_for() -> None:
    start = time.monotonic()
    found = check_collective("gloo", timeout_s=6, ranks=(0,))
    assert found.verdict == "failure" and "gloo" in found.found
    assert "GLOO_SOCKET_IFNAME" in found.remedy
    assert time.monotonic() - start < 20


# Placement


def node(cpus: float, gpus: float, *, free: float | None = None) -> Node:
    total = {"CPU": cpus, "GPU": gpus}
    return Node("10.0.0.1", total, total if free is None else {"CPU": cpus, "GPU": free})


def test_the_bundle_without_a_place_is_named() -> None:
    config = config_of("learner.num_gpus=2", "rollout.num_gpus=1", "rollout.num_workers=2")
    assert check_placement(config, [node(8, 2), node(8, 2)]).verdict == "ok"
    found = check_placement(config, [node(8, 1), node(8, 1)])
    assert found.verdict == "failure" and "num_gpus" in found.remedy
    assert "a learner process with 0.25 CPU and 2 GPU" in found.found
    assert "rollout" not in found.found


def test_room_that_others_use_is_a_warning() -> None:
    found = check_placement(config_of("learner.num_gpus=1"), [node(8, 1, free=0)])
    assert found.verdict == "warning" and found.remedy.startswith("wait")


def test_several_nodes_need_storage_that_all_can_write() -> None:
    assert [f.verdict for f in check_shared_storage(config_of(), 2)] == ["warning"]
    assert check_shared_storage(config_of(), 1) == []
    assert check_shared_storage(config_of("checkpoint.uri=s3://bucket/run"), 2) == []
    told = [{"name": "a", "total": {"CPU": 8}, "free": {"CPU": 8}, "labels": {}}] * 2
    found = judge_nodes(config_of(), "head:6379", told)
    assert [f.name for f in found] == ["ray", "placement", "shared storage"]
    assert found[0].found == "head:6379: 2 node(s), 16 CPU, 0 GPU"


# What is read and written


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
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            status, text = answers.get(self.path.partition("?")[0], (404, ""))
            if "token" in answers and self.headers["Authorization"] != answers["token"][1]:
                status = 401
            if status == 0:
                time.sleep(1.0)
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


# The report


def test_a_check_that_hangs_or_breaks_is_a_failure_and_hides_no_other() -> None:
    hung = threading.Event()

    def broken() -> list[Finding]:
        raise ZeroDivisionError("oops")

    def refused() -> list[Finding]:
        raise ConfigError("a = 1 is wrong; use 2.")

    checks = [
        Check("fine", lambda: [Finding("fine", "ok", "yes")]),
        Check("broken", broken),
        Check("refused", refused),
        Check("hung", lambda: [Finding("hung", "ok", str(hung.wait(30)))]),
    ]
    start = time.monotonic()
    found = list(run_checks(checks, timeout_s=0.5))
    hung.set()
    assert time.monotonic() - start < 5
    assert [f.verdict for f in found] == ["ok", "failure", "failure", "failure"]
    assert "ZeroDivisionError: oops" in found[1].found
    assert (found[2].found, found[2].remedy) == ("a = 1 is wrong", "use 2.")


def test_secrets_do_not_get_into_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    check = Check("x", lambda: [Finding("x", "failure", "got correct horse", "not correct horse")])
    assert "horse" not in str(list(run_checks([check], timeout_s=5)))


def test_a_process_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        "print(child.pid, file=sys.stderr, flush=True)\n"
        "child.wait()\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        answer = ask_process("hangs", timeout_s=2.0)
    assert answer.is_late and answer.value is None
    status = Path(f"/proc/{int(answer.errors)}/stat")
    for _ in range(100):  # the kernel may take a moment
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child is still alive")


def test_the_exit_status_and_the_json_say_what_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checks = ["config", "storage", "mlflow", "weights"]
    every = doctor.all_checks

    def some(config: RunConfig) -> list[Check]:
        return [check for check in every(config) if check.name in checks]

    monkeypatch.setattr(doctor, "all_checks", some)
    report = tmp_path / "report.json"
    own = ["runtime=local", "--json", str(report)]
    assert doctor.main(own) == 0
    assert json.loads(report.read_text())["failure"] == 0
    assert doctor.main([*own, "policy.checkpoint=/nowhere/weights"]) == 1
    told = json.loads(report.read_text())
    assert told["failure"] == 1
    (failure,) = [f for f in told["findings"] if f["verdict"] == "failure"]
    assert failure["name"] == "weights policy.checkpoint" and failure["remedy"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "3 ok, 0 warning, 1 failure" or lines[-1].endswith("1 failure")
    assert any(line.startswith("failure   weights policy.checkpoint") for line in lines)
    assert list(tmp_path.iterdir()) == [report]


def test_the_command_checks_everything_in_time_and_leaves_nothing(tmp_path: Path) -> None:
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", "rlgen.jobs.doctor", "cluster.address=local", "--json", "found"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert time.monotonic() - start < 70
    findings = json.loads((tmp_path / "found").read_text())["findings"]
    assert {f["name"] for f in findings} >= {
        *("config", "python", "versions", "conflicts", "torch make", "gpus", "shared memory"),
        *("spill space", "ray", "placement", "storage", "mlflow", "weights embedded"),
        "collective",
    }
    failures = [f for f in findings if f["verdict"] == "failure"]
    assert run.returncode == (1 if failures else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["found"]
