"""Which folder a run writes to, and whether it goes on with what lies there.

Owns run.json: the settings that the folder belongs to, and the process that writes there.
"""

import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import Any

from rlgen.config.identity import differences, resume_key
from rlgen.config.run import RunConfig
from rlgen.errors import ConfigError
from rlgen.learner.ownership import process_mark
from rlgen.storage import write_bytes

_OWNER = "run.json"
_RUNS = Path("runs")


def choose_folder(config: RunConfig, output: Path | None) -> Path:
    """The folder that was named, an interrupted run of the same settings, or a new one.

    Raises:
        ConfigError: the folder that was named holds another run, or one that is still going.
    """
    if output is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        new = _RUNS / f"{stamp}-seed{config.seed}"
        return _interrupted_run(config) or _unused(new)
    _check_named(config, output)
    return output


def claim_folder(folder: Path, config: RunConfig) -> None:
    """Note whose folder it is, before anything else is written there."""
    pid = os.getpid()
    owner = {
        "settings": resume_key(config),
        "host": socket.gethostname(),
        "pid": pid,
        "process": process_mark(pid),
    }
    write_bytes(str(folder / _OWNER), json.dumps(owner, indent=1).encode())


def _check_named(config: RunConfig, folder: Path) -> None:
    if not (folder / "config.yaml").exists() or config.checkpoint.resume_from is not None:
        return
    owner = _owner(folder)
    if owner is not None and _is_alive(owner):
        raise ConfigError(
            f"--output {folder} is written by process {owner['pid']} at this moment; wait for it, "
            "stop it, or name another folder."
        )
    if (folder / "summary.json").exists() or config.checkpoint.resume == "never":
        raise ConfigError(
            f"--output {folder} holds a run already; name another folder, or go on from one of "
            "its checkpoints by checkpoint.resume_from."
        )
    if owner is None or owner["settings"] != resume_key(config):
        told = differences((folder / "config.yaml").read_bytes(), config)
        raise ConfigError(
            f"--output {folder} holds an interrupted run of other settings: {told}. Name another "
            "folder, or go on with it by its own config.yaml."
        )


def _interrupted_run(config: RunConfig) -> Path | None:
    """The newest run here with these settings that has neither ended nor a living process."""
    if config.checkpoint.resume == "never" or config.checkpoint.resume_from is not None:
        return None
    key = resume_key(config)
    for path in sorted(_RUNS.glob(f"*/{_OWNER}"), reverse=True):
        owner = _owner(path.parent)
        if owner is None or owner["settings"] != key or _is_alive(owner):
            continue
        if not (path.parent / "summary.json").exists():
            return path.parent
    return None


def _unused(folder: Path) -> Path:
    """Two runs may start in one second."""
    number, found = 2, folder
    while found.exists():
        found = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return found


def _owner(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / _OWNER).read_text())
    except (OSError, ValueError):
        return None


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether another process writes there; on another machine it can't be asked."""
    mark = process_mark(owner["pid"])
    return mark != "" and owner["pid"] != os.getpid() and mark == owner.get("process")
