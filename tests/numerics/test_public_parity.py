"""rlgen computes what the public implementations compute, on weights from a frozen rule.

The folder holds golden numbers of small models of every family; the parity job runs larger ones.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlgen.jobs.parity import main
from rlgen.parity.cases import load_case, read_cases
from rlgen.parity.rule import distribution_of, is_made, make_array
from rlgen.parity.run import run_case

CASES = Path(__file__).parent / "data" / "parity"
ENTRIES = {entry["name"]: entry for entry in read_cases(CASES)}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the cases that a test may spoil."""
    return Path(shutil.copytree(CASES, tmp_path / "cases"))


def rewrite(folder: Path, name: str, **changes: Any) -> None:
    """Change fields of one case in a folder's index."""
    content = json.loads((folder / "cases.json").read_text())
    [entry] = [entry for entry in content["cases"] if entry["name"] == name]
    entry.update(changes)
    (folder / "cases.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", ENTRIES)
def test_every_array_of_the_case_is_reproduced(name) -> None:
    comparisons = run_case(CASES, ENTRIES[name])
    expected = [array for array in load_case(CASES, ENTRIES[name]).arrays if array[:4] == "out."]
    assert [comparison.array for comparison in comparisons] == expected
    assert [c for c in comparisons if not c.passed] == []


def test_the_job_prints_a_line_for_each_case_and_writes_them(tmp_path, capsys) -> None:
    report = tmp_path / "parity.json"
    assert main(["--cases", str(CASES), "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    results = json.loads(report.read_text())
    assert {result["name"] for result in results} == set(ENTRIES)
    assert all(f"pass  {name}" in printed for name in ENTRIES)
    assert f"{len(ENTRIES)} passed, 0 failed" in printed
    assert all(a["deviation"] <= a["tolerance"] for r in results for a in r["arrays"])


def test_family_and_name_select_cases(capsys) -> None:
    assert main(["--cases", str(CASES), "--family", "taming_mingpt,sampling_filters"]) == 0
    assert "2 passed, 0 failed" in capsys.readouterr().out
    assert main(["--cases", str(CASES), "--case", "llamagen_c2i_tiny"]) == 0
    assert "1 passed, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llamagen_c2i_tiny", "norm_eps", 1e-3),
        ("llamagen_c2i_tiny", "rope_base", 5000),
        ("var_tiny_l2norm", "attn_l2_norm", False),
        ("var_vqvae_phi256", "quant_resi", 0.4),
        ("taming_mingpt_tiny", "n_head", 2),
    ],
)
def test_another_architecture_fails(copied, name, field, value, capsys) -> None:
    rewrite(copied, name, config=ENTRIES[name]["config"] | {field: value})
    assert main(["--cases", str(copied), "--case", name]) == 1
    assert f"FAIL  {name}" in capsys.readouterr().out


def test_other_weights_fail(copied) -> None:
    rewrite(copied, "taming_mingpt_tiny", seed=1)
    assert main(["--cases", str(copied), "--case", "taming_mingpt_tiny"]) == 1


def test_an_unknown_family_is_a_failure_and_the_others_still_run(copied, capsys) -> None:
    rewrite(copied, "sampling_filters", family="diffusion")
    assert main(["--cases", str(copied)]) == 1
    printed = capsys.readouterr().out
    assert "family diffusion is unknown" in printed
    assert f"{len(ENTRIES) - 1} passed, 1 failed" in printed


@pytest.mark.parametrize("part", ["config", "settings"])
@pytest.mark.parametrize("name", ENTRIES)
def test_an_unknown_field_is_a_failure(copied, name, part, capsys) -> None:
    rewrite(copied, name, **{part: ENTRIES[name].get(part, {}) | {"flux_capacitor": 1}})
    assert main(["--cases", str(copied), "--case", name]) == 1
    assert "flux_capacitor" in capsys.readouterr().out


def test_an_array_that_nobody_computes_is_a_failure(copied, capsys) -> None:
    path = copied / ENTRIES["taming_mingpt_tiny"]["file"]
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **arrays, **{"out.novel": np.zeros(3)})
    assert main(["--cases", str(copied), "--case", "taming_mingpt_tiny"]) == 1
    assert "out.novel: not computed" in capsys.readouterr().out


def test_nan_is_a_failure(copied) -> None:
    path = copied / ENTRIES["taming_mingpt_tiny"]["file"]
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["out.tf"][0, 0, 0] = np.nan
    np.savez(path, **arrays)
    assert main(["--cases", str(copied), "--case", "taming_mingpt_tiny"]) == 1


def test_a_missing_file_of_one_case_is_its_failure(copied, capsys) -> None:
    (copied / ENTRIES["taming_mingpt_tiny"]["file"]).unlink()
    assert main(["--cases", str(copied), "--family", "taming_mingpt"]) == 1
    assert "taming_mingpt_tiny can't be read" in capsys.readouterr().out


def test_the_rule_gives_the_checked_values() -> None:
    for check in json.loads((CASES / "cases.json").read_text())["rule_check"]:
        array = make_array(check["seed"], check["key"], check["shape"])
        assert array.dtype == np.float32
        assert array.ravel()[:4].tolist() == check["first"], check["key"]
        assert float(array.sum(dtype=np.float64)) == pytest.approx(
            check["float64_sum"], rel=1e-9, abs=1e-7
        )
        assert list(distribution_of(check["key"], check["shape"])) == check["spec"]


def test_tables_that_models_compute_are_not_made() -> None:
    assert not is_made("blocks.3.attn.zero_k_bias") and not is_made("layers.0.freqs_cis")
    assert is_made("blocks.3.attn.q_bias")
