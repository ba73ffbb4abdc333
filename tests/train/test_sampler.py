"""The order of samples."""

import random

import numpy as np
import pytest
import torch

from job.train.sampler import EpochOrder


def order(rows: int, seed: int, epoch: int) -> list[int]:
    sampler = EpochOrder(rows, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_row_comes_once_an_epoch():
    assert sorted(order(100, 1, 0)) == list(range(100))


def test_epochs_and_seeds_differ():
    assert order(100, 1, 0) != order(100, 1, 1) != order(100, 2, 1)


def test_the_order_does_not_depend_on_what_was_drawn_before_and_draws_nothing():
    first = order(50, 7, 2)
    torch.manual_seed(5)
    torch.rand(3)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert order(50, 7, 2) == first
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize("rows", [48, 49, 51, 58])
def test_every_step_has_the_same_rows_on_any_number_of_ranks(rows: int):
    batch, whole = 8, order(rows, 3, 1)
    steps = [whole[start : start + batch] for start in range(0, rows, batch)]
    for world in (1, 2, 4, 8):
        ranks = [EpochOrder(rows, 3, batch, rank, world) for rank in range(world)]
        shares = []
        for sampler in ranks:
            sampler.set_epoch(1)
            own = list(sampler)
            assert len(own) == len(sampler)
            shares.append([own[start : start + batch // world] for start in range(0, len(own), batch // world)])
            assert len(shares[-1]) == sampler.steps == len(steps)
        for number, step in enumerate(steps):
            seen = [row for rank in range(world) for row in shares[rank][number][: ranks[rank].own(number)]]
            assert sorted(seen) == sorted(step)
