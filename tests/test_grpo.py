"""Reinforcement learning: it learns, resumes bit for bit, counts the right tokens, and draws from the right side."""

import copy
import dataclasses
import functools
import importlib

import pytest
import torch

from labkit.errors import LabError
from labkit.models import GPT, Generation, GPTConfig, answer_logprob, generate
from labkit.objectives.policy_gradient import METHODS
from labkit.tasks import DigitList
from labkit.tasks.alphabet import END, VOCAB
from labkit.tasks.world import SIDES, hash_of
from labkit.trainers import (
    GRPOSettings,
    Lesson,
    TrainSettings,
    accuracy,
    grpo,
    imitate,
    load_world_base,
    loop,
    roll_out,
    rollout,
    run_all,
)
from labkit.trainers.rollout import Rollout
from labkit.trainers.schedule import SHAPES, annealed

trainer = importlib.import_module("labkit.trainers.grpo")  # the name in the package is the function
WORLD = DigitList("parity", 2, same=0.5)
CONFIG = GPTConfig(VOCAB, context=8, width=16, layers=1, heads=2)
SETTINGS = GRPOSettings(rounds=4, learning_rate=0.05, prompts=6, samples=4, optimizer="sgd", seed=3)
SEVERAL = dataclasses.replace(SETTINGS, minibatches=2, epochs=2)
ANSWERS = [[1, 3, END], [END, 5, 7], [5, 6, 7], [5, END, END], [1, END, 3], [2, 2, END], [END, END, END], [END, 40, 47]]
COUNTED = [3, 1, 3, 2, 2, 3, 1, 1]  # of them: END counts, what stands behind it does not, a truncated one counts whole


@functools.cache
def trained_base() -> GPT:
    """Two digits and END, right by chance: about a quarter of the answers."""
    model = GPT(CONFIG)
    imitate(model, [Lesson(WORLD, "same")], TrainSettings(80, 2e-2, batch=64, warmup=10))
    return model


def base() -> GPT:
    """A copy that may be trained."""
    return copy.deepcopy(trained_base())


def strange() -> GPT:
    """Never trained, with large weights: its answers depend on the prompt, and no token of theirs is certain."""
    model, draw = GPT(dataclasses.replace(CONFIG, tied=False)), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.4, generator=draw)
    return model


def weights(model: GPT):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient(model: GPT, loss):
    """All of a loss's gradient in one row; zeros where there is no path."""
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    pairs = zip(found, model.parameters(), strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])


def handmade(model: GPT, answers=ANSWERS, *, seed: int = 0) -> trainer.Batch:
    """A round with given answers: old and reference policies near the model, advantages of both signs, float64."""
    draw = torch.Generator().manual_seed(seed)
    answer_BA = torch.tensor(answers)
    prompt_BT = WORLD.problems(2, seed=5).repeat_interleave(len(answers) // 2, 0)
    with torch.no_grad():
        logp_BA = answer_logprob(model, prompt_BT, torch.tensor(ANSWERS))[0]
    old_BA, reference_BA = (logp_BA + 0.3 * torch.randn(logp_BA.shape, generator=draw, dtype=torch.float64)
                            for _ in range(2))
    advantage_B = torch.randn(len(answers), generator=draw, dtype=torch.float64)
    drawn = Rollout(prompt_BT, answer_BA, rollout.answer_mask(answer_BA), logp_BA, torch.zeros(len(answers)))
    kept_B = torch.ones(len(answers), dtype=torch.bool)
    return trainer.Batch(drawn, advantage_B, old_BA, reference_BA, kept_B, {}, 0.0)


def token_by_token(model: GPT, batch: trainer.Batch, settings: GRPOSettings):
    """GRPO's loss and the KL estimate from their formulas: one call of the model for each counted token's prefix."""
    loss, kl, B = 0.0, 0.0, len(batch.advantage_B)
    rows = zip(batch.drawn.prompt_BT.tolist(), batch.drawn.answer_BA.tolist(), strict=True)
    for b, (prompt, answer) in enumerate(rows):
        counted = answer[: answer.index(END) + 1] if END in answer else answer
        A = batch.advantage_B[b]
        for t, token in enumerate(counted):
            logp = model(torch.tensor([prompt + answer[:t]]))[0, -1].log_softmax(-1)[token]
            ratio = (logp - batch.old_logp_BA[b, t]).exp()
            cut = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
            loss = loss - torch.min(ratio * A, cut * A) / len(counted) / B
            r = batch.reference_logp_BA[b, t] - logp
            kl = kl + (r.exp() - r - 1) / len(counted) / B
    return loss, kl


class Fixed(DigitList):
    """A verifier that asks the prompt instead of the answer, so that all answers to a prompt get one reward."""

    def __init__(self, right):
        super().__init__("parity", 2)
        self.right = right

    def verify(self, prompt_NT, answer_NA):
        return self.right(self.items(prompt_NT)[:, 0])


class OneRound(DigitList):
    """The same problems in every round of every run, so that only the dice can differ."""

    def problems(self, count, *, split="train", seed=0, step=0):
        return super().problems(count, split=split)


def spy(monkeypatch):
    """The settings and statistics of every call of policy_loss by the trainer."""
    calls, as_it_is = [], trainer.policy_loss

    def watched(*arguments, **named):
        loss, stats = as_it_is(*arguments, **named)
        calls.append({**named, **{name: float(value) for name, value in stats.items()}})
        return loss, stats

    monkeypatch.setattr(trainer, "policy_loss", watched)
    return calls


# ---- learning


def test_learns_addition_from_the_shipped_base():
    """From under 0.45 of sampled answers to over 0.9 on problems of the other side: only the verifier can have taught
    it, for nothing else in the run knows a sum."""
    shipped = load_world_base("addition")
    world = shipped.worlds["addition"]
    settings = GRPOSettings(rounds=20, learning_rate=0.02, optimizer="sgd", evaluation_problems=400)
    history = grpo(shipped.model, world, settings)
    before, after = history.evaluations["accuracy"]
    assert history.evaluations["step"] == [0, 20] and before < 0.45 and after > 0.9
    assert accuracy(shipped.model, world, problems=400) > 0.9
    assert history.rollouts["reward"][0] < 0.45 and history.rollouts["reward"][-1] > 0.9
    assert history.rollouts["round"] == list(range(20))


@pytest.mark.parametrize("shape", [{}, {"minibatches": 4}, {"epochs": 3}, {"minibatches": 2, "epochs": 2}])
def test_a_first_round_of_any_shape_can_be_watched(shape):
    """One row of `train` a step and one of `rollouts` a round; what the bar says before the first round is over does
    not ask for numbers that do not exist yet."""
    settings = dataclasses.replace(SETTINGS, rounds=2, **shape)
    history = grpo(base(), WORLD, settings)
    assert history.train["step"] == list(range(2 * settings.updates)) and history.rollouts["round"] == [0, 1]
    assert trainer.status_of(loop.History(), settings) == "first round"
    half = loop.History(rollouts={"reward": [0.5], "tokens": [3.0], "seconds": [2.0]})
    assert trainer.status_of(half, settings) == "accuracy 0.50 ± 0.20, 12 rollouts/s"  # sqrt(0.25 / 6 prompts)
    assert trainer.throughput(half, settings) == {"rollouts_per_s": 12.0, "tokens_per_s": 36.0}


def test_bf16_products_get_the_gradient_of_every_weight():
    """Sampling and scoring under autocast, without gradient, come first in a step. Weights that they have cast must not
    be taken for the ones that learn: the step in bf16 is that of fp32 but for rounding, matrix by matrix."""
    moved = {}
    for precision in ("fp32", "bf16"):
        model, batch = base(), handmade(base().double())
        float_batch = dataclasses.replace(batch, advantage_B=batch.advantage_B.float())

        def loss_at(model, step, batch=float_batch):
            trainer.collect(model, WORLD, SETTINGS, 0, None)
            return trainer.batch_loss(model, batch, slice(None), SETTINGS, 1.0)[0]

        loop.train(model, loss_at, dataclasses.replace(SETTINGS.training(), steps=1, precision=precision))
        pairs = zip(model.parameters(), base().parameters(), strict=True)
        moved[precision] = [(new - old).detach() for new, old in pairs]
        assert all(p.dtype == torch.float32 for p in model.parameters())
    for exact, rounded in zip(moved["fp32"], moved["bf16"], strict=True):
        assert exact.norm() > 0 and (rounded - exact).norm() < 0.15 * exact.norm()


# ---- resuming


def watched_run(monkeypatch, settings, model, *, stop=None, **named):
    """A run, broken off before step `stop`; returns its history and the optimizer's state."""
    optimizers, step_as_it_is, optimizer_as_it_is = [], loop.train_step, loop.make_optimizer

    def break_off(model, optimizer, loss_at, step, settings):
        if step == stop:
            raise KeyboardInterrupt
        return step_as_it_is(model, optimizer, loss_at, step, settings)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", break_off)
        patch.setattr(loop, "make_optimizer", lambda *a: optimizers.append(optimizer_as_it_is(*a)) or optimizers[0])
        if stop is None:
            history = grpo(model, WORLD, settings, **named)
            return history, optimizers[0].state_dict()["state"]
        with pytest.raises(KeyboardInterrupt):
            grpo(model, WORLD, settings, **named)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stop", [8, 10])
def test_resumed_equals_unbroken_bitwise(tmp_path, monkeypatch, optimizer, stop):
    """Four updates a round, an exponent that moves, a reference and evaluations; broken off between two rounds and in
    the middle of one. Weights, optimizer and tables have the same bits, so no die, problem or ratio differed."""
    settings = dataclasses.replace(SEVERAL, optimizer=optimizer, learning_rate=0.01, method="holder", p=2.0, p_end=-2.0,
                                   kl=0.1, checkpoint_every=1, evaluate_every=1, evaluation_problems=20)
    unbroken, path = base(), tmp_path / "run.safetensors"
    whole, whole_state = watched_run(monkeypatch, settings, unbroken, reference=GPT(CONFIG))
    watched_run(monkeypatch, settings, base(), stop=stop, reference=GPT(CONFIG), checkpoint=path)
    resumed = base()
    history, state = watched_run(monkeypatch, settings, resumed, reference=GPT(CONFIG), checkpoint=path)
    assert torch.equal(weights(resumed), weights(unbroken)) and not torch.equal(weights(resumed), weights(base()))
    kept, whole_kept = ({(place, name): value for place, row in table.items() for name, value in row.items()}
                        for table in (state, whole_state))
    assert kept.keys() == whole_kept.keys() and len(kept) == (0 if optimizer == "sgd" else 3 * 8)
    assert all(torch.equal(kept[place], whole_kept[place]) for place in kept)
    assert history.train == whole.train and history.evaluations == whole.evaluations
    assert history.evaluations["step"] == [0, 4, 8, 12, 16]
    assert history.rollouts.keys() == whole.rollouts.keys()
    assert all(history.rollouts[name] == whole.rollouts[name] for name in whole.rollouts if name != "seconds")


def test_a_checkpoint_belongs_to_one_run(tmp_path):
    """Another base, reference, world or setting is refused; the run itself goes on (here: is already over)."""
    path, settings = tmp_path / "run.safetensors", dataclasses.replace(SETTINGS, checkpoint_every=2, kl=0.1)
    grpo(base(), WORLD, settings, reference=base(), checkpoint=path)
    longer = DigitList("parity", 2, same=0.9)
    others = [(GPT(CONFIG, seed=9), WORLD, settings, base()), (base(), WORLD, settings, GPT(CONFIG, seed=9)),
              (base(), longer, settings, base()), (base(), WORLD, dataclasses.replace(settings, clip_low=0.1), base()),
              (base(), WORLD, dataclasses.replace(settings, kl=0.0), base())]
    for model, world, other, reference in others:
        with pytest.raises(LabError, match="another run"):
            grpo(model, world, other, reference=reference, checkpoint=path)
    assert grpo(base(), WORLD, settings, reference=base(), checkpoint=path).train["step"] == [0, 1, 2, 3]


def test_runs_side_by_side_change_nothing():
    """Two runs in two worker processes end with the weights and rewards that they have one after the other."""
    def run(seed):
        model = base()
        history = grpo(model, WORLD, dataclasses.replace(SEVERAL, seed=seed))
        return weights(model), history.rollouts["reward"]

    runs = {seed: functools.partial(run, seed) for seed in (0, 1)}
    trained_base()  # once for both
    cpu = torch.device("cpu")
    apart, together = run_all(runs, cpu, workers=1), run_all(runs, cpu, workers=2)
    for seed in runs:
        assert torch.equal(apart[seed][0], together[seed][0]) and apart[seed][1] == together[seed][1]
    assert not torch.equal(apart[0][0], apart[1][0])


# ---- which tokens count


@pytest.mark.parametrize("kl", [0.0, 0.7])
def test_loss_and_gradient_equal_a_loop_over_tokens(kl):
    """In float64, over answers that end at once, early, late or never, with junk behind END: loss and the gradient of
    every weight are those of a loop that calls the model on each counted token's prefix. A mask, a shift by one
    position, the prompt's tokens or the lengths' weighting being wrong would all show."""
    model = base().double()
    batch, settings = handmade(model), dataclasses.replace(SEVERAL, kl=kl)
    assert batch.drawn.mask_BA.sum(1).tolist() == COUNTED
    loss, stats = trainer.batch_loss(model, batch, slice(None), settings, 1.0)
    expected, estimate = token_by_token(model, batch, settings)
    torch.testing.assert_close(loss, expected + kl * estimate, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stats["kl"], estimate, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(model, loss), gradient(model, expected + kl * estimate), rtol=1e-8, atol=1e-11)


def test_some_rows_are_the_batch_of_those_rows():
    """Rows picked out of a round give the loss of a round that has only them: every table is cut at the same rows."""
    model = base().double()
    batch, rows = handmade(model), torch.tensor([6, 0, 2, 5])
    drawn = Rollout(*(getattr(batch.drawn, field.name)[rows] for field in dataclasses.fields(Rollout)))
    part = trainer.Batch(drawn, batch.advantage_B[rows], batch.old_logp_BA[rows], batch.reference_logp_BA[rows],
                         batch.kept_B[rows], {}, 0.0)
    settings = dataclasses.replace(SEVERAL, kl=0.5)
    picked, alone = (trainer.batch_loss(model, source, which, settings, 1.0)[0]
                     for source, which in ((batch, rows), (part, slice(None))))
    expected, estimate = token_by_token(model, part, settings)
    assert torch.equal(picked, alone)
    torch.testing.assert_close(picked, expected + 0.5 * estimate, rtol=1e-10, atol=1e-12)


def test_each_counted_token_has_a_gradient_and_no_other(monkeypatch):
    """The scores that get a gradient are exactly the first `COUNTED` of each row: first answer token and END are in,
    what stands behind END is not, whatever its score says."""
    model = base().double()
    batch, scores = handmade(model), []
    as_it_is = trainer.answer_logprob

    def watched(*arguments, **named):
        logp_BA, entropy_BA = as_it_is(*arguments, **named)
        scores.append(logp_BA.detach().requires_grad_())
        return scores[-1], entropy_BA

    monkeypatch.setattr(trainer, "answer_logprob", watched)
    for method in METHODS:
        settings = dataclasses.replace(SEVERAL, method=method, kl=0.1, clip_low=0.99, clip_high=99.0)  # cuts nothing
        trainer.batch_loss(model, batch, slice(None), settings, 1.0)[0].backward()
        expected = torch.arange(3) < torch.tensor(COUNTED)[:, None]
        assert torch.equal(scores[-1].grad != 0, expected), method


def test_tokens_behind_end_change_nothing_and_counted_ones_do():
    """Junk behind END may be any token: loss and gradient keep their bits. Another first token, or another token in
    END's place, changes both."""
    model = base().double()

    def of(answers):
        uncut = dataclasses.replace(SEVERAL, clip_low=0.99, clip_high=99.0)
        loss, _ = trainer.batch_loss(model, handmade(model, answers), slice(None), uncut, 1.0)
        return loss.detach(), gradient(model, loss)

    loss, slope = of(ANSWERS)
    junk = [[*row[: counted], *[(token + 17) % VOCAB for token in row[counted:]]]
            for row, counted in zip(ANSWERS, COUNTED, strict=True)]
    assert junk != ANSWERS
    again, slope_again = of(junk)
    assert torch.equal(loss, again)
    torch.testing.assert_close(slope, slope_again, rtol=0, atol=1e-14)
    for row in range(len(ANSWERS)):
        first, last = copy.deepcopy(ANSWERS), copy.deepcopy(ANSWERS)
        first[row][0] = 12
        last[row][COUNTED[row] - 1] = 12
        for changed in (first, last):
            other, other_slope = of(changed)
            assert abs(other - loss) > 1e-6 and (other_slope - slope).norm() > 1e-6


def test_truncated_and_empty_answers_are_wrong_and_count(monkeypatch):
    """A cut-off answer with all the right digits gets reward 0 and counts whole; END at once gets 0 and counts one
    token; the same digits with END get 1. The round's table says so too."""
    first, second = WORLD.problems(1, seed=0)[0, 1:3].tolist()
    answers = torch.tensor([[first, second, first], [END, first, second], [first, second, END], [first, END, second]])

    def given(model, prompt_NT, **named):
        return Generation(answers, torch.tensor([3, 1, 3, 2]), torch.zeros(4, 3), torch.arange(4) > 0)

    monkeypatch.setattr(rollout, "generate", given)
    drawn = roll_out(base(), WORLD, prompts=1, samples=4, seed=0, step=0)
    assert drawn.reward_B.tolist() == [0, 0, 1, 0] and drawn.mask_BA.sum(1).tolist() == [3, 1, 3, 2]
    entropy_BA = torch.where(drawn.mask_BA, 2.0, 99.0)
    facts = {name: float(value) for name, value in trainer.facts_of(drawn, entropy_BA, 4).items()}
    assert facts == {"reward": 0.25, "truncated": 0.25, "tokens": 2.25, "mixed_groups": 1.0, "entropy": 2.0}
    facts = trainer.facts_of(drawn, entropy_BA, 2)
    assert float(facts["mixed_groups"]) == 0.5  # of the groups [0, 0] and [1, 0]


# ---- advantages


@pytest.mark.parametrize("method", METHODS)
def test_groups_of_equal_rewards_teach_exactly_nothing(method):
    """Each prompt's answers are all right or all wrong. Not one bit of one weight moves in sixteen steps, though the
    rewards differ between prompts: a mean over the batch instead of the group would move them."""
    model = base()
    history = grpo(model, Fixed(lambda digit_N: digit_N % 2 == 0), dataclasses.replace(SEVERAL, method=method))
    assert 0 < history.rollouts["reward"][0] < 1 and history.rollouts["mixed_groups"] == [0.0] * 4
    assert history.train["gradient_norm"] == [0.0] * 16 and torch.equal(weights(model), weights(base()))


@pytest.mark.parametrize("method", METHODS)
def test_dropping_equal_groups_changes_the_denominator_of_dapo_alone(method):
    """Half the groups are equal. DAPO's gradient grows by tokens / tokens of mixed groups, the others' stays (a
    sequence without advantage adds nothing to a mean over sequences). Where all groups are mixed nothing changes."""
    model = base().double()
    for pattern in ([1, 0, 0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 1, 1, 0, 1]):
        slopes = []
        for drop in (False, True):
            settings = dataclasses.replace(SEVERAL, method=method, drop_equal_groups=drop)
            batch = handmade(model)
            batch.advantage_B, batch.kept_B = trainer.advantages(torch.tensor(pattern, dtype=torch.float64), settings)
            loss, _ = trainer.batch_loss(model, batch, slice(None), settings, 1.0)
            slopes.append(gradient(model, loss))
        grown = sum(COUNTED) / sum(COUNTED[:4]) if method == "dapo" and 0 not in pattern[4:] else 1.0
        assert slopes[0].norm() > 1e-3
        torch.testing.assert_close(slopes[1], grown * slopes[0], rtol=1e-9, atol=1e-12)


def test_reward_as_advantage_is_reinforce():
    """With the reward as advantage and one update a round, ratio 1 makes the gradient of R r equal to R grad log p: the
    mean over answers of -R (1/n) sum of log p. So only right answers push, and a round without one moves nothing."""
    model, settings = base().double(), dataclasses.replace(SETTINGS, advantage="reward")
    right = [True, False, True, False, False, True, False, False]
    batch = handmade(model)
    batch.advantage_B, _ = trainer.advantages(torch.tensor(right, dtype=torch.float64), settings)
    loss, _ = trainer.batch_loss(model, batch, slice(None), settings, 1.0)
    expected = 0.0
    for b in (0, 2, 5):
        row, n = [batch.drawn.prompt_BT[b].tolist() + ANSWERS[b]], COUNTED[b]
        logp_TV = model(torch.tensor(row))[0].log_softmax(-1)
        expected = expected - sum(logp_TV[3 + t, ANSWERS[b][t]] for t in range(n)) / n / len(ANSWERS)
    torch.testing.assert_close(gradient(model, loss), gradient(model, expected), rtol=1e-9, atol=1e-12)
    model = base()
    history = grpo(model, Fixed(lambda digit_N: digit_N < 0), dataclasses.replace(SEVERAL, advantage="reward"))
    assert history.train["gradient_norm"] == [0.0] * 16 and torch.equal(weights(model), weights(base()))
    history = grpo(model, Fixed(lambda digit_N: digit_N >= 0), dataclasses.replace(SEVERAL, advantage="reward"))
    assert min(history.train["gradient_norm"]) > 0  # all right: no group is mixed, and yet they are learned


def test_advantages_are_those_of_the_group():
    """By hand for rewards 1 0 0 0 | 1 1 0 0: (R - mean) / std with G - 1, and without the division."""
    reward_B = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0])
    scaled, kept_B = trainer.advantages(reward_B, SETTINGS)
    plain, _ = trainer.advantages(reward_B, dataclasses.replace(SETTINGS, scale_by_std=False))
    assert scaled.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5, *[0.75**0.5] * 2, *[-(0.75**0.5)] * 2], abs=1e-5)
    assert plain.tolist() == [0.75, -0.25, -0.25, -0.25, 0.5, 0.5, -0.5, -0.5] and bool(kept_B.all())


# ---- ratios


def test_one_update_a_round_has_ratios_of_one():
    """Largest and smallest ratio of every round are 1 to the last bit, and nothing is clipped, though the sampler's
    scores come from another computation (with a cache) and differ in theirs."""
    history = grpo(base(), WORLD, dataclasses.replace(SETTINGS, clip_low=0.0, clip_high=0.0))
    assert history.rollouts["ratio_max"] == [1.0] * 4 == history.rollouts["ratio_min"]
    assert history.rollouts["clip_fraction"] == [0.0] * 4 and history.rollouts["log_ratio_mean"] == [0.0] * 4


def test_at_ratio_one_the_methods_differ_in_their_lengths_only():
    """One update: GRPO, GMPO, GSPO and Hölder at any p and level have one gradient. DAPO and Dr. GRPO join them where
    all answers have the full length, and do not where lengths differ."""
    model = base().double()
    arms = [("gmpo", {}), ("gspo", {}), ("holder", {"p": 3.0}), ("holder", {"p": -2.0, "level": "token"}),
            ("holder", {"p": 0.0})]

    def slope(method, answers, **named):
        settings = dataclasses.replace(SETTINGS, method=method, **named)
        loss, stats = trainer.batch_loss(model, handmade(model, answers), slice(None), settings, settings.p)
        assert stats["ratio_max"] == stats["ratio_min"] == 1
        return gradient(model, loss)

    for method, named in arms:
        torch.testing.assert_close(slope(method, ANSWERS, **named), slope("grpo", ANSWERS), rtol=1e-9, atol=1e-12)
    full = [[digit, digit + 1, END] for digit in range(8)]
    for method in ("dapo", "dr_grpo"):
        torch.testing.assert_close(slope(method, full), slope("grpo", full), rtol=1e-9, atol=1e-12)
        assert (slope(method, ANSWERS) - slope("grpo", ANSWERS)).norm() > 1e-3


def test_several_updates_a_round_leave_the_old_policy(monkeypatch):
    """The first minibatch of each round meets the policy that was scored: ratios within 1e-5 of 1. The later ones do
    not. And the row of a round holds the means over its steps."""
    calls = spy(monkeypatch)
    history = grpo(base(), WORLD, dataclasses.replace(SEVERAL, learning_rate=0.5))
    assert len(calls) == 16
    for round_ in range(4):
        first, *later = calls[4 * round_ : 4 * round_ + 4]
        assert abs(first["ratio_max"] - 1) < 1e-5 and abs(first["ratio_min"] - 1) < 1e-5
        assert all(call["ratio_max"] > 1.001 and call["ratio_min"] < 0.999 for call in later)
        mean = sum(call["ratio_max"] for call in (first, *later)) / 4
        assert history.rollouts["ratio_max"][round_] == pytest.approx(mean, rel=1e-5)


def test_minibatches_are_parts_of_one_permutation():
    """The parts of an epoch hold every row once; each epoch and each round cuts anew; one part is all rows in order."""
    cpu = torch.device("cpu")
    orders = [torch.cat([trainer.minibatch(SEVERAL, round_, 2 * epoch + part, cpu) for part in range(2)]).tolist()
              for round_ in range(2) for epoch in range(2)]
    assert all(sorted(order) == list(range(24)) for order in orders) and len(set(map(tuple, orders))) == 4
    assert trainer.minibatch(SETTINGS, 0, 0, cpu) == slice(None)


# ---- the reference


def test_a_penalty_needs_another_policy():
    """Without one, and with the learner itself, which would never be far from itself, the run is refused."""
    model, settings = base(), dataclasses.replace(SETTINGS, kl=0.1)
    for reference in (None, model):
        with pytest.raises(LabError, match="KL penalty needs"):
            grpo(model, WORLD, settings, reference=reference)


def test_the_reference_pulls_and_never_moves():
    """The reference keeps its bits and gets no gradient; a penalty holds the learner nearer to it; without a weight the
    reference changes nothing."""
    settings, kept, ends = dataclasses.replace(SEVERAL, learning_rate=0.1, rounds=6), base(), {}
    for kl, reference in ((0.0, None), (0.0, kept), (2.0, kept)):
        model = base()
        history = grpo(model, WORLD, dataclasses.replace(settings, kl=kl), reference=reference)
        ends[kl, reference is None] = weights(model)
        assert ("kl" in history.rollouts) == (kl > 0)
    assert torch.equal(weights(kept), weights(base())) and all(p.grad is None for p in kept.parameters())
    assert torch.equal(ends[0.0, True], ends[0.0, False])
    free, held = ((ends[key] - weights(kept)).norm() for key in ((0.0, True), (2.0, False)))
    assert 0 < held < 0.8 * free


# ---- sampling


@pytest.mark.parametrize("samples", [1, 3])
def test_groups_are_repeated_prompts_in_order(samples):
    """At temperature 0 the answers to N prompts, `samples` each, are those to the list with every prompt repeated:
    row i continues prompt i // samples. With dice, all three answers to a prompt need not agree."""
    prompt_NT, model = WORLD.problems(7, seed=1), strange()
    named = {"max_new_tokens": 4, "stop_tokens": (END, 13, 14)}
    ours = generate(model, prompt_NT, temperature=0, samples=samples, **named)
    repeated = generate(model, prompt_NT.repeat_interleave(samples, 0), temperature=0, **named)
    assert torch.equal(ours.tokens_BT, repeated.tokens_BT) and torch.equal(ours.length_B, repeated.length_B)
    torch.testing.assert_close(ours.logprob_BT, repeated.logprob_BT, atol=1e-5, rtol=0)
    assert len(ours.tokens_BT) == 7 * samples and len({tuple(row) for row in ours.tokens_BT.tolist()}) > 3
    assert ours.length_B.min() < ours.length_B.max()
    first, again, other = (generate(model, prompt_NT, samples=samples, generator=torch.Generator().manual_seed(seed),
                                    **named).tokens_BT for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    if samples > 1:
        group_NGA = first.view(7, samples, -1)
        assert bool((group_NGA != group_NGA[:, :1]).any())


def test_no_prefix_is_computed_twice(monkeypatch):
    """The positions that pass through the model are N * P for the prompts and N * G for each later token: a prompt
    computed G times, or a prefix computed again, would be more."""
    model, seen = base(), []
    as_it_is = model.embed
    monkeypatch.setattr(model, "embed", lambda tokens: seen.append(tokens.numel()) or as_it_is(tokens))
    N, P, G, A = 5, WORLD.prompt_length, 4, WORLD.answer_length
    roll_out(model, WORLD, prompts=N, samples=G, seed=0, step=0)
    assert sum(seen) == N * P + N * G * (A - 1) and max(seen[1:]) == N * G


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_of_a_whole_answer_equal_the_sampler_s(temperature):
    """The log-probabilities that the sampler saw token by token, with its cache of a prompt shared by a group, are
    those of one pass over prompt and answer: to 1e-5, at every counted token."""
    model = strange()
    drawn = roll_out(model, WORLD, prompts=8, samples=3, seed=0, step=0, temperature=temperature)
    logp_BA, entropy_BA = answer_logprob(model, drawn.prompt_BT, drawn.answer_BA, temperature=temperature)
    difference_BA = (logp_BA - drawn.sampled_logp_BA)[drawn.mask_BA]
    assert difference_BA.abs().max() < 1e-5 and drawn.sampled_logp_BA[drawn.mask_BA].max() < 0
    logits_BTV = model(torch.cat((drawn.prompt_BT, drawn.answer_BA), 1))[:, WORLD.prompt_length - 1 : -1]
    p_BAV = (logits_BTV / temperature).softmax(-1)
    torch.testing.assert_close(entropy_BA, torch.special.entr(p_BAV).sum(-1), atol=1e-5, rtol=0)


def test_training_draws_no_problem_of_another_side():
    """Many rounds' problems: none has the content of a test or validation problem, whatever the seed; and the trainer
    asks for no other side but to evaluate."""
    model = base()
    drawn = torch.cat([roll_out(model, WORLD, prompts=60, samples=1, seed=seed, step=step).prompt_BT
                       for seed in range(2) for step in range(3)])
    seen = set(WORLD.content(drawn).tolist())
    for split in ("validation", "test"):
        others = set(WORLD.content(WORLD.problems(200, split=split)).tolist())
        assert len(others) > 3 and not seen & others
    assert len(seen) > 50


def test_a_round_is_a_function_of_seed_and_number(monkeypatch):
    """Equal (seed, step): the same problems and answers; another seed or step: others. Groups stand together, and the
    evaluation is on validation problems, the same ones for every seed of training."""
    model = base()
    draws = {place: roll_out(model, WORLD, prompts=10, samples=3, seed=place[0], step=place[1])
             for place in ((0, 0), (0, 1), (1, 0))}
    again = roll_out(model, WORLD, prompts=10, samples=3, seed=0, step=0)
    assert all(torch.equal(getattr(again, field.name), getattr(draws[0, 0], field.name))
               for field in dataclasses.fields(Rollout))
    assert not torch.equal(draws[0, 0].prompt_BT, draws[0, 1].prompt_BT)
    assert not torch.equal(draws[0, 0].prompt_BT, draws[1, 0].prompt_BT)
    assert torch.equal(again.prompt_BT, WORLD.problems(10, seed=0, step=0).repeat_interleave(3, 0))
    answers = [roll_out(model, OneRound("parity", 2), prompts=10, samples=3, seed=seed, step=step).answer_BA.flatten()
               for seed, step in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(row.tolist()) for row in answers}) == 3  # to the same problems, by other dice
    asked, problems_as_they_are = [], DigitList.problems

    def watched(world, count, **named):
        asked.append((count, *named.values()))
        return problems_as_they_are(world, count, **named)

    monkeypatch.setattr(DigitList, "problems", watched)
    for seed in (0, 1):
        grpo(base(), WORLD, dataclasses.replace(SETTINGS, rounds=2, seed=seed, evaluation_problems=9))
    evaluation = (9, "validation", trainer.VALIDATION_SEED, 0)
    rounds = {seed: [(6, "train", seed, step) for step in (0, 1)] for seed in (0, 1)}
    assert asked == [evaluation, *rounds[0], evaluation, evaluation, *rounds[1], evaluation]


def exact_accuracy(model, prompt_NT):
    """The probability of a right answer, summed over all 25 of them, mean over prompts."""
    digit_5 = torch.arange(0, 10, 2)
    total = torch.zeros(len(prompt_NT))
    for i in digit_5:
        for j in digit_5:
            item_N2 = prompt_NT[:, 1:3] % 2 + torch.tensor([i, j])
            answer_N3 = torch.cat((item_N2, torch.full((len(prompt_NT), 1), END)), 1)
            total += answer_logprob(model, prompt_NT, answer_N3)[0].sum(1).exp()
    return float(total.mean())


@torch.no_grad()
def test_accuracy_is_the_probability_of_a_right_answer():
    """At temperature 1: within four standard errors of the exact probability, all right answers enumerated. At 0: the
    share of right greedy answers, found by argmax over whole sequences without a cache."""
    model = base()
    prompt_NT = WORLD.problems(1500, split="test")
    expected = exact_accuracy(model, prompt_NT)
    assert 0.1 < expected < 0.9
    error = (expected * (1 - expected) / 1500) ** 0.5
    assert abs(accuracy(model, WORLD, problems=1500) - expected) < 4 * error
    answers_NT = prompt_NT
    for _ in range(WORLD.answer_length):
        answers_NT = torch.cat((answers_NT, model(answers_NT)[:, -1].argmax(-1, keepdim=True)), 1)
    greedy = float(WORLD.verify(prompt_NT, answers_NT[:, WORLD.prompt_length :]).float().mean())
    assert accuracy(model, WORLD, problems=1500, temperature=0) == pytest.approx(greedy)


# ---- settings


def test_exponents_move_from_start_to_end():
    """End points and middle of each shape, by hand; beyond the end it stays; a shape nobody knows is refused."""
    middle = {"linear": 0.0, "sine": 2 - 4 * 0.5**0.5, "square": 1.0, "cube": 1.5}
    assert SHAPES.keys() == middle.keys()
    for shape, value in middle.items():
        assert [annealed(step, 10, 2.0, -2.0, shape) for step in (0, 5, 10, 12)] == pytest.approx([2, value, -2, -2])
    with pytest.raises(LabError, match="no shape 'step'"):
        annealed(0, 10, 2.0, -2.0, "step")


def test_the_exponent_is_held_while_a_round_s_answers_are_used(monkeypatch):
    """All four updates of a round have one p, that of the round's number; without p_end it never moves."""
    calls = spy(monkeypatch)
    settings = dataclasses.replace(SEVERAL, method="holder", p=2.0, p_end=-2.0, p_shape="square", level="token")
    grpo(base(), WORLD, settings)
    assert [call["p"] for call in calls] == [p for p in (2.0, 1.75, 1.0, -0.25) for _ in range(4)]
    assert {call["level"] for call in calls} == {"token"}
    assert [dataclasses.replace(settings, p_end=None).exponent(round_) for round_ in range(4)] == [2.0] * 4


@pytest.mark.parametrize("fault", [
    {"rounds": 0}, {"prompts": 0}, {"samples": 0}, {"epochs": 0}, {"minibatches": 0}, {"minibatches": 5},
    {"samples": 1}, {"advantage": "value"}, {"optimizer": "lion"}, {"schedule": "linear"}, {"precision": "fp8"},
    {"seed": -1}, {"warmup": 5}])
def test_impossible_plans_are_refused(fault):
    """Each is refused before anything is drawn, in a sentence with what to do instead."""
    with pytest.raises(LabError) as refusal:
        dataclasses.replace(SETTINGS, **fault)
    assert refusal.value.fix


def test_what_only_the_objective_knows_is_refused_in_the_first_round():
    """An unknown method or shape, an exponent beside a method that has its own, a temperature of 0 and answers longer
    than the context stop the run with a sentence, and no weight has moved."""
    short = GPT(dataclasses.replace(CONFIG, context=4))
    for fault in ({"method": "ppo"}, {"p": 2.0}, {"level": "token", "method": "gspo"}, {"temperature": 0.0},
                  {"p_end": 0.0, "p_shape": "step"}):
        model = base()
        with pytest.raises(LabError):
            grpo(model, WORLD, dataclasses.replace(SETTINGS, **fault))
        assert torch.equal(weights(model), weights(base())), fault
    with pytest.raises(LabError, match="context"):
        grpo(short, WORLD, SETTINGS)


def test_settings_of_the_loop_underneath():
    """Rounds become steps, what is asked for every few rounds becomes every few steps, and the rest is handed on."""
    settings = dataclasses.replace(SEVERAL, evaluate_every=2, checkpoint_every=3, warmup=5, betas=(0.8, 0.9), clip=0.5)
    loop_settings = settings.training()
    assert (loop_settings.steps, loop_settings.batch) == (16, 12)
    assert (loop_settings.evaluate_every, loop_settings.checkpoint_every) == (8, 12)
    for name in ("learning_rate", "seed", "optimizer", "betas", "clip", "warmup", "schedule", "weight_decay"):
        assert getattr(loop_settings, name) == getattr(settings, name), name


def test_every_side_has_the_tenths_it_says():
    """The sides that the tests above rely on: eight, one and one tenth of the hash, without overlap."""
    assert [list(side) for side in SIDES.values()] == [list(range(8)), [8], [9]]
    assert hash_of(WORLD.content(WORLD.problems(300))).max() < 8
