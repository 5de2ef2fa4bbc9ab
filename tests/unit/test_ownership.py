"""Two runs under one root: the second stops, a dead one blocks no one, no two commit."""

import json
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from rlgen.errors import CheckpointError
from rlgen.learner.ownership import OWNER, RootClaim
from rlgen.storage import join, read_bytes, write_bytes

HOLD = (
    "import sys, time\nfrom rlgen.learner.ownership import RootClaim\n"
    "with RootClaim(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(600)"
)
BEAT_S = 0.2


@pytest.fixture(params=["folder", "url"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {
        "folder": str(tmp_path / "checkpoints"),
        "url": f"memory://test-ownership/{uuid.uuid4().hex}",
    }[request.param]


def claim_elsewhere(root: str, monkeypatch: pytest.MonkeyPatch) -> RootClaim:
    with monkeypatch.context() as patch:
        patch.setattr("rlgen.learner.ownership.process_mark", lambda pid: f"other kernel\n{pid} 7")
        return RootClaim(root, beat_s=BEAT_S)


def test_a_claim_leaves_nothing_behind(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    with RootClaim(str(root), beat_s=BEAT_S):
        owner = json.loads((root / OWNER).read_text())
        beats = [path for path in root.iterdir() if path.name != OWNER]
        first = beats[0].read_bytes()
        time.sleep(2 * BEAT_S)
        assert beats[0].read_bytes() != first, "it gives signs of life"
        assert owner["token"] in beats[0].name
    assert list(root.iterdir()) == []


def test_a_second_live_run_stops_and_a_killed_one_blocks_no_one(tmp_path: Path) -> None:
    root = str(tmp_path / "checkpoints")
    command = [sys.executable, "-c", HOLD, root]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match=f"alive: process {holder.pid} on") as caught:
            RootClaim(root).__enter__()
        assert root in str(caught.value) and "checkpoint.uri" in str(caught.value)
        holder.kill()
        # Not even reaped: a zombie is dead.
        began = time.monotonic()
        while Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        with RootClaim(root) as claim:
            claim.check()
        assert time.monotonic() - began < 2, "the kernel told at once"
    assert list(Path(root).iterdir()) == [], "its sign of life is gone too"


def test_a_process_with_the_dead_owners_number_is_not_the_owner(tmp_path: Path) -> None:
    root = str(tmp_path)
    with RootClaim(root):
        owner = json.loads(read_bytes(join(root, OWNER)))
        owner["process"] = owner["process"] + "1"  # the same pid, started at another time
        write_bytes(join(root, OWNER), json.dumps(owner).encode())
        with RootClaim(root) as second:
            second.check()


def test_a_live_run_on_another_machine_is_heard_of(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with claim_elsewhere(root, monkeypatch), pytest.raises(CheckpointError, match="is alive"):
        RootClaim(root).__enter__()


def test_a_dead_run_on_another_machine_is_silent(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = claim_elsewhere(root, monkeypatch)
    monkeypatch.setattr(gone, "_keep_beating", lambda: None)
    gone.__enter__()
    began = time.monotonic()
    with RootClaim(root) as claim:
        assert 2 * BEAT_S < time.monotonic() - began < 5
        claim.check()
        with pytest.raises(CheckpointError, match=rf"names another run now.*{claim.token}"):
            gone.check()
        gone.__exit__(None, None, None)
        claim.check()  # a run that lost the root takes nothing with it


def test_of_two_that_start_at_once_one_at_most_can_commit(root: str) -> None:
    claims = [RootClaim(root, beat_s=BEAT_S) for _ in range(2)]
    start = threading.Barrier(2)
    could: list[RootClaim] = []

    def run(claim: RootClaim) -> None:
        start.wait()
        try:
            claim.__enter__()
            time.sleep(0.2)  # a step
            claim.check()
            could.append(claim)
        except CheckpointError:
            pass

    threads = [threading.Thread(target=run, args=(claim,)) for claim in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(could) <= 1
    for claim in claims:
        claim.__exit__(None, None, None)


def test_a_damaged_owner_file_blocks_no_one(root: str) -> None:
    write_bytes(join(root, OWNER), b'{"token": 1')
    with RootClaim(root) as claim:
        claim.check()
