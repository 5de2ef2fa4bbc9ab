"""One run on Ray under everything that infra/ sets up, hurt until every alert has fired.

MLflow's server on PostgreSQL with artifacts on S3, and Prometheus with our files, are real and
started by the commands of compose.yaml; the files' durations alone are shorter. The tests go
through the life of one run and depend on their order.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from rlgen.jobs.metrics_export import EXPORTS
from tests.chaos.victims import rows, steps_done
from tests.heads import Head
from tests.infra.natives import PG_BIN, await_that
from tests.infra.rules import INFRA, alerts
from tests.infra.stage import Stage, staged
from tests.storage.s3_server import KEY, SECRET

ENDED_DRIVER = """
import ray
from pathlib import Path
from types import SimpleNamespace
from rlgen.config import RunConfig
from rlgen.jobs.metrics_export import exported

ray.init(log_to_driver=False)
recorder = SimpleNamespace(folder=Path("ended"), export=None)
with exported(RunConfig(), recorder):
    recorder.export.put(1, {"time/step_s": 1.0}, num_unsent=0)
    input()
ray.shutdown()
"""
MAY_FIRE_ON_A_BUSY_MACHINE = {"RlgenStandsStill", "RlgenStepsSlow", "RlgenRunLost"}
"""Their durations are seconds here; rules_test.yaml shows that they are silent when they should."""
RAY_LABELS = {
    "WorkerId",
    "NodeAddress",
    "SessionName",
    "Component",
    "Version",
    "otel_scope_name",
    "otel_scope_version",
    "otel_scope_schema_url",
}
"""What Ray's agent adds."""

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None or PG_BIN is None,
        reason="needs the Debian packages prometheus and postgresql",
    ),
]


@pytest.fixture(scope="module")
def stage(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("infra")) as stage:
        yield stage


def agent_urls(head: Head) -> list[str]:
    """Where metrics are served, as Ray tells Prometheus."""
    listed = json.loads((head.folder / "prom_metrics_service_discovery.json").read_text())
    return [f"http://{address}/metrics" for entry in listed for address in entry["targets"]]


def exposition(head: Head) -> str:
    """What is exposed of rlgen, in Prometheus' text format."""
    lines: list[str] = []
    for url in agent_urls(head):
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        lines += [line for line in text.splitlines() if re.search(r"\bray_rlgen_", line)]
    return "\n".join(lines) + "\n"


def test_a_run_that_does_well_sets_off_no_alert(stage: Stage) -> None:
    await_that(lambda: steps_done(stage.output) >= 8, "step 8")
    run = '{run="patient"}'
    await_that(
        lambda: stage.prometheus.query(f"ray_rlgen_step{run} >= 8"), "the step in Prometheus"
    )
    for url in agent_urls(stage.head):  # in Ray's list, so that ours must find it there
        address = url.removeprefix("http://").removesuffix("/metrics")
        await_that(
            lambda name=f"ray {address}": stage.prometheus.targets().get(name) == "up", address
        )
    assert not stage.prometheus.firing() - MAY_FIRE_ON_A_BUSY_MACHINE


def test_an_export_agrees_with_the_record_of_the_run(stage: Stage) -> None:
    last = next(row for row in rows(stage.output) if row["step"] == 2 and "loss/kl" in row)
    seen = stage.prometheus.query('max_over_time(ray_rlgen_images_total{run="patient"}[1m])')
    assert float(seen[0]["value"][1]) >= 8 * 80 and float(seen[0]["value"][1]) % 20 == 0
    scorers = stage.prometheus.query('count by (scorer) (ray_rlgen_reward_mean{run="patient"})')
    recorded = {name.removeprefix("reward/") for name in last if name.startswith("reward/")}
    assert {series["metric"]["scorer"] for series in scorers} == recorded
    assert all(len(series["metric"]) == 1 for series in scorers)
    stage.collapse()  # it takes its time, while other things happen


def test_storage_tracking_and_a_worker_are_away_and_come_back(stage: Stage) -> None:
    names = {
        "RlgenCheckpointFails",
        "RlgenCheckpointOld",
        "RlgenTrackingBehind",
        "RlgenWorkersMissing",
        "RlgenWorkersRestart",
    }
    assert not names & stage.fired()
    stage.line.cut()
    os.killpg(stage.mlflow.pid, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + 90
        while not names <= stage.fired() and time.monotonic() < deadline:
            if not {"RlgenWorkersMissing", "RlgenWorkersRestart"} <= stage.fired():
                for worker in stage.victims("rollout")[1:]:  # whoever comes in its place, too
                    worker.kill()
            time.sleep(0.2)
        assert names <= stage.fired(), names - stage.fired()
    finally:
        stage.line.mend()
        os.killpg(stage.mlflow.pid, signal.SIGCONT)
    gone = names - {"RlgenWorkersRestart", "RlgenCheckpointFails"}  # those two look back an hour
    await_that(lambda: not gone & stage.prometheus.firing(), "end of these alerts")


def test_processes_die(stage: Stage) -> None:
    names = {"RlgenRoleLost", "RlgenGroupsDropped"}
    assert not names & stage.fired()
    # In the middle between two checkpoints, which are 10 steps apart: so there is work to lose.
    await_that(lambda: steps_done(stage.output) % 10 in (5, 6), "a step between")
    for role in ("reward", "learner"):
        for victim in stage.victims(role):
            victim.kill()
    stage.await_alerts(*names)


def test_the_run_slows_down_and_stands_still(stage: Stage) -> None:
    stage.await_steps(5)
    workers = stage.victims("rollout")
    deadline = time.monotonic() + 60
    while "RlgenStepsSlow" not in stage.fired() and time.monotonic() < deadline:
        for kind, seconds in ((signal.SIGSTOP, 0.6), (signal.SIGCONT, 0.05)):
            for worker in workers:
                worker.send_signal(kind)
            time.sleep(seconds)
    stage.await_alerts("RlgenStepsSlow")
    for worker in workers:
        worker.send_signal(signal.SIGSTOP)
    stage.await_alerts("RlgenStandsStill")
    for worker in workers:
        worker.send_signal(signal.SIGCONT)
    stage.await_steps(1)


def test_the_policy_collapses_and_the_driver_miscounts(stage: Stage) -> None:
    stage.await_alerts(
        "RlgenEntropyCollapsed", "RlgenRewardFell", "RlgenGuardAlarm", "RlgenGroupsUnaccounted"
    )


def test_every_query_of_the_dashboard_has_data(stage: Stage) -> None:
    has_gpu = Path("/dev/nvidiactl").exists()
    dashboard = json.loads((INFRA / "grafana" / "dashboards" / "rlgen.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"].replace("$run", "patient").replace("$__range", "5m")
            query = query.replace("$__rate_interval", "10s")
            found = stage.prometheus.query(query)
            if panel["title"].startswith("GPU") and not has_gpu:
                continue
            if not found:  # Ray measures nodes every few seconds, and here forgets within two
                found = await_that(lambda query=query: stage.prometheus.query(query), query)
            legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert all(legend <= series["metric"].keys() for series in found), query


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_exposed_names_pass_promtool_and_tags_have_few_values(stage: Stage) -> None:
    text = exposition(stage.head)
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    exposed = {re.split(r"[{ ]", line)[0] for line in samples}
    assert exposed == {f"ray_{export.name}" for export in EXPORTS}
    values: dict[str, set[str]] = {}
    for line in samples:
        for tag, value in re.findall(r'(\w+)="([^"]*)"', line):
            values.setdefault(tag, set()).add(value)
    own = values.keys() - RAY_LABELS
    assert own == {"run", "role", "scorer", "part"}
    assert values["run"] == {"patient"}
    assert all(len(values[tag]) <= 8 for tag in own), values
    # Ray's own labels are not ours to name.
    ours = re.sub(rf'({"|".join(RAY_LABELS)})="[^"]*",?', "", text).replace(",}", "}")
    unique = dict.fromkeys(ours.replace("{}", "").splitlines())
    linted = subprocess.run(
        ["promtool", "check", "metrics"],
        input="\n".join(unique) + "\n",
        capture_output=True,
        text=True,
    )
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_the_record_is_in_postgresql_and_on_s3(stage: Stage) -> None:
    import psycopg2
    from mlflow import MlflowClient

    client = MlflowClient(stage.mlflow_url)
    experiment = client.get_experiment_by_name("rlgen")
    assert experiment is not None and experiment.artifact_location.startswith("mlflow-artifacts:")
    [run] = client.search_runs([experiment.experiment_id])
    run_id = run.info.run_id
    assert run.data.params["rollout.group_size"] == "4"

    def has_all_steps() -> bool:
        last = steps_done(stage.output)
        history = {point.step for point in client.get_metric_history(run_id, "loss/total")}
        return set(range(1, last - 20)) <= history

    await_that(has_all_steps, "points of every step")

    def files(path: str | None = None) -> Iterator[str]:
        for found in client.list_artifacts(run_id, path):
            yield from files(found.path) if found.is_dir else [found.path]

    stored = set(files())
    assert "config.yaml" in stored and any(name.endswith(".png") for name in stored)
    s3 = boto3.client(
        "s3",
        endpoint_url=stage.settings["S3_ENDPOINT_URL"],
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )
    kept = s3.list_objects_v2(Bucket="rlgen", Prefix="mlflow/")["Contents"]
    assert stored <= {entry["Key"].partition("/artifacts/")[2] for entry in kept}
    config = next(e["Key"] for e in kept if e["Key"].endswith("config.yaml"))
    body = s3.get_object(Bucket="rlgen", Key=config)["Body"].read()
    assert body == (stage.output / "config.yaml").read_bytes()
    with (
        psycopg2.connect(
            host="127.0.0.1",
            port=stage.postgres_port,
            user="mlflow",
            dbname="mlflow",
            password=stage.settings["POSTGRES_PASSWORD"],
        ) as database,
        database.cursor() as cursor,
    ):
        cursor.execute("SELECT count(*) FROM metrics WHERE run_uuid = %s", (run_id,))
        assert cursor.fetchone()[0] > 1000


def test_an_agent_hangs(stage: Stage) -> None:
    assert "RayNodeUnreachable" not in stage.fired()
    agents = [
        child
        for child in stage.raylet.children(recursive=True)
        if "dashboard/agent.py" in " ".join(child.cmdline())
        or "DashboardAgent" in " ".join(child.cmdline())
    ]
    for agent in agents:
        agent.suspend()
    stage.await_alerts("RayNodeUnreachable")
    for agent in agents:
        agent.resume()
    await_that(lambda: "RayNodeUnreachable" not in stage.prometheus.firing(), "an answer")


def test_a_driver_that_ends_is_not_lost_and_one_that_is_killed_is(stage: Stage) -> None:
    ended = subprocess.Popen(
        [sys.executable, "-c", ENDED_DRIVER],
        env=os.environ | stage.environment,
        stdin=subprocess.PIPE,
        text=True,
    )
    await_that(lambda: stage.prometheus.query('ray_rlgen_step{run="ended"} == 1'), "its step")
    ended.communicate("\n", timeout=60)
    assert ended.returncode == 0
    gone = 'last_over_time(ray_rlgen_run_active{run="ended"}[1m]) == 0'
    await_that(lambda: stage.prometheus.query(gone), "its end in Prometheus", deadline_s=10)
    assert "RlgenRunLost" not in stage.prometheus.firing()
    stage.job.kill()
    await_that(lambda: "RlgenRunLost" in stage.prometheus.firing(), "RlgenRunLost")
    lost = stage.prometheus.query('max_over_time(ALERTS{alertname="RlgenRunLost"}[1m])')
    assert {series["metric"]["run"] for series in lost} == {"patient"}


def test_every_rule_has_fired(stage: Stage) -> None:
    assert stage.fired() == alerts().keys()
