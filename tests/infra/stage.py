"""What the live tests act on: a run on Ray, and every server that infra/ sets up.

The run's policy collapses once `collapse` gives it a reward that it can't resist, and after 60
steps its driver miscounts, because the one here does.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.victims import processes, steps_done
from tests.conftest import TINY_RUN
from tests.heads import Head, closed_port, ray_head
from tests.infra.natives import (
    Prometheus,
    await_that,
    make_bucket,
    mlflow,
    postgres,
    process,
    prometheus,
)
from tests.infra.rules import INFRA, alerts
from tests.storage.s3_server import KEY, SECRET, Line, moto_server

BROKEN_LEDGER = """
import sys
from dataclasses import replace
from rlgen.jobs import grpo
from rlgen.jobs.cli import run_job
from rlgen.jobs.ledger import GroupLedger

see = GroupLedger.see

def see_too_many(self, counts):
    see(self, replace(counts, generated=counts.generated + 7 * (self.trained > 1200)))

GroupLedger.see = see_too_many
sys.exit(run_job(lambda: grpo.main(sys.argv[1:])))
"""
COLLAPSING = [
    "learner.lr=0.003",
    "guard.every=20",
    "guard.max_fid_ratio=10",  # a hundred images of a poor policy swing a lot
    "guard.min_recall_ratio=0.5",
    "guard.max_hollow_gains=null",
    "reward.scorers.paper={type: python, target: 'tests.infra.greedy:Paper', weight: 0.000001}",
]
INK = (
    "reward.scorers.ink={{type: python, target: 'tests.infra.greedy:Ink', weight: 10.0, "
    "arguments: {{switch: {0}}}}}"
)
LONG_RUN = [
    *TINY_RUN,
    "rollout.num_workers=2",
    "steps=100000",
    "evaluation.every_steps=0",
    "evaluation.cfg_scales=[]",
    "evaluation.num_images=100",
    "evaluation.images_per_unit=50",
    "checkpoint.every_steps=10",
    "checkpoint.retries=0",
    "cluster.heartbeat_timeout_s=600",
    "cluster.max_restarts=50",
]


@dataclass(frozen=True)
class Stage:
    """The run and what is around it."""

    head: Head
    raylet: psutil.Process
    prometheus: Prometheus
    mlflow_url: str
    mlflow: subprocess.Popen[bytes]
    postgres_port: int
    line: Line
    """Between the run and the S3 server."""
    settings: dict[str, str]
    output: Path
    job: subprocess.Popen[bytes]
    environment: dict[str, str]

    def victims(self, role: str) -> list[psutil.Process]:
        """Living processes of a role."""
        return processes(role, self.raylet)

    def collapse(self) -> None:
        """Reward what ruins the policy."""
        self.output.with_name("switch").touch()

    def await_alerts(self, *names: str) -> None:
        """Wait until each of these has fired at least once."""
        missing = set(names) - alerts().keys()
        assert not missing, f"{missing} are no rules"

        for name in names:
            await_that(lambda name=name: name in self.fired(), name)

    def fired(self) -> set[str]:
        """Every alert that has ever fired here."""
        found = self.prometheus.query('max_over_time(ALERTS{alertstate="firing"}[1h])')
        return {series["metric"]["alertname"] for series in found}

    def await_steps(self, number: int) -> None:
        """Wait until so many more steps are done."""
        goal = steps_done(self.output) + number
        await_that(lambda: steps_done(self.output) >= goal, f"step {goal}")


@contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    """Start everything, in parallel where that is possible, and the run."""
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        s3_port = stack.enter_context(moto_server())
        line = Line(s3_port)
        settings = {
            "POSTGRES_PASSWORD": "planted/pass@word",
            "GRAFANA_PASSWORD": "unused here",
            "S3_ACCESS_KEY_ID": KEY,
            "S3_SECRET_ACCESS_KEY": SECRET,
            "S3_BUCKET": "rlgen",
            "S3_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}",
        }
        environment = {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{line.port}",
            "RAY_metrics_report_interval_ms": "1000",
            # By default every head of a machine wants the same two.
            "AUTOSCALER_METRIC_PORT": str(closed_port()),
            "DASHBOARD_METRIC_PORT": str(closed_port()),
            "PYTHONPATH": str(INFRA.parent),  # where workers find the rewards of the tests
        }
        make_bucket(settings)
        database = pool.submit(stack.enter_context, postgres(settings))
        head = stack.enter_context(ray_head(num_cpus=4, **environment))
        raylet = raylet_of(head)
        stack.callback(lambda: os.killpg(os.getpgid(raylet.pid), signal.SIGKILL))
        environment |= {
            "RAY_ADDRESS": head.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": head.token,
        }
        mlflow_port = closed_port()
        url = f"http://127.0.0.1:{mlflow_port}"
        output = folder / "patient"
        job = [sys.executable, "-c", BROKEN_LEDGER, "--output", str(output), *LONG_RUN, *COLLAPSING]
        job += [INK.format(output.with_name("switch"))]
        job += [f"tracking.uri={url}", "checkpoint.uri=s3://rlgen/checkpoints"]
        log = folder / "patient.log"
        started = stack.enter_context(process(job, log, env=os.environ | environment))
        postgres_port = database.result()
        server = stack.enter_context(mlflow(settings, postgres_port, mlflow_port, folder))

        def is_training() -> bool:
            assert started.poll() is None, log.read_text()[-3000:]
            return steps_done(output) >= 3

        await_that(is_training, "first steps")
        watching = stack.enter_context(prometheus(head.folder, folder))
        yield Stage(
            head=head,
            raylet=raylet,
            prometheus=watching,
            mlflow_url=url,
            mlflow=server,
            postgres_port=postgres_port,
            line=line,
            settings=settings,
            output=output,
            job=started,
            environment=environment,
        )


def raylet_of(head: Head) -> psutil.Process:
    """The head's raylet, of which all workers are children."""
    for found in psutil.process_iter(["cmdline"]):
        words = found.info["cmdline"] or [""]
        if words[0].endswith("/raylet") and str(head.folder) in " ".join(words):
            return found
    raise AssertionError("the head has no raylet")
