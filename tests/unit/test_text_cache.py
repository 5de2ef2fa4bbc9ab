"""Scores must not depend on which prompts a scorer saw before."""

import torch
from open_clip.tokenizer import SimpleTokenizer

from rlgen.config import DigitsConfig
from rlgen.digits.train_clip import clip_model_config
from rlgen.rewards.clip import ClipScorer
from rlgen.rewards.open_clip_model import build_open_clip, default_preprocess

PROMPTS = [f"a photo of the digit {name}" for name in ("zero", "one", "two", "three", "four")]


def make_scorer() -> ClipScorer:
    config = clip_model_config(DigitsConfig())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_open_clip(config, "memory")
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(number)
        parameter.data.normal_(std=0.2, generator=generator)
    length = config["text_cfg"]["context_length"]
    return ClipScorer(model, default_preprocess(16), SimpleTokenizer(context_length=length))


def test_text_features_are_the_same_bits_in_any_company() -> None:
    """A worker replaced in the middle of a run saw other prompts first, and scored 3e-8 apart."""
    together, apart = make_scorer(), make_scorer()
    expected = together.text_features(PROMPTS)
    reversed_one_by_one = [apart.text_features([prompt])[0] for prompt in reversed(PROMPTS)]
    assert torch.equal(expected, torch.stack(list(reversed(reversed_one_by_one))))
