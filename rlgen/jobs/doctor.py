"""See whether a run would work here, before it is asked to: one line for each thing that can break.

Owns the list of checks, the report and the exit status: 1 if anything fails. Nothing stays behind.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rlgen.config import RunConfig, load_config
from rlgen.jobs.cli import run_job
from rlgen.jobs.doctor_check import Check, Finding, run_checks

_TIMEOUT_S = 55.0
_SERVER_TIMEOUT_S = 5.0
_STORAGE_TIMEOUT_S = 20.0
_PROCESS_TIMEOUT_S = 45.0
"""A process that imports torch or Ray, on a machine that is busy."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, tell, and say by the exit status whether anything fails."""
    parser = argparse.ArgumentParser(
        prog="python -m rlgen.jobs.doctor", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of the run to come")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the findings here as well")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    asked = parser.parse_intermixed_args(arguments)
    config = load_config(asked.config, asked.settings)
    findings = []
    for finding in run_checks(all_checks(config), timeout_s=_TIMEOUT_S):
        print(as_text(finding), flush=True)
        findings.append(finding)
    counts = {v: sum(f.verdict == v for f in findings) for v in ("ok", "warning", "failure")}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if asked.json is not None:
        report = {**counts, "findings": [asdict(finding) for finding in findings]}
        asked.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if counts["failure"] else 0


def all_checks(config: RunConfig) -> list[Check]:
    """Everything that a run of this configuration needs."""
    from rlgen.jobs.doctor_cluster import find_ray
    from rlgen.jobs.doctor_inputs import find_config, find_mlflow, find_storage, find_weights
    from rlgen.jobs.doctor_machine import find_collective, find_gpus, find_memory
    from rlgen.jobs.doctor_versions import find_versions

    return [
        Check("config", partial(find_config, config)),
        Check("versions", partial(find_versions, config)),
        Check("gpus", partial(find_gpus, config, timeout_s=_PROCESS_TIMEOUT_S)),
        Check("memory", partial(find_memory, config)),
        Check("ray", partial(find_ray, config, timeout_s=_PROCESS_TIMEOUT_S)),
        Check("storage", partial(find_storage, config, timeout_s=_STORAGE_TIMEOUT_S)),
        Check("mlflow", partial(find_mlflow, config, timeout_s=_SERVER_TIMEOUT_S)),
        Check("weights", partial(find_weights, config, timeout_s=_STORAGE_TIMEOUT_S)),
        Check("collective", partial(find_collective, config, timeout_s=_PROCESS_TIMEOUT_S)),
    ]


def as_text(finding: Finding) -> str:
    """A finding for people; the remedy on a line of its own."""
    remedy = f"\n{'':32}-> {finding.remedy}" if finding.remedy else ""
    return f"{finding.verdict:<8}  {finding.name:<20}  {finding.found}{remedy}"


if __name__ == "__main__":
    sys.exit(run_job(main))
