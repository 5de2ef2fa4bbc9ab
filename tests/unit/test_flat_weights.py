"""Weights as one buffer: what arrives is what was sent, or it is not used."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from rlgen.errors import RolloutError, WeightTransferError
from rlgen.nn.flat import (
    BLOCK_BYTES,
    _sums,
    _sums_on_host,
    flat_digest,
    pack_weights,
    split_chunks,
    unpack_weights,
)
from rlgen.nn.weights import state_sha256
from rlgen.sampling.units import training_units
from tests.tiny import sampler_of, tiny_config, tiny_policy


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
    assert pack_weights(changed, version=1)[0].digest != first.digest


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
def test_one_damaged_byte_is_noticed(place) -> None:
    manifest, buffer = pack_weights(Mixed(1).state_dict(), version=5)
    buffer[place] ^= 1
    with pytest.raises(WeightTransferError, match=r"version 5 arrived with digest.*publish again"):
        unpack_weights(manifest, buffer, Mixed(2))


def test_a_sampler_with_damaged_weights_samples_no_version_until_others_arrive() -> None:
    ours, theirs = tiny_policy(seed=1), tiny_policy(seed=2)
    sampler = sampler_of(theirs, version=4)
    manifest, buffer = pack_weights(ours.state_dict(), version=5)
    damaged = buffer.copy()
    damaged[-1] ^= 1
    with pytest.raises(WeightTransferError, match="arrived with digest"):
        sampler.update_weights(manifest, damaged)
    (before, *_), (unit, *_) = (
        training_units(tiny_config(), 0, policy_version=version) for version in (4, 5)
    )
    for asked in (before, unit):
        with pytest.raises(RolloutError, match="holds None; fetch the weights"):
            sampler.sample(asked)
    sampler.update_weights(manifest, buffer)
    assert digest(sampler.policy) == digest(ours)
    assert sampler.sample(unit).policy_version == 5


@pytest.mark.parametrize("num_bytes", [-16, 16])
def test_a_buffer_of_another_length_is_refused_before_anything_is_copied(num_bytes) -> None:
    manifest, buffer = pack_weights(Mixed(1).state_dict(), version=0)
    other = np.concatenate([buffer, np.zeros(16, np.uint8)])[: len(buffer) + num_bytes]
    theirs = Mixed(2)
    before = digest(theirs)
    with pytest.raises(WeightTransferError, match=rf"{len(other)} bytes, published were 112"):
        unpack_weights(manifest, other, theirs)
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


# -- chunks and digests ------------------------------------------------------------------------

_MIB = 2**20


class Wide(nn.Module):
    """Three blocks of the digest, and tensors that lie across their borders."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name in ("first", "second", "third"):
            values = torch.randn(500_001, generator=generator)
            self.register_parameter(name, nn.Parameter(values))


def random_bytes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_arrive_in_chunks_into_any_number_format(dtype) -> None:
    ours, theirs, expected = Wide(1), Wide(2).to(dtype), Wide(1).to(dtype)
    manifest, buffer = pack_weights(ours.state_dict(), version=1)
    assert manifest.num_bytes == len(buffer) > 2 * BLOCK_BYTES
    chunks = split_chunks(torch.from_numpy(buffer), 2 * _MIB)
    assert [len(chunk) for chunk in chunks[:-1]] == [2 * _MIB] * 2
    read_only = [chunk.numpy() for chunk in chunks]
    for chunk in read_only:
        chunk.flags.writeable = False
    unpack_weights(manifest, read_only, theirs)
    assert digest(theirs) == digest(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_arrive_in_tensors_of_another_layout(dtype) -> None:
    ours = nn.Conv2d(1024, 64, 3)
    theirs = nn.Conv2d(1024, 64, 3, dtype=dtype).to(memory_format=torch.channels_last)
    assert not theirs.weight.is_contiguous()
    manifest, buffer = pack_weights(ours.state_dict(), version=1)
    assert manifest.num_bytes > BLOCK_BYTES
    unpack_weights(manifest, buffer, theirs)
    assert not theirs.weight.is_contiguous()
    assert digest(theirs) == digest(ours.to(dtype))


def test_a_tensor_without_numbers_travels_too() -> None:
    state = {"a": torch.ones(4), "b": torch.ones(0, 3), "c": torch.full((2,), 3.0)}
    manifest, buffer = pack_weights(state, version=1)
    theirs = nn.Module()
    for name, values in state.items():
        theirs.register_buffer(name, torch.zeros_like(values))
    unpack_weights(manifest, buffer, theirs)
    assert digest(theirs) == state_sha256(state)


def test_chunks_in_another_order_are_noticed() -> None:
    manifest, buffer = pack_weights(Wide(1).state_dict(), version=1)
    first, second, third = split_chunks(torch.from_numpy(buffer), 2 * _MIB)
    with pytest.raises(WeightTransferError, match="arrived with digest"):
        unpack_weights(manifest, [second, first, third], Wide(2))


def test_a_digest_does_not_depend_on_how_the_bytes_are_cut() -> None:
    payload = random_bytes(7 * _MIB + 24)
    whole = flat_digest([payload])
    assert whole == flat_digest(split_chunks(payload, 2 * _MIB))
    assert whole == flat_digest(split_chunks(payload, 4 * _MIB))
    with pytest.raises(
        WeightTransferError, match=r"chunks of 100 bytes; use a multiple of 2097152"
    ):
        split_chunks(payload, 100)


def test_a_digest_sees_length_order_and_every_bit() -> None:
    payload = random_bytes(3 * BLOCK_BYTES)
    seen = {flat_digest([payload]), flat_digest([payload[:-8]]), flat_digest([])}
    longer = torch.cat([payload, torch.zeros(8, dtype=torch.uint8)])
    seen |= {flat_digest([longer]), flat_digest([longer[:-1]])}
    blocks = list(payload.split(BLOCK_BYTES))
    seen.add(flat_digest([blocks[1], blocks[0], blocks[2]]))
    rows = blocks[0].view(512, 4096)
    seen.add(flat_digest([rows[torch.randperm(512)].flatten(), *blocks[1:]]))
    columns = rows.view(512, 512, 8)[:, torch.randperm(512)]
    seen.add(flat_digest([columns.flatten(), *blocks[1:]]))
    for place, bit in [(0, 1), (7, 128), (BLOCK_BYTES - 1, 128), (2 * BLOCK_BYTES, 16)]:
        damaged = payload.clone()
        damaged[place] ^= bit
        seen.add(flat_digest([damaged]))
    assert len(seen) == 12


@pytest.mark.parametrize("places", [(7, 15), (7, 4103), (7, 15, 4111)])
def test_top_bits_that_flip_together_do_not_cancel(places) -> None:
    payload = random_bytes(BLOCK_BYTES)
    damaged = payload.clone()
    damaged[list(places)] ^= 128  # the sign of float32 number 1, 3, 1025, 1027
    assert flat_digest([damaged]) != flat_digest([payload])


def test_the_sums_on_the_host_are_those_of_a_device() -> None:
    block = random_bytes(BLOCK_BYTES)
    for host, device in zip(_sums_on_host(block), _sums(block), strict=True):
        assert torch.equal(host, device)


def test_a_buffer_is_used_again_for_the_next_version() -> None:
    _, buffer = pack_weights(Mixed(1).state_dict(), version=1)
    manifest, again = pack_weights(Mixed(2).state_dict(), version=2, out=buffer)
    assert again is buffer
    fresh_manifest, fresh = pack_weights(Mixed(2).state_dict(), version=2)
    assert manifest == fresh_manifest and np.array_equal(again, fresh)
    _, larger = pack_weights(Wide(1).state_dict(), version=3, out=buffer)
    assert larger is not buffer
