"""Training on late weights: the rule by hand, ordinary training bit for bit where nothing is late.

On a quadratic in float64 every number of the rule can be written down; on a decoder the same rule is run with one model
at a time.
"""

import math

import numpy as np
import pytest
import torch
from planted import altered

from labkit.data import generator_for
from labkit.errors import LabError
from labkit.models import GPT, GPTConfig
from labkit.models.explicit_attention import ExplicitAttention
from labkit.objectives import next_token_loss
from labkit.trainers import late_weights
from labkit.trainers.late_weights import train_late
from labkit.trainers.stack import StackedAdamW, stack_weights, stacked_losses

BETAS, EPS = (0.8, 0.9), 1e-3
CONFIG = GPTConfig(vocab_size=11, context=6, width=8, layers=2, heads=2)


class Point(torch.nn.Module):
    """Two weights in float64, and a loss whose gradient is plain to see: sum of (w - target)^2 / 2."""

    def __init__(self, seed):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64) + seed)


def squared(model, weights, target_M2):
    return (weights["w"] - target_M2).square().sum(1) / 2, None


def target(seed, step):
    return torch.randn(2, dtype=torch.float64, generator=generator_for(seed, step))


def by_hand(seed, rate, k, steps):
    """(losses, last weights): versions in a list, Adam written out."""
    versions, m, v, losses = [np.array([1.0, -2.0]) + seed], np.zeros(2), np.zeros(2), []
    for step in range(steps):
        read = versions[max(0, step - k)]
        g = read - target(seed, step).numpy()
        losses.append((g**2).sum() / 2)
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
        size = m / (1 - BETAS[0] ** (step + 1)) / (np.sqrt(v / (1 - BETAS[1] ** (step + 1))) + EPS)
        versions.append(versions[-1] - rate * size)
    return np.array(losses), versions[-1]


def check_rule(train=train_late):
    rates, seeds, steps = (0.3, 0.05), (0, 3), 9
    for k in (0, 1, 2, 12):
        history = train(Point, target, staleness=k, learning_rate=rates, seeds=seeds, steps=steps, betas=BETAS, eps=EPS,
                        losses=squared, held_out_BT1=torch.zeros(2, dtype=torch.float64), evaluate_every=4)
        assert history.evaluated == (4, 8, 9) and history.loss_NM.shape == (steps, 4)
        for rate in rates:
            for seed in seeds:
                losses, last = by_hand(seed, rate, k, steps)
                assert history.losses(rate, seed) == pytest.approx(losses, rel=1e-12)
                assert history.end(rate)[seed] == pytest.approx((last**2).sum() / 2, rel=1e-12)


def test_the_rule_by_hand():
    """U_(T+1) = U_T - eta Adam(G_T), G_T on U_max(0, T - k): delays 0, 1, 2 and longer than the run, in float64."""
    check_rule()


FAULTS = {
    "one version too many": ("maxlen=staleness + 1", "maxlen=staleness + 2"),
    "one too few": ("maxlen=staleness + 1", "maxlen=max(1, staleness)"),
    "the newest is read": ("loss_M = losses(model, versions[0]", "loss_M = losses(model, versions[-1]"),
    "late weights are evaluated": ("held_out.append(losses(model, newest", "held_out.append(losses(model, versions[0]"),
    "all seeds read one batch": ("windows[seed] for _, seed", "windows[seeds[0]] for _, seed"),
    "the step is counted from one": ("batches(seed, step)", "batches(seed, step + 1)"),
    "evaluated at another step": ("(step + 1) % evaluate_every", "step % evaluate_every"),
    "betas forgotten": ("betas=betas, eps=eps", "eps=eps"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault):
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check_rule(altered(train_late, "train_late", *FAULTS[fault], vars(late_weights)))


def small_decoder(seed):
    return GPT(CONFIG, attention=ExplicitAttention(), seed=seed)


def windows(seed, step):
    return torch.randint(11, (3, 7), generator=generator_for(seed, step))


def test_without_delay_it_is_ordinary_training_bit_for_bit():
    """The stack's own steps, with no versions kept anywhere; clipping and schedule included."""
    seeds, rates, steps = (0, 1), (1e-2, 3e-3), 6
    history = train_late(small_decoder, windows, staleness=0, learning_rate=rates, seeds=seeds, steps=steps, warmup=2,
                         schedule="wsd", decay=0.5, weight_decay=0.1, clip=0.3, held_out_BT1=windows(9, 0))
    model, weights = small_decoder(0), stack_weights([small_decoder(seed) for _ in rates for seed in seeds])
    optimizer = StackedAdamW(weights, torch.tensor([rate for rate in rates for _ in seeds]), weight_decay=0.1)
    for step in range(steps):
        batch = torch.stack([windows(seed, step) for _ in rates for seed in seeds])
        loss_M, _ = stacked_losses(model, weights, batch)
        assert (history.loss_NM[step] == loss_M.detach().numpy()).all()
        gradient = dict(zip(weights, torch.autograd.grad(loss_M.sum(), list(weights.values())), strict=True))
        factor = (step + 1) / 2 if step < 2 else min(1.0, (steps - step) / 3)
        optimizer.step(late_weights.clip_stack(gradient, 0.3), factor)
    with torch.no_grad():
        last_M, _ = stacked_losses(model, weights, windows(9, 0).expand(4, -1, -1))
    assert (history.held_out_EM == last_M.numpy()).all() and history.evaluated == (steps,)


def test_a_decoder_one_update_late_follows_two_plain_models():
    """One at a time: gradients on a model that lags one update behind, applied to another by Adam in three lines."""
    rates, seeds, steps = (1e-2, 1e-3), (0, 1), 5
    history = train_late(small_decoder, windows, staleness=1, learning_rate=rates, seeds=seeds, steps=steps)
    apart = train_late(small_decoder, windows, staleness=0, learning_rate=rates, seeds=seeds, steps=steps)
    assert np.abs(history.loss_NM[2:] - apart.loss_NM[2:]).max() > 1e-3  # else the delay would not show
    for rate in rates:
        for seed in seeds:
            newest, late, losses = small_decoder(seed), small_decoder(seed), []
            first, second = ([torch.zeros_like(w) for w in newest.parameters()] for _ in range(2))
            for step in range(steps):
                batch = windows(seed, step)
                loss = next_token_loss(late(batch[:, :-1]), batch[:, 1:])
                gradients = torch.autograd.grad(loss, list(late.parameters()))
                late.load_state_dict(newest.state_dict())  # what the next iteration reads: without this update
                with torch.no_grad():
                    for w, g, m, v in zip(newest.parameters(), gradients, first, second, strict=True):
                        m.mul_(0.9).add_(0.1 * g)
                        v.mul_(0.999).add_(0.001 * g**2)
                        w -= rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                losses.append(loss.item())
            assert history.losses(rate, seed) == pytest.approx(losses, abs=2e-5)


def test_a_model_that_overflows_spoils_no_other():
    """A rate of 1e30 is not finite soon; the others are what they are without it."""
    settings = dict(staleness=1, seeds=(0,), steps=6, held_out_BT1=windows(9, 0))
    both = train_late(small_decoder, windows, learning_rate=(1e-3, 1e30), **settings)
    alone = train_late(small_decoder, windows, learning_rate=1e-3, **settings)
    assert not math.isfinite(both.end(1e30)[0])
    assert both.losses(1e-3, 0) == pytest.approx(alone.losses(1e-3, 0), rel=1e-5)


def test_nothing_to_train_is_refused():
    for wrong in (dict(staleness=-1), dict(steps=0), dict(seeds=()), dict(learning_rate=())):
        with pytest.raises(LabError, match="train nothing"):
            train_late(Point, target, **{"staleness": 1, "learning_rate": 0.1, "steps": 1, **wrong})
    history = train_late(Point, target, staleness=1, learning_rate=0.1, steps=1, losses=squared)
    assert history.held_out_EM.shape == (0, 1) and history.evaluated == ()
