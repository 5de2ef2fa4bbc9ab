"""Planted secrets: nothing that a run writes or prints holds one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlgen.config import load_config
from rlgen.config.load import dump_yaml
from rlgen.config.secrets import scrubbed
from rlgen.errors import ConfigError
from tests.conftest import TINY_RUN

PLANTED = "PLANTEDhunter2secret"
ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": f"{PLANTED}aws",
    "AWS_ACCESS_KEY_ID": f"{PLANTED}id",
    "MLFLOW_TRACKING_PASSWORD": f"{PLANTED}mlflow",
    "RAY_AUTH_TOKEN": f"{PLANTED}ray",
    "HF_TOKEN": f"{PLANTED}hf",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"s3://AKIA:{PLANTED}@bucket/key", "s3://***@bucket/key"),
        (f"get https://h/f?X-Amz-Signature={PLANTED}&x=1 now", "get https://h/f?*** now"),
        (f'Invalid name "AKIA:{PLANTED}@bucket"', 'Invalid name "***@bucket"'),
        ("why? because://of/this", "why? because://of/this"),
        ("me@example.org and s3://bucket/a@b", "me@example.org and s3://bucket/a@b"),
    ],
)
def test_credentials_and_signatures_in_urls_are_hidden(text: str, expected: str) -> None:
    assert scrubbed(text) == expected


def test_values_of_secret_variables_are_hidden_and_paths_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOME_API_KEY", f"{PLANTED}!")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path))
    monkeypatch.setenv("SHORT_TOKEN", "digits")
    assert scrubbed(f"no {PLANTED}! in {tmp_path}, digits") == f"no *** in {tmp_path}, digits"


def test_a_dump_without_its_secret_is_refused_with_the_field(tmp_path: Path) -> None:
    config = load_config(None, [f"tracking.uri=postgresql://me:{PLANTED}@db/mlflow"])
    dump = tmp_path / "config.yaml"
    dump.write_text(dump_yaml(config))
    assert PLANTED not in dump.read_text()
    with pytest.raises(ConfigError, match=r"tracking\.uri = postgresql://\*\*\*@db/mlflow"):
        load_config(str(dump), [])
    again = load_config(str(dump), ["tracking.uri=sqlite:///x.db"])
    assert again.tracking.uri == "sqlite:///x.db"


def files_with_secret(folder: Path) -> list[str]:
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and PLANTED.encode() in path.read_bytes()
    ]


def job(tmp_path: Path, *settings: str) -> str:
    """Run the main job with all secrets in its environment; what it printed."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "rlgen.jobs.grpo", "--output", str(tmp_path / "run")),
            *(*TINY_RUN, "runtime=local", *settings),
        ],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout + done.stderr


def test_a_run_leaves_no_secret_behind(cache_folder: Path, tmp_path: Path) -> None:
    tracking = f"tracking.uri=http://me:{PLANTED}url@127.0.0.1:9"  # nothing listens there
    printed = job(tmp_path, tracking, "steps=1")
    assert (tmp_path / "run" / "summary.json").exists(), printed[-2000:]
    assert PLANTED not in printed
    assert files_with_secret(tmp_path) == []


@pytest.mark.parametrize(
    "setting",
    [
        f"policy.checkpoint=s3://AKIA:{PLANTED}url@no-such-bucket/policy.safetensors",
        f"policy.checkpoint=https://127.0.0.1:9/p.safetensors?X-Amz-Signature={PLANTED}",
        f"tracking.uri=nonsense://me:{PLANTED}@server",
    ],
)
def test_an_error_names_the_place_without_the_secret(tmp_path: Path, setting: str) -> None:
    printed = job(tmp_path, setting)
    assert "error:" in printed and "Traceback" not in printed
    assert PLANTED not in printed
    assert files_with_secret(tmp_path) == []
