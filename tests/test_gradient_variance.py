"""The variance of a policy gradient from token scores: equal to what one backward pass a token or a sequence gives.

The module never holds a sequence's gradient; it combines inner products of scores. The tests hold real gradients, made
with ordinary autograd in float64, one at a time, and compare. The closed form of the coefficients is held against
autograd through holder_objective, for both levels, signs, clips and exponents.
"""

import math

import pytest
import torch

from labkit.errors import LabError
from labkit.kernels import holder_objective
from labkit.measure import fisher_diagonal, holder_coefficients, sequence_variance, token_gram
from labkit.measure.gradient_variance import (
    mean_gradient,
    score_norms,
    second_moment,
    token_weights,
    variance_bound,
    weight_entropy,
)
from labkit.models import GPT, GPTConfig, answer_logits
from labkit.tasks.alphabet import END

PS = (-4.0, -1.0, -1e-5, 0.0, 1.0, 2.0, 30.0)


def tiny(tied: bool = True, seed: int = 0) -> GPT:
    model = GPT(GPTConfig(13, 12, 8, 1, 2, tied=tied, qk_norm=True), seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return model


def batch(B: int = 5, T: int = 3, A: int = 4, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    prompt_BT, answer_BA = (torch.randint(0, END, (B, size), generator=generator) for size in (T, A))
    answer_BA[1, 1:] = END  # two tokens count
    answer_BA[2, 0] = END  # one
    return prompt_BT, answer_BA


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]).bool()


def scores_of(model, prompt_BT, answer_BA) -> torch.Tensor:
    """[B, A, all weights]: one backward pass for every token."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    rows = []
    for prompt_T, answer_A in zip(prompt_BT, answer_BA, strict=True):
        logp_A = answer_logits(model, prompt_T[None], answer_A[None])[0].log_softmax(-1)[range(len(answer_A)), answer_A]
        rows.append(torch.stack([torch.cat([part.flatten() for part in torch.autograd.grad(
            logp, weights, retain_graph=True)]) for logp in logp_A]))
    return torch.stack(rows)


def ratios(B: int = 6, A: int = 5, seed: int = 0, spread: float = 0.4):
    """Log-probabilities of a stale policy, advantages of both signs and zero, and a mask with an empty row."""
    generator = torch.Generator().manual_seed(seed)
    logp_BA = -torch.rand(B, A, generator=generator, dtype=torch.float64) * 3
    old_BA = logp_BA - spread * torch.randn(B, A, generator=generator, dtype=torch.float64)
    advantage_B = torch.tensor([1.3, -0.7, 0.0, 2.0, -1.0, 0.4], dtype=torch.float64)[:B]
    mask_BA = torch.rand(B, A, generator=generator) < 0.8
    mask_BA[min(5, B - 1)] = False
    logp_BA[~mask_BA] = math.nan  # what the mask leaves out may be anything
    return logp_BA, old_BA, advantage_B, mask_BA


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_the_gram_is_that_of_the_tokens_gradients(tied, chunk):
    """With END masked by default; chunks must not change it, nor a last chunk that is shorter."""
    model, data = tiny(tied), batch()
    scores_BAP = scores_of(model, *data) * MASK[:, :, None]
    gram_BAA = token_gram(model, *data, chunk=chunk)
    torch.testing.assert_close(gram_BAA, scores_BAP @ scores_BAP.mT)
    torch.testing.assert_close(score_norms(gram_BAA), scores_BAP.norm(dim=2))


def test_a_mask_of_ones_counts_every_token_and_frozen_weights_do_not_count():
    model, data = tiny(), batch()
    model.embedding.weight.requires_grad_(False)
    scores_BAP = scores_of(model, *data)
    torch.testing.assert_close(token_gram(model, *data, torch.ones(5, 4)), scores_BAP @ scores_BAP.mT)


def test_no_sequences_and_no_tokens():
    model, (prompt_BT, answer_BA) = tiny(), batch()
    assert token_gram(model, prompt_BT[:0], answer_BA[:0]).shape == (0, 4, 4)
    none_BA = torch.zeros(5, 4, dtype=torch.bool)
    assert token_gram(model, prompt_BT, answer_BA, none_BA).abs().sum() == 0
    assert sequence_variance(model, prompt_BT, answer_BA, torch.zeros(5, 4, 4), torch.zeros(5, 4)) == 0.0


def test_nothing_of_the_model_is_left_changed():
    """No gradient lands in the weights, and the attention the caller chose stands."""
    model, data = tiny(), batch()
    attention, before = model.attention, [weight.clone() for weight in model.parameters()]
    token_gram(model, *data)
    fisher_diagonal(model, *data)
    assert model.attention is attention
    for weight, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, old) and weight.grad is None


@pytest.mark.parametrize("p", [-2.0, 0.0, 2.0])
def test_the_variance_is_that_of_the_sequences_gradients(p):
    """torch.var over real per-sequence gradients, unbiased and summed over all weights."""
    model, data = tiny(), batch()
    generator = torch.Generator().manual_seed(3)
    logp_BA = -torch.rand(5, 4, generator=generator, dtype=torch.float64)
    old_BA = logp_BA + 0.3 * torch.randn(5, 4, generator=generator, dtype=torch.float64)
    k_BA, _ = holder_coefficients(logp_BA, old_BA, torch.randn(5, generator=generator, dtype=torch.float64), MASK, p)
    G_BP = (k_BA[:, :, None] * scores_of(model, *data)).sum(1)
    gram_BAA = token_gram(model, *data)
    assert float(second_moment(gram_BAA, k_BA)) == pytest.approx(float(G_BP.square().sum(1).mean()))
    mean_P = torch.cat([part.flatten() for part in mean_gradient(model, *data, k_BA).values()])
    torch.testing.assert_close(mean_P, G_BP.mean(0))
    assert sequence_variance(model, *data, gram_BAA, k_BA) == pytest.approx(float(G_BP.var(0).sum()))


def test_the_mean_gradient_is_the_loss_gradient():
    """-grad of holder_objective through the model, with the coefficients taken at the same weights."""
    model, (prompt_BT, answer_BA) = tiny(), batch()
    A_B = torch.tensor([1.0, -0.5, 0.3, 0.8, -1.2], dtype=torch.float64)
    logp_BA = answer_logits(model, prompt_BT, answer_BA).log_softmax(-1).gather(2, answer_BA[..., None])[..., 0]
    old_BA = logp_BA.detach() - 0.1 * torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)
    loss, _ = holder_objective(logp_BA, old_BA, A_B, None, 2.0, mask=MASK)
    loss.backward()
    k_BA, _ = holder_coefficients(logp_BA.detach(), old_BA, A_B, MASK, 2.0)
    for name, part in mean_gradient(model, prompt_BT, answer_BA, k_BA).items():
        torch.testing.assert_close(part, -model.get_parameter(name).grad)


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("spread", [0.0, 0.4, 3.0])
@pytest.mark.parametrize("p", PS)
def test_the_coefficients_are_the_gradient_of_the_objective(level, spread, p):
    """k = -B d loss / d logp in float64, where some ratios are clipped and some not; NaN behind the mask stays out."""
    logp_BA, old_BA, advantage_B, mask_BA = ratios(spread=spread)
    k_BA, log_rho_B = holder_coefficients(logp_BA, old_BA, advantage_B, mask_BA, p, clip_low=0.2, clip_high=0.3,
                                          level=level)
    leaf_BA = logp_BA.clone().requires_grad_()
    loss, stats = holder_objective(leaf_BA, old_BA, advantage_B, None, p, 0.2, 0.3, level, mask=mask_BA)
    (slope_BA,) = torch.autograd.grad(loss, leaf_BA)
    torch.testing.assert_close(k_BA, torch.where(mask_BA, -len(logp_BA) * slope_BA, 0.0))
    torch.testing.assert_close(log_rho_B, stats["log_ratio_B"])
    assert (k_BA[5] == 0).all() and (k_BA[2] == 0).all()  # no token; no advantage


@pytest.mark.parametrize("spread", [0.4, 3.0])
def test_the_clip_is_not_idle_in_the_test_above(spread):
    logp_BA, old_BA, advantage_B, mask_BA = ratios(spread=spread)
    free, cut = (holder_coefficients(logp_BA, old_BA, advantage_B, mask_BA, 1.0, clip_low=low, clip_high=high)[0]
                 for low, high in ((0.999, 1e6), (0.2, 0.3)))
    rows = (free != cut).any(1)
    assert rows.any() and not rows.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_ratios_and_exponents_do_not_overflow(dtype):
    """exp(p l) would be e^4000; the closed form has the weight of the one largest token, 1, and rho its ratio."""
    logp_BA, old_BA = torch.tensor([[0.0, 40.0, 1.0]], dtype=dtype), torch.zeros(1, 3, dtype=dtype)
    k_BA, log_rho_B = holder_coefficients(logp_BA, old_BA, torch.tensor([-1.0], dtype=dtype), torch.ones(1, 3), 100.0)
    assert float(log_rho_B) == pytest.approx(40 - math.log(3) / 100)
    assert k_BA[0].tolist() == pytest.approx([0, -math.exp(40 - math.log(3) / 100), 0], rel=1e-4)


def test_without_staleness_every_exponent_is_the_same():
    """pi = pi_old: all ratios are 1, W = 1/n and k = A/n, whatever p."""
    logp_BA, _, advantage_B, mask_BA = ratios()
    for p in PS:
        k_BA, _ = holder_coefficients(logp_BA, logp_BA, advantage_B, mask_BA, p)
        n_B1 = mask_BA.sum(1, keepdim=True).clamp(min=1)
        torch.testing.assert_close(k_BA, torch.where(mask_BA, advantage_B[:, None] / n_B1, 0.0))


def test_entropy_of_the_weights():
    """Theorem 1: log n at p = 0, falling on both sides; a sequence without tokens has 0."""
    logp_BA, old_BA, _, mask_BA = ratios()
    entropies = {p: weight_entropy(token_weights(logp_BA, old_BA, mask_BA, p)) for p in (-5.0, -1.0, 0.0, 1.0, 5.0)}
    n_B = mask_BA.sum(1)
    torch.testing.assert_close(entropies[0.0], n_B.clamp(min=1).double().log())
    for near, far in ((1.0, 5.0), (-1.0, -5.0)):
        several_B = n_B > 1
        assert (entropies[0.0] > entropies[near])[several_B].all()
        assert (entropies[near] > entropies[far])[several_B].all()
    assert token_weights(logp_BA, old_BA, mask_BA, 3.0).sum(1).tolist() == pytest.approx([1] * 5 + [0])


def test_the_bound_holds_rises_with_p_and_has_its_closed_form():
    """Theorem 2: M^2 E[A^2 rho^2] is above the second moment at every p, and grows with p; by hand for two ratios."""
    model, data = tiny(), batch()
    logp_BA, old_BA, advantage_B, _ = ratios(5, 4, spread=0.1)
    logp_BA = torch.nan_to_num(logp_BA, nan=-1.0)
    gram_BAA, bounds = token_gram(model, *data), []
    for p in PS:
        k_BA, log_rho_B = holder_coefficients(logp_BA, old_BA, advantage_B, MASK, p)
        bounds.append(variance_bound(advantage_B, log_rho_B, score_norms(gram_BAA)))
        assert 0 < float(second_moment(gram_BAA, k_BA)) <= bounds[-1]
    assert sorted(bounds) == pytest.approx(bounds) and bounds[-1] > 1.1 * bounds[0]
    by_hand = variance_bound(torch.tensor([2.0, -1.0]), torch.tensor([0.0, math.log(3.0)]))
    assert by_hand == pytest.approx((4 * 1 + 1 * 9) / 2)
    assert variance_bound(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([[1.0, 3.0]])) == pytest.approx(36.0)


def test_the_fisher_diagonal_is_the_mean_square_of_the_answers_gradients():
    model, data = tiny(False), batch()
    G_BP = (scores_of(model, *data) * MASK[:, :, None]).sum(1)
    for chunk in (None, 2):
        fisher = fisher_diagonal(model, *data, chunk=chunk)
        assert list(fisher) == [name for name, _ in model.named_parameters()]
        torch.testing.assert_close(torch.cat([part.flatten() for part in fisher.values()]), G_BP.square().mean(0))


def test_bad_input_is_refused():
    model, (prompt_BT, answer_BA) = tiny(), batch()
    gram_BAA = torch.zeros(5, 4, 4)
    for call, sentence in (
        (lambda: token_gram(model, prompt_BT[:2], answer_BA), "prompt_BT has shape"),
        (lambda: token_gram(model, prompt_BT, answer_BA, MASK[:, :2]), "mask_BA has shape"),
        (lambda: second_moment(gram_BAA, MASK[:3]), "coefficient_BA has shape"),
        (lambda: mean_gradient(model, prompt_BT, answer_BA, MASK[:3]), "coefficient_BA has shape"),
        (lambda: sequence_variance(model, prompt_BT[:1], answer_BA[:1], gram_BAA[:1], MASK[:1]), "no variance"),
        (lambda: fisher_diagonal(model, prompt_BT[:0], answer_BA[:0]), "no answer"),
        (lambda: holder_coefficients(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3), 1.0,
                                     level="word"), "no level 'word'"),
        (lambda: token_gram(model, torch.zeros(5, 30, dtype=torch.long), answer_BA), "do not fit into a context"),
    ):
        with pytest.raises(LabError, match=sentence):
            call()
