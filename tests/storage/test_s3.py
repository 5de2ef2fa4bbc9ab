"""Checkpoints on a real S3 server: cut uploads, outages, wrong credentials, a hanging server."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlgen.config.run import CheckpointConfig
from rlgen.errors import StorageError
from rlgen.learner.checkpoint import (
    checkpoint_uri,
    commit_checkpoint,
    discard_uncommitted,
    newest_checkpoint,
    prune_checkpoints,
    read_part,
    write_parts,
)
from rlgen.storage import check_writable, read_bytes, write_bytes
from tests.storage.conftest import S3, forget_clients
from tests.storage.s3_server import KEY, SECRET, moto_server

ONCE = CheckpointConfig(retries=0)
META = {"run_key": "mine", "resume_key": "mine"}


def part(num_bytes: int = 1000) -> dict[str, Callable[[], bytes]]:
    return {"policy.bin": lambda: bytes(range(250)) * (num_bytes // 250)}


def write(root: str, step: int, num_bytes: int = 1000) -> str:
    uri = checkpoint_uri(root, step)
    commit_checkpoint(uri, write_parts(uri, part(num_bytes), ONCE), meta=META, settings=ONCE)
    return uri


def test_checkpoints_are_found_read_and_pruned_whoever_wrote_them(s3: S3) -> None:
    root = f"{s3.url}/run"
    assert newest_checkpoint(root, resume_key="mine") is None
    first = write(root, 2)
    assert newest_checkpoint(root, resume_key="mine") == first
    # Another process writes the next one, after this one has listed the folder.
    code = f"from tests.storage.test_s3 import write; write({root!r}, 4)"
    subprocess.run([sys.executable, "-c", code], check=True)
    newest = newest_checkpoint(root, resume_key="mine")
    assert newest == f"{root}/step-00004"
    assert read_part(newest, "policy.bin") == part()["policy.bin"]()
    write_parts(checkpoint_uri(root, 6), part(), ONCE)
    prune_checkpoints(root, keep=1)
    assert newest_checkpoint(root, resume_key="mine") == newest
    discard_uncommitted(root)
    assert s3.files() == ["run/step-00004/COMMIT.json", "run/step-00004/policy.bin"]


@pytest.mark.parametrize("num_mib", [8, 110], ids=["one request", "many requests"])
def test_an_upload_that_is_cut_half_way_leaves_nothing_that_counts(s3: S3, num_mib: int) -> None:
    newest = write(s3.url, 2)
    s3.line.cut_after = s3.line.bytes_sent + num_mib * 2**19
    with pytest.raises(StorageError, match=r"step-00004/policy\.bin can't be written"):
        write_parts(checkpoint_uri(s3.url, 4), part(num_mib * 2**20), ONCE)
    s3.line.mend()
    assert newest_checkpoint(s3.url, resume_key="mine") == newest
    assert not any("step-00004" in key for key in s3.files())


def test_a_process_killed_in_the_middle_of_an_upload_leaves_nothing_that_counts(s3: S3) -> None:
    newest = write(s3.url, 2)
    code = (
        "from tests.storage.test_s3 import write\n"
        f"write({s3.url!r}, 3)\nprint('ready', flush=True)\nwrite({s3.url!r}, 4, 110 << 20)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        sent = s3.line.bytes_sent
        while s3.line.bytes_sent < sent + (30 << 20):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert newest_checkpoint(s3.url, resume_key="mine") == checkpoint_uri(s3.url, 3) != newest
    discard_uncommitted(s3.url)
    assert {key.split("/")[0] for key in s3.files()} == {"step-00002", "step-00003"}


def test_an_outage_is_ridden_out_and_never_taken_for_damage(s3: S3) -> None:
    write(s3.url, 2)
    s3.line.cut()
    with pytest.raises(StorageError, match="can't be read"):
        newest_checkpoint(s3.url, resume_key="mine")
    threading.Timer(1.0, s3.line.mend).start()
    [written] = write_parts(f"{s3.url}/late", part(), CheckpointConfig(retries=5))
    assert written.num_retries >= 1
    assert read_bytes(f"{s3.url}/late/policy.bin") == part()["policy.bin"]()


# -- before a run starts -----------------------------------------------------------------------


def refused(root: str, timeout_s: float = 60.0) -> str:
    with pytest.raises(StorageError) as caught:
        check_writable(root, timeout_s=timeout_s)
    message = str(caught.value)
    assert SECRET not in message and KEY not in message
    return message


def test_a_writable_root_is_probed_without_a_trace(s3: S3) -> None:
    check_writable(f"{s3.url}/run/checkpoints")
    assert s3.files() == []


def test_a_missing_bucket_is_named(s3: S3) -> None:
    message = refused("s3://rlgen-no-such-bucket/run")
    assert "s3://rlgen-no-such-bucket/run" in message and "bucket does not exist" in message


def test_a_server_that_is_away_or_hangs_is_named_within_the_time(s3: S3) -> None:
    s3.line.cut()
    assert f"{s3.url}/run" in refused(f"{s3.url}/run")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        forget_clients()
        began = time.monotonic()
        assert "took longer than 2 s" in refused(f"{s3.url}/run", timeout_s=2.0)
        assert time.monotonic() - began < 5


def test_wrong_credentials_are_refused_without_showing_them(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moto_server(INITIAL_NO_AUTH_ACTION_COUNT="0") as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        forget_clients()
        message = refused("s3://rlgen-private/run")
        assert "s3://rlgen-private/run" in message and "credentials in the environment" in message
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{KEY}:{SECRET[:7]}@127.0.0.1:{port}")
        forget_clients()
        refused("s3://rlgen-private/run")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
        forget_clients()
        assert "s3://rlgen-private/run" in refused("s3://rlgen-private/run")


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert str(tmp_path / "file") in refused(str(tmp_path / "file" / "checkpoints"))


def test_a_file_that_does_not_fit_is_absent_not_partial(tmp_path: Path) -> None:
    """The process may write no more than 100 kB to a file, as on a full disk."""
    write_bytes(str(tmp_path / "a"), b"before")
    code = (
        "import resource\nfrom rlgen.storage import write_bytes\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"write_bytes({str(tmp_path / 'a')!r}, b'x' * 200_000)"
    )
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "StorageError" in failed.stderr and "File too large" in failed.stderr
    assert (tmp_path / "a").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
