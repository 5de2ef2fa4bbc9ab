"""The learner group: Ray Train owns the processes, learner/ owns what they compute.

Every rank follows the coordinator's commands in order. Rank 0 publishes weights to the weight
store: the payload first, the version last. Ranks talk to each other through torch.distributed
alone (gloo on CPUs, NCCL on GPUs).
"""

import threading
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchTrainer, get_device

from rlgen.actors.coordinator import LearnerCommand
from rlgen.config.run import RunConfig
from rlgen.errors import RlgenError
from rlgen.learner.learner import Learner
from rlgen.learner.state_io import restore_learner, save_learner
from rlgen.nn.flat import pack_weights
from rlgen.nn.weights import state_sha256
from rlgen.policies.load import load_policy


def learner_loop(settings: dict[str, Any]) -> None:
    """What each rank runs, from the first command to the last."""
    config: RunConfig = settings["config"]
    coordinator, weights = settings["coordinator"], settings["weights"]
    rank = ray.train.get_context().get_world_rank()
    torch.set_num_threads(config.learner.threads)
    device = get_device()
    learner = Learner(load_policy(config, device=device), config, device=device)
    if settings["resume_from"] is not None:
        restore_learner(learner, settings["resume_from"])
    _publish(learner, weights, rank)
    number = 0
    while True:
        command = ray.get(coordinator.next_command.remote(rank, number))
        if command is None:
            continue
        if command.kind == "stop":
            return
        try:
            answer = _obey(command, learner, weights, rank)
        except RlgenError as error:
            ray.get(coordinator.fail.remote(error))
            raise
        ray.get(coordinator.answer.remote(rank, number, answer))
        number += 1


def _obey(command: LearnerCommand, learner: Learner, weights: Any, rank: int) -> Any:
    if command.kind == "learn":
        metrics = learner.update(command.batches[0])
        _publish(learner, weights, rank)
        return metrics
    if command.kind == "digest":
        return state_sha256(learner.policy_state()) if rank == 0 else None
    return save_learner(learner, command.uri) if rank == 0 else None


def _publish(learner: Learner, weights: Any, rank: int) -> None:
    if rank == 0:
        manifest, buffer = pack_weights(learner.policy_state(), version=learner.policy_version)
        ray.get(weights.publish.remote(manifest, buffer))


class LearnerGroup:
    """Starts the ranks in a thread of the driver and passes their failure on."""

    def __init__(
        self,
        config: RunConfig,
        *,
        coordinator: Any,
        weights: Any,
        resume_from: str | None,
        run_name: str,
        storage: str,
    ) -> None:
        """Return at once; the ranks come up meanwhile."""
        self._coordinator = coordinator
        resources: dict[str, float] = {"CPU": config.learner.num_cpus}
        if config.learner.num_gpus:
            resources["GPU"] = config.learner.num_gpus
        self._trainer = TorchTrainer(
            learner_loop,
            train_loop_config={
                "config": config,
                "coordinator": coordinator,
                "weights": weights,
                "resume_from": resume_from,
            },
            scaling_config=ScalingConfig(
                num_workers=config.learner.num_workers,
                use_gpu="GPU" in resources,
                resources_per_worker=resources,
            ),
            run_config=TrainRunConfig(
                name=run_name,
                storage_path=storage,
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        self._thread = threading.Thread(target=self._fit, name="learner-group", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the ranks to go home after a stop command."""
        self._thread.join(timeout_s)

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:
            # The first error counts: a rank that failed with its own error has reported it.
            failure = RlgenError(f"the learner group stopped: {error}")
            ray.get(self._coordinator.fail.remote(failure))
