"""The benchmarks of single parts: every family runs, numbers are consistent, misuse is told."""

import json

import pytest

from rlgen.config import models
from rlgen.config.model_sizes import num_parameters
from rlgen.config.models import ModelSpec
from rlgen.errors import ConfigError
from rlgen.jobs import bench
from rlgen.jobs.bench_model import work_of_sampling
from rlgen.sampling.cuda_graph import GraphSampler
from rlgen.types import SamplingSettings
from tests.tiny_gpt import tiny_llamagen

_GPT = {"num_layers": 2, "num_heads": 2, "width": 16, "grid_size": 3, "codebook_size": 20}
TINY = {
    "llamagen": ("llamagen", {**_GPT, "num_classes": 8, "ffn_multiple_of": 16}),
    "llamagen-text": (
        "llamagen",
        {**_GPT, "ffn_multiple_of": 16, "caption_width": 6, "num_caption_slots": 16},
    ),
    "vqgan-gpt": ("vqgan_gpt", {**_GPT, "num_classes": 8, "has_null_class": False}),
    "var": (
        "var",
        {
            "depth": 2,
            "width": 16,
            "num_heads": 2,
            "patch_nums": (1, 2, 3),
            "codebook_size": 20,
            "code_dim": 4,
            "num_classes": 8,
            "mlp_ratio": 4.0,
            "shared_aln": False,
            "attn_l2_norm": True,
            "norm_eps": 1e-6,
        },
    ),
}


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch) -> None:
    for name, (family, architecture) in TINY.items():
        spec = ModelSpec(name, family, architecture, image_size=48, files=())
        monkeypatch.setitem(models.MODELS, name, spec)


def run(tmp_path, *words: str) -> dict:
    file = tmp_path / "result.json"
    assert bench.main([*words, "--json", str(file)]) == 0
    return json.loads(file.read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", TINY)
def test_sampling_is_measured_in_every_family(tmp_path, capsys, model, dtype) -> None:
    scale = "1" if model == "vqgan-gpt" else "1.5"
    result = run(
        tmp_path,
        *("sample", "--model", model, "--batch", "4", "--repeats", "2", "--dtype", dtype),
        *("--cfg-scale", scale),
    )
    assert json.loads(capsys.readouterr().out) == result, "printed and written are the same"
    num_tokens = 14 if model == "var" else 9
    assert result["tokens_per_s"] == pytest.approx(result["images_per_s"] * num_tokens)
    assert result["images_per_s"] == pytest.approx(4 / result["median_s"])
    assert len(result["runs_s"]) == 2 and result["median_s"] in result["runs_s"]
    assert result["num_parameters"] == num_parameters(*TINY[model])
    assert result["time_split_s"].keys() == {"allocate", "prefill", "decode", "draw"}
    assert all(seconds > 0 for seconds in result["time_split_s"].values())
    assert result["peak_memory_gib"] > 0.05 and result["dtype"] == dtype


@pytest.mark.parametrize("model", TINY)
def test_learning_is_measured_in_every_family(tmp_path, model) -> None:
    words = ("learn", "--model", model, "--batch", "4", "--micro-batch", "2", "--repeats", "2")
    result = run(tmp_path, *words, "grpo.kl_coef=0.01", "learner.gradient_checkpointing=true")
    assert result["images_per_s"] == pytest.approx(4 / result["median_s"])
    assert result["time_split_s"].keys() == {"forward_backward", "optimizer", "other"}
    assert result["logprob_gap_max"] < 1e-4, "the batch is on-policy"
    assert result["micro_batch"] == 2 and result["rollout_s"] > 0


def test_learning_is_measured_with_adapters(tmp_path) -> None:
    words = ("learn", "--model", "llamagen", "--batch", "2", "--repeats", "1")
    result = run(tmp_path, *words, "learner.lora={rank: 4, alpha: 8.0}")
    assert result["settings"] == ["learner.lora={rank: 4, alpha: 8.0}"]


def test_work_is_counted_by_hand_for_a_tiny_model() -> None:
    work = work_of_sampling(
        "llamagen", settings=SamplingSettings(cfg_scale=2.0), batch=3, dtype="float32"
    )
    # Two layers of width 16, ffn 48: 4 x 16^2 + 3 x 16 x 48 weights; a head of 16 x 20.
    weights = 2 * (4 * 16 * 16 + 3 * 16 * 48) + 16 * 20
    seen = sum(2 * 2 * 16 * end for end in range(1, 10))  # keys and values of all positions
    rows = 6
    assert work["tflop"] == pytest.approx(2 * rows * (9 * weights + seen) / 1e12)
    assert work["traffic_gb"] == pytest.approx(4 * (9 * weights + rows * seen) / 1e9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sample", "--model", "llamagen-zzz"), "no published model 'llamagen-zzz'"),
        (("sample", "--model", "var-vq"), "var-vq is a tokenizer"),
        (("sample", "--model", "vqgan-gpt", "--cfg-scale", "2"), "cfg_scale = 2.0 needs a null"),
        (("sample", "--model", "llamagen", "--batch", "0"), "--batch 0 and --repeats 3 must"),
        (("sample", "--model", "llamagen", "--threads", "0"), "--threads 0 must be"),
        (("sample", "--model", "llamagen", "--cuda-graph"), "--cuda-graph needs --device cuda"),
        (("learn", "--model", "llamagen", "--batch", "3"), "--batch 3 must be even"),
        (("learn", "--model", "llamagen", "learner.no=1"), "learner.no"),
    ],
)
def test_misuse_is_told(words, message) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.main(words)


def test_a_graph_needs_a_policy_on_a_gpu() -> None:
    with pytest.raises(
        ConfigError, match="needs a policy on a CUDA device, and this one is on cpu"
    ):
        GraphSampler(tiny_llamagen(), batch=2, settings=SamplingSettings())
