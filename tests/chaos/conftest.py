"""How often and where to hurt: `pytest tests/chaos --chaos-rounds 5` is the full form."""

from pathlib import Path
from typing import Any

import pytest

from tests.chaos.victims import finish, running, summary_of


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config) -> int:
    return pytestconfig.getoption("--chaos-rounds")


@pytest.fixture(scope="session")
def undisturbed(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of the same run in one process that nobody hurts."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    with running(output, "runtime=local") as job:
        finish(job)
    return summary_of(output)
