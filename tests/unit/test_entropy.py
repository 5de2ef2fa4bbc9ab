"""The entropy controller: feedback, limits, schedule, and that it can't wind up."""

import itertools
import math

import pytest

from rlgen.config.learning import EntropyConfig
from rlgen.grpo.entropy import EntropyController, schedule

CONFIG = EntropyConfig(
    base_coef=0.01,
    target=0.6,
    dead_band=0.015,
    gain=3.0,
    min_coef=0.001,
    max_coef=0.05,
    smoothing=0.9,
    warmup_fraction=0.1,
    decay_start_fraction=0.8,
)
MIDDLE = {"step": 49, "num_steps": 100}


def coefficient(entropy: float | None, config: EntropyConfig = CONFIG, **when: int) -> float:
    return EntropyController(entropy).coefficient(config, **(when or MIDDLE))


@pytest.mark.parametrize("entropy", [None, 0.6, 0.6149, 0.5851])
def test_within_the_dead_band_the_coefficient_is_the_base(entropy) -> None:
    assert coefficient(entropy) == CONFIG.base_coef


@pytest.mark.parametrize("entropy", [0.5, 0.58, 0.62, 0.8])
def test_outside_it_grows_when_entropy_is_too_low_and_shrinks_when_too_high(entropy) -> None:
    found = coefficient(entropy)
    assert found == pytest.approx(0.01 * math.exp(3.0 * (0.6 - entropy)))
    assert (found > CONFIG.base_coef) == (entropy < CONFIG.target)


@pytest.mark.parametrize(("entropy", "expected"), [(0.0, 0.05), (1.0, 0.001)])
def test_limits_hold(entropy, expected) -> None:
    steep = CONFIG.model_copy(update={"gain": 30.0})
    assert coefficient(entropy, steep) == expected


def test_base_zero_is_off_whatever_is_measured() -> None:
    off = CONFIG.model_copy(update={"base_coef": 0.0})
    assert [coefficient(entropy, off) for entropy in (None, 0.0, 0.6, 1.0)] == [0.0] * 4


def test_warm_up_is_linear_and_decay_a_half_cosine() -> None:
    found = [schedule(CONFIG, step=step, num_steps=100) for step in range(100)]
    assert found[0] == pytest.approx(0.1)
    assert found[4] == pytest.approx(0.5)
    assert found[9:80] == [1.0] * 71
    assert found[89] == pytest.approx(0.5)  # halfway from 80 to 100
    assert found[84] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert found[99] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(found[80:]))


def test_the_schedule_multiplies_the_limited_coefficient() -> None:
    for step in (0, 50, 89):
        expected = 0.05 * schedule(CONFIG, step=step, num_steps=100)
        steep = CONFIG.model_copy(update={"gain": 30.0})
        assert coefficient(0.0, steep, step=step, num_steps=100) == pytest.approx(expected)


def test_without_warm_up_and_decay_the_schedule_is_one() -> None:
    flat = CONFIG.model_copy(update={"warmup_fraction": 0.0, "decay_start_fraction": 1.0})
    assert {schedule(flat, step=step, num_steps=7) for step in range(7)} == {1.0}


def test_the_measured_entropy_is_smoothed_from_the_first_value_on() -> None:
    first = EntropyController().observed(0.5, smoothing=0.9)
    assert first.mean_entropy == 0.5
    second = first.observed(0.7, smoothing=0.9)
    assert second.mean_entropy == pytest.approx(0.9 * 0.5 + 0.1 * 0.7)
    assert second.observed(0.3, smoothing=0.0).mean_entropy == pytest.approx(0.3)


def test_a_long_time_off_target_does_not_wind_up() -> None:
    controller = EntropyController()
    low = []
    for _ in range(500):
        controller = controller.observed(0.3, smoothing=0.9)
        low.append(controller.coefficient(CONFIG, **MIDDLE))
    assert max(low) == min(low) == pytest.approx(0.01 * math.exp(3 * 0.3))
    # Back on target, 0.9^30 = 0.04 of the error is left: inside the dead band.
    for _ in range(30):
        controller = controller.observed(0.6, smoothing=0.9)
    assert controller.coefficient(CONFIG, **MIDDLE) == CONFIG.base_coef
