"""From a step to its units: balanced classes, fixed shapes, keys that don't depend on the cut."""

import numpy as np
import pytest

from rlgen.config import RunConfig
from rlgen.sampling.units import (
    class_schedule,
    independent_units,
    training_settings,
    training_units,
)
from rlgen.types import SamplingSettings, WorkUnit
from tests.tiny import tiny_config


def classes_of(units: list[WorkUnit]) -> list[int]:
    return np.concatenate([unit.class_ids_P for unit in units]).tolist()


def keys_of(units: list[WorkUnit]) -> list[int]:
    return np.concatenate([unit.condition_indices_P for unit in units]).tolist()


def evaluation(
    config: RunConfig, num_images: int, *, classes: int = 0, per_class: int = 0
) -> list[WorkUnit]:
    return independent_units(
        config,
        "evaluate",
        num_images=num_images,
        seed=77,
        policy_version=5,
        settings=SamplingSettings(cfg_scale=1.5),
        kept_classes=classes,
        kept_per_class=per_class,
    )


@pytest.mark.parametrize("num_conditions", [10, 60, 25, 3])
def test_classes_are_balanced_as_far_as_they_divide(num_conditions) -> None:
    found = class_schedule(seed=1, step=2, num_conditions=num_conditions, num_classes=10)
    counts = np.bincount(found, minlength=10)
    assert found.dtype == np.int64 and len(found) == num_conditions
    assert counts.max() - counts.min() <= (num_conditions % 10 > 0)


def test_the_schedule_depends_on_seed_and_step_alone() -> None:
    def schedule(seed: int, step: int) -> list[int]:
        found = class_schedule(seed=seed, step=step, num_conditions=40, num_classes=10)
        return found.tolist()

    np.random.seed(0)
    first = schedule(3, 4)
    np.random.seed(1)
    assert schedule(3, 4) == first
    assert len({tuple(schedule(seed, step)) for seed in range(4) for step in range(4)}) == 16
    assert first != sorted(first), "the order is random"
    assert schedule(2**32 - 1, 10**6) != first


def test_every_class_is_shown_over_the_steps_that_have_no_room_for_all() -> None:
    seen = {
        class_id
        for step in range(60)
        for class_id in class_schedule(seed=0, step=step, num_conditions=3, num_classes=10)
    }
    assert seen == set(range(10))


def test_units_have_one_shape_and_cover_the_step() -> None:
    config = tiny_config(rollout__conditions_per_step=12, rollout__conditions_per_unit=4)
    units = training_units(config, 6, policy_version=3)
    assert len(units) == config.num_units == 3
    assert {unit.class_ids_P.shape for unit in units} == {(4,)}
    assert {unit.num_images for unit in units} == {4 * 3}
    assert sum(unit.num_images for unit in units) == config.images_per_step
    assert [unit.index for unit in units] == [0, 1, 2]
    assert len({unit.unit_id for unit in units}) == 3
    assert keys_of(units) == list(range(12))
    assert {(u.step, u.policy_version, u.seed, u.purpose) for u in units} == {(6, 3, 0, "train")}
    assert {unit.kept_images for unit in units} == {()}


def test_how_a_step_is_cut_changes_neither_classes_nor_noise_keys() -> None:
    cuts = [
        training_units(
            tiny_config(rollout__conditions_per_step=12, rollout__conditions_per_unit=size),
            5,
            policy_version=5,
        )
        for size in (1, 3, 12)
    ]
    assert [len(units) for units in cuts] == [12, 4, 1]
    assert len({tuple(classes_of(units)) for units in cuts}) == 1
    assert {tuple(keys_of(units)) for units in cuts} == {tuple(range(12))}
    assert {unit.seed for units in cuts for unit in units} == {0}


def test_workers_and_ranks_do_not_appear_in_units() -> None:
    few = training_units(tiny_config(), 1, policy_version=1)
    many = training_units(
        tiny_config(rollout__num_workers=3, learner__num_workers=2, reward__num_workers=2),
        1,
        policy_version=1,
    )
    for a, b in zip(few, many, strict=True):
        assert np.array_equal(a.class_ids_P, b.class_ids_P)
        assert np.array_equal(a.condition_indices_P, b.condition_indices_P)
        assert (a.unit_id, a.seed, a.settings) == (b.unit_id, b.seed, b.settings)


def test_training_settings_are_the_rollouts() -> None:
    config = tiny_config(
        rollout__cfg_scale=1.5, rollout__temperature=0.7, rollout__top_k=5, rollout__top_p=0.9
    )
    expected = SamplingSettings(cfg_scale=1.5, temperature=0.7, top_k=5, top_p=0.9)
    assert training_settings(config) == expected
    assert training_units(config, 0, policy_version=0)[1].settings == expected


def test_evaluations_take_classes_in_turn_with_one_key_per_image() -> None:
    units = evaluation(tiny_config(evaluation__images_per_unit=4), 10)
    assert classes_of(units) == [i % 4 for i in range(10)]
    assert keys_of(units) == list(range(10))
    assert [unit.num_images for unit in units] == [4, 4, 2]
    assert {(u.group_size, u.step, u.seed, u.policy_version) for u in units} == {(1, 0, 77, 5)}


def test_evaluations_are_the_same_images_however_they_are_cut() -> None:
    cuts = [evaluation(tiny_config(evaluation__images_per_unit=size), 100) for size in (1, 7, 250)]
    assert len({tuple(classes_of(units)) for units in cuts}) == 1
    assert len({tuple(keys_of(units)) for units in cuts}) == 1


def test_only_the_first_images_of_the_first_classes_are_kept() -> None:
    config = tiny_config(evaluation__images_per_unit=5)  # of 4 classes
    kept = [unit.kept_images for unit in evaluation(config, 16, classes=3, per_class=2)]
    assert kept == [(0, 1, 2, 4), (0, 1), (), ()], "images 0, 1, 2, 4, 5, 6"
    more = evaluation(config, 16, classes=10, per_class=2)
    assert [len(unit.kept_images) for unit in more] == [5, 3, 0, 0], "all classes there are"
    assert {unit.kept_images for unit in evaluation(config, 16)} == {()}


def test_unit_ids_tell_versions_scales_and_purposes_apart() -> None:
    config = tiny_config(evaluation__images_per_unit=5)
    ids: list[str] = []
    for purpose in ("evaluate", "bootstrap"):
        for version in (0, 1):
            for scale in (1.0, 1.25, 1.5):
                ids += [
                    unit.unit_id
                    for unit in independent_units(
                        config,
                        purpose,
                        num_images=10,
                        seed=0,
                        policy_version=version,
                        settings=SamplingSettings(cfg_scale=scale),
                    )
                ]
    ids += [
        unit.unit_id for step in range(3) for unit in training_units(config, step, policy_version=0)
    ]
    assert len(set(ids)) == len(ids)
