"""The doctor's look at this machine: GPUs, shared memory, room to spill, and a collective.

Owns what this machine needs to take a part in a run; other nodes answer for themselves when the
doctor runs there.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rlgen.config.model_plan import GIB, num_policy_parameters
from rlgen.config.roles import role_resources
from rlgen.config.run import RunConfig
from rlgen.jobs.doctor_check import Finding, ask_process
from rlgen.storage import in_background

_PROBES = "rlgen.jobs.doctor_probes"
_SHARED_MEMORY = Path("/dev/shm")
_OBJECT_STORE_GIB = 0.5
"""What a Ray that a run starts takes."""
_SPILL_LIMIT = 0.95
"""Ray spills no more onto a disk that is fuller (its local_fs_capacity_threshold)."""

_LITTLE_GIB = 2.0


def find_gpus(config: RunConfig, *, timeout_s: float) -> list[Finding]:
    """What torch and the driver say of GPUs, against what the configuration asks for."""
    asked = sum(role.count * role.num_gpus for role in role_resources(config))
    drivers = _driver_rows()
    answer = ask_process(_PROBES, "gpus", timeout_s=timeout_s)
    if answer.value is None:
        late = f"torch did not answer in {timeout_s:g} s" if answer.is_late else "torch won't start"
        reason = "".join(answer.errors.strip().splitlines()[-1:])
        return [Finding("gpus", "failure", f"{late} {reason}".strip(), "see `nvidia-smi`")]
    return [_judged_gpus(answer.value, drivers, asked)]


def num_gpus() -> int:
    """GPUs that the driver shows here."""
    return len(_driver_rows())


def _judged_gpus(told: dict[str, Any], drivers: Sequence[str], asked: float) -> Finding:
    if told["error"] is not None:
        return Finding("gpus", "failure", told["error"], "update the driver, or reset that GPU")
    if told["gpus"]:
        versions = {row.rpartition(", ")[2] for row in drivers}
        driver = f"; driver {', '.join(sorted(versions))}" if versions else ""
        names = ", ".join(told["gpus"])
        return Finding("gpus", "ok", f"{len(told['gpus'])}: {names}; CUDA {told['cuda']}{driver}")
    if drivers and told["cuda"] is None:
        found = f"{len(drivers)} GPUs ({drivers[0]}), and this torch is built without CUDA"
        return Finding("gpus", "failure", found, "install torch from an index with CUDA")
    if drivers:
        found = f"{len(drivers)} GPUs ({drivers[0]}), which torch for CUDA {told['cuda']} can't use"
        remedy = "update the driver, install torch for an older CUDA, or see CUDA_VISIBLE_DEVICES"
        return Finding("gpus", "failure", found, remedy)
    if asked:
        return Finding(
            "gpus",
            "warning",
            f"none here, and the roles ask for {asked:g}",
            "nodes of the cluster must have them, see placement; or set num_gpus of the roles to 0",
        )
    return Finding("gpus", "ok", "none here, and none is asked for")


def _driver_rows() -> list[str]:
    """Name and driver of each GPU, as nvidia-smi tells; nothing where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return told.stdout.strip().splitlines()


def find_memory(config: RunConfig) -> list[Finding]:
    """Shared memory for Ray's objects, and disk for what doesn't fit there."""
    if config.runtime == "local":
        return []
    return [
        check_shared_memory(_SHARED_MEMORY, _object_gib(config)),
        check_spill(Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()))),
    ]


def check_shared_memory(folder: Path, wanted_gib: float) -> Finding:
    """Whether Ray's objects find room in memory; on a disk each transfer is slow."""
    if not folder.is_dir():
        return Finding("shared memory", "ok", f"no {folder} on this system")
    free = shutil.disk_usage(folder).free / GIB
    found = f"{free:.2f} GiB free in {folder}, {wanted_gib:.2f} wanted"
    if free >= wanted_gib:
        return Finding("shared memory", "ok", found)
    remedy = "give the container more: --shm-size, or an emptyDir of medium Memory at /dev/shm"
    return Finding("shared memory", "warning", f"{found}: Ray would use a disk", remedy)


def check_spill(folder: Path) -> Finding:
    """Whether Ray may spill objects to its folder."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    usage = shutil.disk_usage(existing)
    usable = (usage.free - (1 - _SPILL_LIMIT) * usage.total) / GIB
    found = (
        f"{max(usable, 0.0):.1f} GiB of {usage.total / GIB:.0f} GiB that Ray may fill at {folder}"
    )
    remedy = "free some, or point RAY_TMPDIR and `ray start --temp-dir` to another disk"
    if not os.access(existing, os.W_OK):
        return Finding("spill space", "failure", f"{folder} can't be written", remedy)
    if usable <= 0:
        return Finding("spill space", "failure", f"{found}: it spills nothing", remedy)
    if usable < _LITTLE_GIB:
        return Finding("spill space", "warning", found, remedy)
    return Finding("spill space", "ok", found)


def _object_gib(config: RunConfig) -> float:
    """Two versions of float32 weights, or what a Ray that a run starts takes, if that is more."""
    if config.policy.model is None:
        return _OBJECT_STORE_GIB
    return max(_OBJECT_STORE_GIB, 2 * 4 * num_policy_parameters(config) / GIB)


def find_collective(config: RunConfig, *, timeout_s: float) -> list[Finding]:
    """An all-reduce between two processes here, over NCCL if there are two GPUs."""
    if config.runtime == "local":
        return []
    return [check_collective("nccl" if num_gpus() > 1 else "gloo", timeout_s=timeout_s)]


def check_collective(
    backend: Literal["gloo", "nccl"], *, timeout_s: float, ranks: Sequence[int] = (0, 1)
) -> Finding:
    """Whether two processes can add over this backend in time.

    Args:
        backend: "nccl" takes a GPU for each of them.
        timeout_s: for the start of the processes and the sum.
        ranks: which of the two are started.
    """
    with tempfile.TemporaryDirectory() as folder:
        common = ["collective", "--store", f"{folder}/store", "--backend", backend]
        common += ["--timeout-s", f"{timeout_s:g}"]
        ask = partial(ask_process, _PROBES, *common, timeout_s=timeout_s)
        waiting = [in_background(partial(ask, "--rank", str(r)), name="rank") for r in ranks]
        answers = [future.result() for future in waiting]
    name = "collective"
    remedy = (
        "see that the host's own name resolves, that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME "
        "names an interface that is up, and what NCCL_DEBUG=INFO says"
    )
    errors = [answer.value["error"] for answer in answers if answer.value is not None]
    if any(error is not None for error in errors):
        told = next(error for error in errors if error is not None)
        return Finding(name, "failure", f"{backend}: {told}", remedy)
    if len(errors) < 2:
        found = f"{backend}: no sum of two processes within {timeout_s:g} s"
        return Finding(name, "failure", found, remedy)
    return Finding(name, "ok", f"{backend}: two processes here can add")
