"""Weight files: what is written comes back, and each kind of damage has its own message."""

import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rlgen.errors import CheckpointError
from rlgen.nn.weights import (
    load_state,
    peek_metadata,
    read_weights,
    save_weights,
    state_sha256,
    weight_bytes,
)

CONFIG = {"width": 3, "name": "tiny", "nested": {"rates": [0.5, 1.0]}}


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


@pytest.fixture
def location(tmp_path, net):
    path = str(tmp_path / "net.safetensors")
    save_weights(path, net, kind="toy", config=CONFIG)
    return path


def test_equal_weights_make_equal_bytes_in_every_process() -> None:
    script = (
        "import torch, hashlib\n"
        "from rlgen.nn.weights import weight_bytes\n"
        "state = {'b': torch.ones(3), 'a': torch.arange(5)}\n"
        "payload = weight_bytes(state, kind='x', config={'n': 1})\n"
        "print(hashlib.sha256(payload).hexdigest())"
    )
    # The order of a hash map differs between processes, half of the time for two keys.
    found = {
        subprocess.run(
            [sys.executable, "-c", script], check=True, capture_output=True, text=True
        ).stdout
        for _ in range(4)
    }
    assert len(found) == 1


def test_round_trip(location, net):
    config, state = read_weights(location, kind="toy")
    assert config == CONFIG
    assert state.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_round_trip_by_url(net):
    location = "memory://weights/net.safetensors"
    save_weights(location, net, kind="toy", config=CONFIG)
    config, state = read_weights(location, kind="toy")
    assert config == CONFIG
    assert state_sha256(state) == state_sha256(net.state_dict())


def test_tied_and_strided_tensors_are_written(tmp_path):
    weight = torch.arange(12.0).view(3, 4)
    path = str(tmp_path / "tied.safetensors")
    save_weights(path, {"a": weight, "b": weight, "t": weight.T}, kind="toy", config={})
    _, state = read_weights(path, kind="toy")
    assert torch.equal(state["a"], weight)
    assert torch.equal(state["b"], weight)
    assert torch.equal(state["t"], weight.T)


def test_peek_reads_the_header_alone(location):
    assert peek_metadata(location) == {"kind": "toy", "config": CONFIG}


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing-here.*does not exist"):
        read_weights(str(tmp_path / "nothing-here.safetensors"), kind="toy")


@pytest.mark.parametrize(
    "payload",
    [b"", b"abc", b"this is no weight file at all", bytes(100), struct.pack("<Q", 8) + b"{no json"],
    ids=["empty", "short", "text", "zeros", "bad-json"],
)
def test_garbage(tmp_path, payload):
    path = tmp_path / "garbage.safetensors"
    path.write_bytes(payload)
    with pytest.raises(CheckpointError, match=r"garbage.*(not a safetensors file|cut short)"):
        read_weights(str(path), kind="toy")


@pytest.mark.parametrize("num_missing_bytes", [1, 40])
def test_truncated_data(location, num_missing_bytes):
    with open(location, "rb") as stream:
        payload = stream.read()
    with open(location, "wb") as stream:
        stream.write(payload[:-num_missing_bytes])
    expected = f"cut short: {len(payload) - num_missing_bytes} of {len(payload)} bytes"
    with pytest.raises(CheckpointError, match=expected):
        read_weights(location, kind="toy")
    with pytest.raises(CheckpointError, match=expected):
        peek_metadata(location)


def test_truncated_header(location):
    with open(location, "rb") as stream:
        payload = stream.read()
    with open(location, "wb") as stream:
        stream.write(payload[:30])
    with pytest.raises(CheckpointError, match="cut short: 30 of"):
        read_weights(location, kind="toy")


def test_wrong_kind_names_both(location):
    with pytest.raises(CheckpointError, match=r"'toy'.*'conv_vq' is needed.*name a file of kind"):
        read_weights(location, kind="conv_vq")


def test_missing_metadata(tmp_path):
    path = str(tmp_path / "foreign.safetensors")
    save_file({"a": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"foreign.*without the metadata.*save_weights"):
        read_weights(path, kind="toy")


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin"])
def test_pickles_are_refused_with_the_way_out(tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"pickled.*weights_only=True.*save_weights"):
        read_weights(str(path), kind="toy")


def test_load_state_lists_every_misfit(net):
    state = net.state_dict()
    state["1.scale"] = state.pop("1.weight")
    state["0.bias"] = torch.zeros(7)
    before = state_sha256(net.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load_state(net, state, "some/place.safetensors")
    message = str(caught.value)
    assert "some/place.safetensors" in message
    assert "1 missing (1.weight)" in message
    assert "1 unexpected (1.scale)" in message
    assert "0.bias [7] instead of [3]" in message
    assert state_sha256(net.state_dict()) == before, "a refused state must not be half loaded"


def test_load_state_loads(net):
    other = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    load_state(other, net.state_dict(), "memory")
    assert state_sha256(other.state_dict()) == state_sha256(net.state_dict())


def test_digest_depends_on_names_types_shapes_and_bytes_but_not_on_order_or_layout():
    a, b = torch.arange(6.0).view(2, 3), torch.ones(2)
    digest = state_sha256({"a": a, "b": b})
    assert digest == state_sha256({"b": b, "a": a})
    assert digest == state_sha256({"a": a.T.contiguous().T, "b": b})
    changed = a.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    for other in (
        {"a": b, "b": a},
        {"a": a.view(3, 2), "b": b},
        {"a": a.to(torch.bfloat16), "b": b},
        {"a": changed, "b": b},
    ):
        assert digest != state_sha256(other)


def test_credentials_never_appear_in_a_message():
    with pytest.raises(CheckpointError) as caught:
        peek_metadata("memory://user:secret@host/none.safetensors")
    assert "secret" not in str(caught.value)


def test_weight_bytes_are_the_file(location, net):
    _, state = read_weights(location, kind="toy")
    payload = weight_bytes(net, kind="toy", config=CONFIG)
    with open(location, "rb") as stream:
        assert len(payload) == len(stream.read())
    assert state_sha256(state) == state_sha256(net.state_dict())
