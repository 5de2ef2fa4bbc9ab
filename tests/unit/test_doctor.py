"""The doctor: its report, what it sees of the machine, and of room on a cluster."""

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from rlgen.config import RunConfig, load_config
from rlgen.config.roles import Node
from rlgen.errors import ConfigError
from rlgen.jobs import doctor
from rlgen.jobs.doctor_check import Check, Finding, ask_process, run_checks
from rlgen.jobs.doctor_cluster import check_placement, check_shared_storage, judge_nodes
from rlgen.jobs.doctor_machine import (
    check_collective,
    check_shared_memory,
    check_spill,
    find_gpus,
)

GIB = 2**30


def config_of(*settings: str) -> RunConfig:
    return load_config(None, settings)


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
        "child = subprocess.Popen(['sleep', '40'])\n"
        "print(child.pid, file=sys.stderr, flush=True)\n"
        "child.wait()\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        start = time.monotonic()
        answer = ask_process("hangs", timeout_s=2.0)
    assert time.monotonic() - start < 20, "a child that lives holds the pipes open"
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
