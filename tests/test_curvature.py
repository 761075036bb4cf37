"""The tracker's eigenvalue is that of the dense matrix, Adam's threshold is where Adam breaks."""

import numpy as np
import pytest
import torch

from labkit.errors import LabError
from labkit.measure.curvature import (
    CurvatureTracker,
    adam_threshold,
    dense_matrix,
    dot,
    power_iteration,
    preconditioned,
    random_vector,
    unit,
)
from labkit.models import GPT, GPTConfig
from labkit.models.explicit_attention import ExplicitAttention
from labkit.models.locked_blocks import set_locked
from labkit.trainers.stack import stack_weights, stacked_losses

MICRO = GPTConfig(vocab_size=11, context=6, width=4, layers=2, heads=1, ffn=5)


def micro(models=2):
    """A float64 stack of two-layer decoders of 4 channels, and the loss of each on its own rows."""
    model = GPT(MICRO, attention=ExplicitAttention()).double()
    weights = stack_weights([GPT(MICRO, seed=seed).double() for seed in range(models)])
    windows = torch.randint(11, (models, 3, 7), generator=torch.Generator().manual_seed(0))
    spread = {name: torch.rand(each.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
              for name, each in weights.items() if each.ndim == 3 and "blocks" in name}
    return model, weights, windows, spread


def matrix_product(matrix_MNN):
    return lambda u: {"w": torch.einsum("mij,mj->mi", matrix_MNN, u["w"])}


def drawn_matrix(models=1, size=12, seed=0, top=10.0):
    """Symmetric with one eigenvalue `top` and the others between -3 and 3."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(models, size, size, generator=generator, dtype=torch.float64))
    value_N = torch.linspace(-3, 3, size, dtype=torch.float64)
    value_N[0] = top
    return basis @ (value_N[:, None] * basis.mT)


def test_the_product_is_the_preconditioned_hessian():
    """Against torch.func's Hessian of one model's loss, flattened by hand, divided by the roots of P on both sides."""
    from torch.func import functional_call, jacrev

    from labkit.objectives import next_token_loss

    model, weights, windows, spread = micro()
    G_MNN = dense_matrix(preconditioned(stacked_losses(model, weights, windows)[0], weights, spread), spread)
    for place in range(2):
        fixed = {name: each[place].detach() for name, each in weights.items()}
        shapes = {name: fixed[name].shape for name in spread}

        def loss(flat_N, place=place, fixed=fixed, shapes=shapes):
            parts = flat_N.split([shape.numel() for shape in shapes.values()])
            chosen = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
            logits = functional_call(model, {**fixed, **chosen}, (windows[place, :, :-1],))
            return next_token_loss(logits, windows[place, :, 1:])

        flat_N = torch.cat([fixed[name].flatten() for name in shapes])
        root_N = torch.cat([spread[name][place].flatten() for name in shapes]).rsqrt()
        expected_NN = root_N[:, None] * jacrev(jacrev(loss))(flat_N) * root_N
        torch.testing.assert_close(G_MNN[place], expected_NN, atol=1e-6, rtol=1e-6)


def test_power_iteration_finds_the_largest_eigenvalue_by_size():
    """Against torch.linalg.eigvalsh of the dense matrix, for each model of a stack, also where it is negative."""
    model, weights, windows, spread = micro()
    product = preconditioned(stacked_losses(model, weights, windows)[0], weights, spread)
    value_MN = torch.linalg.eigvalsh(dense_matrix(product, spread))
    largest_M = value_MN.gather(1, value_MN.abs().argmax(1, keepdim=True))[:, 0]
    found_M, u = power_iteration(product, random_vector(spread, torch.Generator().manual_seed(0)), 300)
    torch.testing.assert_close(found_M, largest_M, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dot(u, u), torch.ones(2, dtype=torch.float64))
    signed = torch.cat([drawn_matrix(top=10.0), drawn_matrix(top=-10.0)])
    found_M, _ = power_iteration(matrix_product(signed), {"w": torch.ones(2, 12, dtype=torch.float64)}, 60)
    torch.testing.assert_close(found_M, torch.tensor([10.0, -10.0], dtype=torch.float64))
    with pytest.raises(LabError):
        power_iteration(matrix_product(signed), {"w": torch.ones(2, 12)}, 0)


def test_weights_that_are_not_named_take_no_part():
    """G over the blocks' matrices is the corner of G over all weights that belongs to them."""
    model, weights, windows, spread = micro(1)
    everything = {**spread, **{name: torch.ones_like(each) for name, each in weights.items() if name not in spread}}
    whole, corner = (dense_matrix(preconditioned(stacked_losses(model, weights, windows)[0], weights, some), some)
                     for some in (everything, spread))
    size = corner.shape[-1]
    torch.testing.assert_close(whole[:, :size, :size], corner)
    assert whole.shape[-1] > size


def test_a_locked_block_has_no_curvature():
    """A skipped block is in no graph, so it is left out of `spread`; what is left still works."""
    model, weights, windows, spread = micro()
    set_locked(model, [0])
    spread = {name: each for name, each in spread.items() if "blocks.0" in name}
    product = preconditioned(stacked_losses(model, weights, windows)[0], weights, spread)
    assert product(random_vector(spread, torch.Generator())).keys() == spread.keys()


def test_a_hot_start_beats_a_cold_one():
    """On a slowly turning matrix three products a reading, from the last vector, come closer than three from scratch;
    after some readings the error is small."""
    hot, errors = CurvatureTracker(torch.Generator().manual_seed(0), 3), []
    ones, turn = {"w": torch.ones(1, 12, dtype=torch.float64)}, drawn_matrix(seed=3) * 0.01
    for step in range(12):
        matrix = drawn_matrix() + step * turn
        exact = torch.linalg.eigvalsh(matrix)[0, -1]
        cold, _ = power_iteration(matrix_product(matrix), random_vector(ones, torch.Generator().manual_seed(step)), 3)
        reading = hot.read(matrix_product(matrix), ones)
        errors.append((float((reading.value_M - exact).abs() / exact), float((cold - exact).abs() / exact)))
        assert bool(reading.angle_M.isnan()) == (step == 0)
    hot_error, cold_error = np.median(errors[3:], axis=0)
    assert hot_error < 1e-3 < cold_error
    assert reading.angle_M < 0.1


def test_transport_keeps_the_generalised_eigenvector():
    """If P^(-1/2) u is unchanged, the vector carried to the new P is the new eigenvector: u' = P'^(1/2) P^(-1/2) u."""
    tracker = CurvatureTracker(torch.Generator().manual_seed(0), 200)
    old, new = ({"w": torch.rand(1, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5}
                for seed in (1, 2))
    tracker.read(matrix_product(drawn_matrix()), old)
    expected = unit({"w": (new["w"] / old["w"]).sqrt() * tracker.u["w"]})
    torch.testing.assert_close(tracker.carried(new), expected)
    still = CurvatureTracker(torch.Generator().manual_seed(0), 200)
    still.read(matrix_product(drawn_matrix()), old)
    assert still.read(matrix_product(drawn_matrix()), old).angle_M < 1e-6


def test_a_block_that_unlocks_joins_the_search():
    """A new block gets a part of the vector; otherwise an eigenvector that lies in it alone would never be found."""
    tracker, one = CurvatureTracker(torch.Generator().manual_seed(0), 40), torch.ones(1, 12, dtype=torch.float64)
    tracker.read(matrix_product(drawn_matrix()), {"w": one})

    def both(u):
        return {"w": u["w"], "new": 50.0 * u["new"]}

    assert tracker.read(both, {"w": one, "new": one[:, :3]}).value_M == pytest.approx(50.0)


@pytest.mark.parametrize("beta_1", [0.0, 0.5, 0.9, 0.95])
def test_adam_breaks_at_its_threshold(beta_1):
    """On a quadratic with P frozen Adam is a linear map of (w, m); its spectral radius passes 1 at the threshold."""
    def radius(eta_lambda):
        push = (1 - beta_1) * eta_lambda
        return max(abs(np.linalg.eigvals([[1 - push, -beta_1], [push, beta_1]])))

    assert radius(0.999 * adam_threshold(beta_1)) < 1 < radius(1.001 * adam_threshold(beta_1))
    assert adam_threshold(0.9) == pytest.approx(38) and adam_threshold(0.95) == pytest.approx(78)
    with pytest.raises(LabError):
        adam_threshold(1.0)
