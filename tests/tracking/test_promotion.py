"""Registered models on a real MLflow server: who becomes champion, and who does not."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlgen.errors import ConfigError, StorageError
from rlgen.mlflow_registry import CHAMPION, Candidate, promote
from rlgen.mlflow_run import prepare_mlflow, promote_now
from rlgen.tracking import Tracker
from tests.mlflow_server import Gate, MlflowServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def client(server: MlflowServer) -> Any:
    prepare_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(server.uri)


@pytest.fixture
def run_id(client: Any) -> str:
    return client.create_run("0").info.run_id


@pytest.fixture
def judged(tmp_path: Path, request: pytest.FixtureRequest) -> Candidate:
    """A policy of judge FID 5; each test has a model of its own."""
    return candidate(tmp_path, request.node.name, judge_fid=5.0)


def candidate(folder: Path, model: str, *, judge_fid: float) -> Candidate:
    path = folder / f"fid-{judge_fid}" / "policy.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(f"weights of {model} with {judge_fid}".encode())
    return Candidate(
        model=model,
        policy=str(path),
        step=120,
        policy_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        judge_fid=judge_fid,
        recall=0.9,
        cfg_scale=1.0,
        judge_sha256="a" * 64,
        judge_reference_sha256="b" * 64,
        num_images=2000,
    )


def versions(client: Any, model: str) -> dict[int, str]:
    """Status of each version, by its number."""
    found = client.search_model_versions(f"name = '{model}'")
    return {int(version.version): version.tags["rlgen.status"] for version in found}


def champion(client: Any, model: str) -> Any:
    return client.get_model_version_by_alias(model, CHAMPION)


def test_the_first_policy_is_champion_and_its_file_can_be_fetched(
    client: Any,
    server: MlflowServer,
    run_id: str,
    judged: Candidate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow.artifacts import download_artifacts

    assert "is the champion" in promote(client, run_id, judged)
    version = champion(client, judged.model)
    assert version.run_id == run_id
    assert version.tags["rlgen.step"] == "120"
    assert float(version.tags["rlgen.judge_fid"]) == 5.0
    assert version.tags["rlgen.policy_sha256"] == judged.policy_sha256
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    folder = download_artifacts(f"models:/{judged.model}@{CHAMPION}", dst_path=str(tmp_path / "x"))
    fetched = (Path(folder) / "policy.safetensors").read_bytes()
    assert hashlib.sha256(fetched).hexdigest() == judged.policy_sha256


def test_a_better_policy_takes_over_and_a_worse_one_is_told_why_not(
    client: Any, run_id: str, judged: Candidate, tmp_path: Path
) -> None:
    model = judged.model
    promote(client, run_id, judged)
    told = promote(client, run_id, candidate(tmp_path, model, judge_fid=4.5))
    assert told == (
        f"version 2 of {model} (judge FID 4.5) is the champion, before version 1 with 5."
    )
    told = promote(client, run_id, candidate(tmp_path, model, judge_fid=4.75))
    assert told == (
        f"version 3 of {model} (judge FID 4.75) stays a candidate: the champion, version 2, has "
        "4.5."
    )
    told = promote(client, run_id, candidate(tmp_path, model, judge_fid=float("nan")))
    assert "stays a candidate" in told
    assert versions(client, model) == {
        1: "former champion",
        2: "champion",
        3: "candidate",
        4: "candidate",
    }
    assert int(champion(client, model).version) == 2


def test_the_same_policy_again_changes_nothing(client: Any, run_id: str, judged: Candidate) -> None:
    promote(client, run_id, judged)
    before = champion(client, judged.model)
    assert promote(client, run_id, judged).endswith("is the champion.")
    after = champion(client, judged.model)
    assert (after.version, after.tags) == (before.version, before.tags)
    assert len(versions(client, judged.model)) == 1


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"judge_sha256": "c" * 64}, "judge cccccccccccc with reference bbbbbbbbbbbb on 2000"),
        ({"judge_reference_sha256": "d" * 64}, "with reference dddddddddddd"),
        ({"num_images": 500}, "on 500 images"),
        ({"cfg_scale": 1.5}, "at guidance 1.5"),
    ],
)
def test_another_judge_is_refused_and_both_are_named(
    client: Any, run_id: str, tmp_path: Path, other: dict[str, Any], told: str
) -> None:
    model = f"judge {next(iter(other))}"
    promote(client, run_id, candidate(tmp_path, model, judge_fid=5.0))
    better = replace(candidate(tmp_path, model, judge_fid=1.0), **other)
    with pytest.raises(ConfigError) as caught:
        promote(client, run_id, better)
    assert told in str(caught.value)
    assert "judge aaaaaaaaaaaa with reference bbbbbbbbbbbb on 2000 images at guidance 1" in str(
        caught.value
    )
    assert versions(client, model) == {1: "champion"}


def test_a_champion_that_rlgen_did_not_make_is_not_displaced(
    client: Any, run_id: str, judged: Candidate
) -> None:
    client.create_registered_model(judged.model)
    client.create_model_version(judged.model, "s3://bucket/model")
    client.set_registered_model_alias(judged.model, CHAMPION, "1")
    with pytest.raises(ConfigError, match="unknown"):
        promote(client, run_id, judged)
    assert int(champion(client, judged.model).version) == 1


def test_who_moves_the_alias_late_gives_it_back_to_the_better_one(
    client: Any, server: MlflowServer, run_id: str, judged: Candidate, tmp_path: Path
) -> None:
    """Both compare with nothing; the better one moves the alias first, the other one after it."""
    from mlflow import MlflowClient

    better = candidate(tmp_path, judged.model, judge_fid=2.0)

    class Late(MlflowClient):
        is_late = True

        def set_registered_model_alias(self, *words: Any) -> None:
            if self.is_late:
                self.is_late = False
                assert "is the champion" in promote(client, run_id, better)
            super().set_registered_model_alias(*words)

    told = promote(Late(server.uri), run_id, judged)
    assert told.endswith("stays a candidate: the champion, version 2, has 2.")
    assert versions(client, judged.model) == {1: "candidate", 2: "champion"}
    assert int(champion(client, judged.model).version) == 2


def test_of_many_at_the_same_time_the_best_is_champion_and_twins_are_one(
    client: Any, server: MlflowServer, run_id: str, judged: Candidate, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    fids = [4.0, 3.0, 3.0, 2.5, 6.0, 2.5]
    crowd = [candidate(tmp_path, judged.model, judge_fid=fid) for fid in fids]
    with ThreadPoolExecutor(len(crowd)) as threads:
        done = [threads.submit(promote, MlflowClient(server.uri), run_id, one) for one in crowd]
        for future in done:
            future.result()
    assert float(champion(client, judged.model).tags["rlgen.judge_fid"]) == 2.5
    found = client.search_model_versions(f"name = '{judged.model}'")
    assert sorted(float(v.tags["rlgen.judge_fid"]) for v in found) == [2.5, 3.0, 4.0, 6.0]


def test_a_checkpoint_at_a_url_stays_where_it_is(
    client: Any, run_id: str, judged: Candidate
) -> None:
    uri = "s3://bucket/runs/a/checkpoints/step-00120"
    promote(client, run_id, replace(judged, policy=f"{uri}/policy.safetensors"))
    assert champion(client, judged.model).source == uri
    assert client.list_artifacts(run_id) == []


def test_a_server_without_registry_is_told_and_the_run_ends_well(
    client: Any, server: MlflowServer, judged: Candidate, tmp_path: Path
) -> None:
    told: list[str] = []
    with Gate(server.uri) as gate:
        gate.refusal, gate.refused_part = 404, "registered-models"
        names = {"experiment": "digits", "run_name": "first"}
        tracker = Tracker(gate.uri, **names, spool_dir=tmp_path / "run", tell=told.append)
        tracker.register(judged)
        tracker.log_metrics(1, {"a": 1.0})
        tracker.close(timeout_s=60)
        assert tracker.warnings == []
        with pytest.raises(StorageError, match="has a model registry"):
            promote_now(gate.uri, str(tracker.run_id), judged)
    (line,) = told
    assert judged.model in line and "404" in line
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"a": 1.0})


def test_the_policy_of_a_run_without_a_server_is_registered_when_its_spool_is_sent(
    client: Any, server: MlflowServer, judged: Candidate, tmp_path: Path
) -> None:
    from rlgen.tracking import main

    run_dir = tmp_path / "run"
    tracker = Tracker("http://127.0.0.1:9", experiment="e", run_name="n", spool_dir=run_dir)
    tracker.register(judged)
    tracker.close(timeout_s=0.1)
    assert main([str(run_dir), server.uri]) == 0
    assert float(champion(client, judged.model).tags["rlgen.judge_fid"]) == 5.0
