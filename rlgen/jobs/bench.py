"""Measure one part of rlgen by itself, and print the result as JSON.

Each command is a module with `add_arguments` and `measure`; its --help has the options.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rlgen.jobs.cli import run_job

COMMANDS = {
    "sample": "rlgen.jobs.bench_sample",
    "learn": "rlgen.jobs.bench_learn",
    "weights": "rlgen.jobs.bench_weights",
    "orchestration": "rlgen.jobs.bench_orchestration",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m rlgen.jobs.bench", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("options", nargs=argparse.REMAINDER)
    chosen = parser.parse_args(arguments)

    module = import_module(COMMANDS[chosen.command])
    parser = argparse.ArgumentParser(
        prog=f"python -m rlgen.jobs.bench {chosen.command}",
        description=(module.__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")
    module.add_arguments(parser)
    request = parser.parse_intermixed_args(chosen.options)
    result = {"benchmark": chosen.command, **module.measure(request)}
    text = json.dumps(result, indent=1)
    print(text)
    if request.json is not None:
        request.json.write_text(text + "\n")
    if "missed" in result:  # a bar that the options set
        print(result["missed"], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
