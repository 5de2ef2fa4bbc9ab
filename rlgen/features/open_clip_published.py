"""Published CLIP weights in a single file, which says neither architecture nor activation.

Owns the architectures' names, the layouts of such files, and the check that OpenAI's weights meet
the activation they were trained with. Must not build models.
"""

import difflib
import warnings
from collections.abc import Mapping
from typing import Any

import open_clip
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from torch import Tensor

from rlgen.errors import CheckpointError, ConfigError, StorageError
from rlgen.nn.public_files import read_public_state
from rlgen.nn.torchscript import is_torchscript, read_torchscript_state
from rlgen.storage import cached_file, without_credentials

_PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")
_OPENAI_COUNTERS = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's files, and no others, hold beside the weights."""


def named_config(model: str) -> dict[str, Any]:
    """open_clip's `model_cfg` and `preprocess_cfg` of an architecture.

    The preprocessing is that of the weights open_clip knows for it. If they differ, it is OpenAI's
    mean and std, and a warning names the others.

    Raises:
        ConfigError: open_clip has no such model; lists close names.
    """
    model_config = open_clip.get_model_config(model)
    if model_config is None:
        close = difflib.get_close_matches(model, open_clip.list_models(), n=5, cutoff=0.5)
        meant = f"close names are {', '.join(close)}" if close else "none has a name like it"
        raise ConfigError(
            f"open_clip {open_clip.__version__} has no model {model!r}; {meant}. See "
            "open_clip.list_models()."
        )
    is_quick = bool(model_config.get("quick_gelu", False))
    by_tag: dict[str, dict[str, Any]] = {}
    for tag in list_pretrained_tags_by_model(model):
        told = get_pretrained_cfg(model, tag)
        if bool(told.get("quick_gelu", False)) == is_quick:
            by_tag[tag] = {key: told[key] for key in _PREPROCESS_KEYS if told.get(key)}
    distinct: list[dict[str, Any]] = []
    for told in by_tag.values():
        if told not in distinct:
            distinct.append(told)
    if len(distinct) == 1:
        return {"model_cfg": model_config, "preprocess_cfg": distinct[0]}
    if distinct:
        others = [tag for tag, told in by_tag.items() if told != distinct[0]]
        warnings.warn(
            f"weights of {model} differ in their preprocessing, and a single file does not say "
            f"which it needs: OpenAI's mean and std are used, and {', '.join(others)} need others. "
            "A folder with open_clip_config.json leaves no doubt.",
            stacklevel=2,
        )
    return {"model_cfg": model_config, "preprocess_cfg": {}}


def read_published(location: str) -> tuple[dict[str, Tensor], bool]:
    """Read a published weight file, whatever it wraps its tensors in.

    Nothing in the file is executed: pickles may hold tensors and plain values only, and of a
    TorchScript archive the program is not even compiled.

    Returns:
        the state dict, and whether OpenAI made it.
    Raises:
        CheckpointError: missing, damaged, or no weights in it.
    """
    shown = without_credentials(location)
    try:
        path = cached_file(location)
    except StorageError as error:
        raise CheckpointError(str(error)) from error
    is_archive = is_torchscript(path)
    state = read_torchscript_state(path, shown) if is_archive else read_public_state(location)
    is_openai = is_archive or any(name in state for name in _OPENAI_COUNTERS)
    kept = {
        name: tensor
        for name, tensor in state.items()
        if name not in _OPENAI_COUNTERS and not name.endswith("attn_mask")
    }
    return kept, is_openai or "openai" in shown.rsplit("/", 1)[-1].lower()


def check_activation(
    location: str, model: str, state: Mapping[str, Tensor], *, is_openai: bool
) -> None:
    """Refuse OpenAI's weights without QuickGELU: they load, and every score is wrong.

    Raises:
        CheckpointError: the file is certainly OpenAI's and the architecture has another activation.
    """
    if open_clip.get_model_config(model).get("quick_gelu", False):
        return
    quick = f"{model}-quickgelu"
    remedy = f"use model={quick}"
    shown = without_credentials(location)
    if is_openai:
        if quick not in open_clip.list_models():
            remedy = "use the name that ends in -quickgelu"
        raise CheckpointError(
            f"{shown} holds OpenAI's weights, which were trained with QuickGELU, and {model} has "
            f"plain GELU, with which every score would be wrong; {remedy}."
        )
    first = state.get("visual.conv1.weight")
    is_half = first is not None and bool((first.half().to(first.dtype) == first).all())
    if is_half and "openai" in list_pretrained_tags_by_model(quick):
        warnings.warn(
            f"{shown} is loaded as {model}, with plain GELU. Its weights are in half precision, as "
            f"OpenAI's are, and OpenAI's need QuickGELU: if they are OpenAI's, {remedy}.",
            stacklevel=2,
        )
