"""The alert rules by promtool: syntax, and the minute in which each of them fires."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlgen.jobs.metrics_export import EXPORTS
from tests.infra.rules import INFRA, RULES, alerts, annotated, shortened

TIMING = Path(__file__).with_name("rules_test.yaml")

pytestmark = pytest.mark.manifests
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool (Debian package prometheus)"
)


def promtool(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *words], cwd=folder, capture_output=True, text=True)


def checks() -> list[dict[str, Any]]:
    tests = yaml.safe_load(TIMING.read_text(encoding="utf-8"))["tests"]
    return [check for test in tests for check in test["alert_rule_test"]]


@needs_promtool
def test_promtool_accepts_configuration_and_rules() -> None:
    folder = INFRA / "prometheus"
    config = promtool("check", "config", "prometheus.yml", folder=folder)
    assert config.returncode == 0, config.stdout + config.stderr
    rules = promtool("check", "rules", "--lint-fatal", "rules.yaml", folder=folder)
    assert rules.returncode == 0, rules.stdout + rules.stderr
    assert f"{len(alerts())} rules found" in rules.stdout


@needs_promtool
def test_every_alert_fires_in_its_minute_and_not_before(tmp_path: Path) -> None:
    timing = yaml.safe_load(TIMING.read_text(encoding="utf-8"))
    for test in timing["tests"]:
        for check in test["alert_rule_test"]:
            for expected in check["exp_alerts"]:
                labels = expected["exp_labels"]
                expected["exp_annotations"] = annotated(check["alertname"], labels)
    (tmp_path / "timing.yaml").write_text(yaml.safe_dump(timing))
    shutil.copy(RULES, tmp_path)
    outcome = promtool("test", "rules", "timing.yaml", folder=tmp_path)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_every_alert_is_timed_both_firing_and_silent() -> None:
    firing = {check["alertname"] for check in checks() if check["exp_alerts"]}
    silent = {check["alertname"] for check in checks() if not check["exp_alerts"]}
    assert firing == silent == alerts().keys()


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for name, rule in alerts().items():
        assert rule["labels"].keys() == {"severity"}
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"].keys() == {"summary", "description"}
        assert len(rule["annotations"]["description"]) > 80, f"{name}: what to do?"


def test_the_readme_lists_the_alerts_with_their_severities() -> None:
    readme = (INFRA / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| ((?:Rlgen|Ray)\w+) \|.*\| (\w+) \|$", readme, re.M))
    assert listed == {name: rule["labels"]["severity"] for name, rule in alerts().items()}


def test_rules_and_dashboard_name_only_what_is_exported() -> None:
    exported = {f"ray_{export.name}" for export in EXPORTS}
    dashboard = INFRA / "grafana" / "dashboards" / "rlgen.json"
    for path in (RULES, dashboard):
        named = set(re.findall(r"ray_rlgen_\w+", path.read_text(encoding="utf-8")))
        assert named and named <= exported, named - exported
    panels = dashboard.read_text(encoding="utf-8")
    assert {name for name in exported if name not in panels} <= {
        "ray_rlgen_run_active",  # for an alert
    }


def test_shortening_changes_durations_and_nothing_else() -> None:
    text = 'expr: rate(x_5m{a="10m"}[10m] offset 2h) > 30\nfor: 5m\n'
    short = 'expr: rate(x_5m{a="10m"}[6000ms] offset 72000ms) > 30\nfor: 3000ms\n'
    assert shortened(text + " ", 100) == short + " "
