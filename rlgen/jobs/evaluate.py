"""Judge a policy over guidance scales: many images, many metrics, no training.

`python -m rlgen.jobs.evaluate --checkpoint runs/NAME/checkpoints/step-00120 --num-images 10000`

Sampled and scored by the rollout and reward actors of a training run. Units of images that are done
are kept in the output folder, and the same command goes on from there. The results are
evaluate.json, a table, and an MLflow run.
"""

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlgen.config import RunConfig, load_config
from rlgen.config.evaluate import (
    EvaluationPlan,
    describe_evaluation,
    plan_evaluation,
    published_architecture,
)
from rlgen.config.plan import check_local_files, check_required
from rlgen.errors import ConfigError
from rlgen.jobs.cli import run_job

if TYPE_CHECKING:  # torch and Ray take seconds to import; --help must not
    from rlgen.evaluation.finished import FinishedUnits
    from rlgen.evaluation.measured import Measured
    from rlgen.jobs.console import RunProgress
    from rlgen.learner.runtime import Runtime
    from rlgen.types import ScoredRollout, WorkUnit

_POLICY_NAME = "policy.safetensors"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, plan, sample, measure, tell."""
    given = _parse(arguments)
    config, policy = _read_request(given)
    plan = plan_evaluation(config, scales=given.scales, num_images=given.num_images, policy=policy)
    check_local_files(plan.config)
    if given.dry_run:
        folder = given.output or "runs/evaluate-<key>"
        print(describe_evaluation(plan, _architecture(plan.config), str(folder)))
        return 0
    check_required(plan.config)
    evaluate(plan, given.output)
    return 0


def evaluate(plan: EvaluationPlan, output: Path | None) -> "dict[float, Measured]":
    """Sample what is missing, measure every scale, and leave the results.

    Args:
        plan: the evaluation.
        output: the folder; None names it after what the images depend on.
    Returns:
        the metrics by guidance scale.
    Raises:
        RlgenError: an input is missing, damaged or does not fit; the folder belongs to another
            evaluation; or sampling failed, after which the finished units are kept.
    """
    from rlgen.evaluation.finished import FinishedUnits, evaluation_key
    from rlgen.jobs.console import RunProgress
    from rlgen.jobs.evaluate_report import measure_scales, write_results
    from rlgen.jobs.prepare import prepare_inputs
    from rlgen.storage import sha256_hex

    with RunProgress(1) as progress:
        place = _Place(progress, output or Path("runs"))
        plan = replace(plan, config=prepare_inputs(plan.config, place))
        progress.stage("reading the key of the evaluation")
        key = evaluation_key(plan.config)
        digest = sha256_hex(json.dumps(key, sort_keys=True).encode())
        folder = output or place.folder / f"evaluate-{digest[:12]}"
        finished = FinishedUnits(folder, key)
        units = {scale: evaluation_units(plan, scale) for scale in plan.scales}
        _sample(plan, units, finished, replace(place, folder=folder))
        progress.stage("measuring")
        policy_sha256 = str(key["policy.checkpoint"])
        results = measure_scales(plan, units, finished, policy_sha256=policy_sha256)
        write_results(results, folder, progress)
        return results.by_scale


def evaluation_units(plan: EvaluationPlan, scale: float) -> "list[WorkUnit]":
    """The units of one scale: the noise, and so the images, of a run's evaluations."""
    from rlgen.sampling.units import independent_units, training_settings

    units = independent_units(
        plan.config,
        "evaluate",
        num_images=plan.num_images,
        seed=plan.config.evaluation.seed,
        policy_version=0,
        settings=replace(training_settings(plan.config), cfg_scale=scale),
    )
    return [replace(unit, is_detailed=True) for unit in units]


def results_in_order(
    runtime: "Runtime", units: "Sequence[WorkUnit]", *, ahead: int
) -> "Iterator[ScoredRollout]":
    """Submit units, a few ahead, and yield their results one by one, so that each can be kept."""
    submitted: deque[WorkUnit] = deque()
    for unit in units:
        runtime.submit([unit])
        submitted.append(unit)
        if len(submitted) > ahead:
            yield from runtime.collect([submitted.popleft()])
    while submitted:
        yield from runtime.collect([submitted.popleft()])


@dataclass(frozen=True)
class _Place:
    """What the preparation of a job needs to know of this one."""

    progress: "RunProgress"
    folder: Path

    @property
    def checkpoint_root(self) -> str:
        """A folder that every node can write to."""
        return str(self.folder.resolve())

    def stage(self, text: str, *, done: int | None = None, total: int | None = None) -> None:
        self.progress.stage(text, done=done, total=total)

    def note(self, text: str) -> None:
        self.progress.say(text)


def _sample(
    plan: EvaluationPlan,
    units: "Mapping[float, list[WorkUnit]]",
    finished: "FinishedUnits",
    place: _Place,
) -> None:
    """Make the units that are not done, by the samplers and scorers of a training run."""
    missing = [u for of_scale in units.values() for u in of_scale if not finished.has(u)]
    total = sum(len(of_scale) for of_scale in units.values())
    if len(missing) < total:
        place.note(f"{total - len(missing)} of {total} units are done already")
    if not missing:
        return
    from rlgen.jobs.prepare import make_runtime

    config = plan.config
    runtime = make_runtime(config, place, with_learner=False)
    try:
        place.stage("starting the roles")
        runtime.start(config)
        workers = config.rollout.num_workers + config.reward.num_workers
        ahead = 0 if config.runtime == "local" else 2 * workers
        for done, scored in enumerate(results_in_order(runtime, missing, ahead=ahead), start=1):
            finished.save(scored)
            scale = scored.rollout.unit.settings.cfg_scale
            place.stage(
                f"sampling at scale {scale:g}, units", done=total - len(missing) + done, total=total
            )
    finally:
        runtime.close()


def _architecture(config: RunConfig) -> tuple[str, dict[str, Any]] | None:
    """Of a published policy from its name; only to read rlgen's own file takes torch."""
    published = published_architecture(config)
    if published is not None:
        return published
    from rlgen.jobs.evaluate_report import policy_architecture

    return policy_architecture(config)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rlgen.jobs.evaluate",
        description=(__doc__ or "").split("\n")[0],
        epilog="settings: any field of the configuration, such as evaluation.images_per_unit=100 "
        "rollout.num_workers=4 runtime=local",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file; default: the checkpoint's own, or the digits"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="PLACE",
        help="a run's checkpoint (.../step-00600), or a policy.safetensors; default: the "
        "configuration's policy",
    )
    parser.add_argument("--scales", metavar="S,S,...", help="default: 1 and evaluation.cfg_scales")
    parser.add_argument(
        "--num-images",
        metavar="N",
        type=int,
        help="images per scale; default: 50000 for a published model, else evaluation.num_images",
    )
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="default: runs/evaluate-<key of the images>"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(arguments)


def _read_request(given: argparse.Namespace) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration, and the keys that put the checkpoint's policy into it.

    Raises:
        ConfigError: two policies are named, or the configuration can't be used.
        CheckpointError: there is no checkpoint, or its policy is damaged.
    """
    checkpoint = given.checkpoint
    if checkpoint is None:
        return load_config(given.config, given.settings), {}
    rivals = [word for word in given.settings if word.startswith("policy.checkpoint=")]
    if rivals:
        raise ConfigError(f"--checkpoint {checkpoint} and {rivals[0]} name two policies; keep one.")
    if checkpoint.endswith(".safetensors"):
        return load_config(given.config, given.settings), _policy_keys(checkpoint, None)
    from rlgen.learner.checkpoint import read_part
    from rlgen.storage import join, local_copy, sha256_hex

    digest = sha256_hex(read_part(checkpoint, _POLICY_NAME))
    keys = _policy_keys(join(checkpoint, _POLICY_NAME), digest)
    if given.config is not None:
        return load_config(given.config, given.settings), keys
    with local_copy(join(checkpoint, "config.yaml")) as path:
        return load_config(str(path), given.settings), keys


def _policy_keys(location: str, sha256: str | None) -> dict[str, Any]:
    """rlgen's own file in place of whatever the configuration names, published or not."""
    return {
        "policy.checkpoint": location,
        "policy.model": None,
        "policy.architecture": {},
        "policy.sha256": sha256,
    }


if __name__ == "__main__":
    sys.exit(run_job(main))
