"""Whether tensors fit a model, and if not, what the file probably is.

Owns the comparison of names and shapes, and the guess at the cause: it reads a model's sizes off
its tensors' shapes and looks for the published model that has them. Needs no module and no
values.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rlgen.config.models import MODELS, ModelSpec

Shapes = Mapping[str, tuple[int, ...]]
Facts = dict[str, Any]
"""Sizes that shapes tell, under the names of the config's fields; `num_tokens` beside."""

_MAX_NAMES_LISTED = 8


def mismatches(own: Shapes, given: Shapes) -> str:
    """The missing, unexpected and mis-shaped tensors in words; empty if all fit."""
    problems = {
        "missing": own.keys() - given.keys(),
        "unexpected": given.keys() - own.keys(),
        "mis-shaped": {
            f"{name} {list(given[name])} instead of {list(own[name])}"
            for name in own.keys() & given.keys()
            if own[name] != given[name]
        },
    }
    return "; ".join(
        f"{len(names)} {what} ({_listed(names)})" for what, names in problems.items() if names
    )


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = len(ordered) - _MAX_NAMES_LISTED
    return ", ".join(ordered[:_MAX_NAMES_LISTED]) + (f" and {more} more" if more > 0 else "")


def explain_mismatch(own: Shapes, given: Shapes, *, file_name: str) -> str:
    """Guess why a published file does not fit, and say what to set.

    Args:
        own: shapes of the model's tensors.
        given: shapes of the file's tensors, as `select_state` leaves them.
        file_name: tells a resolution where the shapes do not.
    Returns:
        one or two sentences.
    """
    wanted, found = read_sizes(own), read_sizes(given)
    if found is None:
        return (
            "The file has none of the tensors by which LlamaGen, VAR, taming-transformers or their "
            f"tokenizers are known (it has {', '.join(list(given)[:3])}); name another file."
        )
    family, facts = found
    described = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    alike = _published_like(family, facts, file_name)
    key = "tokenizer" if _is_tokenizer(family) else "policy"
    looks = f"The file looks like {' or '.join(alike) or f'a {family}'} ({described})"
    way_out = f"set {key}.model={' or '.join(alike)}" if alike else "no published model has these"
    if wanted is None:
        return f"{looks}."
    if _is_tokenizer(wanted[0]) != _is_tokenizer(family):
        other = "tokenizer" if key == "policy" else "policy"
        return (
            f"{looks}, which is a {key} and no {other}: give it as {key}.checkpoint, and another "
            f"file as {other}.checkpoint."
        )
    if wanted[0] != family:
        return f"{looks}; {way_out}."
    differing = {name: value for name, value in facts.items() if wanted[1][name] != value}
    if not differing:
        return (
            f"{looks}, and so does the model: the file is incomplete, or of a variant that rlgen "
            "does not know."
        )
    return f"{looks}. {_difference(key, wanted[1], differing)}; {_change(key, differing, way_out)}."


def _difference(key: str, wanted: Facts, differing: Facts) -> str:
    if "caption_width" in differing and None in (
        wanted["caption_width"],
        differing["caption_width"],
    ):
        kinds = ("class", "text") if wanted["caption_width"] is None else ("text", "class")
        return f"The {key} asked for is {kinds[0]}-conditional and the file {kinds[1]}-conditional"
    if differing.keys() == {"num_tokens"}:
        return (
            f"It is for another resolution: {differing['num_tokens']} tokens where "
            f"{wanted['num_tokens']} are asked for"
        )
    pairs = [
        f"{name} = {value} where {wanted[name]} is asked for" for name, value in differing.items()
    ]
    return f"It has {', '.join(pairs)}"


def _change(key: str, differing: Facts, way_out: str) -> str:
    if differing.keys() == {"num_classes"}:
        return (
            f"set {key}.architecture.num_classes={differing['num_classes']} and name as many "
            "class_names"
        )
    return way_out


def resolution_conflict(model: ModelSpec, file_name: str) -> str:
    """What is wrong if a LlamaGen file's name tells another resolution; its tensors can't.

    Returns:
        a sentence, or nothing.
    """
    named = _resolution_in(file_name)
    if model.family != "llamagen" or named in (None, model.image_size):
        return ""
    other = model.name.replace(str(model.image_size), str(named))
    return (
        f"{file_name} is by its name for {named} px and {model.name} is for {model.image_size} px; "
        "the tensors of both are alike, so it would load, but sample bad images. "
        + (f"Set policy.model={other}" if other in MODELS else "Name a file for this resolution")
        + ", or rename the file if its name is wrong."
    )


def _resolution_in(file_name: str) -> int | None:
    found = re.search(r"(?<!\d)(256|384|512)(?!\d)", file_name)
    return None if found is None else int(found[1])


def read_sizes(shapes: Shapes) -> tuple[str, Facts] | None:
    """Family and sizes of the model that tensors of these shapes belong to; None if unknown."""
    for family, mark in _MARKS.items():
        if mark in shapes:
            return family, _READERS[family](shapes)
    return None


# A tensor that no other family has; the tokenizers' before the more general.
_MARKS = {
    "llamagen": "layers.0.attention.wqkv.weight",
    "var": "pos_1LC",
    "vqgan_gpt": "blocks.0.attn.key.weight",
    "var_vqvae": "quantize.quant_resi.qresi_ls.0.weight",
    "llamagen_vq": "encoder.conv_blocks.0.res.0.conv1.weight",
    "taming_vqgan": "encoder.down.0.block.0.conv1.weight",
}


def _size(shapes: Shapes, name: str, axis: int) -> int | None:
    """One side of a tensor, or None where the file lacks it."""
    shape = shapes.get(name, ())
    return shape[axis] if axis < len(shape) else None


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbered modules follow the prefix."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({m[1] for name in shapes if (m := pattern.match(name))})


def _less_null(rows: int | None) -> int | None:
    return None if rows is None else rows - 1


def _llamagen(shapes: Shapes) -> Facts:
    return {
        "num_layers": _count(shapes, "layers"),
        "width": _size(shapes, "tok_embeddings.weight", 1),
        "codebook_size": _size(shapes, "tok_embeddings.weight", 0),
        "num_classes": _less_null(_size(shapes, "cls_embedding.embedding_table.weight", 0)),
        "caption_width": _size(shapes, "cls_embedding.cap_proj.fc1.weight", 1),
    }


def _var(shapes: Shapes) -> Facts:
    return {
        "depth": _count(shapes, "blocks"),
        "width": _size(shapes, "pos_1LC", 2),
        "codebook_size": _size(shapes, "head.weight", 0),
        "num_classes": _less_null(_size(shapes, "class_emb.weight", 0)),
        "num_tokens": _size(shapes, "pos_1LC", 1),
        "shared_aln": "shared_ada_lin.1.weight" in shapes,
    }


def _vqgan_gpt(shapes: Shapes) -> Facts:
    return {
        "num_layers": _count(shapes, "blocks"),
        "width": _size(shapes, "pos_emb", 2),
        "codebook_size": _size(shapes, "head.weight", 0),
        "num_tokens": _size(shapes, "pos_emb", 1),
    }


def _llamagen_vq(shapes: Shapes) -> Facts:
    return {
        "stride": 2 ** (_count(shapes, "encoder.conv_blocks") - 1),
        "codebook_size": _size(shapes, "quantize.embedding.weight", 0),
        "codebook_embed_dim": _size(shapes, "quantize.embedding.weight", 1),
    }


def _var_vqvae(shapes: Shapes) -> Facts:
    return {
        "vocab_size": _size(shapes, "quantize.embedding.weight", 0),
        "z_channels": _size(shapes, "quantize.embedding.weight", 1),
        "ch": _size(shapes, "encoder.conv_in.weight", 0),
    }


def _taming_vqgan(shapes: Shapes) -> Facts:
    return {
        "stride": 2 ** (_count(shapes, "encoder.down") - 1),
        "n_embed": _size(shapes, "quantize.embedding.weight", 0),
        "embed_dim": _size(shapes, "quantize.embedding.weight", 1),
    }


_READERS = {
    "llamagen": _llamagen,
    "var": _var,
    "vqgan_gpt": _vqgan_gpt,
    "llamagen_vq": _llamagen_vq,
    "var_vqvae": _var_vqvae,
    "taming_vqgan": _taming_vqgan,
}


def _published_facts(spec: ModelSpec) -> Facts:
    """What `read_sizes` would find in a published model's file."""
    fields = spec.architecture
    facts: Facts = {"caption_width": None, "num_classes": None, **fields}
    if "patch_nums" in fields:
        facts["num_tokens"] = sum(side**2 for side in fields["patch_nums"])
    elif "grid_size" in fields:
        facts["num_tokens"] = fields["grid_size"] ** 2
    levels = fields.get("encoder_ch_mult") or fields.get("ch_mult")
    if levels:
        facts["stride"] = 2 ** (len(levels) - 1)
    return facts


def _published_like(family: str, facts: Facts, file_name: str) -> list[str]:
    """Published models with these sizes; where only the resolution is open, the name decides."""
    alike = [
        spec
        for spec in MODELS.values()
        if spec.family == family
        and all(_published_facts(spec)[name] == value for name, value in facts.items())
    ]
    named = [spec for spec in alike if spec.image_size == _resolution_in(file_name)]
    return [spec.name for spec in named or alike]


def _is_tokenizer(family: str) -> bool:
    return any(spec.is_tokenizer for spec in MODELS.values() if spec.family == family)
