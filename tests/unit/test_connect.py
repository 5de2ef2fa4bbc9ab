"""What Ray is asked for; a real one answers in tests/ray."""

from types import SimpleNamespace
from typing import Any

import pytest

from rlgen.actors import placement
from rlgen.config import load_config


@pytest.mark.parametrize("has_dashboard", [True, False])
def test_a_ray_that_the_run_starts_may_do_without_a_dashboard(
    has_dashboard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def init(**options: Any) -> SimpleNamespace:
        asked.update(options)
        return SimpleNamespace(dashboard_url="127.0.0.1:8265" if has_dashboard else None)

    monkeypatch.setattr(placement.ray, "init", init)
    words = ["cluster.address=local", f"cluster.dashboard={str(has_dashboard).lower()}"]
    assert placement.connect(load_config(None, words)) == ("127.0.0.1:8265" * has_dashboard)
    assert asked["address"] == "local" and asked["include_dashboard"] is has_dashboard
    assert asked["log_to_driver"] is False
