"""The main job: post-train a token-based image generator by GRPO.

`python -m rlgen.jobs.grpo` trains the embedded default; `--help` tells the rest. This file tells
the whole story of a run. What each role computes is in sampling/, rewards/, moments/ and learner/;
where it runs is the runtime's business.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rlgen.config.plan import (
    check_local_files,
    check_required,
    check_trainable,
    describe_plan,
)
from rlgen.config.run import RunConfig
from rlgen.jobs.cli import Request, parse_request, run_job

if TYPE_CHECKING:  # torch and Ray take seconds to import; --dry-run must not
    from rlgen.evaluation.evaluator import UnitRunner
    from rlgen.jobs.checkpoints import RunCheckpoints
    from rlgen.jobs.recorder import Recorder
    from rlgen.learner.runtime import Runtime
    from rlgen.types import ScoredRollout, WorkUnit

_LAST_CHANCE_S = 10.0
"""For the checkpoint that is being written when a run fails."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, plan, prepare, run."""
    request = parse_request(arguments, job="grpo", description=__doc__.split("\n")[0])
    check_trainable(request.config)
    check_local_files(request.config)
    if request.is_dry_run:
        print(describe_plan(request.config, request.rates))
        return 0
    check_required(request.config)
    return run(request)


def run(request: Request) -> int:
    """Prepare inputs, place the roles, train, and leave a folder that shows the result.

    A run that was interrupted goes on from its newest checkpoint, be it that the same command is
    given again, or that a role was lost in the middle of it.
    """
    from rlgen.jobs.checkpoints import RunCheckpoints
    from rlgen.jobs.metrics_export import exported
    from rlgen.jobs.prepare import make_runtime, prepare_inputs
    from rlgen.jobs.recorder import Recorder
    from rlgen.jobs.resuming import resumed
    from rlgen.jobs.stopping import stop_on_signals

    with Recorder(request.config, output=request.output) as recorder:
        config = prepare_inputs(request.config, recorder)
        with RunCheckpoints(request.config, recorder) as checkpoints:
            config = resumed(config, request.config, recorder)
            recorder.open(config)
            runtime = make_runtime(config, recorder)
            try:
                with stop_on_signals(recorder), exported(config, recorder):
                    train_to_the_end(config, runtime, recorder, checkpoints)
            finally:
                checkpoints.let_go(timeout_s=_LAST_CHANCE_S)
                runtime.close()
    return 0


def train_to_the_end(
    config: RunConfig, runtime: "Runtime", recorder: "Recorder", checkpoints: "RunCheckpoints"
) -> None:
    """Train, and go on from a checkpoint after a rollback or the loss of a role."""
    from rlgen.errors import RoleLost
    from rlgen.jobs.guarding import Rollback
    from rlgen.jobs.resuming import after_loss

    while True:
        try:
            train(config, runtime, recorder, checkpoints)
            return
        except Rollback as rollback:
            config = rollback.config
            recorder.roll_back(config)
        except RoleLost as loss:
            checkpoints.let_go(timeout_s=_LAST_CHANCE_S)
            config = after_loss(loss, config, recorder)


def train(
    config: RunConfig, runtime: "Runtime", recorder: "Recorder", checkpoints: "RunCheckpoints"
) -> None:
    """The run itself, on roles that are placed but not started."""
    from rlgen.evaluation.evaluator import Evaluator
    from rlgen.jobs.checkpoints import restore_run
    from rlgen.jobs.guarding import act_on, keep_best
    from rlgen.jobs.stopwatch import Stopwatch
    from rlgen.learner.batch import learner_batch, pooled

    recorder.stage("starting the roles")
    runtime.start(config)
    evaluator = Evaluator(config, runtime)
    if config.checkpoint.resume_from is None:
        recorder.stage("judging the base policy")
        recorder.begin(evaluator.sweep(0))
        recorder.log_bootstrap(bootstrap_moments(config, runtime))
        first_step = 0
        checkpoints.save(config, runtime, first_step)
    else:
        first_step = restore_run(config, runtime, recorder)

    watch = Stopwatch()
    for step, scored in scored_steps(config, runtime, first_step):
        watch.lap("rollout_and_score")
        rewards = runtime.commit_moments(step, *pooled(scored))
        watch.lap("commit")
        metrics = runtime.learn(learner_batch(step, scored, rewards))
        watch.lap("learn")
        recorder.log_step(step, scored, rewards, metrics | watch.metrics(), runtime.health())
        if is_judged(step + 1, config):
            broken = recorder.log_evaluation(step + 1, *evaluator.evaluate(step + 1))
            act_on(broken, config, runtime, recorder, checkpoints, step + 1)
            keep_best(config, runtime, recorder, checkpoints, step + 1)
        is_last = step + 1 == config.steps or recorder.is_stopping
        if is_due(step + 1, config.checkpoint.every_steps) or is_last:
            checkpoints.save(config, runtime, step + 1, must_commit=is_last)
        recorder.stop_if_asked()
        watch = Stopwatch()

    recorder.stage("judging the trained policy")
    recorder.finish(
        evaluator.sweep(config.steps),
        policy_sha256=runtime.policy_sha256(),
        health=runtime.health(),
    )


def scored_steps(
    config: RunConfig, runtime: "UnitRunner", first_step: int = 0
) -> Iterator[tuple[int, "list[ScoredRollout]"]]:
    """Yield every step with its scored units; sampling runs ahead by max_policy_lag steps.

    The units of a step ask for the newest policy version when they are submitted, so whoever
    takes a step must have learnt from it before asking for the next one.
    """
    from rlgen.sampling.units import training_units

    lag = config.max_policy_lag

    def units_of(step: int) -> "list[WorkUnit]":
        version = max(step - lag, first_step)
        return training_units(config, step, policy_version=version)

    for step in range(first_step, min(first_step + lag, config.steps)):
        runtime.submit(units_of(step))  # a head start for the samplers, if lag allows one
    for step in range(first_step, config.steps):
        if step + lag < config.steps:
            runtime.submit(units_of(step + lag))
        yield step, runtime.collect(units_of(step))


def bootstrap_moments(config: RunConfig, runtime: "Runtime") -> "list[ScoredRollout]":
    """Start the EMA from images of the base policy, sampled like the training's, if asked to."""
    import numpy as np

    from rlgen.sampling.units import independent_units, training_settings

    loo_fid = config.reward.loo_fid
    if loo_fid is None or loo_fid.start == "reference":
        return []
    units = independent_units(
        config,
        "bootstrap",
        num_images=loo_fid.bootstrap_images,
        seed=config.seed,
        policy_version=0,
        settings=training_settings(config),
    )
    runtime.submit(units)
    scored = runtime.collect(units)
    features = [item.features_BF for item in scored]
    runtime.bootstrap_moments(np.concatenate([f for f in features if f is not None]))
    return scored


def is_judged(step: int, config: RunConfig) -> bool:
    """Whether the policy is judged after this step; the last one is judged at the end."""
    due = is_due(step, config.evaluation.every_steps) or is_due(step, config.guard.every)
    return due and step < config.steps


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every > 0 and step % every == 0


if __name__ == "__main__":
    sys.exit(run_job(main))
