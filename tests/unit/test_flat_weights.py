"""Weights as one buffer: what arrives is what was sent, or nothing changes."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from rlgen.errors import WeightTransferError
from rlgen.nn.flat import pack_weights, unpack_weights
from rlgen.nn.weights import state_sha256
from tests.tiny import tiny_policy


class Mixed(nn.Module):
    """Odd sizes and three types, so that alignment matters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.b = nn.Parameter(torch.randn(3, 5, generator=generator).bfloat16())
        self.a = nn.Parameter(torch.randn(7, generator=generator))
        self.c = nn.Parameter(torch.randn((), generator=generator))
        self.register_buffer("count", torch.randint(100, (3,), generator=generator))
        self.register_buffer("scratch", torch.full((2,), float(seed)), persistent=False)


def digest(module: nn.Module) -> str:
    return state_sha256(module.state_dict())


def test_a_policy_arrives_as_it_was_sent() -> None:
    ours, theirs = tiny_policy(seed=1), tiny_policy(seed=2)
    manifest, buffer = pack_weights(ours.state_dict(), version=8)
    assert digest(ours) != digest(theirs)
    unpack_weights(manifest, buffer, theirs)
    assert digest(ours) == digest(theirs)
    assert manifest.version == 8
    assert buffer.dtype == np.uint8 and buffer.ndim == 1


def test_bfloat16_float32_and_integers_travel_together() -> None:
    ours, theirs = Mixed(1), Mixed(2)
    manifest, buffer = pack_weights(ours.state_dict(), version=0)
    unpack_weights(manifest, buffer, theirs)
    assert digest(ours) == digest(theirs)
    assert theirs.b.dtype == torch.bfloat16 and torch.equal(ours.b, theirs.b)
    assert torch.equal(ours.count, theirs.count)
    assert torch.equal(theirs.scratch, torch.full((2,), 2.0)), "buffers that aren't saved stay"


def test_tensors_lie_aligned_in_name_order_and_do_not_overlap() -> None:
    manifest, buffer = pack_weights(Mixed(1).state_dict(), version=0)
    assert [spec.name for spec in manifest.tensors] == ["a", "b", "c", "count"]
    assert [spec.num_bytes for spec in manifest.tensors] == [28, 30, 4, 24]
    end = 0
    for spec in manifest.tensors:
        assert spec.offset % 16 == 0 and spec.offset >= end
        end = spec.offset + spec.num_bytes
    assert end <= len(buffer)


def test_packing_is_deterministic_and_the_digest_sees_every_byte() -> None:
    state = Mixed(1).state_dict()
    first, again = pack_weights(state, version=1)[0], pack_weights(state, version=1)[0]
    assert first == again
    shuffled = dict(reversed(list(state.items())))
    assert pack_weights(shuffled, version=1)[0] == first
    changed = {**state, "a": torch.nextafter(state["a"], torch.tensor(9.0))}
    assert pack_weights(changed, version=1)[0].sha256 != first.sha256


def test_the_buffer_is_a_copy_of_the_weights() -> None:
    module = Mixed(1)
    manifest, buffer = pack_weights(module.state_dict(), version=0)
    before = digest(module)
    with torch.no_grad():
        module.a.zero_()
    unpack_weights(manifest, buffer, module)
    assert digest(module) == before


def test_shared_read_only_memory_is_neither_written_nor_kept() -> None:
    manifest, buffer = pack_weights(Mixed(1).state_dict(), version=0)
    shared = buffer.view()
    shared.flags.writeable = False
    theirs = Mixed(2)
    unpack_weights(manifest, shared, theirs)
    before = digest(theirs)
    buffer[:] = 255
    assert digest(theirs) == before


@pytest.mark.parametrize("place", [0, 33, -1])
def test_one_damaged_byte_is_noticed_and_nothing_is_copied(place) -> None:
    manifest, buffer = pack_weights(Mixed(1).state_dict(), version=5)
    buffer[place] ^= 1
    theirs = Mixed(2)
    before = digest(theirs)
    with pytest.raises(WeightTransferError, match=r"version 5 arrived with sha256.*publish again"):
        unpack_weights(manifest, buffer, theirs)
    assert digest(theirs) == before


def test_a_buffer_cut_short_is_noticed() -> None:
    manifest, buffer = pack_weights(Mixed(1).state_dict(), version=0)
    theirs = Mixed(2)
    before = digest(theirs)
    with pytest.raises(WeightTransferError, match="arrived with sha256"):
        unpack_weights(manifest, buffer[:-16], theirs)
    assert digest(theirs) == before


def test_another_model_is_refused_before_anything_is_copied() -> None:
    state = Mixed(1).state_dict()
    for other in (
        {**state, "c": torch.zeros(1)},  # another shape
        {name: tensor for name, tensor in state.items() if name != "c"},
        {**state, "d": torch.zeros(1)},
    ):
        manifest, buffer = pack_weights(other, version=3)
        theirs = Mixed(2)
        before = digest(theirs)
        with pytest.raises(WeightTransferError, match=r"version 3 have other tensors.*'[cd]'"):
            unpack_weights(manifest, buffer, theirs)
        assert digest(theirs) == before


def test_manifest_travels_between_processes() -> None:
    manifest, buffer = pack_weights(Mixed(1).state_dict(), version=2)
    arrived = pickle.loads(pickle.dumps(manifest))
    assert arrived == manifest
    unpack_weights(replace(arrived, version=9), buffer, Mixed(2))
