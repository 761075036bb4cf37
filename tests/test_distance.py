"""How far a policy moved: equal to the KL of whole answers, counted out, and to closed forms; fits equal to scipy's.

The KL of two decoders over *all* answers of a small alphabet can be summed without sampling. The sum of token KLs,
weighted by the first model's own probabilities, must equal it: the chain rule, which makes the estimator unbiased.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from labkit.errors import LabError
from labkit.measure import bootstrap_r2, forward_kl, quadratic_fit, reverse_kl, sequence_kl, spearman
from labkit.measure.distance import (
    activation_distance,
    draw_answers,
    fisher_distance,
    token_kl,
    token_total_variation,
    total_variation,
    weight_distance,
)
from labkit.measure.gradient_variance import fisher_diagonal
from labkit.models import GPT, GPTConfig, answer_logits
from labkit.tasks import answer_mask
from labkit.tasks.alphabet import END
from labkit.tasks.world import filled_with_end

V = END + 1
PROMPT = torch.tensor([[1, 2]])


class Forbidding(GPT):
    """A decoder that gives all tokens but the allowed ones the logit -inf."""

    allowed: tuple[int, ...] = tuple(range(V))

    def head(self, hidden):
        forbidden_V = torch.full((V,), -math.inf).index_fill(0, torch.tensor(self.allowed), 0.0)
        return super().head(hidden) + forbidden_V


def decoder(seed: int, allowed: tuple[int, ...] = tuple(range(V))) -> GPT:
    """A random decoder with sharp opinions, in float64."""
    model = Forbidding(GPTConfig(V, 6, 8, 1, 2, tied=False), seed=seed).double()
    model.allowed = allowed
    with torch.no_grad():
        model.unembedding.weight.normal_(0, 1.0, generator=torch.Generator().manual_seed(seed))
    return model


def all_answers(tokens: tuple[int, ...], length: int) -> torch.Tensor:
    """Every answer that ends with its first END, or is cut off at `length`; filled with END."""
    rows = set()
    for row in itertools.product(tokens, repeat=length):
        end = row.index(END) if END in row else length
        rows.add(row[:end] + (END,) * (length - end))
    return torch.tensor(sorted(rows))


def log_prob_of_answers(model, prompt_NT, answer_NA):
    logp_NA = answer_logits(model, prompt_NT, answer_NA).log_softmax(-1).gather(2, answer_NA[..., None])[..., 0]
    return torch.where(answer_mask(answer_NA), logp_NA, 0.0).sum(1)


@pytest.fixture(scope="module")
def everything():
    """Two decoders over three tokens and END, and all answers of up to three tokens."""
    allowed = (0, 3, 7, END)
    p_model, q_model = decoder(1, allowed), decoder(2, allowed)
    answer_NA = all_answers(allowed, 3)
    prompt_NT = PROMPT.expand(len(answer_NA), 2)
    log_p_N, log_q_N = (log_prob_of_answers(model, prompt_NT, answer_NA).detach() for model in (p_model, q_model))
    assert float(log_p_N.exp().sum()) == pytest.approx(1) == pytest.approx(float(log_q_N.exp().sum()))
    return p_model, q_model, prompt_NT, answer_NA, log_p_N, log_q_N


def test_the_chain_rule_makes_it_the_kl_of_whole_answers(everything):
    """E_p of the summed token KLs equals sum_y p(y) log p(y)/q(y), counted out. The tokens behind END must not add."""
    p_model, q_model, prompt_NT, answer_NA, log_p_N, log_q_N = everything
    for one, other, log_one_N, log_other_N in ((p_model, q_model, log_p_N, log_q_N),
                                               (q_model, p_model, log_q_N, log_p_N)):
        expected = float((log_one_N.exp() * (log_one_N - log_other_N)).sum())
        kl_N = sequence_kl(one, other, prompt_NT, answer_NA)
        assert float(log_one_N.exp() @ kl_N) == pytest.approx(expected) and expected > 0.1


def test_the_sum_of_token_variations_bounds_that_of_answers(everything):
    p_model, q_model, prompt_NT, answer_NA, log_p_N, log_q_N = everything
    whole = float((log_p_N.exp() - log_q_N.exp()).abs().sum() / 2)
    total = float(log_p_N.exp() @ total_variation(p_model, q_model, prompt_NT, answer_NA))
    assert whole < total < 3 * whole
    first_N1 = answer_NA[:, :1]  # of one token it is no bound but the thing itself
    one = total_variation(p_model, q_model, prompt_NT[:1], first_N1[:1])
    p_V, q_V = (answer_logits(model, PROMPT, first_N1[:1])[0, 0].detach().softmax(-1) for model in (p_model, q_model))
    assert float(one[0]) == pytest.approx(float((p_V - q_V).abs().sum() / 2))


def test_forward_and_reverse_take_their_own_answers_and_sampling_is_unbiased(everything):
    """Drawn answers give the counted-out KL within four standard errors, in both directions, and the two differ."""
    p_model, q_model, _, _, log_p_N, log_q_N = everything
    prompt_NT = PROMPT.expand(6000, 2)
    generator = torch.Generator().manual_seed(0)
    for base_draws, measure, log_one_N, log_other_N in ((True, forward_kl, log_p_N, log_q_N),
                                                        (False, reverse_kl, log_q_N, log_p_N)):
        drawn_from, other = (p_model, q_model) if base_draws else (q_model, p_model)
        answer_NA = draw_answers(drawn_from, prompt_NT, 3, generator)
        assert torch.equal(answer_NA, filled_with_end(answer_NA))
        expected = float((log_one_N.exp() * (log_one_N - log_other_N)).sum())
        kl_N = sequence_kl(drawn_from, other, prompt_NT, answer_NA)
        assert abs(float(kl_N.mean()) - expected) < 4 * float(kl_N.std()) / math.sqrt(6000)
        assert measure(p_model, q_model, prompt_NT, answer_NA) == float(kl_N.mean())


def test_equal_models_are_at_distance_zero():
    model, prompt_NT = decoder(1), torch.randint(0, V, (4, 3), generator=torch.Generator().manual_seed(0))
    answer_NA = draw_answers(model, prompt_NT, 2, torch.Generator().manual_seed(1))
    assert answer_NA.shape == (4, 2)
    for same in (model, decoder(1).float()):
        assert sequence_kl(same, same, prompt_NT, answer_NA).tolist() == [0.0] * 4
        assert total_variation(same, same, prompt_NT, answer_NA).tolist() == [0.0] * 4
        assert activation_distance(same, same, prompt_NT) == 0.0
    assert weight_distance(model.state_dict(), model.state_dict()) == 0.0


def test_masks_empty_answers_and_parts(monkeypatch):
    """A mask picks tokens; an answer without tokens has 0; batches are joined in order."""
    p_model, q_model = decoder(1), decoder(2)
    prompt_NT = PROMPT.expand(3, 2)
    answer_NA = torch.tensor([[4, 5, END], [END, END, END], [1, 2, 3]])
    logits = [answer_logits(model, prompt_NT, answer_NA) for model in (p_model, q_model)]
    each_NA = token_kl(*logits).detach()
    by_end = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1]])
    torch.testing.assert_close(sequence_kl(p_model, q_model, prompt_NT, answer_NA), (each_NA * by_end).sum(1))
    chosen = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 1]])
    kl_N = sequence_kl(p_model, q_model, prompt_NT, answer_NA, chosen)
    torch.testing.assert_close(kl_N, (each_NA * chosen).sum(1))
    monkeypatch.setattr("labkit.measure.distance.ROWS", 2)
    torch.testing.assert_close(sequence_kl(p_model, q_model, prompt_NT, answer_NA, chosen), kl_N)


def test_forbidden_tokens():
    """What p forbids adds 0, also where q forbids it too; what only q forbids makes the KL infinite, not NaN."""
    some, fewer = decoder(1, (0, 3, END)), decoder(2, (0, END))
    answer_NA = torch.tensor([[0, END]])
    assert sequence_kl(some, fewer, PROMPT, answer_NA).tolist() == [math.inf]
    kl = float(sequence_kl(fewer, some, PROMPT, answer_NA)[0])
    assert 0 < kl < math.inf
    assert 0 < float(total_variation(some, fewer, PROMPT, answer_NA)[0]) <= 2
    deep = torch.tensor([0.0, -1e4], dtype=torch.float64)  # p underflows to 0 while log p is finite
    assert float(token_kl(deep, torch.tensor([0.0, -math.inf], dtype=torch.float64))) == 0.0
    assert token_kl(torch.tensor([math.nan, 0.0]), torch.zeros(2)).isnan()


def test_token_distances_in_closed_form():
    """Two coins, p = 1/2 and 1/4: log 2 - (log 3)/2 + ... counted by hand, and a tie of fp32 and float64 input."""
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert float(token_kl(p, q)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    assert float(token_total_variation(p, q)) == pytest.approx(0.25)
    assert float(token_kl(p + 100, q - 7)) == pytest.approx(float(token_kl(p, q)), rel=1e-4)  # logits, not logs


def test_weight_distances_by_hand():
    a = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor(3.0)}
    b = {"y": torch.tensor(-1.0), "x": torch.tensor([1.0, 5.0])}  # another order of names must not matter
    assert weight_distance(a, b, order=1) == 7.0 and weight_distance(a, b) == 5.0
    half = {name: value.bfloat16() for name, value in a.items()}
    assert weight_distance(half, {name: value + 1 for name, value in a.items()}, order=1) == 3.0


def test_the_fisher_distance_is_the_kl_of_a_small_step():
    """A head with one free row: F is exact there, and half the squared distance is the KL to second order."""
    base, policy = decoder(1), decoder(1)
    prompt_NT = PROMPT.expand(4000, 2)
    answer_NA = draw_answers(base, prompt_NT, 1, torch.Generator().manual_seed(0))
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    with torch.no_grad():
        policy.unembedding.weight[3, 2] += 0.02
    fisher = fisher_diagonal(base, prompt_NT, answer_NA)
    kl = forward_kl(base, policy, prompt_NT, answer_NA)
    assert fisher_distance(fisher, before, policy.state_dict()) ** 2 / 2 == pytest.approx(kl, rel=0.15)
    by_hand = fisher["unembedding.weight"][3, 2].sqrt() * 0.02
    assert fisher_distance(fisher, before, policy.state_dict()) == pytest.approx(float(by_hand))


def test_activations_by_hand():
    """L1 over the width, the mean over prompts and positions: a norm's weight doubled moves each state by itself."""
    base, policy = decoder(1), decoder(1)
    with torch.no_grad():
        policy.norm.weight.mul_(2)
    prompt_NT = torch.tensor([[1, 2], [3, 4], [5, 6]])
    expected = float(base.trunk(base.embed(prompt_NT)).detach().abs().sum() / 6)
    assert activation_distance(base, policy, prompt_NT) == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4])
def test_the_parabola_is_that_of_numpy(scale):
    generator = np.random.default_rng(0)
    x_N = scale * generator.uniform(0, 3, 40)
    y_N = 0.3 - x_N / scale + 2 * (x_N / scale) ** 2 + generator.normal(size=40)
    coefficients, r2 = quadratic_fit(x_N, y_N)
    expected = np.polynomial.Polynomial.fit(x_N, y_N, 2).convert().coef
    np.testing.assert_allclose(coefficients, expected, rtol=1e-6)
    rest = y_N - np.polynomial.Polynomial(expected)(x_N)
    assert r2 == pytest.approx(1 - rest.var() / y_N.var())


def test_exact_and_flat_parabolas():
    x_N = np.array([0.0, 1, 2, 5])
    assert quadratic_fit(x_N, 1 - x_N + 3 * x_N**2) == ((pytest.approx(1), pytest.approx(-1), pytest.approx(3)),
                                                        pytest.approx(1))
    assert quadratic_fit(x_N, [0.3] * 4).r2 == 0.0
    assert quadratic_fit(x_N, [0.0] * 4).r2 == 0.0


def test_the_bootstrap_draws_the_same_points_for_every_predictor():
    """One resample recomputed by hand from the drawn counts, by repeating points; equal predictors give equal R^2."""
    generator = np.random.default_rng(1)
    x_N = generator.uniform(0, 3, 30)
    y_N = x_N**2 + generator.normal(size=30)
    noisy_N = x_N + generator.normal(size=30)
    r2 = bootstrap_r2({"x": x_N, "noisy": noisy_N, "scaled": 1000 * x_N}, y_N, resamples=200, seed=5)
    counts = np.random.default_rng(5).multinomial(30, np.full(30, 1 / 30), size=200)
    for name, values_N in (("x", x_N), ("noisy", noisy_N)):
        for row in (0, 199):
            points = np.repeat(np.arange(30), counts[row])
            assert r2[name][row] == pytest.approx(quadratic_fit(values_N[points], y_N[points]).r2)
    np.testing.assert_allclose(r2["scaled"], r2["x"], atol=1e-9)
    assert (r2["x"] > r2["noisy"]).mean() > 0.95
    assert r2["x"].mean() == pytest.approx(quadratic_fit(x_N, y_N).r2, abs=0.05)


def test_whole_runs_are_drawn_where_points_belong_to_runs():
    """Ten copies of each run say nothing new: by run the spread equals that of the runs alone, by point it shrinks."""
    generator = np.random.default_rng(2)
    x_N = generator.uniform(0, 3, 12)
    y_N = x_N**2 + 2 * generator.normal(size=12)
    alone = bootstrap_r2({"x": x_N}, y_N, seed=3)["x"]
    many = {"x": np.repeat(x_N, 10)}
    names = [f"run {n:02d}" for n in range(12) for _ in range(10)]
    by_run = bootstrap_r2(many, np.repeat(y_N, 10), seed=3, run_N=names)
    np.testing.assert_allclose(by_run["x"], alone, atol=1e-9)
    assert bootstrap_r2(many, np.repeat(y_N, 10), seed=3)["x"].std() < 0.6 * alone.std()


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_that_of_scipy(ties):
    generator = np.random.default_rng(4)
    x_N, y_N = generator.normal(size=(2, 25))
    y_N = y_N + x_N
    if ties:
        x_N, y_N = x_N.round(), y_N.round()
    assert spearman(x_N, y_N) == pytest.approx(stats.spearmanr(x_N, y_N).statistic)
    assert spearman([1, 2, 30], [-5.0, -6.0, -9.0]) == pytest.approx(-1)


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: quadratic_fit([1, 2, 3], [1, 2, 3]), "3 points at 3 places"),
    (lambda: quadratic_fit([1, 1, 2, 2], [1, 2, 3, 4]), "4 points at 2 places"),
    (lambda: quadratic_fit([1, 2, 3, math.nan], [1, 2, 3, 4]), "not finite pairs"),
    (lambda: quadratic_fit([1, 2, 3, 4], [1, 2, 3]), "not finite pairs"),
    (lambda: spearman([1, 1], [1, 2]), "no order"),
    (lambda: bootstrap_r2({}, [1, 2, 3, 4]), "nothing to compare"),
    (lambda: bootstrap_r2({"x": [1, 2, 3, 4]}, [1, 2, 3, 4], run_N=[0, 1]), "2 names of runs"),
    (lambda: weight_distance({"a": torch.ones(2)}, {"b": torch.ones(2)}), "same tensors"),
    (lambda: weight_distance({"a": torch.ones(2)}, {"a": torch.ones(3)}), "a has shape"),
    (lambda: weight_distance({"a": torch.ones(2)}, {"a": torch.ones(2)}, order=3), "order 3"),
    (lambda: sequence_kl(decoder(1), decoder(1), PROMPT, torch.zeros(2, 1, dtype=torch.long)), "prompt_NT has shape"),
    (lambda: sequence_kl(decoder(1), decoder(1), PROMPT, torch.ones(1, 2).long(), torch.ones(1, 3)), "mask_NA has"),
    (lambda: forward_kl(decoder(1), decoder(1), PROMPT[:0], torch.zeros(0, 2, dtype=torch.long)), "no answers"),
    (lambda: forward_kl(decoder(1), decoder(1), PROMPT, torch.zeros(1, 0, dtype=torch.long)), "no answers"),
])
def test_bad_input_is_refused(call, sentence):
    with pytest.raises(LabError, match=sentence):
        call()
