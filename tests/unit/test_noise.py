"""Counter-based noise: the published answers, and that a key alone decides what is drawn."""

import itertools

import pytest
import torch
from scipy import stats

from rlgen.sampling.noise import philox_4x32, uniform_noise

KEY = {"seed": 5, "purpose": "train", "step": 3}


def noise(conditions: list[int], samples: list[int], *, num_tokens: int = 9, **key) -> torch.Tensor:
    return uniform_noise(
        **(KEY | key),
        condition_indices_B=torch.tensor(conditions),
        sample_indices_B=torch.tensor(samples),
        num_tokens=num_tokens,
    )


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)  # fmt: skip
def test_philox_gives_the_known_answers_of_random123(counter, key, expected) -> None:
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    key_words = tuple(int(word, 16) for word in key.split())
    found = philox_4x32(tuple(words), key_words)
    assert " ".join(f"{word.item():08x}" for word in found) == expected


def test_philox_of_a_tensor_is_philox_of_each_element() -> None:
    counters = [torch.tensor([[0, 7], [2**32 - 1, 12345]]) + 0 for _ in range(4)]
    together = philox_4x32(tuple(counters), (1, 2**32 - 1))
    for row, column in itertools.product(range(2), range(2)):
        alone = philox_4x32(tuple(c[row, column] for c in counters), (1, 2**32 - 1))
        assert [w.item() for w in alone] == [w[row, column].item() for w in together]


def test_an_image_draws_the_same_whatever_is_in_the_batch() -> None:
    conditions, samples = [4, 4, 9, 0, 63], [0, 1, 1, 5, 0]
    whole = noise(conditions, samples)
    for index, (condition, sample) in enumerate(zip(conditions, samples, strict=True)):
        assert torch.equal(noise([condition], [sample])[0], whole[index])
    assert torch.equal(noise(conditions[::-1], samples[::-1]), whole.flip(0))


def test_shorter_images_draw_a_prefix() -> None:
    longer = noise([1, 2], [3, 4], num_tokens=8)
    assert torch.equal(noise([1, 2], [3, 4], num_tokens=5), longer[:, :5])


def test_no_two_keys_share_a_number() -> None:
    drawn = [
        noise([1], [2], num_tokens=64),
        noise([2], [1], num_tokens=64),  # condition and sample are not interchangeable
        noise([1], [3], num_tokens=64),
        noise([4], [2], num_tokens=64),
        noise([1], [2], num_tokens=64, step=4),
        noise([1], [2], num_tokens=64, seed=6),
        noise([1], [2], num_tokens=64, purpose="bootstrap"),
        noise([1], [2], num_tokens=64, purpose="evaluate"),
        # seed and step in each other's place, and a seed that looks like a stream
        noise([1], [2], num_tokens=64, seed=3, step=5),
        noise([1], [2], num_tokens=64, seed=0, step=3),
    ]
    numbers = torch.cat(drawn).flatten()
    assert len(numbers.unique()) == len(numbers), "53-bit numbers don't collide by chance"


def test_numbers_are_uniform_and_use_all_their_bits() -> None:
    conditions = torch.arange(200).repeat_interleave(10).tolist()
    samples = torch.arange(10).repeat(200).tolist()
    drawn = noise(conditions, samples, num_tokens=16)
    assert drawn.dtype == torch.float64
    assert drawn.min() >= 0 and drawn.max() < 1
    # The numbers are fixed, so these p-values can't be unlucky from run to run.
    assert stats.kstest(drawn.flatten().numpy(), "uniform").pvalue > 0.01
    for token in (0, 1, 15):  # first and second number of a block
        assert stats.kstest(drawn[:, token].numpy(), "uniform").pvalue > 0.01
    for a, b in ((drawn[:, 0], drawn[:, 1]), (drawn[:-1, 0], drawn[1:, 0])):
        # A correlation of independent numbers has standard deviation 1/sqrt(2000) = 0.022.
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.08
    integers = (drawn * 2.0**53).long()
    assert torch.equal(integers.double() * 2.0**-53, drawn)
    for bit in range(53):
        # A fair bit of 32,000 has standard deviation 0.0028.
        assert abs(((integers >> bit) & 1).double().mean() - 0.5) < 0.014, bit


def test_seeds_up_to_32_bits_are_distinct() -> None:
    assert not torch.equal(noise([0], [0], seed=2**32 - 1), noise([0], [0], seed=2**31 - 1))
