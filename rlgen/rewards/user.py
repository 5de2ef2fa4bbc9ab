"""Scorers that users write: what such a class looks like, and how it is found and made.

Owns the boundary to code that rlgen does not know: whatever goes wrong there becomes an error
that names the target and the reason. Shapes: B images of a work unit.
"""

import difflib
import importlib
import inspect
import os
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from rlgen.config.reward import PythonRewardConfig
from rlgen.errors import ConfigError
from rlgen.rewards.protocol import InstanceScorer, told


class UserScorer(Protocol):
    """The shape of a class that `type: python` takes; there is nothing to inherit from.

    One object is made in every reward actor, so scores must depend on the arguments of the call
    alone: which actor sees which images is not fixed. Calls run without gradients.
    """

    def __init__(self, *, device: torch.device, **arguments: Any) -> None:
        """Load what scoring needs.

        Args:
            device: where the images will be.
            arguments: `arguments` of the configuration.
        """

    def __call__(self, images_01: Tensor, prompts: list[str], class_ids_B: Tensor) -> Tensor:
        """Score images; higher is better, and only differences within a run matter.

        Args:
            images_01: float32 [B, 3, H, W] in [0, 1], on the device; a copy that may be changed.
            prompts: B captions, of one template. With several templates there is a call for each.
            class_ids_B: int64 [B], on the CPU.
        Returns:
            float32 [B], finite, on any device. Anything else, or an exception, stops the run.
        """
        ...


def find_scorer_class(config: PythonRewardConfig) -> type:
    """Import the class and check that the configured arguments fit it; nothing is made.

    Raises:
        ConfigError: names the target and what is wrong with it.
    """
    module_name, _, class_name = config.target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module raises while it is imported
        raise _cannot(config.target, "be imported", _import_advice(error, module_name)) from error
    found = vars(module).get(class_name)
    if not isinstance(found, type):
        names = [name for name, value in vars(module).items() if isinstance(value, type)]
        close = difflib.get_close_matches(class_name, names, n=1)
        what = "it has no class of this name" if found is None else f"it is {found!r}, no class"
        hint = f"; did you mean {close[0]}?" if close else f"; {module.__file__} was looked into"
        raise _cannot(config.target, "be used", what + hint)
    if not any("__call__" in vars(base) for base in found.__mro__):
        raise _cannot(config.target, "be used", "the class has no __call__")
    _check_fits(found, config, device=torch.device("cpu"), **config.arguments)
    _check_fits(found.__call__, config, None, "images_01", "prompts", "class_ids_B")
    return found


def load_user_scorer(config: PythonRewardConfig, device: torch.device) -> InstanceScorer:
    """Import the class and make the scorer on a device.

    Raises:
        ConfigError: names the target and what is wrong with it, such as what __init__ raised.
    """
    scorer_class = find_scorer_class(config)
    try:
        return scorer_class(device=device, **config.arguments)
    except Exception as error:  # whatever the user's __init__ raises
        reason = f"its __init__ raised {told(error)}"
        raise _cannot(config.target, f"be made on {device}", reason) from error


def _check_fits(
    call: Callable[..., Any], config: PythonRewardConfig, /, *args: Any, **kwargs: Any
) -> None:
    """Refuse a signature that doesn't take what rlgen will pass."""
    try:
        signature = inspect.signature(call)
    except ValueError:  # of a class that is not written in Python, which says nothing
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        is_init = "device" in kwargs
        passed = ", ".join(f"{name}=..." for name in kwargs) if is_init else ", ".join(args[1:])
        name = "__init__" if is_init else "__call__"
        raise _cannot(
            config.target, "be used", f"its {name}{signature} is called with ({passed}): {error}"
        ) from error


def _import_advice(error: Exception, module_name: str) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        parents = module_name.split(".")
        if error.name in {".".join(parents[: n + 1]) for n in range(len(parents))}:
            return (
                f"there is no module {error.name!r} in {os.getcwd()} or on Python's path; start "
                "the job in the folder that the name counts from, and on a cluster submit it with "
                "--working-dir"
            )
    return told(error)


def _cannot(target: str, verb: str, reason: str) -> ConfigError:
    end = "" if reason.endswith("?") else "."
    return ConfigError(f"the scorer {target} can't {verb}: {reason}{end}")
