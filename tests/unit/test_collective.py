"""The process group of weights: it needs no default group, and nobody waits past the deadline."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlgen.errors import WeightTransferError
from rlgen.nn.collective import LOOPBACK, BroadcastGroup, Deadline, Rendezvous, connect


def member(rendezvous: Rendezvous, rank: int, size: int, *, timeout_s: float) -> BroadcastGroup:
    deadline = Deadline(timeout_s)
    server = rendezvous.server
    if rank > 0:
        server = connect(rendezvous.host, rendezvous.port, deadline)
    return BroadcastGroup(
        rendezvous.group_id,
        server=server,
        rank=rank,
        size=size,
        host=LOOPBACK,
        backend="gloo",
        deadline=deadline,
    )


def side_by_side(*works: Callable[[], Any]) -> list[Any]:
    """Results or errors of functions that wait for each other."""
    results: list[Any] = [None] * len(works)

    def run(index: int) -> None:
        try:
            results[index] = works[index]()
        except WeightTransferError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def three_members(timeout_s: float = 20.0) -> list[BroadcastGroup]:
    rendezvous = Rendezvous(LOOPBACK, timeout_s=timeout_s)
    joins = [lambda r=r: member(rendezvous, r, 3, timeout_s=timeout_s) for r in range(3)]
    groups = side_by_side(*joins)
    assert all(isinstance(group, BroadcastGroup) for group in groups), groups
    return groups


def test_what_rank_0_holds_lands_in_place_without_a_default_group() -> None:
    groups = three_members()
    sent = torch.arange(200, dtype=torch.uint8)
    found = [sent.clone(), torch.zeros(200, dtype=torch.uint8), torch.ones(200, dtype=torch.uint8)]
    for _ in range(2):  # a group serves more than once
        found[1].zero_()
        sends = [
            lambda g=group, t=tensor: g.broadcast(list(t.split(64)), Deadline(20.0))
            for group, tensor in zip(groups, found, strict=True)
        ]
        assert side_by_side(*sends) == [None] * 3
        assert all(torch.equal(tensor, sent) for tensor in found)
    assert not dist.is_initialized()
    for group in groups:
        group.close()


def test_a_member_that_leaves_ends_the_wait_of_the_others_at_once() -> None:
    groups = three_members()
    tensor = torch.zeros(50_000_000, dtype=torch.uint8)
    start = time.monotonic()

    def leave() -> None:
        time.sleep(0.2)
        groups[2].close()

    sender, receiver, _ = side_by_side(
        lambda: groups[0].broadcast([tensor.clone()] * 4, Deadline(20.0)),
        lambda: groups[1].broadcast([tensor.clone()] * 4, Deadline(20.0)),
        leave,
    )
    assert time.monotonic() - start < 10
    assert {type(sender), type(receiver)} & {WeightTransferError}
    for found in (sender, receiver):
        assert found is None or "the broadcast broke off" in str(found)


def test_a_group_that_does_not_fill_gives_up_at_the_deadline() -> None:
    rendezvous = Rendezvous(LOOPBACK, timeout_s=2.0)
    start = time.monotonic()
    with pytest.raises(WeightTransferError, match="the process group did not form"):
        member(rendezvous, 0, 2, timeout_s=2.0)
    assert time.monotonic() - start < 8


def test_a_broadcast_that_nobody_takes_gives_up_at_the_deadline() -> None:
    groups = three_members()
    start = time.monotonic()
    with pytest.raises(WeightTransferError, match=r"broke off|missed its deadline"):
        groups[0].broadcast([torch.zeros(50_000_000, dtype=torch.uint8)] * 4, Deadline(1.0))
    assert time.monotonic() - start < 8


def test_a_sender_that_is_gone_is_named() -> None:
    rendezvous = Rendezvous(LOOPBACK, timeout_s=2.0)
    port = rendezvous.port
    del rendezvous
    with pytest.raises(WeightTransferError, match=rf"does not answer at 127.0.0.1:{port}"):
        connect(LOOPBACK, port, Deadline(2.0))


def test_a_spent_deadline_names_its_setting() -> None:
    deadline = Deadline(0.01)
    time.sleep(0.02)
    with pytest.raises(WeightTransferError, match=r"weights.timeout_s = 0.01"):
        deadline.remaining_s()
