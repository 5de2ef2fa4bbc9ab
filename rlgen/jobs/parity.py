"""Compare rlgen's models with golden numbers of the public implementations.

Reads a folder of cases, builds each model from the case's configuration and weight rule, and
prints the largest deviation of each case. It needs no download, so it also verifies an
installation on new hardware. Exit status 1 if any case fails.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlgen.errors import ConfigError
from rlgen.jobs.cli import run_job

if TYPE_CHECKING:
    from rlgen.parity.cases import Comparison


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cases and print a line for each."""
    parser = argparse.ArgumentParser(
        prog="python -m rlgen.jobs.parity", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--cases", type=Path, required=True, metavar="DIR", help="cases.json, .npz")
    parser.add_argument("--family", help="comma-separated families; default: all of the folder")
    parser.add_argument("--case", help="name of a single case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparisons here")
    parser.add_argument("--device", default="cpu", help="such as cuda; default: cpu")
    request = parser.parse_args(arguments)

    import torch

    from rlgen.parity.cases import read_cases
    from rlgen.parity.run import run_case

    try:
        device = torch.empty(0, device=request.device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {request.device} can't be used: {error}") from None
    torch.backends.cudnn.allow_tf32 = False  # the numbers are float32's
    entries = _chosen(read_cases(request.cases), request.family, request.case)
    results: list[dict[str, Any]] = []
    for entry in entries:
        start = time.perf_counter()
        comparisons = run_case(request.cases, entry, device=device)
        results.append(_result(entry, comparisons, time.perf_counter() - start))
        _print(results[-1])
    num_failed = sum(not result["passed"] for result in results)
    print(f"{len(results) - num_failed} passed, {num_failed} failed")
    if request.json is not None:
        request.json.write_text(json.dumps(results, indent=1))
    return 1 if num_failed else 0


def _chosen(
    entries: list[dict[str, Any]], families: str | None, name: str | None
) -> list[dict[str, Any]]:
    """Select cases; a family or name that no case has is an error.

    Raises:
        ConfigError: names what there is.
    """
    present = sorted({str(entry.get("family")) for entry in entries})
    wanted = present if families is None else families.split(",")
    missing = sorted(set(wanted) - set(present))
    if missing:
        raise ConfigError(
            f"no case is of family {', '.join(missing)}; the folder has {', '.join(present)}."
        )
    chosen = [entry for entry in entries if entry.get("family") in wanted]
    if name is not None:
        chosen = [entry for entry in chosen if entry.get("name") == name]
    if not chosen:
        names = ", ".join(str(entry.get("name")) for entry in entries)
        raise ConfigError(f"no case is chosen by --family and --case; the folder has {names}.")
    return chosen


def _result(
    entry: dict[str, Any], comparisons: "Sequence[Comparison]", seconds: float
) -> dict[str, Any]:
    return {
        "name": entry.get("name"),
        "family": entry.get("family"),
        "passed": bool(comparisons) and all(c.passed for c in comparisons),
        "wall_s": round(seconds, 3),
        "arrays": [
            {
                "array": c.array,
                "deviation": c.deviation if c.deviation < float("inf") else None,
                "tolerance": c.tolerance,
                "passed": c.passed,
                "problem": c.problem,
            }
            for c in comparisons
        ],
    }


def _print(result: dict[str, Any]) -> None:
    """One line a case with the array that is nearest to its tolerance; one more per failure."""
    arrays = result["arrays"]
    measured = [a for a in arrays if a["deviation"] is not None]
    worst = max(measured, key=_share_of_tolerance, default=None)
    verdict = "pass" if result["passed"] else "FAIL"
    shown = ""
    if worst is not None:
        shown = f"{worst['deviation']:.3g} of {worst['tolerance']:g} in {worst['array']}"
    print(f"{verdict}  {result['name']:<28} {shown}  ({result['wall_s']:.1f} s)", flush=True)
    for array in arrays:
        if not array["passed"]:
            deviation = array["deviation"]
            size = "a value that is not finite" if deviation is None else f"{deviation:.3g}"
            found = array["problem"] or f"deviates by {size}"
            print(f"      {array['array']}: {found}", flush=True)


def _share_of_tolerance(array: dict[str, Any]) -> float:
    return array["deviation"] / max(array["tolerance"], 1e-30)


if __name__ == "__main__":
    sys.exit(run_job(main))
