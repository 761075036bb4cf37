"""Extrapolated weights: equal to the official procedure, which materialises its directions, at every setting.

`official` below is that procedure step by step in numpy: displacements, Gram matrix in fp32, v = M^T u / sigma,
coordinates M v, a fit against the row index 0..N-1, and W_0 + c v. The module under test never makes v, c or the row
index, but mixes checkpoints, so agreement on random paths proves the identity behind it, its dropping of noise, and
that no sign or offset is off by one.
"""

import math

import numpy as np
import pytest
import torch

from labkit.errors import LabError
from labkit.measure.trajectory import explained_variance, flat_displacements, linearity
from labkit.models import GPT, GPTConfig
from labkit.trainers import Trajectory, extrapolate_rank1
from labkit.trainers.extrapolate import prediction_weights, reconstruct, scale_update

SHAPES = {"matrix": (9, 7), "norm": (5,), "scalar": (), "still": (4,)}


def path_of(steps: int, *, seed: int = 0, noise: float = 0.3, dtype=torch.float32):
    """A base and a path that bends and wobbles; one tensor never moves."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    base, direction, bend = draw(), draw(), draw()
    states = []
    for step in range(1, steps + 1):
        wobble = draw()
        states.append({name: base[name] + (name != "still") * 0.01 * (
            step * direction[name] + math.sqrt(step) * bend[name] + noise * wobble[name]) for name in SHAPES})
    return tuple([{name: value.to(dtype) for name, value in state.items()} for state in states] if several else
                 {name: value.to(dtype) for name, value in states.items()}
                 for several, states in ((False, base), (True, states)))


@np.errstate(invalid="ignore")  # small fp32 products set that flag in some builds of BLAS, without making a NaN
def official(base, checkpoints, target, *, rank=1, degree=1, window=None, half=False, gram=np.float32):
    """The official procedure for every tensor, in fp32, with directions and coordinates materialised."""
    made = {}
    for name, weight in base.items():
        rows = [state[name].half() - weight.half() if half else state[name].float() - weight.float()
                for state in checkpoints]
        M = torch.stack(rows).float().reshape(len(rows), -1).numpy().astype(gram)
        value, vector = np.linalg.eigh(M @ M.T)
        order = np.argsort(value)[::-1][: min(rank, len(M))]
        sigma, u = np.sqrt(np.maximum(value[order], 0)), vector[:, order]
        V = M.T @ u
        for k in range(len(order)):
            V[:, k] = V[:, k] / sigma[k] if sigma[k] > (sigma[0] * 1e-6 if sigma[0] > 0 else 1e-12) else 0
        C = (M @ V)[-(window or len(M)):]
        at = len(C) - 1 + target - len(M)
        c = np.array([np.polyval(np.polyfit(np.arange(len(C)), C[:, k].astype(np.float64), degree), at)
                      for k in range(len(order))])
        made[name] = (weight.float() + torch.from_numpy(V.astype(np.float32) @ c.astype(np.float32)).view(weight.shape))
    return {name: value.to(base[name].dtype) for name, value in made.items()}


def assert_states(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance)


@pytest.mark.parametrize("steps", [2, 3, 12])
@pytest.mark.parametrize("settings", [
    {}, {"rank": 2}, {"rank": 5}, {"degree": 2}, {"window": 2}, {"window": 99}, {"rank": 3, "degree": 2, "window": 7}],
    ids=str)
def test_it_is_the_official_procedure(steps, settings):
    """Also at ranks and windows above N, at a target inside the prefix and at a far one."""
    base, checkpoints = path_of(steps)
    fitted = min(settings.get("window", steps), steps)
    if fitted <= settings.get("degree", 1):
        with pytest.raises(LabError, match="can't determine"):
            extrapolate_rank1(base, checkpoints, 10, **settings)
        return
    for target in (1, steps, 10 * steps):
        fit = {key: value for key, value in settings.items() if key != "rank"}
        reach = max(1.0, float(prediction_weights(steps, target, **fit).abs().sum()))  # magnifies both roundings
        assert_states(extrapolate_rank1(base, checkpoints, target, **settings),
                      official(base, checkpoints, target, **settings), rtol=0, atol=1e-6 * reach)


def test_a_gram_in_fp32_or_float64_makes_no_difference_that_matters():
    """The official fp32 Gram against float64, both by the official procedure: far below the noise of one update."""
    base, checkpoints = path_of(30)
    for rank in (1, 3):
        single, double = (official(base, checkpoints, 300, rank=rank, gram=gram) for gram in (np.float32, np.float64))
        moved = float((double["matrix"] - base["matrix"]).norm())
        assert float((single["matrix"] - double["matrix"]).norm()) < 2e-5 * moved


def test_an_exactly_linear_path_is_continued_exactly():
    """W_t = W_0 + t d has W_T = W_0 + T d, at every rank: the directions of rounding must be dropped, not fitted."""
    base, _ = path_of(1)
    step = {name: 2.0**-6 * torch.ones(shape) for name, shape in SHAPES.items()}
    base = {name: (64 * value).round() / 64 for name, value in base.items()}  # sums without rounding
    checkpoints = [{name: base[name] + t * step[name] for name in base} for t in range(1, 9)]
    for settings in ({}, {"rank": 8}, {"window": 3}, {"intercept": False}, {"degree": 2}):
        expected = {name: base[name] + 40 * step[name] for name in base}
        assert_states(extrapolate_rank1(base, checkpoints, 40, **settings), expected, rtol=0, atol=1e-5)


def test_full_rank_extrapolates_every_weight_by_its_own_line():
    base, checkpoints = path_of(6)
    made = extrapolate_rank1(base, checkpoints, 20, rank=6)
    series = np.stack([state["matrix"].numpy().ravel() for state in checkpoints]).astype(np.float64)
    expected = np.polyval(np.polyfit(np.arange(1, 7), series, 1), 20)
    np.testing.assert_allclose(made["matrix"].numpy().ravel(), expected, atol=1e-5)


def test_without_intercept_the_line_starts_at_the_base():
    """One checkpoint then gives the secant; several give the least-squares slope through (0, 0)."""
    base, checkpoints = path_of(5)
    assert_states(extrapolate_rank1(base, checkpoints[:1], 30, intercept=False), scale_update(base, checkpoints[0], 30))
    slope = np.arange(1, 6) / np.sum(np.arange(1, 6) ** 2)
    np.testing.assert_allclose(prediction_weights(5, 30, intercept=False), 30 * slope)
    assert prediction_weights(5, 30, intercept=False, window=2)[:3].tolist() == [0.0] * 3


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("rows", [3, 75])
def test_prediction_weights_reproduce_polynomials(degree, rows):
    """A series that is a polynomial of the fit's degree is predicted exactly, also ten times past its end."""
    step_N = torch.arange(1.0, rows + 1, dtype=torch.float64)
    weight_N = prediction_weights(rows, 10 * rows, degree=degree)
    for power in range(degree + 1):
        assert float(weight_N @ step_N**power) == pytest.approx((10.0 * rows) ** power, rel=1e-9)


def test_two_checkpoints_are_nearly_the_secant_of_their_own():
    """N = 2 at full rank: W_2 + (T - 2)(W_2 - W_1), the line through both."""
    base, checkpoints = path_of(2)
    expected = checkpoints[1]["matrix"] + 8 * (checkpoints[1]["matrix"] - checkpoints[0]["matrix"])
    torch.testing.assert_close(extrapolate_rank1(base, checkpoints, 10, rank=2)["matrix"], expected, atol=1e-5, rtol=0)


def test_weights_that_never_moved_stay_bit_for_bit():
    base, checkpoints = path_of(4)
    assert torch.equal(extrapolate_rank1(base, checkpoints, 1000)["still"], base["still"])
    assert_states(extrapolate_rank1(base, [base] * 3, 50), base, rtol=0, atol=0)


def test_scaling_an_update():
    base, checkpoints = path_of(3)
    made = scale_update(base, checkpoints[0], 2.5)
    for name in base:
        torch.testing.assert_close(made[name], base[name] + 2.5 * (checkpoints[0][name] - base[name]))
    assert_states(scale_update(base, checkpoints[2], 1), checkpoints[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounding_happens_once_at_the_end(dtype):
    """Difference and sum are taken in fp32 (float64 for float64), so the result is the exact one, rounded to dtype."""
    generator = torch.Generator().manual_seed(0)
    base, later = ({"w": torch.randn(500, generator=generator, dtype=torch.float64).to(dtype)} for _ in range(2))
    exact = base["w"].double() + 3.7 * (later["w"].double() - base["w"].double())
    made = scale_update(base, later, 3.7)["w"].double()
    half_step = 0.51 * torch.finfo(dtype).eps * exact.abs()
    terms = base["w"].double().abs() + later["w"].double().abs()  # in fp32 and float64 they cancel near 0
    allowed = half_step if dtype.itemsize == 2 else 8 * torch.finfo(dtype).eps * terms
    assert ((made - exact).abs() <= allowed + 1e-6 * (dtype.itemsize == 2)).all()


@pytest.mark.parametrize("rank", [1, 2, 9])
def test_reconstruction_is_the_projection_on_the_first_directions(rank):
    """Against numpy's SVD of the displacements; at full rank it is the checkpoint itself."""
    base, checkpoints = path_of(9)
    made = reconstruct(base, checkpoints, 4, rank)
    M = np.stack([(state["matrix"] - base["matrix"]).numpy().ravel() for state in checkpoints]).astype(np.float64)
    right = np.linalg.svd(M, full_matrices=False)[2][:rank]
    np.testing.assert_allclose((made["matrix"] - base["matrix"]).numpy().ravel(), right.T @ (right @ M[3]), atol=1e-6)
    if rank == 9:
        assert_states(made, checkpoints[3], rtol=0, atol=1e-6)


def test_a_corner_of_the_gram_is_the_prefix():
    """Trajectory of 10 checkpoints, asked for the first 4, equals one made of 4."""
    base, checkpoints = path_of(10)
    whole, short = Trajectory(base, checkpoints), Trajectory(base, checkpoints[:4])
    assert_states(whole.extrapolate(4, 30, rank=2), short.extrapolate(4, 30, rank=2), rtol=0, atol=1e-6)
    assert_states(whole.reconstruct(4, 2), short.reconstruct(4, 2), rtol=0, atol=1e-6)
    assert_states(whole.extrapolate(10, 30), extrapolate_rank1(base, checkpoints, 30), rtol=0, atol=0)


def test_spectrum_coordinates_and_grams_describe_the_same_path():
    base, checkpoints = path_of(7)
    path = Trajectory(base, checkpoints)
    M = flat_displacements({"matrix": base["matrix"]}, checkpoints[:5])
    value_N = path.spectrum(5)["matrix"]
    torch.testing.assert_close(value_N.cumsum(0) / value_N.sum(), explained_variance(M))
    c_NR = path.coefficients(5, rank=9)["matrix"]
    assert c_NR.shape == (5, 5) and (c_NR.sum(0) >= 0).all()
    torch.testing.assert_close((c_NR.T @ c_NR).diagonal(), value_N)  # c_k = sigma_k u_k
    assert float(np.corrcoef(c_NR[:, 0], np.arange(5))[0, 1] ** 2) == pytest.approx(linearity(M))
    torch.testing.assert_close(path.grams(5)["matrix"], M.double() @ M.double().T)
    assert (path.coefficients(5, rank=2)["still"] == 0).all()


def test_the_mixture_shows_its_weights():
    """alpha of a tensor, applied by hand, is the prediction; at full rank it is the regression's own weights."""
    base, checkpoints = path_of(6)
    path = Trajectory(base, checkpoints)
    alpha_N = path.weights(6, 25)["matrix"]
    by_hand = base["matrix"].double() + sum(
        alpha * (state["matrix"].double() - base["matrix"].double())
        for alpha, state in zip(alpha_N, checkpoints, strict=True))
    torch.testing.assert_close(path.extrapolate(6, 25)["matrix"], by_hand.float())
    torch.testing.assert_close(path.weights(6, 25, rank=6)["matrix"], prediction_weights(6, 25))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_base_comes_back(dtype):
    """Computed in fp32 (float64 for float64) and rounded once at the end."""
    base, checkpoints = path_of(5, dtype=dtype)
    made = extrapolate_rank1(base, checkpoints, 15)
    expected = official(base, checkpoints, 15)
    assert made["matrix"].dtype == dtype
    assert_states(made, expected, rtol=0, atol=1e-5 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps)


def test_bf16_checkpoints_round_the_path_and_fp32_ones_do_not():
    """bf16 keeps 8 bits, so most small updates vanish; the fp32 base below must not be rounded along with them."""
    base, checkpoints = path_of(5)
    coarse = [{name: value.bfloat16() for name, value in state.items()} for state in checkpoints]
    fine, rounded = (extrapolate_rank1(base, states, 10)["matrix"] for states in (checkpoints, coarse))
    assert 1e-4 < float((fine - rounded).abs().max()) < 0.1
    assert rounded.dtype == torch.float32


def test_subtracting_in_fp16_as_the_official_code_does():
    base, checkpoints = path_of(8)
    made = Trajectory(base, checkpoints, precast=torch.float16).extrapolate(8, 24)
    assert_states(made, official(base, checkpoints, 24, half=True), rtol=0, atol=1e-5)
    assert float((made["matrix"] - extrapolate_rank1(base, checkpoints, 24)["matrix"]).abs().max()) > 1e-4


def test_parts_of_a_large_tensor_make_the_whole(monkeypatch):
    base, checkpoints = path_of(6)
    expected = extrapolate_rank1(base, checkpoints, 12, rank=2)
    monkeypatch.setattr("labkit.trainers.extrapolate.NUMBERS", 60)  # ten columns at a time
    assert_states(extrapolate_rank1(base, checkpoints, 12, rank=2), expected, rtol=0, atol=1e-6)


def test_tied_tensors_are_one_and_stay_one():
    """Two names of one memory, in the base and in all checkpoints: one Gram matrix, one tensor out."""
    def tied(state):
        return {"embedding": state["matrix"], "head": state["matrix"], "norm": state["norm"]}
    base, checkpoints = path_of(4)
    path = Trajectory(tied(base), [tied(state) for state in checkpoints])
    assert list(path.gram) == ["embedding", "norm"]
    made = path.extrapolate(4, 9)
    assert made["head"] is made["embedding"]
    apart = [dict(tied(state), head=state["matrix"] + 1) for state in checkpoints]  # tied in the base only
    assert not torch.equal(extrapolate_rank1(tied(base), apart, 9)["head"], made["head"])


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_takes_the_prediction(tied):
    """The GPT of this course: a tied one has no head of its own, and all its tensors are extrapolated."""
    model = GPT(GPTConfig(11, 8, 16, 1, 2, tied=tied))
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    checkpoints = [{name: weight + 0.001 * t for name, weight in base.items()} for t in (1, 2, 3)]
    made = extrapolate_rank1(base, checkpoints, 9)
    assert ("unembedding.weight" in made) != tied
    model.load_state_dict(made)
    torch.testing.assert_close(model.embedding.weight.detach(), base["embedding.weight"] + 0.009, atol=1e-5, rtol=0)


def test_counters_and_empty_tensors_pass_through():
    base, checkpoints = path_of(3)
    more = {"count": torch.tensor(7), "empty": torch.zeros(0, 3)}
    made = extrapolate_rank1(base | more, [state | more for state in checkpoints], 6)
    assert made["count"] == 7 and made["empty"].shape == (0, 3)
    assert list(made) == [*base, "count", "empty"]


def test_the_inputs_are_left_alone():
    base, checkpoints = path_of(4)
    before = {name: value.clone() for name, value in base.items()}
    made = extrapolate_rank1(base, checkpoints, 8)
    made["matrix"].add_(1)
    assert_states(base, before, rtol=0, atol=0)


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda b, c: (b, []), "no checkpoint"),
    (lambda b, c: (b, c[:1]), "1 checkpoint can't determine a fit of degree 1 with an intercept"),
    (lambda b, c: (b, [*c, {"matrix": c[0]["matrix"]}]), "Checkpoint 4 and the base have different tensors"),
    (lambda b, c: (b, [*c, dict(c[0], norm=torch.zeros(6))]), r"norm is \[6\] in checkpoint 4"),
    (lambda b, c: (b, [*c, dict(c[0], norm=torch.full((5,), math.inf))]), "The weights of norm are not all finite"),
    (lambda b, c: (dict(b, scalar=torch.tensor(math.nan)), c), "The weights of scalar are not all finite"),
])
def test_states_that_make_no_path_are_refused(change, sentence):
    base, checkpoints = change(*path_of(3))
    with pytest.raises(LabError, match=sentence):
        extrapolate_rank1(base, checkpoints, 10)


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"target_step": 0}, "no extrapolation of degree 1 to step 0"),
    ({"target_step": math.inf}, "to step inf"),
    ({"target_step": 9, "rank": 0}, "no rank 0"),
    ({"target_step": 9, "degree": 0}, "degree 0"),
    ({"target_step": 9, "window": 0}, "window of 0"),
    ({"target_step": 9, "window": 1}, "1 checkpoint can't"),
    ({"target_step": 9, "degree": 3}, "3 checkpoints can't determine a fit of degree 3"),
])
def test_settings_that_make_no_fit_are_refused(settings, sentence):
    with pytest.raises(LabError, match=sentence):
        extrapolate_rank1(*path_of(3), **settings)


def test_prefixes_and_steps_outside_the_path_are_refused():
    path = Trajectory(*path_of(3))
    for call in (lambda: path.grams(4), lambda: path.extrapolate(0, 9), lambda: path.reconstruct(3, 4)):
        with pytest.raises(LabError, match="Use 1 to 3"):
            call()
    with pytest.raises(LabError, match="not all finite in torch.float16"):
        base, checkpoints = path_of(3)
        Trajectory(base, [dict(state, norm=state["norm"] + 1e6) for state in checkpoints], precast=torch.float16)
