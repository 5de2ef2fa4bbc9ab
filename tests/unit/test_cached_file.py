"""Downloads: every URL scheme, once per version, checked, and safe with several processes."""

import hashlib
import json
import os
import socketserver
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlparse

import fsspec
import gcsfs
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from rlgen.errors import CheckpointError, StorageError
from rlgen.storage import cached_file

PAYLOAD = bytes(range(256)) * 4096
DIGEST = hashlib.sha256(PAYLOAD).hexdigest()


class Server(socketserver.ThreadingTCPServer):
    """Files by path, over HTTP and as much of Google's storage API as reading needs."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.gets: Counter[str] = Counter()
        self.seen_credentials: set[str] = set()
        self.missing_bytes = 0
        """How many bytes of the end are promised and not sent."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        if authorization := self.headers.get("Authorization"):
            self.server.seen_credentials.add(authorization)
        body = self.server.files.get(path)
        if body is None:
            self.send_error(404)
            return
        if with_body:
            self.server.gets[path] += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if path in self.server.etags:
            self.send_header("ETag", self.server.etags[path])
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) - self.server.missing_bytes])

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setenv("RLGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "files"


def kept(cache: Path) -> list[str]:
    """Names of cached files; locks and partial files are hidden ones."""
    return sorted(path.name for path in cache.glob("*") if not path.name.startswith("."))


def test_a_local_file_is_used_where_it_is(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(PAYLOAD)
    assert cached_file(str(path), sha256=DIGEST) == path
    assert cached_file(f"file://{path}", sha256=DIGEST.upper()) == path
    assert not cache.exists()
    path.write_bytes(PAYLOAD + b"!")
    with pytest.raises(CheckpointError, match=DIGEST):
        cached_file(str(path), sha256=DIGEST)
    with pytest.raises(StorageError, match="is no file"):
        cached_file(str(tmp_path / "missing.pt"))


def test_http_file_is_downloaded_once(server: Server, cache: Path) -> None:
    server.files["/models/c2i_L_256.pt"] = PAYLOAD
    url = f"{server.url}/models/c2i_L_256.pt"
    first = cached_file(url)
    assert first.read_bytes() == PAYLOAD
    assert first.parent == cache and first.name.endswith("-c2i_L_256.pt")
    assert cached_file(url, sha256=DIGEST) == first
    assert server.gets["/models/c2i_L_256.pt"] == 1


@pytest.mark.parametrize("told_by", ["etag", "size"])
def test_a_new_version_at_the_same_url_is_downloaded(server: Server, told_by: str) -> None:
    server.files["/w.pt"], server.etags["/w.pt"] = b"old", '"1"'
    assert cached_file(f"{server.url}/w.pt").read_bytes() == b"old"
    server.files["/w.pt"] = b"new" if told_by == "etag" else b"newer"
    if told_by == "etag":
        server.etags["/w.pt"] = '"2"'
    assert cached_file(f"{server.url}/w.pt").read_bytes() == server.files["/w.pt"]


def test_files_of_one_name_at_two_urls_are_kept_apart(server: Server, cache: Path) -> None:
    server.files |= {"/a/w.pt": b"aaa", "/b/w.pt": b"bbb", "/c.pt": b"ccc"}
    urls = [f"{server.url}/{p}" for p in ("a/w.pt", "b/w.pt", "c.pt?file=1", "c.pt?file=2")]
    assert [cached_file(url).read_bytes() for url in urls] == [b"aaa", b"bbb", b"ccc", b"ccc"]
    assert len(kept(cache)) == 4


def test_another_digest_is_refused_and_nothing_is_kept(server: Server, cache: Path) -> None:
    server.files["/w.pt"] = PAYLOAD
    wanted = "0" * 64
    with pytest.raises(CheckpointError) as caught:
        cached_file(f"{server.url}/w.pt", sha256=wanted)
    assert DIGEST in str(caught.value) and wanted in str(caught.value)
    assert kept(cache) == []
    cached_file(f"{server.url}/w.pt")
    with pytest.raises(CheckpointError, match=DIGEST):
        cached_file(f"{server.url}/w.pt", sha256=wanted)
    assert kept(cache) == [], "a cached file that turns out wrong goes as well"


def test_a_broken_transfer_leaves_nothing(server: Server, cache: Path) -> None:
    server.files["/w.pt"] = PAYLOAD
    server.missing_bytes = 1000
    with pytest.raises(StorageError, match=r"/w\.pt"):
        cached_file(f"{server.url}/w.pt")
    assert kept(cache) == [] and not list(cache.glob("*.partial"))
    server.missing_bytes = 0
    assert cached_file(f"{server.url}/w.pt").read_bytes() == PAYLOAD


def test_what_a_killed_process_left_goes_with_the_next_download(
    server: Server, cache: Path
) -> None:
    server.files["/w.pt"] = PAYLOAD
    whole = cached_file(f"{server.url}/w.pt")
    left = cache / f".{whole.name}.0123abcd.partial"
    left.write_bytes(b"half")
    whole.unlink()
    cached_file(f"{server.url}/w.pt")
    assert not left.exists()


def test_a_missing_url_says_why(server: Server) -> None:
    with pytest.raises(StorageError, match=r"/nothing\.pt does not exist.*404"):
        cached_file(f"{server.url}/nothing.pt")
    with pytest.raises(StorageError, match=r"Connect"):
        cached_file("http://127.0.0.1:9/w.pt")


def test_credentials_stay_out_of_names_and_messages(server: Server, cache: Path) -> None:
    server.files["/w.pt"] = PAYLOAD
    authority = server.url.removeprefix("http://")
    cached_file(f"http://alice:s3cret@{authority}/w.pt?token=t0ken")
    assert server.seen_credentials, "the password is used"
    places = [str(path) for path in cache.rglob("*")] + [str(cache)]
    errors = []
    for path, digest in (("w.pt", "0" * 64), ("nothing.pt", None)):
        with pytest.raises((CheckpointError, StorageError)) as caught:
            cached_file(f"http://alice:s3cret@{authority}/{path}?token=t0ken", sha256=digest)
        errors.append(str(caught.value))
    for text in places + errors:
        assert not any(secret in text for secret in ("alice", "s3cret", "t0ken")), text


def test_processes_that_want_one_file_download_it_once(server: Server, cache: Path) -> None:
    server.files["/w.pt"] = PAYLOAD
    code = (
        "import sys; from rlgen.storage import cached_file; "
        "print(cached_file(sys.argv[1], sha256=sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, f"{server.url}/w.pt", DIGEST]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = {process.communicate(timeout=120)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0] * 4
    assert answers == {str(cache / kept(cache)[0])} and len(kept(cache)) == 1
    assert server.gets["/w.pt"] == 1


def test_memory_urls_work() -> None:
    with fsspec.open("memory://bucket/w.pt", "wb") as stream:
        stream.write(PAYLOAD)
    assert cached_file("memory://bucket/w.pt", sha256=DIGEST).read_bytes() == PAYLOAD


def test_s3_urls_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    store = ThreadedMotoServer(port=0)
    store.start()
    try:
        host, port = store.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("models")
        with fsspec.open("s3://models/var/var_d16.pth", "wb") as stream:
            stream.write(PAYLOAD)
        cached = cached_file("s3://models/var/var_d16.pth", sha256=DIGEST)
        assert cached.read_bytes() == PAYLOAD and cached.name.endswith("-var_d16.pth")
        with pytest.raises(StorageError, match="does not exist"):
            cached_file("s3://models/var/var_d99.pth")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        store.stop()


def test_gs_urls_work(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {
        "kind": "storage#object",
        "bucket": "models",
        "name": "w.pt",
        "size": str(len(PAYLOAD)),
        "etag": "CAE=",
        "generation": "7",
        "mediaLink": f"{server.url}/download/storage/v1/b/models/o/w.pt?alt=media",
    }
    server.files["/storage/v1/b/models/o/w.pt"] = json.dumps(about).encode()
    server.files["/download/storage/v1/b/models/o/w.pt"] = PAYLOAD
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    gcsfs.GCSFileSystem.clear_instance_cache()
    try:
        cached = cached_file("gs://models/w.pt", sha256=DIGEST)
        assert cached.read_bytes() == PAYLOAD and cached.name.endswith("-w.pt")
    finally:
        gcsfs.GCSFileSystem.clear_instance_cache()


def test_a_cache_that_cannot_be_written_is_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the cache's folder should be")
    monkeypatch.setenv("RLGEN_CACHE", str(blocked))
    server.files["/w.pt"] = PAYLOAD
    with pytest.raises(StorageError, match="set RLGEN_CACHE"):
        cached_file(f"{server.url}/w.pt")
    assert os.path.getsize(blocked) > 0
