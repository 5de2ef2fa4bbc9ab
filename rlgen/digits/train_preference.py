"""Training of the tiny preference model, in the manner of HPSv2.

Owns the recipe: the tiny CLIP is tuned on pairs of a clean and a damaged image for one prompt.
Source: HPSv2, arXiv:2306.09341, section 4.
"""

import copy
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from rlgen.config.digits import DigitsConfig
from rlgen.digits.captions import PROMPTS, STYLED_PROMPTS
from rlgen.digits.damage import DAMAGES, mix_reconstructions
from rlgen.digits.data import DigitsData
from rlgen.digits.optimise import OnStep, draw_rows, minimize
from rlgen.digits.style_judge import joint_ids
from rlgen.digits.train_clip import digits_preprocess
from rlgen.tokenizers.protocol import Tokenizer

PAIRS = {
    "replace_codes": 14,
    "borrow_codes": 22,
    "swap_class": 12,
    "blur": 8,
    "add_noise": 8,
    "erase_patch": 8,
}
"""Pairs of a batch by damage; most for what is hardest to see and likeliest to happen."""
STYLED_PAIRS = PAIRS | {"borrow_codes": 16, "swap_class": 10, "swap_style": 8}
"""The same for digits in all styles."""
MAX_LR = 3e-3
SEED_OFFSET = 2000
"""Keeps the draws apart from those of the CLIP's training."""


def train_preference(
    data: DigitsData,
    clip: open_clip.CLIP,
    clip_config: dict[str, Any],
    tokenizer: Tokenizer,
    config: DigitsConfig,
    *,
    on_step: OnStep | None = None,
) -> open_clip.CLIP:
    """Tune a copy of the CLIP to prefer clean digits; deterministic on the CPU.

    Half of the clean images are reconstructions, so that the tokenizer's traces alone are no
    sign of damage; and the clean image of a pair is another digit of the same class half of
    the time, so that scores compare across images and not just within one. Digits in all styles
    have prompts that name the style, and are also paired with themselves in another style.
    """
    model = copy.deepcopy(clip).requires_grad_(True)
    model.token_embedding.requires_grad_(False)
    generator = torch.Generator().manual_seed(config.seed + SEED_OFFSET)
    preprocess = digits_preprocess(config)
    context_length = clip_config["text_cfg"]["context_length"]
    prompts, pairs = (PROMPTS, PAIRS) if config.style is None else (STYLED_PROMPTS, STYLED_PAIRS)
    prompt_tokens = SimpleTokenizer(context_length=context_length)(list(prompts))
    prompt_ids_N = joint_ids(data.train.labels_N, data.train.styles_N)
    rows_of_prompt = [(prompt_ids_N == i).nonzero().flatten() for i in range(len(prompts))]

    def loss_at(step: int) -> Tensor:
        rows = draw_rows(len(data.train.labels_N), sum(pairs.values()), generator)
        damaged = torch.cat(
            [
                DAMAGES[name](data.train, part, tokenizer, generator)
                for name, part in zip(pairs, rows.split(list(pairs.values())), strict=True)
            ]
        )
        clean_rows = _sometimes_another(rows, prompt_ids_N, rows_of_prompt, generator)
        clean = mix_reconstructions(data.train.images_rgb_01[clean_rows], tokenizer, generator)
        images = preprocess(torch.cat([clean, damaged]))
        image_features = model.encode_image(images, normalize=True).view(2, len(rows), -1)
        text_features = model.encode_text(prompt_tokens, normalize=True)[prompt_ids_N[rows]]
        scores_2N = (image_features * text_features).sum(-1) * model.logit_scale.exp()
        # Softmax over the two scores, the clean one being right.
        return F.softplus(scores_2N[1] - scores_2N[0]).mean()

    minimize(model, loss_at, num_steps=config.preference_steps, max_lr=MAX_LR, on_step=on_step)
    return model


def _sometimes_another(
    rows: Tensor, prompt_ids_N: Tensor, rows_of_prompt: list[Tensor], generator: torch.Generator
) -> Tensor:
    """Replace a random half of the rows by random rows with the same prompt."""
    others = torch.stack(
        [
            alike[torch.randint(len(alike), (), generator=generator)]
            for alike in (rows_of_prompt[i] for i in prompt_ids_N[rows].tolist())
        ]
    )
    return torch.where(torch.rand(len(rows), generator=generator) < 0.5, others, rows)
