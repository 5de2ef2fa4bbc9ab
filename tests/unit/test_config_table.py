"""The README's table of every field is what the configuration says."""

import re
from pathlib import Path

import pytest

from rlgen.config import RunConfig
from rlgen.config.table import END, RENEW, START, between_marks, field_tables, main
from tests.unit.test_config import all_fields, sections_in

README = Path(__file__).resolve().parents[2] / "README.md"


def rows_of(tables: str) -> list[list[str]]:
    """The cells of every row that is neither a heading nor a ruler."""
    rows = [line for line in tables.splitlines() if line.startswith("| `")]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in rows]


def test_the_readme_shows_every_field_as_it_is() -> None:
    text = README.read_text(encoding="utf-8")
    assert between_marks(text, field_tables()) == text, f"README.md is out of date; run `{RENEW}`"


def test_every_field_is_there_with_its_name_and_its_help_text() -> None:
    tables = field_tables()
    rows = {(cells[0].strip(" `"), cells[3].strip()) for cells in rows_of(tables)}
    shown = {(name, told.replace("\\", "")) for name, told in rows}
    told = {
        (name, " ".join(field.description.split()), bool(sections_in(field.annotation)))
        for _, name, field in all_fields(RunConfig)
        if field.description
    }
    assert len(told) > 100
    of_sections = {(name, text) for name, text, is_section in told if is_section}
    assert {(name, text) for name, text, _ in told} - of_sections <= shown
    # Those of a section stand above its table, except the scorers', which are a table each.
    assert [t for n, t in of_sections if t not in tables.replace("\\", "")] == []


def test_every_row_has_four_cells_and_none_is_empty() -> None:
    for cells in rows_of(field_tables()):
        assert len(cells) == 4 and all(cell.strip() for cell in cells), cells


@pytest.mark.parametrize(
    ("name", "values", "default"),
    [
        ("top_p", "number above 0 to 1", "`1.0`"),
        ("group_size", "integer from 2", "`8`"),
        ("combine", "`normalize_then_sum` or `sum_then_normalize`", "`normalize_then_sum`"),
        ("action", "`alarm`, `stop` or `rollback`", "`alarm`"),
        ("cfg_scales", "list of numbers above 1", "`[1.25, 1.5, 2.0, 3.0]`"),
        ("cfg_interval", "integer from 0 or `null`", "`null`"),
        (
            "scorers",
            "section or null, by name",
            "`clip` (type `clip`), `preference` (type `hpsv2`)",
        ),
        ("target", "text", "must be given"),
    ],
)
def test_types_limits_and_defaults_are_told_in_words(name, values, default) -> None:
    cells = next(cells for cells in rows_of(field_tables()) if cells[0].strip() == f"`{name}`")
    assert [cell.strip() for cell in cells[1:3]] == [values, default]


def test_a_page_is_renewed_between_its_marks_and_nowhere_else(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    assert main(["--renew", str(page)]) == 0
    assert page.read_text() == f"before\n{START}\n\n{field_tables()}\n\n{END}\nafter\n"
    renewed = page.read_text()
    assert main(["--renew", str(page)]) == 0
    assert page.read_text() == renewed


@pytest.mark.parametrize("text", ["no marks", f"{END}\n{START}\n", f"{START}\n{START}\n{END}\n"])
def test_a_page_without_its_marks_is_refused_and_left_alone(tmp_path, capsys, text) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert main(["--renew", str(page)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {page}: there must be one line") and said.count("\n") == 1
    assert page.read_text() == text
