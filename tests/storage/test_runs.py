"""Whole runs of the embedded default in one process, on storage that fails, and all from S3."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest

import rlgen.jobs.checkpoints
import rlgen.learner.state_io
from rlgen.config import load_config
from rlgen.config.identity import resume_key
from rlgen.digits.assets import ensure_assets, resolve_embedded
from rlgen.errors import StorageError
from rlgen.jobs import grpo
from rlgen.jobs.cli import run_job
from rlgen.learner.checkpoint import MARKER, Part, newest_checkpoint, read_meta, write_parts
from rlgen.learner.ownership import OWNER, RootClaim
from tests.conftest import TINY_RUN
from tests.storage.conftest import S3

SETTINGS = [
    *TINY_RUN,
    "runtime=local",
    "steps=8",
    "checkpoint.every_steps=1",
    "evaluation.every_steps=0",
    "evaluation.cfg_scales=[]",
]


def run(output: Path, *settings: str) -> int:
    """The job's exit status."""
    arguments = ["--output", str(output), *SETTINGS, *settings]
    return run_job(lambda: grpo.main(arguments))


def rows(output: Path) -> list[dict[str, Any]]:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def steps_done(output: Path) -> int:
    return sum("loss/total" in row for row in rows(output))


def digest(output: Path) -> str:
    return json.loads((output / "summary.json").read_text())["policy_sha256"]


def last(output: Path, name: str) -> float:
    return [row[name] for row in rows(output) if name in row][-1]


@pytest.fixture(scope="module")
def undisturbed(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the policy that the same run makes on a local disk."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(output) == 0
    return digest(output)


@contextmanager
def watching(output: Path, acts: dict[int, Callable[[], None]]) -> Iterator[None]:
    """Do something when so many steps are done, and hold up the run until it is done."""
    from rlgen.jobs.recorder import Recorder

    log_step = Recorder.log_step

    def logged(self: Recorder, *arguments: Any) -> None:
        log_step(self, *arguments)
        acts.get(steps_done(output), lambda: None)()

    Recorder.log_step = logged  # type: ignore[method-assign]
    try:
        yield
    finally:
        Recorder.log_step = log_step  # type: ignore[method-assign]


def test_a_server_that_is_away_for_a_while_costs_checkpoints_and_nothing_else(
    undisturbed: str,
    s3: S3,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    outage_s: float,
) -> None:
    output, root = tmp_path / "run", f"{s3.url}/run"

    def wait() -> None:
        time.sleep(outage_s / 2)

    def mend_after_a_failure() -> None:
        deadline = time.monotonic() + 30
        while not any(row.get("checkpoint/failed") for row in rows(output)):
            assert time.monotonic() < deadline, "no checkpoint failed"
            time.sleep(0.02)
        s3.line.mend()

    acts = {2: s3.line.cut, 3: wait, 4: wait, 5: mend_after_a_failure}
    with watching(output, acts):
        status = run(output, f"checkpoint.uri={root}", "checkpoint.retries=0")
    assert status == 0
    assert digest(output) == undisturbed
    assert last(output, "checkpoint/failed") >= 1
    assert read_meta(f"{root}/step-00008")["step"] == 8
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("could not be written, training goes on") == 1
    assert "checkpoints are written again" in told
    # Nothing partial, no claim, and no more than what is to be kept.
    files = s3.files()
    committed = {key.split("/")[1] for key in files if key.endswith(MARKER)}
    assert len(committed) == 2
    assert {key.split("/")[1] for key in files} == committed


def test_what_is_written_of_a_checkpoint_after_it_failed_is_deleted(
    undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's half of step 2 fails at once, and the learner's is still on its way."""

    def failing(uri: str, *rest: Any) -> list[Part]:
        if uri.endswith("step-00002"):
            raise StorageError("no such luck.")
        return write_parts(uri, *rest)

    def late(uri: str, *rest: Any) -> list[Part]:
        if uri.endswith("step-00002"):
            time.sleep(0.3)
            landed.append(uri)
        return write_parts(uri, *rest)

    landed: list[str] = []
    monkeypatch.setattr(rlgen.jobs.checkpoints, "write_parts", failing)
    monkeypatch.setattr(rlgen.learner.state_io, "write_parts", late)
    output = tmp_path / "run"
    assert run(output) == 0
    assert digest(output) == undisturbed
    assert len(landed) == 1 and last(output, "checkpoint/failed") >= 1
    folders = sorted((output / "checkpoints").glob("step-*"))
    assert len(folders) == 2 and all((folder / MARKER).exists() for folder in folders)


def test_a_run_whose_last_checkpoint_can_not_be_written_says_so(
    undisturbed: str, s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, root = tmp_path / "run", f"{s3.url}/run"
    with watching(output, {5: s3.line.cut}):
        status = run(output, f"checkpoint.uri={root}", "checkpoint.retries=0")
    message = " ".join(capsys.readouterr().err.split())
    assert status == 2
    assert steps_done(output) == 8, "the training went on"
    assert "the checkpoint of step 8 can't be committed" in message and root in message
    assert "the same command goes on from" in message
    # The same command, once the server is back, ends as if nothing had happened.
    s3.line.mend()
    assert run(output, f"checkpoint.uri={root}", "checkpoint.retries=0") == 0
    assert digest(output) == undisturbed


def full(output: Path, folder: Path, *words: str, limit: str) -> str:
    """What a run says that ends with its last checkpoint unwritten; it runs after `words`.

    The embedded default is in the cache by then, and the rest of the run's files elsewhere.
    """
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom tests.storage.test_runs import run\n"
        f"{limit}\n"
        f"status = run(Path({str(output)!r}), 'checkpoint.retries=0', 'steps=3',\n"
        f"             'checkpoint.uri={folder}')\n"
        f"print('left:', sorted(os.listdir({str(folder)!r})))\nsys.exit(status)"
    )
    command = [*words, sys.executable, "-c", code]
    job = subprocess.run(command, capture_output=True, text=True)
    told = " ".join((job.stdout + job.stderr).split())
    assert job.returncode == 2, told
    assert steps_done(output) == 3, told
    assert re.search(r"step-00003/\w+\.\w+ can't be written", told), told
    assert "the free space" in told
    assert "Traceback" not in told
    assert "left: ['step-00000']" in told, "which fitted, because the optimiser had no state yet"
    return told


def test_a_full_disk_leaves_no_partial_checkpoint_and_training_goes_on(
    undisturbed: str, tmp_path: Path
) -> None:
    """A disk with room for the first checkpoint, made in a mount namespace of the run's own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = 'mount -t tmpfs -o size=3m none "$0" && exec "$@"'
    words = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(folder)]
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk of their own")
    assert "No space left on device" in full(tmp_path / "run", folder, *words, limit="")


def test_a_file_above_the_limit_leaves_no_partial_checkpoint_and_training_goes_on(
    undisturbed: str, tmp_path: Path
) -> None:
    """The process may write no more than 1 MB to a file."""
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"
    told = full(tmp_path / "run", tmp_path / "run" / "checkpoints", limit=limit)
    assert "File too large" in told


def test_a_second_run_under_one_root_stops_before_it_starts_anything(
    cache_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path / "shared")
    with RootClaim(root):
        assert run(tmp_path / "second", f"checkpoint.uri={root}") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "belongs to a run that is alive" in message and "another checkpoint.uri" in message
    assert not (tmp_path / "second").exists()
    assert list(Path(root).iterdir()) == []


def test_a_run_that_was_taken_for_dead_stops_and_does_not_commit(
    cache_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, root = tmp_path / "run", tmp_path / "root"

    def take_over() -> None:
        owner = json.loads((root / OWNER).read_text())
        (root / OWNER).write_text(json.dumps(owner | {"token": "other", "host": "elsewhere"}))
        taken.append(len(list(root.glob(f"*/{MARKER}"))))

    taken: list[int] = []
    with watching(output, {3: take_over}):
        assert run(output, f"checkpoint.uri={root}", "checkpoint.every_steps=4") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "names another run now" in message and "elsewhere" in message
    committed = {path.parent.name for path in root.glob(f"*/{MARKER}")}
    assert committed == {"step-00000"}, "as many as before it was taken over"
    assert taken == [1]
    assert json.loads((root / OWNER).read_text())["token"] == "other", "not ours to remove"


def test_another_run_under_the_same_root_is_refused(
    cache_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = f"checkpoint.uri={tmp_path / 'root'}"
    assert run(tmp_path / "first", root, "steps=1") == 0
    assert run(tmp_path / "second", root, "steps=1", "seed=1") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "holds the checkpoints of another run" in message
    assert (tmp_path / "root" / "step-00001" / MARKER).exists()


# -- everything from s3:// ---------------------------------------------------------------------


def upload_inputs(s3: S3) -> list[str]:
    """Put every input of the run on S3; the settings that name them there."""
    config = load_config(None, SETTINGS)
    assets = ensure_assets(config.digits, lambda *_: None)
    folder = str(assets.folder)
    fsspec.filesystem("s3").put(f"{folder}/", f"{s3.bucket}/inputs/", recursive=True)
    settings = []
    for key, value in resolve_embedded(config, assets).flattened().items():
        if isinstance(value, str) and value.startswith(folder):
            settings.append(f"{key}={s3.url}/inputs{value.removeprefix(folder)}")
    return settings


def make_experiment(uri: str, artifacts: str) -> None:
    from mlflow import MlflowClient

    MlflowClient(uri).create_experiment("on-s3", artifact_location=artifacts)


@pytest.mark.slow
def test_a_run_with_everything_on_s3_is_killed_goes_on_and_ends_as_the_undisturbed(
    undisturbed: str, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = upload_inputs(s3)
    assert len(inputs) == 8
    root, tracking = f"{s3.url}/run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    make_experiment(tracking, f"{s3.url}/mlflow")
    settings = [
        *inputs,
        f"checkpoint.uri={root}",
        f"tracking.uri={tracking}",
        "tracking.experiment=on-s3",
    ]
    # Another machine would have an empty cache, too.
    monkeypatch.setenv("RLGEN_CACHE", str(tmp_path / "cache"))
    code = "import sys\nfrom pathlib import Path\nfrom tests.storage.test_runs import run\n"
    code += "sys.exit(run(Path(sys.argv[1]), *sys.argv[2:]))"
    output = tmp_path / "run"
    command = [sys.executable, "-c", code, str(output), *settings]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as job:
        while not any("run/step-0000" in key for key in s3.files() if key.endswith(MARKER)):
            assert job.poll() is None
            time.sleep(0.05)
        while steps_done(output) < 3:
            assert job.poll() is None
        job.send_signal(signal.SIGKILL)
    key = resume_key(load_config(None, [*SETTINGS, *settings]))
    assert newest_checkpoint(root, resume_key=key) is not None

    # The same command, on a machine that has nothing of the first one.
    second = tmp_path / "second"
    assert run(second, *settings) == 0
    assert 0 < steps_done(second) < 8
    assert digest(second) == undisturbed
    assert any(file.startswith("mlflow/") and file.endswith("report.html") for file in s3.files())
