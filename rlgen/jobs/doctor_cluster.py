"""The doctor's look at Ray: whether it answers, takes this process's token, and has room.

Owns the difference between a refused token and an absent cluster, which Ray's Python errors don't
tell. Nothing is started or placed.
"""

import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlgen.actors.placement import find_cluster
from rlgen.config.roles import Node, role_resources, unmet_roles
from rlgen.config.run import RunConfig
from rlgen.errors import PlacementError
from rlgen.jobs.doctor_check import Finding, ask_process, from_error
from rlgen.jobs.doctor_machine import num_gpus
from rlgen.storage import is_url

_REFUSED_TOKEN = "InvalidAuthToken"
"""What Ray's core writes to stderr, again and again, for some twenty seconds."""
_NO_TOKEN = "no authentication token was found"
_ADDRESS_REMEDY = "see that the head runs, and correct RAY_ADDRESS or cluster.address"


def find_ray(config: RunConfig, *, timeout_s: float) -> list[Finding]:
    """Reach the cluster that a run would use, and see whether the roles fit on it."""
    if config.runtime == "local":
        return [Finding("ray", "ok", "not used, as runtime = local")]
    address = find_cluster(config.cluster.address)
    if address is None:
        found = "no cluster is configured or runs here: a run starts Ray on this machine"
        return [Finding("ray", "ok", found), check_placement(config, [_this_machine()])]
    if address.startswith(("http://", "https://")):
        return [check_job_server(address, timeout_s=min(timeout_s, 10.0))]
    answer = ask_process(
        "rlgen.jobs.doctor_probes",
        "cluster",
        timeout_s=timeout_s,
        given=config.model_dump_json(),
        give_up_on=_REFUSED_TOKEN,
    )
    error = "" if answer.value is None else answer.value["error"] or ""
    if _REFUSED_TOKEN in answer.errors or _NO_TOKEN in error:
        return [_refused(address)]
    if answer.value is None:
        last = "".join(answer.errors.strip().splitlines()[-1:])
        found = f"{address} gives no answer in {timeout_s:g} s" if answer.is_late else last
        return [Finding("ray", "failure", found, _ADDRESS_REMEDY)]
    if answer.value["error"] is not None:
        return [from_error("ray", PlacementError(answer.value["error"]))]
    return judge_nodes(config, address, answer.value["nodes"])


def judge_nodes(
    config: RunConfig, address: str, told: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    """What the nodes of a cluster mean for a run."""
    nodes = [Node(**node) for node in told]
    cpus, gpus = (sum(node.total.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    found = f"{address}: {len(nodes)} node(s), {cpus:g} CPU, {gpus:g} GPU"
    return [
        Finding("ray", "ok", found),
        check_placement(config, nodes),
        *check_shared_storage(config, len(nodes)),
    ]


def check_placement(config: RunConfig, nodes: Sequence[Node]) -> Finding:
    """Whether all roles find a place: now, or when nobody else uses the nodes."""
    roles = role_resources(config)
    unmet = unmet_roles(roles, nodes)
    if not unmet:
        count = sum(role.count for role in roles)
        return Finding("placement", "ok", f"room for {count} processes of {len(roles)} roles")
    labels = sorted({label for role in roles for label in role.label_selector})
    has = "; ".join(node.describe(labels) for node in nodes) or "none"
    found = f"no room for {' and '.join(map(str, unmet))}. Nodes: {has}"
    is_busy = not unmet_roles(roles, nodes, busy=False)
    if is_busy:
        return Finding("placement", "warning", f"{found}. Others use it", "wait, or add nodes")
    return Finding(
        "placement",
        "failure",
        found,
        "add nodes, or lower num_workers, num_cpus or num_gpus of these roles; where nodes are "
        "added on demand, see that such a node is among those that may come",
    )


def check_shared_storage(config: RunConfig, num_nodes: int) -> list[Finding]:
    """Several nodes need checkpoints where all of them can write."""
    root = config.checkpoint.uri or "the run folder"
    if num_nodes < 2 or is_url(root):
        return []
    found = f"{num_nodes} nodes, and checkpoints go to {root} on this machine"
    remedy = "set checkpoint.uri to an object store, or see that every node mounts that folder"
    return [Finding("shared storage", "warning", found, remedy)]


def check_job_server(address: str, *, timeout_s: float) -> Finding:
    """Whether the address for `ray job submit` answers and takes the token.

    Placement can't be told from outside the cluster: the doctor submitted as a job tells it.
    """
    request = urllib.request.Request(f"{address.rstrip('/')}/api/version")
    token = _token()
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s):
            pass
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return _refused(address)
        return Finding("ray", "failure", f"{address} answers {error.code}", _ADDRESS_REMEDY)
    except (OSError, ValueError) as error:
        return Finding("ray", "failure", f"{address} doesn't answer ({error})", _ADDRESS_REMEDY)
    return Finding(
        "ray",
        "warning",
        f"{address} takes jobs; a run can't connect to it, and placement can't be seen from here",
        f"ray job submit --address {address} -- python -m rlgen.jobs.doctor",
    )


def _refused(address: str) -> Finding:
    """A cluster that asks for a token, and what this process has."""
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode != "token":
        found = (
            f"{address} asks for a token, and RAY_AUTH_MODE is {mode or 'not set'}: none is sent"
        )
        remedy = "set RAY_AUTH_MODE=token, and the cluster's token as RAY_AUTH_TOKEN"
    elif _token() is None:
        found = f"{address} asks for a token, and there is none"
        remedy = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
    else:
        found = f"{address} refuses the token of {_token_source()}"
        remedy = "take the token that the head was started with"
    return Finding("ray", "failure", found, remedy)


def _token_source() -> str:
    """Where Ray looks for a token, in its order."""
    named = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
    return named[0] if named else str(Path.home() / ".ray" / "auth_token")


def _token() -> str | None:
    source = _token_source()
    if source == "RAY_AUTH_TOKEN":
        return os.environ[source]
    try:
        return Path(os.environ.get(source, source)).read_text().strip() or None
    except OSError:
        return None


def _this_machine() -> Node:
    """What a Ray started here would offer."""
    has = {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(num_gpus())}
    return Node("this machine", has, has)
