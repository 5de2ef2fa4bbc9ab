"""Cases of the scorers: HPSv2, CLIP and LAION's aesthetic heads, through the scorers themselves.

Each runs the route of a training run, from images on a tensor to scores. For CLIP this is the
public pipeline over PIL images to the last bit, so its golden numbers hold without an allowance
for the resize. Shapes: N images, P prompts, D embedding width.
"""

import math
from dataclasses import replace

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from rlgen.errors import ConfigError
from rlgen.features.open_clip_files import build_open_clip
from rlgen.features.open_clip_published import named_config
from rlgen.features.preprocess import default_preprocess
from rlgen.nn.weights import load_state
from rlgen.parity.cases import Case, Outputs
from rlgen.rewards.aesthetic import load_head
from rlgen.rewards.clip import ClipScorer
from rlgen.rewards.hpsv2 import HpsScorer
from rlgen.rewards.open_clip_model import CosineScorer

_CONFIG = ("name", "embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
_SETTINGS = ("prompts", "image_mean", "image_std", "resize", "resize_input", "activation")


@torch.inference_mode()
def run_open_clip(case: Case) -> Outputs:
    """Features, scores and pixels of CLIP."""
    _check_settings(case, resize="shorter side", resize_input="uint8 pil image")
    return _cosines(case, _build(case, ClipScorer))


@torch.inference_mode()
def run_hpsv2(case: Case) -> Outputs:
    """The same of HPSv2, also with the resize of older torchvision."""
    _check_settings(case, resize="longer side", resize_input="float tensor")
    scorer = _build(case, HpsScorer)
    found = _cosines(case, scorer)
    if any(name.endswith("_noaa") for name in case.arrays):
        scorer.preprocess = replace(scorer.preprocess, antialias=False)
        plain = _cosines(case, scorer)
        found |= {f"{name}_noaa": array for name, array in plain.items()}
    return found


def _check_settings(case: Case, *, resize: str, resize_input: str) -> None:
    """Refuse another preprocessing or activation than the scorer's own.

    Raises:
        ConfigError: names what the case asks for.
    """
    case.check_fields(config=_CONFIG, settings=_SETTINGS)
    is_quick = bool(case.config.get("quick_gelu", False))
    wanted = {"resize": f"bicubic, {resize}", "resize_input": resize_input}
    wanted["activation"] = "quick_gelu" if is_quick else "gelu"
    for field, beginning in wanted.items():
        told = str(case.settings.get(field, beginning))
        if not told.lower().startswith(beginning):
            raise ConfigError(f"case {case.name} has {field} {told!r}, not {beginning!r}.")


def _build(case: Case, scorer_class: type[CosineScorer]) -> CosineScorer:
    config = {name: value for name, value in case.config.items() if name != "name"}
    name = case.config.get("name")
    if name is not None and named_config(name)["model_cfg"] != config:
        raise ConfigError(
            f"case {case.name} has the name {name} and other sizes than open_clip "
            f"{open_clip.__version__} gives it."
        )
    net = build_open_clip(config, case.name)
    load_state(net, case.weights(), case.name)
    preprocess = default_preprocess(config["vision_cfg"]["image_size"])
    preprocess = replace(
        preprocess,
        mean=tuple(case.settings.get("image_mean", preprocess.mean)),
        std=tuple(case.settings.get("image_std", preprocess.std)),
    )
    tokenizer = SimpleTokenizer(context_length=config["text_cfg"].get("context_length", 77))
    return scorer_class(net, preprocess, tokenizer)


def _cosines(case: Case, scorer: CosineScorer) -> Outputs:
    prompts = case.settings["prompts"]
    tokens = scorer.tokenizer(prompts).to(case.tensor("in.tokens").device)
    if not torch.equal(tokens, case.tensor("in.tokens")):
        raise ConfigError(f"case {case.name}: the prompts' tokens differ from in.tokens.")
    images = [_image_01(case, name) for name in case.arrays if name.startswith("in.image")]
    # One by one, since they differ in size.
    image_ND = torch.cat([scorer.image_features(image_01) for image_01 in images])
    text_PD = scorer.text_features(prompts)
    found: Outputs = {
        "out.image_features": image_ND,
        "out.text_features": text_PD,
        "out.score": (image_ND[:, None] * text_PD).sum(-1),
        "out.logit_scale": scorer.model.logit_scale.exp(),
    }
    if "out.pixels_strided" in case.arrays:
        pixels = torch.cat([scorer.preprocess(image_01) for image_01 in images])
        step = math.ceil(pixels.shape[-1] / case.arrays["out.pixels_strided"].shape[-1])
        found["out.pixels_strided"] = pixels[..., ::step, ::step]
    return found


def _image_01(case: Case, name: str) -> Tensor:
    # (H, W, 3) -> (1, 3, H, W)
    return case.tensor(name).permute(2, 0, 1)[None].float() / 255


def run_aesthetic(case: Case) -> Outputs:
    """Scores of the published heads, whose files lie beside the cases."""
    case.check_fields(config=("heads",))
    found: Outputs = {}
    for entry in case.config["heads"]:
        unknown = entry.keys() - {"name", "kind", "in_features", "file", "layers", "state_dict"}
        if unknown or entry["kind"] not in ("linear", "mlp"):
            raise ConfigError(
                f"case {case.name} has a head of kind {entry['kind']!r} with unknown fields "
                f"{sorted(unknown)}; known are linear and mlp."
            )
        if "no activation" not in entry.get("layers", "no activation"):
            raise ConfigError(f"case {case.name} has a head with layers {entry['layers']!r}.")
        head = load_head(str(case.folder / "aesthetic" / entry["file"]))
        if head.num_features != entry["in_features"]:
            raise ConfigError(
                f"case {case.name}: {entry['file']} takes {head.num_features} features, not "
                f"{entry['in_features']}."
            )
        features_ND = case.tensor(f"in.features_{entry['in_features']}")
        found[f"out.score_{entry['name']}"] = head(features_ND)
    return found
