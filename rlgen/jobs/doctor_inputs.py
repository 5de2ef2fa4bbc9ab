"""The doctor's look at what a run reads and writes: configuration, weights, storage, MLflow.

Owns deadlines and verdicts; what is right is what the jobs themselves check.
"""

import base64
import hashlib
import os
import sqlite3
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from rlgen.config.plan import check_required, check_trainable, named_files, uses_embedded
from rlgen.config.run import RunConfig
from rlgen.errors import ConfigError, RlgenError
from rlgen.jobs.doctor_check import Finding, from_error
from rlgen.spool import without_password
from rlgen.storage import (
    cached_file,
    check_writable,
    filesystem_of,
    is_url,
    open_binary,
    reading,
    without_credentials,
)
from rlgen.tracking import NO_TRACKING, check_tracking_uri

_RUNS = "runs"
"""Where run folders go, and with them checkpoints and MLflow's file, if nothing else is said."""
_CHUNK = 2**22
_OPENED_BYTES = 4 * 2**30
"""Files larger than this together are left for the run to open."""
_PROBE_NAME = "rlgen-doctor"


def find_config(config: RunConfig) -> list[Finding]:
    """What can be told by the configuration alone."""
    findings = []
    for check in (check_trainable, check_required):
        try:
            check(config)
        except ConfigError as error:
            what, _, paths = str(error).partition(":\n")
            remedy = paths and "give " + ", ".join(line.split("=")[0] for line in paths.split("\n"))
            one = (
                Finding("config", "failure", what, remedy) if paths else from_error("config", error)
            )
            findings.append(one)
    return findings or [Finding("config", "ok", f"{config.steps} steps, runtime {config.runtime}")]


def find_storage(config: RunConfig, *, timeout_s: float) -> list[Finding]:
    """Write, read and delete where checkpoints go."""
    root = config.checkpoint.uri or _RUNS
    try:
        check_writable(root, timeout_s=timeout_s)
    except RlgenError as error:
        return [from_error("storage", error)]
    return [
        Finding("storage", "ok", f"{without_credentials(root)} can be written and deleted from")
    ]


def find_weights(config: RunConfig, *, timeout_s: float) -> list[Finding]:
    """Every file that the configuration names: there, of what size, with the digest it should have.

    Remote files are not kept; one too large to be read in time has its digest checked by the run.
    """
    end = time.monotonic() + timeout_s
    digests = {
        "policy.checkpoint": config.policy.sha256,
        "tokenizer.checkpoint": config.tokenizer.sha256,
    }
    findings = [
        check_file(key, location, sha256=digests.get(key), end=end)
        for key, location in named_files(config).items()
    ]
    if all(finding.verdict == "ok" for finding in findings):
        findings += _opened(config)
    if uses_embedded(config):
        findings.append(Finding("weights embedded", "ok", "trained once, then cached"))
    return findings


def _opened(config: RunConfig) -> list[Finding]:
    """Open what is named, as a run does before it starts, unless that would take long."""
    from rlgen.learner.preflight import check_named_files  # torch

    files = named_files(config).values()
    if not files or any(is_url(location) for location in files):
        return []
    sizes = [Path(location.removeprefix("file://")).stat().st_size for location in files]
    if sum(sizes) > _OPENED_BYTES:
        return []
    try:
        check_named_files(config)
    except RlgenError as error:
        return [from_error("weights opened", error)]
    return [Finding("weights opened", "ok", "every file opens as what it should be")]


def check_file(key: str, location: str, *, sha256: str | None, end: float) -> Finding:
    """One file or folder that the configuration names.

    Args:
        key: of the configuration.
        location: path or URL.
        sha256: digest that it must have; None checks none.
        end: moment, by time.monotonic(), after which no digest is computed.
    """
    name, shown = f"weights {key}", without_credentials(location)
    try:
        with reading(location):
            filesystem, path = filesystem_of(location)
            info = filesystem.info(path)
        size = f", {info.get('size') or 0:,} bytes" if info.get("type") == "file" else ""
        if sha256 is None:
            return Finding(name, "ok", f"{shown}{size}")
        if not is_url(location):
            cached_file(location, sha256=sha256)
        elif not _has_digest(location, sha256, end):
            found = f"{shown}{size}: too large to check its sha256 from here"
            return Finding(name, "warning", found, "the run checks it before it starts")
    except RlgenError as error:
        return from_error(name, error)
    return Finding(name, "ok", f"{shown}{size}, sha256 as given")


def _has_digest(location: str, sha256: str, end: float) -> bool:
    """Whether a remote file could be read to its end in time, with the right digest.

    Raises:
        ConfigError: the digest is another one.
    """
    digest = hashlib.sha256()
    with open_binary(location) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            if time.monotonic() > end:
                return False
    if digest.hexdigest() != sha256.lower():
        raise ConfigError(
            f"{without_credentials(location)} has the sha256 {digest.hexdigest()}, not {sha256}; "
            "get the file again, or correct the digest."
        )
    return True


def find_mlflow(config: RunConfig, *, timeout_s: float) -> list[Finding]:
    """Whether the tracking URI is one that works, and who it names answers."""
    uri = config.tracking.uri or f"sqlite:///{Path(_RUNS).absolute()}/mlflow.db"
    if uri == NO_TRACKING:
        return [Finding("mlflow", "ok", "switched off")]
    try:
        check_tracking_uri(uri)
    except ConfigError as error:
        return [from_error("mlflow", error)]
    if uri.startswith("sqlite:"):
        return [check_tracking_file(Path(uri.removeprefix("sqlite:///")))]
    return check_tracking_server(uri, config.tracking.experiment, timeout_s=timeout_s)


def check_tracking_file(path: Path) -> Finding:
    """Whether MLflow's sqlite file can be read, or made."""
    remedy = "name another file: tracking.uri=sqlite:///PATH/mlflow.db"
    try:
        check_writable(str(path.parent))
        if path.exists():
            with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=2.0) as database:
                database.execute("select count(*) from sqlite_master")
    except RlgenError as error:
        return from_error("mlflow", error)
    except sqlite3.Error as error:
        return Finding("mlflow", "failure", f"{path} is no database that opens ({error})", remedy)
    return Finding("mlflow", "ok", f"{path}{'' if path.exists() else ', to be made'}")


def check_tracking_server(uri: str, experiment: str, *, timeout_s: float) -> list[Finding]:
    """Ask a server for the experiment, and for its artifacts; nothing is written.

    Source: MLflow's REST API.
    """
    shown = without_password(uri)
    query = urllib.parse.urlencode({"experiment_name": experiment})
    try:
        status, text = _get(uri, f"mlflow/experiments/get-by-name?{query}", timeout_s)
    except (OSError, ValueError) as error:
        remedy = "start the server or correct tracking.uri; a run goes on without it, and spools"
        return [Finding("mlflow", "failure", f"{shown} doesn't answer ({error})", remedy)]
    if status in (401, 403):
        remedy = "give MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN; a 403 may "
        remedy += "also mean that the server's --allowed-hosts lacks this name"
        return [Finding("mlflow", "failure", f"{shown} refuses ({status})", remedy)]
    is_new = status == 404 and "RESOURCE_DOES_NOT_EXIST" in text
    if status != 200 and not is_new:
        remedy = "see that tracking.uri names an MLflow server, and its log"
        return [Finding("mlflow", "failure", f"{shown} answers {status}", remedy)]
    what = "new" if is_new else "known"
    found = Finding("mlflow", "ok", f"{shown} answers; experiment {experiment} is {what}")
    return [found, *_artifact_store(uri, shown, timeout_s)]


def _artifact_store(uri: str, shown: str, timeout_s: float) -> list[Finding]:
    """Whether the server's own artifact store works, if files go through the server."""
    try:
        status, _ = _get(uri, f"mlflow-artifacts/artifacts?path={_PROBE_NAME}", timeout_s)
    except (OSError, ValueError) as error:
        status = 0
        reason = str(error)
    else:
        reason = f"answers {status}"
    if status == 503:  # files go to the store directly
        return []
    if 200 <= status < 300 or status == 404:
        return [Finding("mlflow artifacts", "ok", f"{shown} lists them")]
    remedy = (
        "see the server's log: with artifacts on S3 it needs boto3 and the bucket's credentials"
    )
    return [Finding("mlflow artifacts", "failure", f"{shown}: listing fails ({reason})", remedy)]


def _get(uri: str, path: str, timeout_s: float) -> tuple[int, str]:
    """Status and text of a request to MLflow's REST API, with the credentials MLflow would use."""
    parts = urllib.parse.urlsplit(uri)
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
    request = urllib.request.Request(f"{address}/api/2.0/{path}")
    user = urllib.parse.unquote(parts.username or os.environ.get("MLFLOW_TRACKING_USERNAME", ""))
    password = urllib.parse.unquote(
        parts.password or os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    )
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if user:
        encoded = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.add_header("Authorization", f"Basic {encoded}")
    elif token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return response.status, response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
