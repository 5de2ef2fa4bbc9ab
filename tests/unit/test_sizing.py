"""Memory of a sharded learner, and GPUs by role, against numbers worked out by hand."""

import argparse
import json
from pathlib import Path

import pytest

from rlgen.config.load import dump_yaml, load_config
from rlgen.config.model_plan import memory_estimates
from rlgen.config.plan import describe_plan
from rlgen.config.run import RunConfig
from rlgen.config.sizing import Rates, describe_sizing, load_rates, split
from rlgen.errors import ConfigError
from rlgen.jobs.cli import parse_request

TOTAL = 342_910_976
# Four layers of 1024 x 1024 (queries, keys, values, output), three of 1024 x 2816, two norms.
BLOCK = 4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024
ROOT = TOTAL - 24 * BLOCK
LORA_8 = 24 * 8 * (4096 + 2048 + 3 * 3840)


def learner_parts(*settings: str) -> dict[str, float]:
    model = ["policy.model=llamagen-l-256", "policy.checkpoint=required"]
    config = load_config(None, [*model, "learner.num_workers=4", *settings])
    return next(e for e in memory_estimates(config) if e.role == "learner").parts


def test_a_rank_of_four_holds_a_quarter_and_what_is_gathered() -> None:
    parts = learner_parts("learner.sharding=fsdp", "learner.micro_batch_size=120")
    assert parts["weights"] == TOTAL
    assert parts["reference"] == TOTAL
    assert parts["gradients and optimiser"] == 3 * TOTAL
    assert parts["whole gradients"] == 0, "480 images are one micro-batch on each of four ranks"
    assert ROOT == 2 * 16384 * 1024 + 1024 + 1001 * 1024
    assert parts["gathered"] == 4 * (ROOT + 2 * BLOCK)


def test_several_micro_batches_keep_whole_gradients() -> None:
    parts = learner_parts("learner.sharding=fsdp", "learner.micro_batch_size=119")
    assert parts["whole gradients"] == 4 * TOTAL


def test_a_cast_is_whole_on_every_rank() -> None:
    """Seen in a run of FSDP2: autograd keeps autocast's bfloat16 copies of gathered weights."""
    parts = learner_parts("learner.sharding=fsdp", "learner.dtype=bfloat16")
    assert parts["weights"] == TOTAL + 2 * TOTAL


def test_sharded_adapters_are_all_that_has_gradients() -> None:
    parts = learner_parts(
        "learner.sharding=fsdp", "learner.micro_batch_size=60", "learner.lora={rank: 8}"
    )
    assert parts["gradients and optimiser"] == 3 * LORA_8
    assert parts["whole gradients"] == 4 * LORA_8
    assert parts["reference"] == 0


@pytest.mark.parametrize("settings", [("learner.sharding=ddp",), ("learner.num_workers=1",)])
def test_without_shards_all_is_whole(settings: tuple[str, ...]) -> None:
    parts = learner_parts("learner.sharding=fsdp", "learner.micro_batch_size=60", *settings)
    assert parts["weights"] == parts["reference"] == 4 * TOTAL
    assert parts["gradients and optimiser"] == 12 * TOTAL
    assert parts["gathered"] == parts["whole gradients"] == 0


def plan_of(*settings: str) -> RunConfig:
    """960 images a step in 24 units of 40, over a number of ranks that divides 24."""
    own = ["conditions_per_step=24", "conditions_per_unit=1", "group_size=40"]
    return load_config(None, [f"rollout.{word}" for word in own] + list(settings))


# A step of 960 images takes one sampler 96 s, one scorer 24 s, one learner 48 s.
RATES = Rates(
    {"sampling": 10.0, "scoring": 40.0, "learning": 20.0},
    dict.fromkeys(("sampling", "scoring", "learning"), "here"),
)


def test_seven_gpus_are_busy_equally_long() -> None:
    found = split(plan_of(), RATES, 7)
    assert found.counts == {"sampling": 4, "scoring": 1, "learning": 2}
    assert found.seconds == pytest.approx({"sampling": 24.0, "scoring": 24.0, "learning": 24.0})


def test_a_gpu_that_shortens_nothing_is_left_out() -> None:
    assert split(plan_of(), RATES, 8).counts == split(plan_of(), RATES, 7).counts


def test_units_are_not_cut() -> None:
    """Five samplers of 24 units take as long as one of them takes for five units."""
    rates = Rates({"sampling": 10.0, "scoring": 1e6, "learning": 1e6})
    assert split(plan_of(), rates, 7).seconds["sampling"] == pytest.approx(5 * 4.0)


def test_ranks_divide_the_conditions() -> None:
    rates = Rates({"sampling": 1e6, "scoring": 1e6, "learning": 20.0})
    assert split(plan_of(), rates, 7).counts["learning"] == 4


def test_the_plan_tells_the_shares_and_stops_where_no_gpu_helps() -> None:
    lines = describe_sizing(plan_of(), RATES)
    text = "\n".join(lines)
    assert "equally busy: 57 % sampling, 14 % scoring, 29 % learning" in text
    rows = [line.split() for line in lines if line.split()[:1] and line.split()[0].isdigit()]
    assert rows[0] == ["3", "1", "1", "1", "96", "24", "48"]
    assert all(int(row[0]) == sum(map(int, row[1:4])) for row in rows)
    assert [max(map(float, row[4:])) for row in rows] == sorted(
        (max(map(float, row[4:])) for row in rows), reverse=True
    )
    few = load_config(None, ["rollout.conditions_per_step=2", "rollout.conditions_per_unit=1"])
    last = describe_sizing(few, RATES)[-2].split()
    assert last[:4] == ["4", "2", "1", "1"], "two units can't be shared by more than two samplers"


def test_rates_come_from_benchmarks_hands_and_runs(tmp_path: Path) -> None:
    sample, learn, hand = (tmp_path / f"{name}.json" for name in ("sample", "learn", "hand"))
    said = {"model": "m", "dtype": "bfloat16", "device": "H200"}
    sample.write_text(json.dumps({"benchmark": "sample", "images_per_s": 10.0, **said}))
    learn.write_text(
        json.dumps({"benchmark": "learn", "images_per_s": 20, "settings": ["a.b=1"], **said})
    )
    hand.write_text('{"scoring": 40}')
    rates = load_rates([str(sample), str(learn), str(hand)])
    assert rates.images_per_s == RATES.images_per_s
    assert rates.sources["learning"] == f"{learn} (m, bfloat16, H200, a.b=1)"

    run = tmp_path / "run"
    run.mkdir()
    config = plan_of("learner.num_workers=2")
    (run / "config.yaml").write_text(dump_yaml(config))
    slow = {"time/sampling_s": 900.0, "time/scoring_s": 900.0, "time/learn_s": 900.0}
    step = {"time/sampling_s": 96.0, "time/scoring_s": 24.0, "time/learn_s": 24.0}
    rows = [{"judge/fid": 3.0}, slow, step, step]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_rates([str(run)]).images_per_s == RATES.images_per_s
    (run / "metrics.jsonl").write_text(json.dumps(slow))
    with pytest.raises(ConfigError, match="too few steps"):
        load_rates([str(run)])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "can't be read"),
        ("[]", "holds nothing"),
        ('{"benchmark": "weights", "gib_per_s": 1}', "no rates"),
        ('{"scoring": 0}', "must be a positive number"),
        ('{"benchmark": "sample"}', "rate of None"),
        ('{"learning": NaN}', "rate of nan"),
    ],
)
def test_what_is_no_rate_is_refused(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "rates.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=said):
        load_rates([str(file)])


def test_without_rates_the_plan_says_what_measures_them(tmp_path: Path) -> None:
    jobs = Path(__file__).resolve().parents[2] / "jobs"
    request = parse_request(
        ["--dry-run", "--config", str(jobs / "var-d30-256.yaml")], job="grpo", description=""
    )
    plan = describe_plan(request.config, request.rates)
    for wanted in (
        "python -m rlgen.jobs.bench sample --model var-d30-256 --cfg-scale 1 --device cuda "
        "--batch 36 --dtype bfloat16",
        "python -m rlgen.jobs.bench learn --model var-d30-256 --cfg-scale 1 --device cuda "
        "--batch 144 --micro-batch 12 --dtype bfloat16",
        "grpo.kl_coef=0.01 grpo.inner_epochs=1 learner.gradient_checkpointing=true "
        "learner.lora.rank=16 learner.lora.alpha=32",
        "scoring: a run's folder knows it",
    ):
        assert wanted in plan
    file = tmp_path / "rates.json"
    file.write_text(json.dumps(RATES.images_per_s))
    request = parse_request(
        ["--dry-run", "--config", str(jobs / "var-d30-256.yaml"), "--rates", str(file)],
        job="grpo",
        description="",
    )
    plan = describe_plan(request.config, request.rates)
    assert "bench sample" not in plan and "equally busy: 57 % sampling" in plan


def test_the_commands_that_it_names_are_understood() -> None:
    from rlgen.jobs import bench_learn, bench_sample  # torch

    jobs = Path(__file__).resolve().parents[2] / "jobs"
    config = load_config(str(jobs / "var-d30-256.yaml"))
    lines = describe_sizing(config, Rates())
    for module, word in ((bench_sample, "bench sample "), (bench_learn, "bench learn ")):
        parser = argparse.ArgumentParser()
        parser.add_argument("--json")
        module.add_arguments(parser)
        command = next(line for line in lines if word in line).partition(word)[2]
        known = parser.parse_intermixed_args(command.split())
        if module is bench_learn:
            run = bench_learn._config(known)
            assert run.learner.lora == config.learner.lora and run.grpo.kl_coef == 0.01


def test_the_default_plan_needs_no_rates() -> None:
    assert "GPUs by role" not in describe_plan(RunConfig())
