"""Run checkpoints: the marker makes them, damage and half-written folders are refused."""

import json
import uuid
from collections.abc import Callable

import fsspec
import pytest

from rlgen.config.run import CheckpointConfig
from rlgen.errors import CheckpointError, StorageError
from rlgen.learner.checkpoint import (
    MARKER,
    checkpoint_uri,
    commit_checkpoint,
    discard_uncommitted,
    newest_checkpoint,
    prune_checkpoints,
    read_meta,
    read_part,
    write_parts,
)
from rlgen.storage import join, remove, write_bytes

SETTINGS = CheckpointConfig(retries=0)
PAYLOADS = {"policy.bin": b"weights" * 50, "moments.bin": b"\x00\x01\x02"}


@pytest.fixture(params=["folder", "url"])
def root(request: pytest.FixtureRequest, tmp_path) -> str:
    return {
        "folder": str(tmp_path / "checkpoints"),
        "url": f"memory://test-checkpoint/{uuid.uuid4().hex}",
    }[request.param]


def write(root: str, step: int, *, is_committed: bool = True) -> str:
    uri = checkpoint_uri(root, step)
    makers = {name: (lambda name=name: PAYLOADS[name]) for name in PAYLOADS}
    parts = write_parts(uri, makers, SETTINGS)
    if is_committed:
        commit_checkpoint(uri, parts, meta={"step": step, "run_key": "mine"})
    return uri


def newest(root: str) -> str | None:
    return newest_checkpoint(root, resume_key="mine")


def steps_in(root: str) -> list[str]:
    filesystem, path = fsspec.core.url_to_fs(root)
    return sorted(
        entry.rstrip("/").rsplit("/", 1)[-1] for entry in filesystem.ls(path, detail=False)
    )


def test_a_committed_checkpoint_comes_back(root) -> None:
    uri = write(root, 40)
    assert uri == join(root, "step-00040")
    assert read_meta(uri) == {"step": 40, "run_key": "mine"}
    for name, payload in PAYLOADS.items():
        assert read_part(uri, name) == payload


def test_the_marker_is_written_last_and_alone_makes_the_checkpoint(root, monkeypatch) -> None:
    written: list[str] = []

    def recording(location: str, payload: bytes) -> None:
        written.append(location.rsplit("/", 1)[-1])
        write_bytes(location, payload)

    monkeypatch.setattr("rlgen.learner.checkpoint.write_bytes", recording)
    write(root, 3)
    assert written == [*PAYLOADS, MARKER]


def test_a_folder_without_a_marker_is_no_checkpoint(root) -> None:
    uri = write(root, 40, is_committed=False)
    for read in (lambda: read_meta(uri), lambda: read_part(uri, "policy.bin")):
        with pytest.raises(CheckpointError, match=r"step-00040 is no committed checkpoint.*COMMIT"):
            read()


def test_a_missing_folder_is_no_checkpoint(root) -> None:
    with pytest.raises(CheckpointError, match=r"step-00007 is no committed checkpoint"):
        read_meta(checkpoint_uri(root, 7))


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        (b"", "is no committed checkpoint"),
        (b'{"parts": [', "is no committed checkpoint"),
        (b"[1]", "COMMIT.json is damaged"),
        (b'{"parts": []}', "COMMIT.json is damaged"),
        (b'{"parts": ["a"], "meta": {}}', "COMMIT.json is damaged"),
    ],
)
def test_a_damaged_marker_is_refused(root, marker, message) -> None:
    uri = write(root, 40)
    write_bytes(join(uri, MARKER), marker)
    with pytest.raises(CheckpointError, match=message):
        read_meta(uri)


@pytest.mark.parametrize(
    "damage",
    [lambda payload: payload[:-1], lambda payload: b"W" + payload[1:], lambda payload: b""],
    ids=["cut short", "one byte", "empty"],
)
def test_a_damaged_part_is_refused(root, damage: Callable[[bytes], bytes]) -> None:
    uri = write(root, 40)
    write_bytes(join(uri, "policy.bin"), damage(PAYLOADS["policy.bin"]))
    with pytest.raises(CheckpointError, match=r"policy\.bin is damaged.*resume from an earlier"):
        read_part(uri, "policy.bin")
    assert read_part(uri, "moments.bin") == PAYLOADS["moments.bin"]


def test_a_part_that_was_deleted_or_never_written_is_named(root) -> None:
    uri = write(root, 40)
    filesystem, path = fsspec.core.url_to_fs(join(uri, "policy.bin"))
    filesystem.rm(path)
    with pytest.raises(CheckpointError, match=r"can't be read.*policy\.bin does not exist"):
        read_part(uri, "policy.bin")
    with pytest.raises(CheckpointError, match=r"has no other\.bin \(it has moments\.bin, policy"):
        read_part(uri, "other.bin")


def test_pruning_keeps_the_newest(root) -> None:
    for step in (40, 80, 120, 160):
        write(root, step)
    prune_checkpoints(root, keep=2)
    assert steps_in(root) == ["step-00120", "step-00160"]
    assert read_part(checkpoint_uri(root, 160), "policy.bin") == PAYLOADS["policy.bin"]
    prune_checkpoints(root, keep=5)
    assert steps_in(root) == ["step-00120", "step-00160"]


def test_pruning_leaves_folders_that_are_not_committed(root) -> None:
    for step in (40, 80):
        write(root, step)
    write(root, 120, is_committed=False)  # perhaps someone is writing it now
    prune_checkpoints(root, keep=1)
    assert steps_in(root) == ["step-00080", "step-00120"]


def test_the_newest_is_the_largest_step_also_beyond_five_digits(root) -> None:
    for step in (99_960, 100_000, 100_040):
        write(root, step)
    prune_checkpoints(root, keep=2)
    assert steps_in(root) == ["step-100000", "step-100040"]


def test_pruning_takes_the_marker_first(root, monkeypatch) -> None:
    for step in (1, 2):
        write(root, step)
    filesystem, _ = fsspec.core.url_to_fs(root)
    remove = type(filesystem).rm
    removed: list[str] = []

    def stopped_after_the_first(self, path: str, recursive: bool = False, **options) -> None:
        if removed:
            raise OSError("the machine went away")
        removed.append(path)
        remove(self, path, recursive=recursive, **options)

    monkeypatch.setattr(type(filesystem), "rm", stopped_after_the_first)
    with pytest.raises(StorageError, match="went away"):
        prune_checkpoints(root, keep=1)
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        read_meta(checkpoint_uri(root, 1))


def test_the_marker_is_readable_json_with_sizes_and_digests(root) -> None:
    uri = write(root, 40)
    with fsspec.open(join(uri, MARKER), "rb") as stream:
        marker = json.loads(stream.read())
    sizes = {part["name"]: part["num_bytes"] for part in marker["parts"]}
    assert sizes == {name: len(payload) for name, payload in PAYLOADS.items()}
    assert all(len(part["sha256"]) == 64 for part in marker["parts"])


# -- the newest --------------------------------------------------------------------------------


def test_the_newest_that_is_committed_is_found(root) -> None:
    assert newest(root) is None
    for step in (99_960, 100_000):
        write(root, step)
    write(root, 100_040, is_committed=False)
    assert newest(root) == join(root, "step-100000")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda uri: write_bytes(join(uri, "moments.bin"), b"\x00\x01"), "2 of 3 bytes"),
        (lambda uri: write_bytes(join(uri, "moments.bin"), b"\x00\x01\x03"), "is damaged"),
        (lambda uri: remove(join(uri, "policy.bin")), r"policy\.bin is missing"),
        (lambda uri: write_bytes(join(uri, MARKER), b"{"), "is no committed checkpoint"),
        (lambda uri: write_bytes(join(uri, MARKER), b"[]"), r"COMMIT\.json is damaged"),
    ],
    ids=["cut short", "one byte", "missing", "marker cut short", "no marker at all"],
)
def test_a_damaged_newest_is_passed_over_by_name_and_stays(root, damage, message) -> None:
    sound = write(root, 40)
    damage(write(root, 80))
    with pytest.warns(UserWarning, match=rf"step-00080.*{message}.*|{message}.*Passing over"):
        assert newest(root) == sound
    assert "step-00080" in steps_in(root)


def test_the_checkpoints_of_another_run_are_refused(root) -> None:
    write(root, 40)
    with pytest.raises(CheckpointError, match=r"another run \(step-00040 has the key mine, this"):
        newest_checkpoint(root, resume_key="theirs")


def test_a_run_goes_by_what_was_asked_for_and_by_what_it_went_on_with(root) -> None:
    uri = checkpoint_uri(root, 40)
    commit_checkpoint(uri, [], meta={"run_key": "asked", "resume_key": "rolled back"})
    assert newest_checkpoint(root, resume_key="asked") == uri
    assert newest_checkpoint(root, resume_key="rolled back") == uri


def test_what_was_not_committed_is_deleted_and_nothing_else(root) -> None:
    write(root, 40)
    write(root, 80, is_committed=False)
    write_bytes(join(write(root, 120), MARKER), b"")  # damaged, so someone may want to look
    write_bytes(join(root, "ray_train", "state"), b"")
    discard_uncommitted(root)
    assert steps_in(root) == ["ray_train", "step-00040", "step-00120"]


def test_pruning_keeps_what_was_written_last_even_if_it_is_not_the_newest(root) -> None:
    for step in (80, 120, 40):  # a user has gone back to 20
        write(root, step)
    prune_checkpoints(root, keep=2, protected=(checkpoint_uri(root, 40), None))
    assert steps_in(root) == ["step-00040", "step-00080", "step-00120"]


def test_a_write_is_tried_again_and_counted(root, monkeypatch) -> None:
    failures = iter([True, True, False, False])
    pauses: list[float] = []

    def flaky(location: str, payload: bytes) -> None:
        if next(failures):
            raise StorageError("the server is away")
        write_bytes(location, payload)

    monkeypatch.setattr("rlgen.learner.checkpoint.write_bytes", flaky)
    monkeypatch.setattr("rlgen.learner.checkpoint.time.sleep", pauses.append)
    makers = {name: (lambda name=name: PAYLOADS[name]) for name in PAYLOADS}
    parts = write_parts(checkpoint_uri(root, 1), makers, CheckpointConfig(retries=2))
    assert [part.num_retries for part in parts] == [2, 0]
    assert pauses == [1.0, 2.0]


def test_trying_again_ends_with_the_time(root, monkeypatch) -> None:
    def broken(location: str, payload: bytes) -> None:
        raise StorageError("the server is away")

    monkeypatch.setattr("rlgen.learner.checkpoint.write_bytes", broken)
    monkeypatch.setattr("rlgen.learner.checkpoint.time.sleep", lambda pause_s: None)
    with pytest.raises(StorageError, match="away"):
        write_parts(root, {"a": lambda: b""}, CheckpointConfig(retries=10**9, timeout_s=1.5))
