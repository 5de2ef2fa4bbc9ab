"""One S3 server for the folder, and a bucket for each test."""

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import fsspec
import pytest

from tests.storage.s3_server import KEY, SECRET, Line, moto_server


@dataclass
class S3:
    """A bucket of its own on the server."""

    bucket: str
    line: Line

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    def files(self) -> list[str]:
        """What is in the bucket, as another client sees it."""
        filesystem, path = fsspec.core.url_to_fs(self.url)
        filesystem.invalidate_cache()
        return sorted(key.removeprefix(f"{path}/") for key in filesystem.find(path))


@pytest.fixture(scope="session")
def line() -> Iterator[Line]:
    with moto_server() as port:
        yield Line(port)


@pytest.fixture
def s3(line: Line, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{line.port}")
    forget_clients()
    line.mend()
    bucket = f"rlgen-{uuid.uuid4().hex[:8]}"
    fsspec.filesystem("s3").mkdir(bucket)
    yield S3(bucket, line)
    line.mend()
    forget_clients()


def forget_clients() -> None:
    """Clients read the environment once, when they are made."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
