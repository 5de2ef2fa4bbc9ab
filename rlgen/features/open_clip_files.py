"""open_clip models from files: a folder that describes itself, or one published weight file.

Owns building, reading and writing; must not reach the network. A folder has open_clip's own
`local-dir:` format: open_clip_config.json and open_clip_model.safetensors. What a single file
lacks is in `open_clip_published`.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor

from rlgen.errors import CheckpointError, StorageError
from rlgen.features.open_clip_published import check_activation, named_config, read_published
from rlgen.features.preprocess import Preprocess
from rlgen.nn.weights import load_state, read_header, read_tensors, tensors_to_bytes
from rlgen.storage import is_url, join, read_bytes, without_credentials, write_bytes

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_WEIGHT_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors"}

Tokenizer = Callable[[list[str]], Tensor]
"""Texts to int64 [P, context_length]."""


def load_open_clip(
    location: str, device: torch.device | str = "cpu", *, model: str | None = None
) -> tuple[open_clip.CLIP, Preprocess, Tokenizer]:
    """Read a model with its preprocessing and tokenizer, in float32.

    Args:
        location: a folder in open_clip's `local-dir:` format, or one published weight file
            (safetensors, a torch file with the state dict under `state_dict` or at the top, or
            OpenAI's TorchScript archive, of which only the tensors are read); by path or fsspec
            URL.
        model: open_clip's name of the architecture; only for a single file, which does not say.
    Raises:
        CheckpointError: the folder or a file in it is missing, damaged, or does not fit; the
            model needs files from the network; or OpenAI's weights without QuickGELU.
        ConfigError: open_clip has no such model; lists close names.
    """
    config = open_clip_config(location, model)
    tokenizer = _make_tokenizer(location, config["model_cfg"]["text_cfg"])
    net, preprocess = load_vision(location, device, model=model)
    return net, preprocess, tokenizer


def load_vision(
    location: str, device: torch.device | str = "cpu", *, model: str | None = None
) -> tuple[open_clip.CLIP, Preprocess]:
    """`load_open_clip` for those that need no texts, and so no tokenizer's files."""
    config = open_clip_config(location, model)
    if model is None:
        weights = join(location, WEIGHTS_FILE)
        read_header(weights)  # before the model is built, which takes long for a large one
        net = build_open_clip(config["model_cfg"], location)
        load_state(net, read_tensors(weights), weights)
    else:
        state, is_openai = read_published(location)
        check_activation(location, model, state, is_openai=is_openai)
        net = build_open_clip(config["model_cfg"], location)
        load_state(net, state, location)
    preprocess = _make_preprocess(net, config.get("preprocess_cfg", {}), location)
    return net.requires_grad_(False).eval().to(device), preprocess


def open_clip_config(location: str, model: str | None) -> dict[str, Any]:
    """The `model_cfg` and `preprocess_cfg` of a model, without reading weights.

    Raises:
        CheckpointError: a folder lacks them, or one is asked of a single file, or a folder is
            named together with an architecture.
        ConfigError: open_clip has no architecture of this name.
    """
    shown = without_credentials(location)
    if model is None:
        if is_weight_file(location):
            raise CheckpointError(
                f"{shown} is a single weight file, which does not say its architecture; name it, "
                "such as model=ViT-L-14-quickgelu for OpenAI's ViT-L/14 or model=ViT-H-14 for "
                "HPSv2."
            )
        return read_open_clip_config(location)
    config = named_config(model)
    if not is_url(location) and Path(location.removeprefix("file://")).is_dir():
        raise CheckpointError(
            f"{shown} is a folder and model={model} is for a single weight file; name the file, or "
            f"leave model out if the folder has {CONFIG_FILE}."
        )
    return config


def is_weight_file(location: str) -> bool:
    """Whether a location names one file rather than a folder; of a URL its ending tells."""
    if is_url(location):
        return PurePosixPath(without_credentials(location)).suffix.lower() in _WEIGHT_SUFFIXES
    return Path(location.removeprefix("file://")).is_file()


def read_open_clip_config(location: str) -> dict[str, Any]:
    """Read the configuration in a model folder.

    Raises:
        CheckpointError: there is none, or it is not open_clip's.
    """
    path = join(location, CONFIG_FILE)
    shown = without_credentials(path)
    try:
        config = json.loads(read_bytes(path))
    except StorageError as error:
        raise CheckpointError(
            f"{without_credentials(location)} is not an open_clip model folder ({error}) Name a "
            f"folder with {CONFIG_FILE} and {WEIGHTS_FILE}; model names are not looked up."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{shown} is not JSON ({error}); copy or make it again.") from error
    model_config = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(model_config, dict) or not {"vision_cfg", "text_cfg"} <= model_config.keys():
        raise CheckpointError(
            f"{shown} lacks model_cfg with vision_cfg and text_cfg; "
            "use the file that open_clip writes beside its weights."
        )
    return config


def build_open_clip(model_config: dict[str, Any], location: str) -> open_clip.CLIP:
    """Build a model without weights, from open_clip's model_cfg.

    Raises:
        CheckpointError: a part would be downloaded, or open_clip refuses the configuration.
    """
    shown = without_credentials(location)
    settings = dict(model_config)
    if settings["text_cfg"].get("hf_model_name"):
        raise CheckpointError(
            f"{shown} has the text tower {settings['text_cfg']['hf_model_name']!r}, which "
            "open_clip would fetch from the network; use a model with open_clip's own text tower."
        )
    if settings["vision_cfg"].get("timm_model_name"):  # its weights are in the file
        settings["vision_cfg"] = settings["vision_cfg"] | {"timm_model_pretrained": False}
    is_custom = settings.pop("custom_text", False)
    if "multimodal_cfg" in settings:
        model_class = open_clip.CoCa
    else:
        model_class = open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
    try:
        # Initial weights are drawn from the global generator and then overwritten.
        with torch.random.fork_rng(devices=[]):
            return model_class(**settings)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"{shown}: open_clip {open_clip.__version__} can't build its model_cfg ({error}); "
            "use a folder written by this version or an earlier one."
        ) from error


def _make_preprocess(model: open_clip.CLIP, overrides: dict[str, Any], location: str) -> Preprocess:
    merged = PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), overrides))
    if merged.fill_color != 0 or merged.resize_mode not in ("shortest", "longest", "squash"):
        raise CheckpointError(
            f"{without_credentials(location)}: preprocess_cfg {asdict(merged)} is not supported; "
            "fill_color must be 0 and resize_mode shortest, longest or squash."
        )
    height, width = model.visual.image_size
    return Preprocess(
        image_size=(height, width),
        mean=tuple(merged.mean),
        std=tuple(merged.std),
        interpolation=merged.interpolation,
        resize_mode=merged.resize_mode,
    )


def _make_tokenizer(location: str, text_config: dict[str, Any]) -> Tokenizer:
    context_length = text_config.get("context_length", 77)
    options = text_config.get("tokenizer_kwargs") or {}
    if not text_config.get("hf_tokenizer_name"):
        return SimpleTokenizer(context_length=context_length, **options)
    try:
        if is_url(location) or is_weight_file(location):
            raise OSError("its tokenizer can only be read from a local folder")
        return HFTokenizer(
            location,
            context_length=context_length,
            tokenizer_mode=text_config.get("tokenizer_mode"),
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"{without_credentials(location)} names the tokenizer "
            f"{text_config['hf_tokenizer_name']!r}, but its files are not usable ({error}); "
            "copy them into a local folder beside the weights."
        ) from error


def save_open_clip(location: str, model: open_clip.CLIP, model_config: dict[str, Any]) -> None:
    """Write a model folder that `load_open_clip` and open_clip's `local-dir:` both read.

    The preprocessing is open_clip's default: OpenAI's mean and std, bicubic, shorter side.
    """
    defaults = PreprocessCfg()
    preprocess_config = {
        "mean": list(defaults.mean),
        "std": list(defaults.std),
        "interpolation": defaults.interpolation,
        "resize_mode": defaults.resize_mode,
    }
    config = {"model_cfg": model_config, "preprocess_cfg": preprocess_config}
    weights = tensors_to_bytes(model.state_dict(), {"format": "pt"})
    write_bytes(join(location, WEIGHTS_FILE), weights)
    write_bytes(join(location, CONFIG_FILE), json.dumps(config, indent=2).encode())
