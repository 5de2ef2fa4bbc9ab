"""The decoding loop recorded as a CUDA graph draws what the eager loop draws."""

import pytest
import torch

from rlgen.errors import ConfigError
from rlgen.sampling.cuda_graph import GraphSampler
from rlgen.sampling.decode import sample_tokens
from rlgen.types import SamplingSettings
from tests.tiny_gpt import tiny_llamagen, tiny_text_llamagen, tiny_vqgan_gpt
from tests.tiny_var import tiny_var

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FAMILIES = {
    "llamagen": tiny_llamagen,
    "llamagen-text": tiny_text_llamagen,
    "vqgan-gpt": lambda: tiny_vqgan_gpt(has_null_class=True),
    "var": tiny_var,
}
SETTINGS = [
    SamplingSettings(),
    SamplingSettings(cfg_scale=1.75, temperature=0.7, top_k=20, top_p=0.9),
]


def inputs(policy, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    class_ids = torch.randint(policy.num_classes, (6,), generator=generator)
    noise = torch.rand(6, policy.num_tokens, generator=generator, dtype=torch.float64)
    return class_ids.cuda(), noise.cuda()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_draws_what_the_eager_loop_draws(family, settings) -> None:
    policy = FAMILIES[family]().requires_grad_(False).cuda()
    graph = GraphSampler(policy, batch=6, settings=settings)
    for seed in range(3):
        tokens, logprobs = graph(*inputs(policy, seed))
        expected, expected_logprobs = sample_tokens(policy, *inputs(policy, seed), settings)
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(logprobs, expected_logprobs, rtol=0, atol=1e-5)


def test_a_graph_sees_weights_that_change_in_place() -> None:
    policy = tiny_llamagen().requires_grad_(False).cuda()
    settings = SamplingSettings(cfg_scale=1.5)
    graph = GraphSampler(policy, batch=6, settings=settings)
    before, _ = graph(*inputs(policy, 0))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.5)
    after, _ = graph(*inputs(policy, 0))
    expected, _ = sample_tokens(policy, *inputs(policy, 0), settings)
    assert torch.equal(after, expected) and not torch.equal(after, before)


def test_another_batch_needs_another_graph() -> None:
    policy = tiny_llamagen().requires_grad_(False).cuda()
    graph = GraphSampler(policy, batch=4, settings=SamplingSettings())
    with pytest.raises(ConfigError, match="make another GraphSampler"):
        graph(*inputs(policy, 0))
