"""Every field of a run's configuration as Markdown tables, for the README.

`python -m rlgen.config.table` prints them, and `--renew README.md` puts them between the marks of
that file. Owns the words for types and limits; names, defaults and meanings are those of the
sections, whose docstrings are the help text. Must not import torch.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from rlgen.config.reward import SCORER_TYPES, RewardConfig
from rlgen.config.run import RunConfig
from rlgen.errors import ConfigError

START = "<!-- fields: start -->"
END = "<!-- fields: end -->"
RENEW = "python -m rlgen.config.table --renew README.md"
_SCORERS = "reward.scorers"
_LINE = 10_000
"""A default stands in one cell, so its YAML must not be broken into lines."""


def field_tables() -> str:
    """All sections with their fields, each section a heading, a sentence and a table."""
    lines: list[str] = []
    for path, about, model in _sections():
        lines += [
            f"#### {path}",
            "",
            _cell(about),
            "",
            "| field | values | default | meaning |",
            "|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in _rows(model)),
            "",
        ]
    return "\n".join(lines).rstrip("\n")


def between_marks(text: str, content: str) -> str:
    """The text with other content between its marks.

    Raises:
        ConfigError: the marks are not there, each once and in order.
    """
    before, start, rest = text.partition(f"{START}\n")
    _, end, after = rest.rpartition(END)
    if not (start and end) or text.count(START) != 1 or text.count(END) != 1:
        raise ConfigError(
            f"there must be one line {START} and after it one line {END}, between which the tables "
            "stand; put them in."
        )
    return f"{before}{start}\n{content}\n\n{END}{after}"


def _sections() -> Iterator[tuple[str, str, type[BaseModel]]]:
    """Heading, help text and class of every section, those in sections right after them."""
    yield "The run itself", "These keys stand alone, without a section.", RunConfig
    yield from _sections_in(RunConfig, "")


def _sections_in(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        if path == _SCORERS:
            for kind, scorer in SCORER_TYPES.items():
                yield f"`{_SCORERS}.NAME` with `type: {kind}`", _about(scorer), scorer
        elif section := _section_of(field.annotation):
            about = " ".join(filter(None, [_about(section), field.description]))
            yield f"`{path}`", about, section
            yield from _sections_in(section, f"{path}.")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, also one that may be null."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _about(section: type[BaseModel]) -> str:
    return section.__doc__ or ""


def _rows(model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Name, values, default and meaning of the fields that are no sections."""
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        if _section_of(field.annotation) is None:
            default = "must be given" if field.is_required() else _default_of(model, name)
            values = _values(schema["properties"][name])
            yield f"`{name}`", _cell(values), default, _cell(field.description or "")


def _default_of(model: type[BaseModel], name: str) -> str:
    """A default as YAML on one line, as one would write it after `key:`."""
    default = model.model_fields[name].get_default(call_default_factory=True)
    if model is RewardConfig and name == "scorers":
        return ", ".join(f"`{key}` (type `{scorer.type}`)" for key, scorer in default.items())
    plain = list(default) if isinstance(default, tuple) else default
    written = yaml.safe_dump(plain, default_flow_style=True, width=_LINE, allow_unicode=True)
    return f"`{written.removesuffix('...' + chr(10)).strip()}`".replace("|", "\\|")


def _values(schema: Mapping[str, Any]) -> str:
    """What a field takes, in words, from its JSON schema."""
    if "anyOf" in schema:
        return _either(_values(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return _either(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return f"{kind}{_limits(schema)}"
    if kind == "array":
        return f"list of {_values(schema['items']).replace('number', 'numbers')}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        is_section = isinstance(inner, Mapping) and "type" not in inner
        return "section or null, by name" if is_section else "mapping"
    return {"boolean": "`true` or `false`", "string": "text", "null": "`null`"}[str(kind)]


def _limits(schema: Mapping[str, Any]) -> str:
    """The limits of a number; empty if it has none."""
    words = {
        "minimum": "from",
        "exclusiveMinimum": "above",
        "maximum": "to",
        "exclusiveMaximum": "to below",
        "multipleOf": "in steps of",
    }
    return "".join(f" {word} {schema[key]:.10g}" for key, word in words.items() if key in schema)


def _either(options: Iterable[str]) -> str:
    *first, last = options
    return f"{', '.join(first)} or {last}" if first else last


def _cell(text: str) -> str:
    """One line for a cell: a | would end it, and a * or < outside of code would be markup."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    escaped = [part if part.startswith("`") else re.sub(r"([*<])", r"\\\1", part) for part in parts]
    return "".join(escaped).replace("|", "\\|")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or renew a file."""
    parser = argparse.ArgumentParser(
        prog="python -m rlgen.config.table", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--renew", type=Path, metavar="FILE", help="put them between its marks")
    request = parser.parse_args(arguments)
    if request.renew is None:
        print(field_tables())
        return 0
    try:
        text = between_marks(request.renew.read_text(encoding="utf-8"), field_tables())
    except ConfigError as error:
        print(f"error: {request.renew}: {error}", file=sys.stderr)
        return 2
    request.renew.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
