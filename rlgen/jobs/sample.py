"""Look at a policy: sample some classes and write one picture with a row for each.

`python -m rlgen.jobs.sample --config jobs/llamagen-l-256.yaml --classes 207,360,388
policy.checkpoint=c2i_L_256.pt tokenizer.checkpoint=vq_ds16_c2i.pt rollout.cfg_scale=2`

Only the policy and its tokenizer are opened: what else the configuration names, or leaves to the
user, does not matter. The distribution, the number format and the images sampled at once are
those of `rollout`, the noise is that of `seed`. An image's noise depends on its class and its
place in the row alone, and is an evaluation's: with `seed` at `evaluation.seed`, the images are
those that a run judges.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlgen.config import EMBEDDED, RunConfig, load_config
from rlgen.config.plan import check_local_files, check_required
from rlgen.errors import ConfigError
from rlgen.jobs.cli import run_job

if TYPE_CHECKING:  # torch takes seconds to import; --help must not
    import numpy as np

    from rlgen.jobs.console import RunProgress
    from rlgen.types import WorkUnit

DEFAULT_ROWS = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, check, load, sample, write."""
    parser = argparse.ArgumentParser(
        prog="python -m rlgen.jobs.sample",
        description=(__doc__ or "").split("\n")[0],
        epilog="settings: fields of the configuration, such as seed=1 rollout.cfg_scale=2 "
        "rollout.dtype=bfloat16; rollout.conditions_per_unit * rollout.group_size images are "
        "sampled at once",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; default: the embedded digits")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        default=Path("images.png"),
        help="the picture, replaced if it exists; default: images.png",
    )
    parser.add_argument(
        "--classes",
        metavar="ID,ID,...",
        help="class ids, or places in the file of captions, from 0; default: the first "
        f"{DEFAULT_ROWS}",
    )
    parser.add_argument(
        "--images-per-class", metavar="N", type=int, default=4, help="columns; default: 4"
    )
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    given = parser.parse_intermixed_args(arguments)
    if given.output.suffix != ".png":
        raise ConfigError(f"--output {given.output} must end in .png.")
    if given.images_per_class < 1:
        raise ConfigError(f"--images-per-class {given.images_per_class} must be 1 or more.")
    config = load_config(given.config, given.settings)
    check_models(config)
    sample(config, given.output, class_ids=given.classes, images_per_class=given.images_per_class)
    return 0


def check_models(config: RunConfig) -> None:
    """Refuse paths of the policy and its tokenizer that do not exist, or are left to the user.

    Raises:
        ConfigError: names the keys and what is meant.
    """
    alone = RunConfig(policy=config.policy, tokenizer=config.tokenizer)
    check_local_files(alone)
    check_required(alone)


def sample(
    config: RunConfig, output: Path, *, class_ids: str | None, images_per_class: int
) -> None:
    """Sample, decode, write the grid, and print where it is, what it shows and how fast it was.

    Args:
        config: policy, tokenizer, rollout and seed are used.
        output: the PNG.
        class_ids: ids with commas between; None takes the first ones.
        images_per_class: columns.
    Raises:
        ConfigError: no such class; guidance without a null class; a policy and a tokenizer that
            don't fit, or names that aren't those of the policy's classes.
        CheckpointError: a file is missing, damaged or of another kind.
        StorageError: the picture can't be written.
    """
    import numpy as np

    from rlgen.evaluation.grid import write_grid
    from rlgen.jobs.console import RunProgress
    from rlgen.storage import check_writable

    check_writable(str(output.parent))
    with RunProgress(1) as progress:
        config = _with_embedded(config, progress)
        names = _condition_names(config)
        rows = _chosen(class_ids, names)
        units = grid_units(config, rows, images_per_class, num_classes=len(names))
        images_u8, speeds = _make_images(config, units, len(names), progress)
        write_grid(output, np.concatenate(images_u8), columns=images_per_class)
        progress.say(f"{output}: {len(rows)} classes, {images_per_class} images of each")
        for row in rows:
            progress.say(f"  {row:>4}  {names[row]}")
        progress.say(speeds)


def grid_units(
    config: RunConfig, class_ids: Sequence[int], images_per_class: int, *, num_classes: int
) -> "list[WorkUnit]":
    """The units of a picture, class by class.

    Image n of class c has the noise key n * num_classes + c, as in `independent_units`, whichever
    other classes and images are sampled, and with whom in a unit.
    """
    import numpy as np

    from rlgen.sampling.units import training_settings
    from rlgen.types import WorkUnit

    class_ids_B = np.repeat(np.array(class_ids, dtype=np.int64), images_per_class)
    numbers_B = np.tile(np.arange(images_per_class), len(class_ids))
    per_unit = config.rollout.conditions_per_unit * config.rollout.group_size
    return [
        WorkUnit(
            unit_id=f"sample-{index}",
            purpose="evaluate",
            step=0,
            index=index,
            policy_version=0,
            seed=config.seed,
            condition_indices_P=(numbers_B * num_classes + class_ids_B)[first : first + per_unit],
            class_ids_P=class_ids_B[first : first + per_unit],
            group_size=1,
            settings=training_settings(config),
        )
        for index, first in enumerate(range(0, len(class_ids_B), per_unit))
    ]


def _with_embedded(config: RunConfig, progress: "RunProgress") -> RunConfig:
    """Put the embedded default's files in place of the word, trained if they are not cached."""
    wanted = {"policy.checkpoint", "tokenizer.checkpoint"} & set(config.keys_with(EMBEDDED))
    if not wanted:
        return config
    from rlgen.digits.assets import ensure_assets

    assets = ensure_assets(
        config.digits,
        lambda name, done, total: progress.stage(
            f"training the embedded default, once: {name}", done=done, total=total
        ),
    )
    paths = {"policy.checkpoint": assets.policy, "tokenizer.checkpoint": assets.tokenizer}
    return config.with_values({key: str(paths[key]) for key in wanted})


def _condition_names(config: RunConfig) -> tuple[str, ...]:
    if config.policy.captions is None:
        return config.class_names
    from rlgen.policies.captions import load_captions

    return load_captions(config.policy.captions).prompts


def _chosen(text: str | None, names: Sequence[str]) -> list[int]:
    """Read --classes.

    Raises:
        ConfigError: something that is no number, or no class.
    """
    if text is None:
        return list(range(min(DEFAULT_ROWS, len(names))))
    try:
        class_ids = [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--classes {text!r} must be ids with commas between, such as 207,360,388."
        ) from None
    wrong = [str(class_id) for class_id in class_ids if not 0 <= class_id < len(names)]
    if wrong:
        raise ConfigError(
            f"--classes has {', '.join(wrong)}, and there are {len(names)} classes; use ids from "
            f"0 to {len(names) - 1}."
        )
    return class_ids


def _make_images(
    config: RunConfig, units: "list[WorkUnit]", num_classes: int, progress: "RunProgress"
) -> "tuple[list[np.ndarray], str]":
    """Images of each unit, uint8 [B, 3, H, W], and the speeds in words, warm-up included."""
    import torch

    from rlgen.learner.preflight import check_fit
    from rlgen.policies.load import load_policy
    from rlgen.sampling.sampler import Sampler
    from rlgen.tokenizers.published import open_tokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    progress.stage("loading the policy and its tokenizer")
    policy = load_policy(config, device=device)
    tokenizer = open_tokenizer(config.tokenizer, device=device)
    check_fit(config, policy, tokenizer, num_classes=num_classes)
    sampler = Sampler(policy, device=device, dtype=config.rollout.dtype)
    images_u8: list[np.ndarray] = []
    sampling_s = decoding_s = 0.0
    for unit in units:
        progress.stage("sampling units of images", done=unit.index, total=len(units))
        rollout = sampler.sample(unit)
        start = time.perf_counter()
        with torch.inference_mode():
            tokens_BL = torch.from_numpy(rollout.tokens_BL).long().to(device)
            images_01 = tokenizer.decode(tokens_BL)
            images_u8.append((images_01 * 255).round().to(torch.uint8).cpu().numpy())
        sampling_s += rollout.sampling_s
        decoding_s += time.perf_counter() - start
    count = sum(unit.num_images for unit in units)
    return images_u8, (
        f"{count / sampling_s:.3g} images/s sampled, {count / decoding_s:.3g} images/s decoded, on "
        f"{device.type} in {config.rollout.dtype}, up to {units[0].num_images} at once"
    )


if __name__ == "__main__":
    sys.exit(run_job(main))
