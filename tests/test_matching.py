"""Matching against a search through all assignments."""

from itertools import permutations

import numpy as np
import pytest
import torch

from asd_hf.matching import match_sets, start_matching


def costs(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cheapest(cost):
    """Pairs (row, column) of the cheapest of all assignments of the smaller side."""
    rows, columns = cost.shape
    if rows > columns:
        return {(i, j) for j, i in cheapest(cost.T)}
    cost = cost.tolist()
    best = min(permutations(range(columns), rows), key=lambda p: sum(cost[i][j] for i, j in enumerate(p)))
    return set(enumerate(best))


@pytest.mark.parametrize(("students", "teachers"), [(4, 4), (3, 5), (5, 3), (1, 4)])
def test_sets_are_matched_as_by_trying_all(students, teachers):
    cost = costs(2, 3, students, teachers)
    rows, columns = match_sets(cost)
    assert rows.shape == columns.shape == (2, 3, min(students, teachers))
    for layer in range(2):
        for image in range(3):
            pairs = zip(rows[layer, image].tolist(), columns[layer, image].tolist(), strict=True)
            assert set(pairs) == cheapest(cost[layer, image])
            assert rows[layer, image].diff().gt(0).all()


def test_a_single_matrix_needs_no_leading_dimensions():
    cost = costs(3, 4)
    assert set(zip(*(x.tolist() for x in match_sets(cost)), strict=True)) == cheapest(cost)


def test_targets_are_matched_as_by_trying_all():
    """Two sets of predictions, of 2 and of 1 layers; images with 2, 0, 5 and 1 targets, padded to 5, of 4 queries."""
    counts = np.array([2, 0, 5, 1])
    given = [costs(2, 4, 4, 5), costs(1, 4, 6, 5, seed=1)]
    for cost, (query, target) in zip(given, start_matching(given, counts)(), strict=True):
        layers, images, queries, _ = cost.shape
        want = set()
        for layer in range(layers):
            for image in range(images):
                for i, j in cheapest(cost[layer, image, :, : counts[image]]) if counts[image] else ():
                    want.add(((layer * images + image) * queries + i, counts[:image].sum() + j))
        pairs = list(zip(query.tolist(), target.tolist(), strict=True))
        assert len(pairs) == len(want) and set(pairs) == want


@pytest.mark.parametrize("queries_last", [False, True])
def test_groups_of_queries_are_each_matched_with_all_targets(queries_last):
    """Whatever lies in a row in memory; pairs come in the order of the queries."""
    counts, cost = np.array([2, 0, 5]), costs(2, 3, 12, 5)
    if queries_last:
        cost = cost.transpose(2, 3).contiguous().transpose(2, 3)
    ((query, target),) = start_matching([cost], counts, groups=3)()
    want = set()
    for layer in range(2):
        for image in (0, 2):
            for group in range(3):
                part = cost[layer, image, 4 * group : 4 * (group + 1), : counts[image]]
                first = (layer * 3 + image) * 12 + 4 * group
                want |= {(first + i, counts[:image].sum() + j) for i, j in cheapest(part)}
    pairs = list(zip(query.tolist(), target.tolist(), strict=True))
    assert len(pairs) == len(want) and set(pairs) == want and pairs == sorted(pairs)


def test_the_union_has_for_each_query_the_target_that_most_layers_gave_it():
    counts, given = np.array([3, 0, 4]), [costs(4, 3, 5, 4), costs(3, 3, 5, 4, seed=1)]
    *pairs, (query, target) = start_matching(given, counts, with_union=True)()
    votes = {}
    for queries, targets in pairs:
        for q, t in zip((queries % 15).tolist(), targets.tolist(), strict=True):
            votes.setdefault(q, []).append(t)
    assert sorted(query.tolist()) == sorted(votes)
    assert any(len(set(given)) > 1 for given in votes.values())
    for q, t in zip(query.tolist(), target.tolist(), strict=True):
        assert votes[q].count(t) == max(map(votes[q].count, votes[q]))


def test_padding_is_never_matched():
    cost = costs(1, 2, 4, 3)
    cost[0, 0, :, 1:] = -1000.0
    ((_, target),) = start_matching([cost], np.array([1, 3]))()
    assert sorted(target.tolist()) == [0, 1, 2, 3]


def test_batches_without_targets_have_no_pairs():
    for query, target in start_matching([costs(2, 3, 4, 1), costs(1, 3, 4, 1)], np.zeros(3, dtype=int))():
        assert query.shape == target.shape == (0,) and query.dtype == target.dtype == torch.int64


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predictions_that_are_not_finite_are_matched_last_and_leave_the_others_as_they_were(value, dtype):
    cost = costs(5, 4).to(dtype)
    cost[2] = value
    kept = [0, 1, 3, 4]
    want = {(kept[i], j) for i, j in cheapest(cost[kept])}
    assert set(zip(*(x.tolist() for x in match_sets(cost)), strict=True)) == want
    # The bad one must take some column here: that which the others can best do without. With this seed the largest
    # number in its place would leave no digits for the others' costs.
    square = costs(5, 5, seed=545).to(dtype)
    square[2] = value
    rows, columns = match_sets(square)
    best = min(
        sum(rest[i, j].item() for i, j in cheapest(rest))
        for column in range(5)
        for rest in [square[kept][:, [j for j in range(5) if j != column]]]
    )
    assert square[rows, columns][rows != 2].sum().item() == pytest.approx(best, rel=1e-6)
