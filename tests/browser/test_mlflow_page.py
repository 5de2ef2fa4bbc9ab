"""The pages of a real run on a real MLflow server, seen by a real browser."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from rlgen.jobs import grpo
from tests.browser.chromium import DRAWN_S, needs_chromium, opened, picture
from tests.conftest import TINY_RUN
from tests.mlflow_server import MlflowServer

pytestmark = [pytest.mark.browser, pytest.mark.slow, needs_chromium]

FULL_RUN = os.environ.get("RLGEN_SCREENSHOT_RUN") == "full"
"""For pictures worth looking at: the default preset, which takes minutes."""
SHORT_RUN = [*TINY_RUN, "steps=12", "evaluation.every_steps=3"]
TRAINING = "?workflowType=machine_learning"
CHART = ".js-plotly-plot"
CURVE = f"{CHART} .scatterlayer path.js-line"
CLOSE_ASSISTANT = "[data-component-id='mlflow.assistant.chat_panel.close']"


@dataclass(frozen=True)
class Tracked:
    """A finished run: its pages, and the steps at which it was judged."""

    run: str
    server: str
    report: str
    judged: list[int]


@pytest.fixture(scope="module")
def tracked(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracked]:
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("tracked")
    with MlflowServer(folder / "server") as server:
        settings = [
            *([] if FULL_RUN else SHORT_RUN),
            "runtime=local",
            f"tracking.uri={server.uri}",
            "tracking.model=digits",
            "tracking.system_metrics_s=0.5",
        ]
        assert grpo.main(["--output", str(folder / "digits"), *settings]) == 0
        client = MlflowClient(server.uri)
        experiment = client.get_experiment_by_name("rlgen")
        [run] = client.search_runs([experiment.experiment_id])
        page = f"{server.uri}/#/experiments/{experiment.experiment_id}/runs/{run.info.run_id}"
        judged = [p.step for p in client.get_metric_history(run.info.run_id, "judge/fid")]
        yield Tracked(page, server.uri, (folder / "digits/report.html").as_uri(), judged)


def test_a_person_finds_curves_grid_machine_and_champion(tracked: Tracked, tmp_path: Path) -> None:
    with opened(f"{tracked.run}/model-metrics{TRAINING}", height=1000) as page:
        page.locator(CLOSE_ASSISTANT).click()
        page.get_by_placeholder("Search metric charts").fill("judge/(fid|recall|prec)|samples")
        expect(page.locator(CHART)).to_have_count(3, timeout=DRAWN_S * 1000)
        # A line through all evaluations: the first point and a segment to each further one.
        assert {curve.count("L") for curve in paths(page)} == {len(tracked.judged) - 1}

        for step in tracked.judged:  # leaf through the grids
            if step:
                page.get_by_role("slider").press("ArrowRight")
            grid = page.locator(f"img[src*='step%2B{step}%2B']").first
            grid.scroll_into_view_if_needed()  # MLflow prints every parameter above it
            assert width_of(grid) > 100
        page.screenshot(path=picture("mlflow", tmp_path))

        page.goto(f"{tracked.run}/system-metrics{TRAINING}")
        page.get_by_text("cpu_utilization_percentage").first.wait_for()
        page.locator(CURVE).nth(3).wait_for()
        page.screenshot(path=picture("mlflow_system", tmp_path))

        page.goto(f"{tracked.server}/#/models/digits/versions/1{TRAINING}")
        page.get_by_text("champion").first.wait_for()
        page.get_by_text("rlgen.judge_fid").first.wait_for()
        page.screenshot(path=picture("mlflow_model", tmp_path))

        page.goto(tracked.report)
        page.get_by_text("GRPO took the judge FID").first.wait_for()
        page.screenshot(path=picture("report", tmp_path))


def paths(page: Page) -> list[str]:
    """What the curves of the page are drawn by."""
    return [curve.get_attribute("d") or "" for curve in page.locator(CURVE).all()]


def width_of(image: Locator) -> int:
    """Of the picture itself; 0 if it is not loaded."""
    return int(image.evaluate("image => image.naturalWidth"))
