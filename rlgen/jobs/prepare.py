"""What happens before the first role starts: inputs, checks, and the choice of the runtime.

Everything that can be wrong with a request is found here, before any process takes a GPU.
"""

from typing import Protocol

from rlgen.config.plan import uses_embedded
from rlgen.config.run import RunConfig
from rlgen.digits.assets import ensure_assets, resolve_embedded
from rlgen.learner.preflight import check_inputs, check_named_files
from rlgen.learner.runtime import LocalRuntime, Runtime
from rlgen.policies.captions import load_captions
from rlgen.storage import check_writable, join
from rlgen.tracking import check_tracking_uri


class Observer(Protocol):
    """Where a job writes and how it tells what it does, such as a Recorder."""

    @property
    def checkpoint_root(self) -> str:
        """Folder or URL that every node can write to."""

    def stage(self, text: str, *, done: int | None = None, total: int | None = None) -> None:
        """Say what is happening."""

    def note(self, text: str) -> None:
        """Print a line that stays."""


def prepare_inputs(config: RunConfig, recorder: Observer) -> RunConfig:
    """Train the embedded default if it is asked for and not cached; check that inputs fit.

    Returns:
        the configuration with real paths in place of `embedded`.
    Raises:
        RlgenError: an input is missing, damaged or does not fit another.
    """
    if config.tracking.uri is not None:
        check_tracking_uri(config.tracking.uri)
    check_writable(recorder.checkpoint_root)
    check_named_files(config)
    if uses_embedded(config):
        assets = ensure_assets(
            config.digits,
            lambda name, done, total: recorder.stage(
                f"training the embedded default, once: {name}", done=done, total=total
            ),
        )
        config = resolve_embedded(config, assets)
    if config.policy.captions is not None:
        captions = load_captions(config.policy.captions)
        config = config.with_values({"class_names": captions.prompts})
    recorder.stage("checking inputs")
    check_inputs(config)
    return config


def make_runtime(config: RunConfig, recorder: Observer, *, with_learner: bool = True) -> Runtime:
    """Connect to Ray, or load everything into this process.

    Args:
        config: the run.
        recorder: is told where Ray's dashboard is.
        with_learner: False makes a runtime that samples and scores the policy as configured, and
            can do nothing else.
    """
    if config.runtime == "local":
        return LocalRuntime(config, with_learner=with_learner)
    from rlgen.actors.ray_runtime import RayRuntime

    recorder.stage("starting Ray")
    storage = join(recorder.checkpoint_root, "ray_train")
    runtime = RayRuntime(config, storage=storage, with_learner=with_learner)
    if runtime.dashboard_url:
        recorder.note(f"Ray dashboard: http://{runtime.dashboard_url}")
    return runtime
