"""What the doctor asks in processes of its own: GPUs, a cluster, a collective.

Whatever such a process takes, GPU memory and connections included, ends with it, and it can be
ended when it hangs. Each prints one line of JSON. Ray's and torch's import is theirs alone.
"""

import argparse
import json
import sys
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from rlgen.config.run import RunConfig
from rlgen.errors import PlacementError


def probe_gpus() -> dict[str, Any]:
    """Every GPU that torch sees, after it has added on each; and what torch was built for."""
    import torch

    found: dict[str, Any] = {"cuda": torch.version.cuda, "gpus": [], "error": None}
    try:
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            total = torch.ones(8, device=device).sum().item()
            assert total == 8.0, f"GPU {index} adds eight ones to {total}"
            found["gpus"].append(torch.cuda.get_device_name(device))
    except (RuntimeError, AssertionError) as error:
        found["error"] = str(error).splitlines()[0]
    return found


def probe_cluster(config: RunConfig) -> dict[str, Any]:
    """Connect, and list the nodes; an address must be known, so that nothing is started."""
    import ray

    from rlgen.actors.placement import connect, live_nodes

    try:
        connect(config)
    except PlacementError as error:
        return {"error": str(error), "nodes": []}
    try:
        return {"error": None, "nodes": [asdict(node) for node in live_nodes()]}
    finally:
        ray.shutdown()


def probe_collective(
    store: str, *, rank: int, size: int, backend: str, timeout_s: float
) -> dict[str, Any]:
    """Add a number of each rank over all of them.

    Args:
        store: a path where the ranks meet.
        rank: of this process.
        size: ranks.
        backend: "nccl" gives each rank a GPU; "gloo" uses none.
        timeout_s: for the others to come.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    try:
        dist.init_process_group(
            backend,
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
        )
        sent = torch.full((1024,), float(rank + 1), device=device)
        dist.all_reduce(sent)
        total, wanted = sent[-1].item(), size * (size + 1) / 2
        dist.destroy_process_group()
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}
    return {"error": None if total == wanted else f"the sum is {total}, not {wanted}"}


def main() -> int:
    """Make one probe and print what it found."""
    parser = argparse.ArgumentParser(prog="python -m rlgen.jobs.doctor_probes")
    parser.add_argument("probe", choices=("gpus", "cluster", "collective"))
    parser.add_argument("--store")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--backend", default="gloo")
    parser.add_argument("--timeout-s", type=float, default=30.0)
    asked = parser.parse_args()
    if asked.probe == "gpus":
        found = probe_gpus()
    elif asked.probe == "cluster":
        found = probe_cluster(RunConfig.model_validate_json(sys.stdin.read()))
    else:
        found = probe_collective(
            asked.store,
            rank=asked.rank,
            size=asked.size,
            backend=asked.backend,
            timeout_s=asked.timeout_s,
        )
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
