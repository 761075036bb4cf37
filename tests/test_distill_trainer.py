"""On-policy distillation: the student comes nearer to a teacher that stays as it is, on answers of its own."""

import copy
import dataclasses
import functools
import importlib

import pytest
import torch

from labkit.errors import LabError
from labkit.models import GPT, GPTConfig, answer_logits, answer_logprob
from labkit.objectives import distill_loss
from labkit.tasks import DigitList, answer_mask
from labkit.tasks.alphabet import END, VOCAB
from labkit.trainers import DistillSettings, Lesson, TrainSettings, distill, imitate, loop, roll_out
from labkit.trainers.rollout import Rollout

trainer = importlib.import_module("labkit.trainers.distill")
WORLD = DigitList("parity", 2, same=0.5)
CONFIG = GPTConfig(VOCAB, context=8, width=16, layers=1, heads=2)
SETTINGS = DistillSettings(12, 1e-2, prompts=16, samples=2)
SUPPORTS = [{}, {"direction": "forward"}, {"direction": "jsd"}, {"support": "topk", "k": 8},
            {"support": "topk", "k": 8, "renormalize": False, "direction": "forward"}, {"support": "sampled"}]


@functools.cache
def trained(dialect: str) -> GPT:
    """A model of one dialect: the student's digits are even or odd by chance, the teacher's are 0 and 1."""
    model = GPT(CONFIG)
    imitate(model, [Lesson(WORLD, dialect)], TrainSettings(60, 2e-2, batch=64, warmup=10))
    return model


def student() -> GPT:
    return copy.deepcopy(trained("same"))


def teacher() -> GPT:
    return copy.deepcopy(trained("canonical"))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@torch.no_grad()
def sequence_kl(model: GPT, other: GPT) -> float:
    """KL(model, other) of whole answers in nats, estimated on 600 answers of the model's own to new problems."""
    drawn = roll_out(model, WORLD, prompts=300, samples=2, seed=77, step=0, split="test")
    own, others = (answer_logprob(each, drawn.prompt_BT, drawn.answer_BA)[0] for each in (model, other))
    return float(((own - others) * drawn.mask_BA).sum(1).mean())


@pytest.mark.parametrize("change", SUPPORTS, ids=str)
def test_the_student_moves_towards_the_teacher(change):
    """After training the sequence KL on problems of another side is a fraction of what it was, for every support and
    direction; and the teacher's bits are as before, without a gradient."""
    learner, leader = student(), teacher()
    before = sequence_kl(learner, leader)
    history = distill(learner, leader, WORLD, dataclasses.replace(SETTINGS, steps=60, **change))
    after = sequence_kl(learner, leader)
    assert before > 1.0 and after < 0.4 * before
    assert torch.equal(weights(leader), weights(teacher())) and all(p.grad is None for p in leader.parameters())
    assert history.rollouts["step"] == list(range(60)) == history.train["step"]


def test_the_loss_is_the_mean_divergence_of_counted_positions():
    """The first step by hand: KL(student, teacher) over the vocabulary at each token up to END, one prefix at a time,
    divided by their number. Positions behind END, of which there are some, do not count."""
    learner, leader = student(), teacher()
    drawn = roll_out(learner, WORLD, prompts=16, samples=2, seed=0, step=0)
    drawn_early = roll_out(strange_student(), WORLD, prompts=16, samples=2, seed=0, step=0)
    for model, answers in ((learner, drawn), (strange_student(), drawn_early)):
        total, tokens = 0.0, 0
        for prompt, answer in zip(answers.prompt_BT.tolist(), answers.answer_BA.tolist(), strict=True):
            for t in range(answer.index(END) + 1 if END in answer else len(answer)):
                log_q, log_p = (each(torch.tensor([prompt + answer[:t]]))[0, -1].log_softmax(-1).detach()
                                for each in (model, leader))
                total, tokens = total + float((log_q.exp() * (log_q - log_p)).sum()), tokens + 1
        history = distill(model, leader, WORLD, dataclasses.replace(SETTINGS, steps=1))
        assert history.train["loss"] == pytest.approx([total / tokens], rel=1e-4)
        assert history.rollouts["tokens"] == [tokens]
        assert history.rollouts["reward"] == [pytest.approx(float(answers.reward_B.mean()))]
    assert tokens < 32 * 3  # the second model's answers ended early


def strange_student() -> GPT:
    """Draws END at every place with a good chance, so that answers have all lengths."""
    model = GPT(CONFIG, seed=4)
    with torch.no_grad():
        model.embedding.weight.mul_(20)
        model.norm.weight.mul_(0.1)
        model.embedding.weight[END] *= 3
    return model


@pytest.mark.parametrize("change", SUPPORTS, ids=str)
def test_tokens_behind_end_do_not_count(monkeypatch, change):
    """Answers with junk behind END give the loss, bit for bit, and the update of answers filled with END; a token that
    does count changes them."""
    answer_BA = torch.tensor([[1, END, 3], [END, 4, 5], [2, 6, END], [7, 8, 9]] * 8)
    junk_BA = answer_BA.masked_fill(~answer_mask(answer_BA), 33)
    other_BA = answer_BA.clone()
    other_BA[::4, 0] = 5
    ends, one_step = [], dataclasses.replace(SETTINGS, steps=1, learning_rate=1.0, optimizer="sgd")
    for given_BA in (answer_BA, junk_BA, other_BA):
        def given(model, world, *, given_BA=given_BA, **named):
            prompt_BT = world.problems(16).repeat_interleave(2, 0)
            return Rollout(prompt_BT, given_BA, answer_mask(given_BA), torch.zeros(32, 3), torch.zeros(32))

        monkeypatch.setattr(trainer, "roll_out", given)
        learner = student()
        history = distill(learner, teacher(), WORLD, dataclasses.replace(one_step, **change))
        ends.append((history.train["loss"][0], weights(learner)))
        assert history.rollouts["tokens"] == [8 * (2 + 1 + 3 + 3)]
    assert ends[0][0] == ends[1][0]
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=0, atol=1e-6)
    assert abs(ends[0][0] - ends[2][0]) > 1e-5 and (ends[0][1] - ends[2][1]).abs().max() > 1e-4


def test_sampled_support_has_the_gradient_of_the_full_one():
    """On many answers the gradient from sampled tokens points where the exact one of the same states points: the
    tokens that it looks at are those that the student drew, at the positions where it drew them."""
    learner, leader = student(), teacher()
    drawn = roll_out(learner, WORLD, prompts=2000, samples=1, seed=1, step=0)
    slopes = []
    for named in ({}, {"support": "sampled", "token_N": drawn.answer_BA.flatten()}):
        with torch.no_grad():
            teacher_BAV = answer_logits(leader, drawn.prompt_BT, drawn.answer_BA)
        student_BAV = answer_logits(learner, drawn.prompt_BT, drawn.answer_BA)
        loss_N = distill_loss(student_BAV.flatten(0, 1), teacher_BAV.flatten(0, 1), mask_N=drawn.mask_BA.flatten(),
                              **named)
        slopes.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss_N.sum(), list(learner.parameters()))]))
    assert torch.cosine_similarity(*slopes, dim=0) > 0.9


@pytest.mark.parametrize("change", SUPPORTS, ids=str)
def test_settings_reach_the_objective(monkeypatch, change):
    """Support, k, direction and renormalisation arrive as they were set, and the ids of drawn tokens where, and only
    where, tokens are the support."""
    seen, as_it_is = [], trainer.distill_loss
    monkeypatch.setattr(trainer, "distill_loss", lambda *rows, **named: seen.append(named) or as_it_is(*rows, **named))
    settings = dataclasses.replace(SETTINGS, steps=1, **change)
    distill(student(), teacher(), WORLD, settings)
    assert all(seen[0][name] == getattr(settings, name) for name in ("support", "k", "direction", "renormalize"))
    assert ("token_N" in seen[0]) == (settings.support == "sampled")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stop", [4, 6])
def test_resumed_equals_unbroken_bitwise(tmp_path, monkeypatch, optimizer, stop):
    """Broken off at a checkpoint and between two of them, then continued: the student's weights and both tables have
    the same bits, so every answer was drawn again as it would have been."""
    settings = dataclasses.replace(SETTINGS, optimizer=optimizer, checkpoint_every=4)
    path, unbroken, resumed, step_as_it_is = tmp_path / "run.safetensors", student(), student(), loop.train_step
    whole = distill(unbroken, teacher(), WORLD, settings)

    def break_off(model, optimizer, loss_at, step, settings):
        if step == stop:
            raise KeyboardInterrupt
        return step_as_it_is(model, optimizer, loss_at, step, settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train_step", break_off)
        distill(student(), teacher(), WORLD, settings, checkpoint=path)
    history = distill(resumed, teacher(), WORLD, settings, checkpoint=path)
    assert torch.equal(weights(resumed), weights(unbroken)) and not torch.equal(weights(resumed), weights(student()))
    assert history.train == whole.train and history.rollouts == whole.rollouts


def test_a_checkpoint_belongs_to_one_run(tmp_path):
    """Another student, teacher, world or setting is refused."""
    path, settings = tmp_path / "run.safetensors", dataclasses.replace(SETTINGS, checkpoint_every=12)
    distill(student(), teacher(), WORLD, settings, checkpoint=path)
    others = [(GPT(CONFIG), teacher(), WORLD, settings), (student(), student(), WORLD, settings),
              (student(), teacher(), DigitList("parity", 2), settings),
              (student(), teacher(), WORLD, dataclasses.replace(settings, direction="forward"))]
    for learner, leader, world, other in others:
        with pytest.raises(LabError, match="another run"):
            distill(learner, leader, world, other, checkpoint=path)
    distill(student(), teacher(), WORLD, settings, checkpoint=path)


def test_answers_are_the_student_s_own_on_the_training_side(monkeypatch):
    """Each step draws from the student as it is then, with (seed, step), and never from another side."""
    asked, as_it_is = [], trainer.roll_out
    learner, leader = student(), teacher()

    def watched(model, world, **named):
        assert model is learner
        asked.append(named)
        return as_it_is(model, world, **named)

    monkeypatch.setattr(trainer, "roll_out", watched)
    distill(learner, leader, WORLD, dataclasses.replace(SETTINGS, steps=3, seed=5, temperature=0.7))
    assert asked == [{"prompts": 16, "samples": 2, "seed": 5, "step": step, "temperature": 0.7} for step in range(3)]


def test_bf16_products_get_the_gradient_of_every_weight():
    """Drawing comes first under autocast and without gradient; the weights that it cast must not be taken for those
    that learn. One SGD step in bf16 is that of fp32 but for rounding, matrix by matrix (the answers are those of the
    same dice, and a few may differ)."""
    moved = {}
    for precision in ("fp32", "bf16"):
        learner = student()
        distill(learner, teacher(), WORLD, dataclasses.replace(SETTINGS, steps=1, prompts=200, optimizer="sgd",
                                                               precision=precision))
        moved[precision] = [(new - old).detach() for new, old in
                            zip(learner.parameters(), student().parameters(), strict=True)]
    for exact, rounded in zip(moved["fp32"], moved["bf16"], strict=True):
        assert exact.norm() > 0 and (rounded - exact).norm() < 0.3 * exact.norm()


def test_what_cannot_work_is_refused():
    """Sizes that are no plan, sampled tokens that are no sample of the student, unknown names, a teacher with another
    vocabulary and answers beyond the context: a sentence each, and no weight has moved."""
    for fault in ({"prompts": 0}, {"samples": 0}, {"prompts": -2, "samples": -3}, {"steps": 0}, {"optimizer": "lion"},
                  {"support": "sampled", "temperature": 0.7}):
        with pytest.raises(LabError) as refusal:
            dataclasses.replace(SETTINGS, **fault)
        assert refusal.value.fix
    wider = GPT(dataclasses.replace(CONFIG, vocab_size=VOCAB + 1))
    faults = [({"support": "half"}, teacher()), ({"support": "topk"}, teacher()), ({"direction": "up"}, teacher()),
              ({"support": "sampled", "direction": "jsd"}, teacher()), ({}, wider)]
    for fault, leader in faults:
        learner = student()
        with pytest.raises(LabError):
            distill(learner, leader, WORLD, dataclasses.replace(SETTINGS, **fault))
        assert torch.equal(weights(learner), weights(student()))
    with pytest.raises(LabError, match="context"):
        distill(GPT(dataclasses.replace(CONFIG, context=4)), teacher(), WORLD, SETTINGS)
