"""The text encoder of text-conditional policies: a T5 from a local folder, by way of transformers.

Owns how prompts are prepared and what is checked of the folder, since transformers fills whatever
a folder lacks with random weights or an empty vocabulary. It is an optional dependency, so it is
imported when an encoder is opened. Nothing is downloaded and no code of the folder runs.

Prompts are stripped and lower-cased, end with the encoder's end mark, are cut to a number of
tokens, and attend to no padding; what lies in the padding of the result is zero, as it was in
LlamaGen's training and is in its sampler. Its scripts differ in two ways. They clean captions as
they come from the web twice before encoding: they decode URL escapes and HTML, drop links, file
names, long numbers, handles, CJK characters and signs such as & ( ) * + /, unify dashes, quotes
and spaces, and set spaces after commas. That is not done here; plain sentences come out of it as
they went in. And they run the encoder in bfloat16; here it runs in float32.

Shapes: N captions, T text tokens, W feature width.
Source: FoundationVision/LlamaGen, language/t5.py and dataset/t2i.py.
"""

import importlib
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlgen.errors import CheckpointError, ConfigError
from rlgen.policies.captions import Captions

_PACKAGES = ("transformers", "sentencepiece")
_VOCABULARIES = ("tokenizer.json", "spiece.model")


class TextEncoder:
    """Prompts in, features out."""

    def __init__(self, tokenizer: Any, model: Any, *, source: str) -> None:
        """Take over a tokenizer and an encoder of transformers; `source` is for messages."""
        self._tokenizer = tokenizer
        self._model = model
        self._source = source

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before any is cut, the end mark included.

        Raises:
            CheckpointError: the tokenizer is not the model's: it makes tokens that the model does
                not have, or sets no end mark.
        """
        rows = self._tokenizer(_prepared(prompts), truncation=False, verbose=False)["input_ids"]
        config = self._model.config
        highest = max(max(row, default=0) for row in rows)
        if highest >= config.vocab_size:
            raise CheckpointError(
                f"the tokenizer in {self._source} makes token {highest} and the model has "
                f"{config.vocab_size}; put both of one model into the folder."
            )
        if any(row[-1:] != [config.eos_token_id] for row in rows):
            raise CheckpointError(
                f"the tokenizer in {self._source} does not end every prompt with token "
                f"{config.eos_token_id}, which the model's config.json calls its end mark; put "
                "both of one model into the folder."
            )
        return [len(row) for row in rows]

    @torch.inference_mode()
    def encode(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        batch: int,
        on_batch: Callable[[int, int], None] = lambda done, total: None,
    ) -> Captions:
        """Encode prompts; padding is on the right and zero.

        Args:
            prompts: N texts.
            max_tokens: longer ones lose what is between the last that fits and the end mark.
            batch: prompts at once; the result does not depend on it but for rounding.
            on_batch: called with the prompts done and in all.
        Returns:
            the prompts as they were given, features float32 [N, T, W] on the CPU, T the longest.
        """
        features_TW: list[Tensor] = []
        for first in range(0, len(prompts), batch):
            on_batch(first, len(prompts))
            rows = self._tokenizer(
                _prepared(prompts[first : first + batch]),
                truncation=True,
                max_length=max_tokens,
                padding=True,
                padding_side="right",
                return_attention_mask=True,
                return_tensors="pt",
            ).to(self._model.device)
            hidden_BTW = self._model(
                input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]
            ).last_hidden_state.cpu()
            lengths = rows["attention_mask"].sum(dim=1).tolist()
            features_TW += [row[:length] for row, length in zip(hidden_BTW, lengths, strict=True)]
        return Captions(
            prompts=tuple(prompts),
            features_NTW=torch.nn.utils.rnn.pad_sequence(features_TW, batch_first=True),
            num_valid_N=torch.tensor([len(row) for row in features_TW]),
        )


def _prepared(prompts: Sequence[str]) -> list[str]:
    return [prompt.strip().lower() for prompt in prompts]


def open_text_encoder(folder: Path, *, device: torch.device) -> TextEncoder:
    """Open a T5 in Hugging Face's layout: config.json, weights, and its tokenizer's files.

    Weights are safetensors, or .bin files of tensors alone. A whole T5 will do; its decoder is
    left out.

    Raises:
        ConfigError: transformers is not installed, or the folder holds no T5.
        CheckpointError: weights or tokenizer are missing, damaged, incomplete or would run code.
    """
    transformers = _transformers()
    _check_folder(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers lets through whatever its readers raise
        raise CheckpointError(
            f"the tokenizer in {folder} can't be read ({type(error).__name__}: {error}); get "
            f"{' or '.join(_VOCABULARIES)} and tokenizer_config.json again."
        ) from error
    model = _read_weights(transformers, folder)
    return TextEncoder(tokenizer, model.eval().to(device), source=str(folder))


def _read_weights(transformers: Any, folder: Path) -> Any:
    try:
        model, found = transformers.T5EncoderModel.from_pretrained(
            str(folder),
            local_files_only=True,
            weights_only=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            dtype=torch.float32,
            output_loading_info=True,
        )
    except pickle.UnpicklingError:  # its message tells how to run the code
        raise CheckpointError(
            f"the weights in {folder} are .bin files that are damaged, or hold more than tensors: "
            "loading that could run code. Get them again, as safetensors."
        ) from None
    except Exception as error:  # transformers lets through whatever its readers raise
        raise CheckpointError(
            f"the weights in {folder} can't be read ({type(error).__name__}: {error}); get them "
            "again, as safetensors."
        ) from error
    missing = set(found["missing_keys"]) | {name for name, *_ in found["mismatched_keys"]}
    surplus = {name for name in found["unexpected_keys"] if name.startswith("encoder.")}
    if missing or surplus:
        raise CheckpointError(
            f"the weights in {folder} are not those of its config.json: {len(missing)} tensors are "
            f"missing or of another shape and {len(surplus)} too many, such as "
            f"{min(missing | surplus)}; get both of one model again."
        )
    return model


def _transformers() -> Any:
    """The package, silent but for errors.

    Raises:
        ConfigError: it, or what it reads T5's tokenizer with, is not installed.
    """
    try:
        transformers, _ = [importlib.import_module(name) for name in _PACKAGES]
    except ImportError as error:
        raise ConfigError(
            f"encoding text needs {' and '.join(_PACKAGES)} ({error}): pip install 'rlgen[text]'."
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _check_folder(folder: Path) -> None:
    """Refuse what transformers would quietly take for a T5 of default size, or without words.

    Raises:
        ConfigError: no folder, no T5, or no vocabulary.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is no folder; download the encoder, such as google/flan-t5-xl, and name "
            "the folder with its config.json."
        )
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{folder}/config.json can't be read ({type(error).__name__}); name a folder in "
            "Hugging Face's layout, with config.json, weights and tokenizer."
        ) from error
    if kind != "t5":
        raise ConfigError(
            f"{folder} holds a model of type {kind!r}; the encoder must be a T5, such as "
            "flan-t5-xl."
        )
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ConfigError(
            f"{folder} has no {' or '.join(_VOCABULARIES)}; put the tokenizer's files beside the "
            "weights."
        )
