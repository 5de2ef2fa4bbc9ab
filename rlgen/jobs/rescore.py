"""Score a run's stored rollouts with another set of rewards, and compare the advantages.

Nothing is sampled: tokens that the run stored (replay.every) are decoded and scored again. The
rewards are the run's own, with what --config and section.key=value change. Moments for the
distribution reward go through the stored steps in their order; they are the run's own if it
stored every step.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlgen.config import RunConfig, load_config
from rlgen.config.plan import uses_embedded
from rlgen.errors import ConfigError
from rlgen.jobs.cli import run_job

if TYPE_CHECKING:
    from rlgen.learner.replay import StoredStep
    from rlgen.types import StepRewards


def main(arguments: Sequence[str] | None = None) -> int:
    """Rescore the chosen steps; print a table and write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m rlgen.jobs.rescore", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--config", metavar="FILE", help="YAML with other rewards, over the run's")
    parser.add_argument("--steps", help="comma-separated; default: all that are stored")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: DIR/rescore.json")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    request = parser.parse_intermixed_args(arguments)
    names = _stored_names(request.run, request.steps)
    config = _config_of(request.run, request.config, request.settings)
    results = rescore(config, request.run, names)
    target = request.json or request.run / "rescore.json"
    target.write_text(json.dumps(results, indent=1))
    _print(results)
    print(f"written to {target}")
    return 0


def rescore(config: RunConfig, run: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Score stored steps in order.

    Args:
        config: the rewards, with real paths.
        run: the run's folder.
        names: stored steps.
    Returns:
        per step the comparison of rewards and advantages, old against new.
    """
    import torch

    from rlgen.learner.batch import pooled
    from rlgen.learner.replay import BOOTSTRAP, FOLDER, load_step
    from rlgen.rewards.engine import RewardEngine
    from rlgen.rewards.moment_store import MomentStore

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine, store = RewardEngine.load(config, device=device), MomentStore(config)
    loo_fid = config.reward.loo_fid
    if loo_fid is not None and loo_fid.start == "policy":
        if not (run / FOLDER / f"{BOOTSTRAP}.npz").exists():
            raise ConfigError(
                f"{run} has no stored bootstrap for the moments to start from; set "
                "reward.loo_fid.start=reference or reward.loo_fid=null."
            )
        features_BF = engine.score(load_step(str(run), BOOTSTRAP).rollout("bootstrap")).features_BF
        assert features_BF is not None, "there is an extractor"
        store.bootstrap(features_BF)
    results = []
    for number, name in enumerate(names):
        stored = load_step(str(run), name)
        scored = engine.score(stored.rollout("train"))
        results.append(_compared(stored, store.commit(number, *pooled([scored]))))
    return results


def _compared(stored: "StoredStep", new: "StepRewards") -> dict[str, Any]:
    assert stored.advantages_B is not None, "a training step has advantages"
    return {
        "step": stored.name,
        "images": len(stored.class_ids_B),
        "advantages": _agreement(stored.advantages_B, new.advantages_B),
        "rewards": {
            name: _agreement(stored.rewards[name], values)
            for name, values in new.rewards.items()
            if name in stored.rewards
        },
        "means": {name: float(values.mean()) for name, values in new.rewards.items()},
    }


def _agreement(old_B: Any, new_B: Any) -> dict[str, float | None]:
    """Correlation, share of equal signs around the mean, and largest difference."""
    import numpy as np

    old, new = old_B.astype(np.float64), new_B.astype(np.float64)
    is_constant = old.std() == 0 or new.std() == 0
    same_side = (old > old.mean()) == (new > new.mean())
    return {
        "correlation": None if is_constant else float(np.corrcoef(old, new)[0, 1]),
        "same_side": float(same_side.mean()),
        "max_difference": float(np.abs(old - new).max()),
    }


def _stored_names(run: Path, steps: str | None) -> list[str]:
    """Files of the chosen steps, in order.

    Raises:
        ConfigError: nothing is stored, or not the asked steps.
    """
    stored = sorted((path.stem for path in run.glob("replay/step-*.npz")), key=_number)
    if not stored:
        raise ConfigError(
            f"{run} has no stored rollouts; a run stores them with replay.every=20, say."
        )
    if steps is None:
        return stored
    try:
        wanted = {int(step) for step in steps.split(",")}
    except ValueError:
        raise ConfigError(f"--steps {steps} is no list like 0,20,40.") from None
    missing = wanted - {_number(name) for name in stored}
    if missing:
        have = ", ".join(str(_number(name)) for name in stored)
        raise ConfigError(f"steps {sorted(missing)} are not stored in {run}; there are {have}.")
    return [name for name in stored if _number(name) in wanted]


def _number(name: str) -> int:
    return int(name.removeprefix("step-"))


def _config_of(run: Path, path: str | None, settings: Sequence[str]) -> RunConfig:
    """The run's configuration with the changes; new scorers may be the embedded ones."""
    from rlgen.digits.assets import ensure_assets, resolve_embedded

    own = run / "config.yaml"
    if not own.exists():
        raise ConfigError(f"--run {run} has no config.yaml; name the folder of a run.")
    config = load_config([str(own), *([] if path is None else [path])], settings)
    if not uses_embedded(config):
        return config
    return resolve_embedded(config, ensure_assets(config.digits, lambda *_: None))


def _print(results: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("step", "images", "advantages: correlation", "same side", "rewards: correlation")
    for result in results:
        rewards = ", ".join(
            f"{name} {_shown(values['correlation'])}" for name, values in result["rewards"].items()
        )
        advantages = result["advantages"]
        table.add_row(
            result["step"],
            str(result["images"]),
            _shown(advantages["correlation"]),
            f"{advantages['same_side']:.2f}",
            rewards or "none in common",
        )
    Console().print(table)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(run_job(main))
