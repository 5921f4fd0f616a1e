# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_spp.pruning.mask import check_pruning_request, pruning_mask


@st.composite
def score_matrices(draw: st.DrawFn, divisor: int = 1) -> torch.Tensor:
    """Matrices of few different values, so that ties are common."""
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    size = rows * groups * divisor
    values = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=size, max_size=size))
    return torch.tensor(values).reshape(rows, groups * divisor)


@given(data=st.data(), pattern=st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (2, 3)]))
def test_pattern_keeps_the_n_highest_of_each_group(data: st.DataObject, pattern: tuple[int, int]) -> None:
    n, m = pattern
    scores = data.draw(score_matrices(divisor=m))
    mask = pruning_mask(scores, pattern=f"{n}:{m}")
    assert mask.dtype == torch.bool and mask.shape == scores.shape
    for group, kept in zip(scores.reshape(-1, m).tolist(), mask.reshape(-1, m).tolist(), strict=True):
        expected = sorted(range(m), key=lambda i, group=group: (group[i], i))[m - n :]
        assert [i for i in range(m) if kept[i]] == sorted(expected)


@given(scores=score_matrices(), sparsity=st.floats(0.0, 1.0, exclude_max=True))
def test_row_groups_prune_the_lowest_of_each_row(scores: torch.Tensor, sparsity: float) -> None:
    mask = pruning_mask(scores, sparsity=sparsity, comparison_group="row")
    num_pruned = min(round(sparsity * scores.shape[1]), scores.shape[1] - 1)
    for row, kept in zip(scores.tolist(), mask.tolist(), strict=True):
        expected = sorted(range(len(row)), key=lambda i, row=row: (row[i], i))[num_pruned:]
        assert [i for i in range(len(row)) if kept[i]] == sorted(expected)


@given(scores=score_matrices(), sparsity=st.floats(0.0, 1.0, exclude_max=True))
def test_layer_group_prunes_the_lowest_of_all(scores: torch.Tensor, sparsity: float) -> None:
    mask = pruning_mask(scores, sparsity=sparsity, comparison_group="layer")
    assert int((~mask).sum()) == min(round(sparsity * scores.numel()), scores.numel() - 1)
    assert torch.equal(mask.flatten(), pruning_mask(scores.reshape(1, -1), sparsity=sparsity)[0])


def test_ties_prune_the_first_places() -> None:
    mask = pruning_mask(torch.ones(2, 4), sparsity=0.5)
    assert mask.tolist() == [[False, False, True, True]] * 2


def test_sparsity_that_floating_point_cannot_represent() -> None:
    # 0.29 * 100 is 28.999999999999996: cut off instead of rounded, one weight would be missing.
    assert int((~pruning_mask(torch.rand(3, 100), sparsity=0.29)).sum()) == 3 * 29


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "2-4", "2:4:8", "", "a:b", "-1:4"])
def test_bad_patterns(pattern: str) -> None:
    with pytest.raises(ValueError, match="N:M pattern"):
        check_pruning_request(pattern, None)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_bad_sparsity(sparsity: float) -> None:
    with pytest.raises(ValueError, match="sparsity should be in"):
        check_pruning_request(None, sparsity)


@pytest.mark.parametrize(("pattern", "sparsity"), [(None, None), ("2:4", 0.5)])
def test_both_or_neither(pattern: str | None, sparsity: float | None) -> None:
    with pytest.raises(ValueError, match="exactly one of pattern and sparsity"):
        check_pruning_request(pattern, sparsity)


def test_indivisible_features() -> None:
    with pytest.raises(ValueError, match="6 input features are not divisible"):
        pruning_mask(torch.rand(2, 6), pattern="2:4")
