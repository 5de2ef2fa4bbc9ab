"""The names of ImageNet's 1000 classes, as open_clip ships them for zero-shot classification.

Read from the installed package's source without running it, because importing open_clip imports
torch.
"""

import ast
import importlib.util
from pathlib import Path

from rlgen.errors import ConfigError

IMAGENET = "imagenet"
"""Stands for the 1000 names where class names are asked for."""

_FILE = "zero_shot_metadata.py"
_VARIABLE = "IMAGENET_CLASSNAMES"
_NUM_CLASSES = 1000


def imagenet_class_names() -> tuple[str, ...]:
    """One name per class, in the order of ImageNet's class ids.

    Raises:
        ConfigError: open_clip is not installed, or has its names elsewhere.
    """
    spec = importlib.util.find_spec("open_clip")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    for place in places:
        try:
            tree = ast.parse((Path(place) / _FILE).read_text(encoding="utf-8"))
            names = tuple(ast.literal_eval(_assigned(tree)))
        except (OSError, SyntaxError, ValueError):
            continue
        if len(names) == _NUM_CLASSES:
            return names
    raise ConfigError(
        f"class_names = {IMAGENET} takes {_VARIABLE} from open_clip's {_FILE}, but "
        + (f"{places} has no such list" if places else "open_clip is not installed")
        + "; install open_clip_torch 3, or write the 1000 names out."
    )


def _assigned(tree: ast.Module) -> ast.expr:
    """The value that the variable is given at the top of the module."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == _VARIABLE for target in statement.targets
        ):
            return statement.value
    raise ValueError(f"{_VARIABLE} is not assigned")
