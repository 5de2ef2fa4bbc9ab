"""The command line that the jobs share.

Owns the arguments and the promise that an error on purpose is one paragraph without traceback.
Imports nothing heavy, so that --help and --dry-run answer at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlgen.config import RunConfig, load_config
from rlgen.config.sizing import Rates, load_rates
from rlgen.errors import RlgenError

_EPILOG = """settings:
  any field of the configuration, such as
    seed=1 steps=60 rollout.num_workers=3 learner.num_workers=2 reward.loo_fid.weight=0
  --dry-run prints the plan that they make; config.yaml in a run's folder lists all fields."""


@dataclass(frozen=True)
class Request:
    """What a user asked a job to do."""

    config: RunConfig
    output: Path | None
    is_dry_run: bool
    rates: Rates = field(default_factory=Rates)
    """What --dry-run sizes a cluster by."""


def parse_request(arguments: Sequence[str] | None, *, job: str, description: str) -> Request:
    """Read the command line of a job that takes a run configuration.

    Raises:
        ConfigError: the configuration can't be used.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m rlgen.jobs.{job}",
        description=description,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="YAML file; sections merge over defaults, and over those of a file named before",
    )
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="run folder; default: runs/<time>"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument(
        "--rates",
        action="append",
        default=[],
        metavar="PATH",
        help="size the cluster in --dry-run: a JSON file of `bench sample` or `bench learn`, or a "
        "run's folder; may be given several times",
    )
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    known = parser.parse_intermixed_args(arguments)
    config = load_config(known.config, known.settings)
    return Request(config, known.output, known.dry_run, load_rates(known.rates))


def run_job(main: Callable[[], int]) -> int:
    """Run a job's main; print an error on purpose as a paragraph and return 2."""
    try:
        return main()
    except RlgenError as error:
        from rlgen.jobs.console import fail

        fail(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
