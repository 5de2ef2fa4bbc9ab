"""System metrics in a real sqlite store, by the names that MLflow's page groups them by."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

import rlgen.mlflow_system
from rlgen.tracking import Tracker

SHOWN = {
    "system/cpu_utilization_percentage",
    "system/system_memory_usage_megabytes",
    "system/system_memory_usage_percentage",
    "system/disk_usage_percentage",
    "system/disk_usage_megabytes",
    "system/disk_available_megabytes",
    "system/network_receive_megabytes",
    "system/network_transmit_megabytes",
}


@contextmanager
def busy() -> Iterator[None]:
    """Keep one core at work, so that no true sample of the CPU is 0."""
    ended = threading.Event()

    def spin() -> None:
        while not ended.is_set():
            sum(range(1000))

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def sampled_run(folder: Path, *, seconds: float, interval_s: float = 0.2) -> tuple[Any, str]:
    from mlflow import MlflowClient

    uri = f"sqlite:///{folder.parent}/mlflow.db"
    names = {"experiment": "digits", "run_name": "first"}
    with busy():
        tracker = Tracker(uri, **names, spool_dir=folder, system_metrics_s=interval_s)
        assert tracker.wait_for_run_id(120) is not None
        time.sleep(seconds)
        tracker.close(timeout_s=120)
    assert tracker.warnings == []
    return MlflowClient(uri), str(tracker.run_id)


def test_samples_have_the_names_and_sizes_that_the_page_shows(tmp_path: Path) -> None:
    client, run_id = sampled_run(tmp_path / "run", seconds=1.5)
    metrics = client.get_run(run_id).data.metrics
    assert set(metrics) >= SHOWN
    assert all(name.startswith("system/") for name in metrics)
    total_mb = psutil.virtual_memory().total / 1e6
    assert 0.02 * total_mb < metrics["system/system_memory_usage_megabytes"] <= total_mb
    cpu = [p.value for p in client.get_metric_history(run_id, "system/cpu_utilization_percentage")]
    assert len(cpu) >= 4
    assert all(0 < value <= 100 for value in cpu), "the first and the last one too"

    # A resumed run goes on where the samples ended.
    client, resumed_id = sampled_run(tmp_path / "run", seconds=0.5)
    assert resumed_id == run_id
    points = client.get_metric_history(run_id, "system/cpu_utilization_percentage")
    assert len(points) > len(cpu)
    assert [point.step for point in points] == list(range(len(points)))
    times = [point.timestamp for point in points]
    assert times == sorted(times)


def test_a_short_run_has_one_sample_and_without_interval_there_is_none(tmp_path: Path) -> None:
    client, run_id = sampled_run(tmp_path / "a", seconds=0.0, interval_s=600.0)
    points = client.get_metric_history(run_id, "system/cpu_utilization_percentage")
    assert len(points) == 1
    client, run_id = sampled_run(tmp_path / "b", seconds=0.3, interval_s=0.0)
    assert client.get_run(run_id).data.metrics == {}


def test_a_sample_is_never_over_a_moment_too_short_to_measure() -> None:
    for _ in range(5):
        samples: list[dict[str, float]] = []
        with busy():
            rlgen.mlflow_system.SystemSampler(600.0, samples.append).stop()
        (sample,) = samples
        assert 0 < sample["system/cpu_utilization_percentage"] <= 100


def test_what_can_not_be_sampled_is_told_once_and_holds_nothing_up(
    tmp_path: Path, monkeypatch: Any
) -> None:
    def broken() -> list[Any]:
        raise OSError("no /proc")

    monkeypatch.setattr(rlgen.mlflow_system, "_monitors", broken)
    told: list[str] = []
    tracker = Tracker(
        f"sqlite:///{tmp_path}/mlflow.db",
        experiment="digits",
        run_name="first",
        spool_dir=tmp_path / "run",
        system_metrics_s=0.1,
        tell=told.append,
    )
    tracker.log_metrics(0, {"a": 1.0})
    tracker.close(timeout_s=120)
    assert tracker.warnings == []
    (line,) = told
    assert "no system metrics" in line and "/proc" in line
