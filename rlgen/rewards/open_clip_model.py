"""open_clip models from a local folder: loading, saving, preprocessing and text features.

Owns everything that CLIP and HPSv2 scoring share; must not reach the network. A folder has
open_clip's own `local-dir:` format: open_clip_config.json and open_clip_model.safetensors.
Shapes: B images, P prompts, D embedding width.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor

from rlgen.errors import CheckpointError, StorageError
from rlgen.nn.weights import load_state, read_header, read_tensors, tensors_to_bytes
from rlgen.storage import is_url, join, read_bytes, without_credentials, write_bytes

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"

Tokenizer = Callable[[list[str]], Tensor]
"""Texts to int64 [P, context_length]."""


@dataclass(frozen=True)
class Preprocess:
    """open_clip's evaluation transform, on float tensors instead of PIL images."""

    image_size: tuple[int, int]
    """Height and width of the model's input."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    """shortest: shorter side to size, center crop. longest: longer side to size, pad with
    zeros. squash: both sides to size."""
    clamp: bool = True
    """Cut off what bicubic overshoots, as uint8 images would."""

    def __call__(self, images_01: Tensor) -> Tensor:
        """Map [B, 3, H, W] in [0, 1] to the model's input."""
        resized = self._resize(images_01.float())
        fitted = _center_crop_or_pad(resized, self.image_size)
        mean = fitted.new_tensor(self.mean).view(-1, 1, 1)
        std = fitted.new_tensor(self.std).view(-1, 1, 1)
        return (fitted - mean) / std

    def _resize(self, images_01: Tensor) -> Tensor:
        size = resized_size(tuple(images_01.shape[-2:]), self.image_size, self.resize_mode)
        if size == tuple(images_01.shape[-2:]):
            return images_01
        mode = "bilinear" if self.interpolation == "bilinear" else "bicubic"
        # Antialiasing is what keeps this near the PIL pipeline: 0.2 / 255 mean, else 2 / 255.
        resized = F.interpolate(
            images_01, size=size, mode=mode, antialias=True, align_corners=False
        )
        return resized.clamp(0, 1) if self.clamp else resized


def default_preprocess(image_size: int) -> Preprocess:
    """Return open_clip's default: OpenAI's mean and std, bicubic, shorter side."""
    defaults = PreprocessCfg()
    return Preprocess((image_size, image_size), tuple(defaults.mean), tuple(defaults.std))


def resized_size(
    source: tuple[int, ...], target: tuple[int, int], resize_mode: str
) -> tuple[int, int]:
    """Return the height and width before cropping or padding, rounded as open_clip does."""
    if resize_mode == "squash":
        return target
    ratios = [s / t for s, t in zip(source, target, strict=True)]
    ratio = max(ratios) if resize_mode == "longest" else min(ratios)
    if resize_mode == "shortest" and target[0] == target[1]:
        # torchvision's Resize truncates; open_clip's own ResizeKeepRatio rounds.
        height, width = (int(target[0] * s / min(source)) for s in source)
    else:
        height, width = (round(s / ratio) for s in source)
    return height, width


def _center_crop_or_pad(images: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    pad_y, pad_x = max(height - images.shape[-2], 0), max(width - images.shape[-1], 0)
    if pad_y or pad_x:
        # An odd row or column goes to the bottom or the right.
        images = F.pad(images, (pad_x // 2, pad_x - pad_x // 2, pad_y // 2, pad_y - pad_y // 2))
    top = round((images.shape[-2] - height) / 2)
    left = round((images.shape[-1] - width) / 2)
    return images[..., top : top + height, left : left + width]


class CosineScorer:
    """Cosine between an image and its prompt, with text features computed once per prompt."""

    def __init__(self, model: open_clip.CLIP, preprocess: Preprocess, tokenizer: Tokenizer) -> None:
        self.model = model.requires_grad_(False).eval()
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self._text_cache: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, images_01: Tensor, prompts: Sequence[str], class_ids_B: Tensor) -> Tensor:
        """Return the cosines, float32 [B]; classes play no part."""
        if len(prompts) != len(images_01):
            raise ValueError(f"{len(prompts)} prompts for {len(images_01)} images; give one each.")
        image_features = self.image_features(images_01)
        return (image_features * self.text_features(prompts)).sum(-1)

    @torch.inference_mode()
    def image_features(self, images_01: Tensor) -> Tensor:
        """Return unit vectors, float32 [B, D]."""
        # The dot product is taken in float32: in half precision scores move in steps of 2e-4.
        return F.normalize(self.model.encode_image(self.preprocess(images_01)).float(), dim=-1)

    @torch.inference_mode()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return unit vectors, float32 [P, D]; only prompts not seen before are computed."""
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        new = [prompt for prompt in rows if prompt not in self._text_cache]
        if new:
            device = next(self.model.parameters()).device
            tokens_PT = self.tokenizer(new).to(device)
            # One by one: a batch would round differently with each set of prompts, and scores
            # must not depend on which unit a worker happened to see first.
            for prompt, tokens_T in zip(new, tokens_PT, strict=True):
                features = self.model.encode_text(tokens_T[None]).float()
                self._text_cache[prompt] = F.normalize(features, dim=-1)[0]
        distinct = torch.stack([self._text_cache[prompt] for prompt in rows])
        return distinct[[rows[prompt] for prompt in prompts]]


def load_open_clip(
    location: str, device: torch.device | str = "cpu"
) -> tuple[open_clip.CLIP, Preprocess, Tokenizer]:
    """Read a model with its preprocessing and tokenizer.

    Args:
        location: a folder, by path or fsspec URL, in open_clip's `local-dir:` format.
    Raises:
        CheckpointError: the folder or a file in it is missing, damaged, or does not fit; or
            the model needs files from the network.
    """
    config = read_open_clip_config(location)
    weights = join(location, WEIGHTS_FILE)
    read_header(weights)  # before the model is built, which takes long for a large one
    tokenizer = _make_tokenizer(location, config["model_cfg"]["text_cfg"])
    model = build_open_clip(config["model_cfg"], location)
    load_state(model, read_tensors(weights), weights)
    preprocess = _make_preprocess(model, config.get("preprocess_cfg", {}), location)
    return model.requires_grad_(False).eval().to(device), preprocess, tokenizer


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
        if is_url(location):
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
