"""Published weight files: how they are packed, and which of their tensors are a model's own.

Owns the layouts in which LlamaGen, VAR and taming-transformers write their checkpoints. Must not
know the modules but by their tensors. Nothing in a file is ever executed.

    state = read_public_state(location, sha256=None)
    load_public_state(module, select_state(state, family), location, model_name=name)
"""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rlgen.config.models import MODELS
from rlgen.errors import CheckpointError, StorageError
from rlgen.nn.fit import explain_mismatch, mismatches, resolution_conflict
from rlgen.nn.weights import shapes_of
from rlgen.storage import cached_file, without_credentials

WRAPPERS = ("model", "module", "state_dict", "ema")
"""Where a state dict lies in a checkpoint, in the order in which they are looked for. It is the
order of LlamaGen's samplers, so `model` is taken where an `ema` lies beside it."""

_VAR_TRAINER_PARTS = ("var_wo_ddp", "vae_local")
_COMMON_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
_MAX_NESTING = 3


class _Inert:
    """Stands for a class of which a file holds only the name; it has no behaviour."""


# What published checkpoints hold beside tensors and plain values: LlamaGen's trainers put their
# argparse.Namespace in, PyTorch Lightning before 1.5 the class of its callback.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
]


def read_public_state(location: str, *, sha256: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a published checkpoint, whatever it wraps them in.

    The format (safetensors, or a torch file old or new) is told by the content, not the name.
    A state dict is looked for under the keys of WRAPPERS in their order, then at the top; a
    checkpoint of VAR's trainer gives its policy's tensors as `var_wo_ddp.*` and its tokenizer's
    as `vae_local.*`. Prefixes of data-parallel and compiled modules go when every key has them.

    Args:
        location: a path or fsspec URL; URLs are cached, see `rlgen.storage.cached_file`.
        sha256: digest that the file must have; None checks nothing.
    Returns:
        names and CPU tensors in the file's number formats, mapped from the disk where possible.
    Raises:
        CheckpointError: missing, damaged, of another digest, no weights, or an object in it that
            is neither a tensor nor a plain value.
    """
    try:
        path = cached_file(location, sha256=sha256)
    except StorageError as error:
        raise CheckpointError(str(error)) from error
    shown = without_credentials(location)
    with path.open("rb") as stream:
        head = stream.read(16)
    if head[8:9] == b"{":
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(
                f"{shown} can't be read as safetensors ({error}); it is probably damaged or cut "
                "short: get it again."
            ) from error
        return _bare(tensors, tensors, shown)
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{shown} is a torch file that is cut short ({path.stat().st_size} bytes, and the "
            "table at its end is missing): get it again."
        )
    if not head.startswith((b"PK", b"\x80")):
        raise CheckpointError(
            f"{shown} is neither a safetensors nor a torch file (it begins with {head!r}); a "
            "download that went wrong often leaves a web page or a Git LFS pointer: get it again."
        )
    content = _read_torch_file(path, shown)
    return _bare(_find_state(content), content, shown)


def _read_torch_file(path: Path, shown: str) -> Any:
    # Only a new file can be mapped, and torch goes by the name if that says safetensors.
    is_mapped = zipfile.is_zipfile(path) and path.suffix != ".safetensors"
    try:
        with path.open("rb") as stream, torch.serialization.safe_globals(_HARMLESS):
            source = path if is_mapped else stream
            return torch.load(source, weights_only=True, map_location="cpu", mmap=is_mapped)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise CheckpointError(
                f"{shown} can't be read as a torch file ({error}); it is probably damaged: get it "
                "again."
            ) from None
        raise CheckpointError(
            f"{shown} holds an object of {refused[1]}, which rlgen does not load, because loading "
            "it could run code. Convert the file once where you trust it: content = "
            "torch.load(path, weights_only=False), then torch.save({'model': state}, new_path) "
            "with the state dict in it, and name the new file."
        ) from None
    except Exception as error:  # a damaged pickle makes the reader fail in any way
        raise CheckpointError(
            f"{shown} can't be read as a torch file ({type(error).__name__}: {error}); it is "
            "probably damaged or cut short: get it again."
        ) from error


def _find_state(content: Any, depth: int = _MAX_NESTING) -> dict[str, Tensor]:
    """The state dict inside what a torch file holds; empty if there is none."""
    if not isinstance(content, Mapping) or depth == 0:
        return {}
    trainer = content.get("trainer")
    if isinstance(trainer, Mapping) and _VAR_TRAINER_PARTS[0] in trainer:
        return {
            f"{part}.{name}": tensor
            for part in _VAR_TRAINER_PARTS
            for name, tensor in _find_state(trainer.get(part), depth - 1).items()
        }
    for key in WRAPPERS:
        if found := _find_state(content.get(key), depth - 1):
            return found
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _bare(state: Mapping[str, Tensor], content: Any, shown: str) -> dict[str, Tensor]:
    """Check that there are weights, and take the prefixes off that all of them have."""
    if not state:
        held = list(content)[:8] if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{shown} holds no weights where they are looked for ({', '.join(WRAPPERS)}, or the "
            f"top of the file); it holds {held}. Save the state dict alone and name that file."
        )
    bare = dict(state)
    while prefix := next((p for p in _COMMON_PREFIXES if all(n.startswith(p) for n in bare)), ""):
        bare = {name.removeprefix(prefix): tensor for name, tensor in bare.items()}
    return bare


# The part of a larger checkpoint that is this model, if its keys carry the prefix.
_PART = {
    "var": "var_wo_ddp.",
    "var_vqvae": "vae_local.",
    "vqgan_gpt": "transformer.",
    "taming_vqgan": "first_stage_model.",
}
# Tensors beside the weights: loss networks, counters, and tables that follow from the sizes.
_IGNORED = {
    "llamagen": r"freqs_cis$|.*kv_cache",
    "var": r"lvl_1L$|attn_bias_for_masking$|blocks\.\d+\.attn\.zero_k_bias$",
    "vqgan_gpt": r"first_stage_model\.|cond_stage_model\.|blocks\.\d+\.attn\.mask$",
    "llamagen_vq": r"quantize\.codebook_used$|loss\.|discriminator\.|perceptual_loss\.",
    "var_vqvae": r"quantize\.ema_vocab_hit_SV$",
    "taming_vqgan": r"loss\.|quantize\.used$",
}


def select_state(
    state: Mapping[str, Tensor], family: str, *, location: str = "the file"
) -> dict[str, Tensor]:
    """Pick the tensors that a model of the family owns, by its public names.

    Takes the model's part out of a checkpoint that holds several, and leaves out caches, masks,
    usage counters and loss networks. Tensors of no known use stay, for `load_public_state` to
    report.

    Args:
        state: what `read_public_state` gave.
        family: a family of config/models.py.
        location: where the state came from, for the message.
    Raises:
        CheckpointError: VAR's `zero_k_bias`, which rlgen leaves out, is not zero.
    """
    prefix = _PART.get(family, "")
    if prefix and any(name.startswith(prefix) for name in state):
        state = {
            name.removeprefix(prefix): tensor
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
    for name, tensor in state.items():
        if family == "var" and name.endswith(".attn.zero_k_bias") and tensor.any():
            raise CheckpointError(
                f"{without_credentials(location)} has a {name} up to "
                f"{tensor.abs().max().item():g}, but the keys of a VAR have no bias; it is a "
                "variant that rlgen does not know."
            )
    ignored = re.compile(_IGNORED[family])
    return {name: tensor for name, tensor in state.items() if not ignored.match(name)}


def load_public_state(
    module: nn.Module,
    state: Mapping[str, Tensor],
    location: str,
    *,
    model_name: str | None = None,
) -> None:
    """Load a published state that must fit exactly; number formats are the module's.

    Args:
        module: keeps public names, so that the state's names are its own.
        state: what `select_state` left.
        location: where it came from, for the message.
        model_name: the published model that the module was built as; None if it is none.
    Raises:
        CheckpointError: names the missing, unexpected and mis-shaped tensors and the likely cause;
            or the file's name tells another resolution than the model's, which tensors do not.
    """
    shown = without_credentials(location)
    file_name = shown.rstrip("/").rsplit("/", 1)[-1]
    own, given = shapes_of(module.state_dict()), shapes_of(state)
    problems = mismatches(own, given)
    if problems:
        raise CheckpointError(
            f"{shown} does not fit {model_name or type(module).__name__}: tensors {problems}. "
            + explain_mismatch(own, given, file_name=file_name)
        )
    if model_name in MODELS and (conflict := resolution_conflict(MODELS[model_name], file_name)):
        raise CheckpointError(conflict)
    module.load_state_dict(dict(state))
