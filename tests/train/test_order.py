"""The order of samples."""

import random

import numpy as np
import torch

from job.train.order import EpochOrder


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
