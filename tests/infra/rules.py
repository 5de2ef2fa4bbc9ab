"""The alert rules, and how tests change their durations."""

import re
from pathlib import Path
from typing import Any

import yaml

INFRA = Path(__file__).resolve().parents[2] / "infra"
RULES = INFRA / "prometheus" / "rules.yaml"


def alerts() -> dict[str, dict[str, Any]]:
    """The rules by name."""
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def annotated(alert: str, labels: dict[str, str]) -> dict[str, str]:
    """The rule's annotations with the labels' values filled in."""

    def value(found: re.Match[str]) -> str:
        return labels[found[1]]

    return {
        name: re.sub(r"{{ \$labels\.(\w+) }}", value, text)
        for name, text in alerts()[alert]["annotations"].items()
    }


def shortened(text: str, factor: float) -> str:
    """A file of Prometheus with all its durations divided by a factor, and nothing else changed."""
    units = {"s": 1e3, "m": 60e3, "h": 3600e3}

    def shorter(found: re.Match[str]) -> str:
        return f"{max(1, round(int(found[1]) * units[found[2]] / factor))}ms"

    return re.sub(r"(?<=[\s\[])(\d+)([smh])(?=[\s\])])", shorter, text)
