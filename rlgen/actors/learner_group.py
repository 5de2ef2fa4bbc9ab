"""The learner group: Ray Train owns the processes, learner/ owns what they compute.

Every rank follows the coordinator's commands in order. Rank 0 publishes weights to the weight
store: the payload first, the version last. Ranks talk to each other through torch.distributed
alone (gloo on CPUs, NCCL on GPUs).
"""

import logging
import threading
from contextlib import suppress
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchTrainer, get_device

from rlgen.actors.coordinator import LEARNER, LearnerCommand
from rlgen.actors.heartbeat import start_beating
from rlgen.actors.shell import brief, explained
from rlgen.actors.weight_transport import Publisher, collective_backend
from rlgen.config.run import RunConfig
from rlgen.errors import RlgenError, StorageError
from rlgen.learner.learner import Learner
from rlgen.learner.state_io import LearnerSaver, SaveOutcome, restore_learner
from rlgen.nn.weights import state_sha256
from rlgen.policies.load import load_policy

_log = logging.getLogger(__name__)


def learner_loop(settings: dict[str, Any]) -> None:
    """What each rank runs: it serves, and tells a fault of its own from a loss around it."""
    try:
        _serve(settings)
    except Exception as error:
        if not _is_loss(error):
            rank = ray.train.get_context().get_world_rank()
            told = explained(error, RlgenError, f"learner rank {rank}")
            ray.get(settings["coordinator"].fail.remote(told))
        raise


def _is_loss(error: Exception) -> bool:
    """Whether a process, a node or the storage went away, so that starting again may help."""
    if isinstance(error, (RayError, StorageError)):
        return True
    # To the ranks that live on, gloo and NCCL report the death of another one so.
    is_collective = type(error) in (RuntimeError, dist.DistBackendError, dist.DistNetworkError)
    return is_collective and dist.is_initialized() and dist.get_world_size() > 1


def _serve(settings: dict[str, Any]) -> None:
    """Load, then follow commands from the first to the last."""
    config: RunConfig = settings["config"]
    coordinator = settings["coordinator"]
    attempt, resume_from = settings["attempt"], config.checkpoint.resume_from
    rank = ray.train.get_context().get_world_rank()
    torch.set_num_threads(config.learner.threads)
    device = get_device()
    learner = Learner(load_policy(config, device=device), config, device=device)
    if resume_from is not None:
        restore_learner(learner, resume_from)
    start_beating(coordinator, f"{LEARNER}{attempt}-{rank}")
    publisher: Publisher | None = None
    if rank == 0:
        backend = collective_backend(config)
        publisher = Publisher(settings["weights"], config.weights, backend=backend)
    _publish(learner, publisher)

    def note_saved(uri: str, outcome: SaveOutcome) -> None:
        ray.get(coordinator.note_saved.remote(attempt, uri, outcome))

    saver = LearnerSaver(note_saved)
    number = 0
    while True:
        command = ray.get(coordinator.next_command.remote(attempt, rank, number))
        if command is None:
            continue
        if command.kind == "stop":
            return
        answer = _obey(command, learner, publisher, rank)
        if command.kind == "save":
            saver.start(learner, command.uri, is_writer=rank == 0)
        ray.get(coordinator.answer.remote(attempt, rank, number, answer))
        number += 1


def _obey(command: LearnerCommand, learner: Learner, publisher: Publisher | None, rank: int) -> Any:
    if command.kind == "learn":
        metrics = learner.update(command.batches[0])
        return metrics | _publish(learner, publisher)
    if command.kind == "digest":
        state = learner.policy_state()  # every rank helps to gather it
        return state_sha256(state) if rank == 0 else None
    return None


def _publish(learner: Learner, publisher: Publisher | None) -> dict[str, float]:
    """Rank 0 has the publisher; the others help to gather the state."""
    state = learner.policy_state()
    return {} if publisher is None else publisher.publish(state, version=learner.policy_version)


class LearnerGroup:
    """One attempt of the ranks, in a thread of the driver that passes their loss on.

    Ray Train starts the ranks and tears all down when one is lost. Starting again is the driver's
    decision, because coordinator and moment store must go back to the same checkpoint.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        coordinator: Any,
        weights: Any,
        attempt: int,
        run_name: str,
        storage: str,
    ) -> None:
        """Return at once; the ranks come up meanwhile."""
        self._coordinator = coordinator
        self._attempt = attempt
        self._may_end = False
        resources: dict[str, float] = {"CPU": config.learner.num_cpus}
        if config.learner.num_gpus:
            resources["GPU"] = config.learner.num_gpus
        self._trainer = TorchTrainer(
            learner_loop,
            train_loop_config={
                "config": config,
                "coordinator": coordinator,
                "weights": weights,
                "attempt": attempt,
            },
            scaling_config=ScalingConfig(
                num_workers=config.learner.num_workers,
                use_gpu="GPU" in resources,
                resources_per_worker=resources,
                label_selector=dict(config.learner.label_selector) or None,  # type: ignore[call-arg]
            ),
            run_config=TrainRunConfig(
                name=f"{run_name}-{attempt}",
                storage_path=storage,
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        self._thread = threading.Thread(target=self._fit, name="learner-group", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the ranks to go home; whether they did. Their end is no loss any more."""
        self._may_end = True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:
            if self._may_end:  # the driver may have left Ray, and a call would start another
                _log.info("learners that were let go: %s", _reasons(error))
                return
            # The first error counts: a rank that failed by its own fault has reported it.
            with suppress(RayError):
                ray.get(self._coordinator.lose_learners.remote(self._attempt, _reasons(error)))


def _reasons(error: Exception) -> str:
    """What Ray Train says of each rank, or of itself."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    if not failures:
        return brief(error)
    return "; ".join(f"rank {rank}: {brief(failure)}" for rank, failure in failures.items())
