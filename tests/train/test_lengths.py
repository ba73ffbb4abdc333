"""Parts of rows of like length: the cheapest way, whatever the lengths."""

import random

import pytest
import torch

from job.train.lengths import PASS_TOKENS, _scaled, of_like_length, pass_tokens


def cost(parts: list[list[int]], lengths: list[int]) -> int:
    return sum(len(part) * max(lengths[row] for row in part) + PASS_TOKENS for part in parts)


def ways(rows: list[int]):
    """All ways to cut a sequence."""
    for mask in range(1 << (len(rows) - 1)):
        parts = [[rows[0]]]
        for number, row in enumerate(rows[1:]):
            if mask >> number & 1:
                parts.append([row])
            else:
                parts[-1].append(row)
        yield parts


def test_no_way_to_cut_is_cheaper():
    chance = random.Random(0)
    for rows in (1, 2, 4, 8):
        for _ in range(30):
            lengths = [chance.choice((60, 400, 1200, 4000)) + chance.randrange(60) for _ in range(rows)]
            found, order = of_like_length(lengths), sorted(range(rows), key=lengths.__getitem__)
            assert sorted(row for part in found for row in part) == [*range(rows)]
            assert cost(found, lengths) == min(cost(way, lengths) for way in ways(order))


def test_rows_of_one_length_stay_together_in_their_order():
    assert of_like_length([400, 380, 410, 390]) == [[0, 1, 2, 3]]
    assert of_like_length([2000, 400] * 4) == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(
    ("multiprocessors", "capability", "tokens"),
    [(84, (8, 6), 768), (108, (8, 0), 1975), (132, (9, 0), 4827), (142, (8, 9), 1298)],
    ids=["A6000", "A100", "H200", "L40S"],
)
def test_a_pass_costs_more_tokens_where_tokens_take_less_time(multiprocessors, capability, tokens):
    assert _scaled(multiprocessors, capability) == tokens


def test_a_pass_that_costs_more_is_made_for_more_tokens_alone():
    assert pass_tokens(torch.device("cpu")) == PASS_TOKENS
    assert len(of_like_length([400, 200] * 4, PASS_TOKENS)) == 2
    assert len(of_like_length([320, 200] * 4, PASS_TOKENS)) == 1  # two would save 480 tokens
    assert len(of_like_length([400, 200] * 4, _scaled(132, (9, 0)))) == 1
