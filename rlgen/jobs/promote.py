"""Add a run's policy to a registered model of MLflow, as its champion if it is judged best.

`python -m rlgen.jobs.promote runs/NAME --model digits`

A run does the same at its end if `tracking.model` names a model.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlgen.config.load import load_config
from rlgen.config.tracking import check_model_name
from rlgen.errors import ConfigError
from rlgen.jobs.cli import run_job
from rlgen.spool import SPOOL_NAME, read_spool, without_password


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, look the run up, register, tell."""
    given = _parse(arguments)
    from rlgen.jobs.lineage import candidate_of
    from rlgen.mlflow_run import promote_now

    model = given.model or _configured_model(given.run_dir)
    check_model_name(model)
    candidate = candidate_of(given.run_dir, model=model, step=given.step)
    uri, run_id = _tracked(given.run_dir, given.uri)
    print(promote_now(uri, run_id, candidate))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rlgen.jobs.promote", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the folder of a run")
    parser.add_argument(
        "--model", metavar="NAME", help="registered model; default: the run's tracking.model"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="step of a judged checkpoint; default: the last"
    )
    parser.add_argument(
        "--uri", metavar="URI", help="tracking URI; default: where the run was tracked last"
    )
    return parser.parse_args(arguments)


def _configured_model(run_dir: Path) -> str:
    path = run_dir / "config.yaml"
    name = load_config(str(path), []).tracking.model if path.exists() else None
    if name is None:
        raise ConfigError(f"{run_dir} names no tracking.model; give --model NAME.")
    return name


def _tracked(run_dir: Path, uri: str | None) -> tuple[str, str]:
    """Where the run is in MLflow, by its spool: URI and run id."""
    from rlgen.tracking import absolute_uri, check_tracking_uri

    if uri is not None:
        check_tracking_uri(uri)
        uri = absolute_uri(uri)
    shown = None if uri is None else without_password(uri)
    runs = [(r["uri"], r["run_id"]) for r in read_spool(run_dir) if r["kind"] == "run"]
    for known, run_id in reversed(runs):
        if shown in (None, known):
            return uri or known, run_id
    raise ConfigError(
        f"{run_dir / SPOOL_NAME} knows no run at {shown or 'any MLflow'} (it knows "
        f"{', '.join(known for known, _ in runs) or 'none'}); send the run there first: "
        f"`python -m rlgen.tracking {run_dir} {shown or 'URI'}`."
    )


if __name__ == "__main__":
    sys.exit(run_job(main))
