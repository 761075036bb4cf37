"""The shape of a path: explained variance, linearity and the random walk they must be read against.

Each number is held against numpy's SVD of the displacements themselves, which shares no code with the Gram matrix, and
against paths whose answer is known: a line, a circle, a walk. The null is held against its closed form for many steps
and against simulation, and the simulation can tell it from a straight path.
"""

import math

import numpy as np
import pytest
import torch

from labkit.errors import LabError
from labkit.measure import explained_variance, linearity, over_tensors, random_walk_null
from labkit.measure.trajectory import (
    WALK_LINEARITY,
    WALK_SHARE,
    displacement_gram,
    flat_displacements,
    gram_linearity,
)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_svd(displacement_ND: torch.Tensor, rank: int) -> tuple[np.ndarray, float]:
    """EV_N, and R^2 along direction `rank`, from the definition: v by SVD, c = M v, and numpy's correlation."""
    M = displacement_ND.double().numpy()
    _, sigma, right = np.linalg.svd(M, full_matrices=False)
    return np.cumsum(sigma**2) / np.sum(sigma**2), np.corrcoef(M @ right[rank - 1], np.arange(len(M)))[0, 1] ** 2


@pytest.mark.parametrize("shape", [(5, 3000), (7, 7), (2, 11)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_agree_with_the_svd_of_the_displacements(shape, dtype):
    """Not centred: the displacements have a mean, and centring would change every number."""
    displacement_ND = (draw(*shape).cumsum(0) + 1.5).to(dtype)
    expected, _ = by_svd(displacement_ND, 1)
    torch.testing.assert_close(explained_variance(displacement_ND), torch.from_numpy(expected)[: shape[0]])
    for rank in (1, 2):
        assert linearity(displacement_ND, rank=rank) == pytest.approx(by_svd(displacement_ND, rank)[1], abs=1e-9)


def test_more_checkpoints_than_weights():
    """N > D: the shares end at 1 after D directions and stay there."""
    share_N = explained_variance(draw(6, 2))
    assert len(share_N) == 6 and share_N[1:].tolist() == pytest.approx([1.0] * 5)


def test_a_straight_path_is_rank_one_and_linear_and_its_other_directions_are_nothing():
    displacement_ND = torch.arange(1.0, 9)[:, None] * draw(50, dtype=torch.float32)
    assert explained_variance(displacement_ND)[0] == pytest.approx(1.0)
    assert linearity(displacement_ND) == pytest.approx(1.0)
    assert linearity(displacement_ND.double(), rank=2) == 0.0


def test_weights_that_never_move():
    assert explained_variance(torch.zeros(4, 9)).tolist() == [0.0] * 4
    assert linearity(torch.zeros(4, 9)) == 0.0


def test_a_jump_that_then_rests_varies_with_no_step():
    """All rows equal: one direction, whose coordinate is constant; rounding must not make an R^2 of it."""
    displacement_ND = draw(1, 30).repeat(5, 1)
    assert explained_variance(displacement_ND)[0] == pytest.approx(1.0)
    assert linearity(displacement_ND) == 0.0


def test_one_checkpoint():
    assert explained_variance(draw(1, 8)).tolist() == [1.0]
    with pytest.raises(LabError, match="One checkpoint"):
        linearity(draw(1, 8))


@pytest.mark.parametrize("bad", [torch.zeros(0, 4), torch.zeros(4), torch.zeros(2, 2, 2)])
def test_what_is_no_path_is_refused(bad):
    with pytest.raises(LabError, match="not rows of a path"):
        explained_variance(bad)


def test_a_diverged_path_is_refused():
    displacement_ND = draw(3, 4)
    displacement_ND[1, 2] = math.nan
    with pytest.raises(LabError, match="not all finite"):
        explained_variance(displacement_ND)
    with pytest.raises(LabError, match="no rank 0"):
        linearity(draw(3, 4), rank=0)


@pytest.mark.parametrize("steps", [2, 3, 20])
def test_the_walk_without_dimension_is_its_expected_gram(steps):
    """E[m_i . m_j] / D = min(i, j): built here as L L^T with L the summing matrix, not as a minimum."""
    summing_NN = np.tril(np.ones((steps, steps)))
    value_N, vector_NN = np.linalg.eigh(summing_NN @ summing_NN.T)
    null = random_walk_null(steps)
    assert null.explained_variance == pytest.approx(value_N[-1] / value_N.sum())
    assert null.linearity == pytest.approx(np.corrcoef(vector_NN[:, -1], np.arange(steps))[0, 1] ** 2)


def test_the_limits_of_many_steps():
    """8 / pi^2, and the R^2 of a quarter sine against a line, here by a sum over a million points."""
    null = random_walk_null(1000)
    assert null.explained_variance == pytest.approx(WALK_SHARE, abs=1e-5) == pytest.approx(0.8106, abs=1e-4)
    x = (np.arange(10**6) + 0.5) / 10**6
    assert np.corrcoef(x, np.sin(math.pi / 2 * x))[0, 1] ** 2 == pytest.approx(WALK_LINEARITY, abs=1e-9)
    assert null.linearity == pytest.approx(WALK_LINEARITY, abs=1e-4)


@pytest.mark.parametrize(("steps", "share", "linear"), [(20, 0.807, 0.961), (60, 0.805, 0.950), (400, 0.809, 0.947)])
def test_single_walks_scatter_round_the_limit_as_measured_before(steps, share, linear):
    """Three walks measured in an earlier prototype lie within the scatter of walks in 1000 dimensions."""
    walks = np.array([random_walk_null(steps, dimension=1000, walks=1, seed=seed) for seed in range(12)])
    assert (np.abs(np.array([share, linear]) - walks.mean(0)) < 3.5 * walks.std(0, ddof=1)).all()
    assert np.abs(walks.mean(0) - random_walk_null(steps)).max() < 0.006
    assert walks.mean(0)[0] < 0.9  # a straight path has 1: the two can be told apart


def test_a_simulated_walk_is_the_mean_over_walks_and_repeats():
    one, two = (random_walk_null(5, dimension=7, walks=2, seed=seed) for seed in (3, 3))
    generator = torch.Generator().manual_seed(3)
    paths = [torch.randn(5, 7, generator=generator).cumsum(0) for _ in range(2)]
    assert one == two
    assert one.explained_variance == pytest.approx(np.mean([by_svd(path, 1)[0][0] for path in paths]))
    assert one.linearity == pytest.approx(np.mean([by_svd(path, 1)[1] for path in paths]))
    assert random_walk_null(5, dimension=7, walks=2, seed=4) != one


def test_a_null_of_one_step_is_refused():
    for arguments in ({"steps": 1}, {"steps": 5, "dimension": 0}, {"steps": 5, "walks": 0}):
        with pytest.raises(LabError, match="no null"):
            random_walk_null(**arguments)


def test_the_three_ways_to_speak_of_a_whole_model():
    """Whole: the SVD of all weights side by side. Weighted and mean: averages of the tensors' own numbers."""
    paths = {"matrix": draw(6, 40, seed=1).cumsum(0), "norm": 0.1 * draw(6, 5, seed=2).cumsum(0)}
    paths["still"] = torch.zeros(6, 3)
    result = over_tensors({name: displacement_gram(path) for name, path in paths.items()}, rank=2)
    side_by_side = torch.cat(list(paths.values()), 1)
    ev = {name: by_svd(paths[name], 2)[0][1] for name in ("matrix", "norm")} | {"still": 0.0}
    energy = {name: float(path.square().sum()) for name, path in paths.items()}
    assert result["whole"] == pytest.approx((by_svd(side_by_side, 2)[0][1], by_svd(side_by_side, 2)[1]))
    assert result["mean"].explained_variance == pytest.approx(sum(ev.values()) / 3)
    weighted = sum(ev[name] * energy[name] for name in ev) / sum(energy.values())
    assert result["weighted"].explained_variance == pytest.approx(weighted)
    assert over_tensors({"still": torch.zeros(3, 3)})["weighted"] == (0.0, 0.0)
    with pytest.raises(LabError, match="no tensor"):
        over_tensors({})


def test_flat_displacements_are_the_states_side_by_side_minus_the_base():
    base = {"a": draw(2, 3, seed=1), "b": draw(seed=2)}
    later = {"b": base["b"] + 2, "a": base["a"] - 1}  # another order of names must not matter
    assert flat_displacements(base, [later, base]).allclose(torch.tensor([[-1.0] * 6 + [2.0], [0.0] * 7]).double())


def test_many_columns_are_summed_in_parts(monkeypatch):
    displacement_ND = draw(3, 50)
    whole = displacement_gram(displacement_ND)
    monkeypatch.setattr("labkit.measure.trajectory.COLUMNS", 7)
    torch.testing.assert_close(displacement_gram(displacement_ND), whole)
    assert gram_linearity(whole) == pytest.approx(linearity(displacement_ND))
