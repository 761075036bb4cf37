"""On-policy distillation: the student comes nearer to a teacher that stays as it is, on answers of its own."""

import copy
import dataclasses
import functools
import importlib
import itertools
from types import SimpleNamespace

import pytest
import torch

from labkit.errors import LabError
from labkit.models import GPT, GPTConfig, answer_logits, answer_logprob
from labkit.objectives import TeacherList, distill_loss, top_list
from labkit.tasks import DigitList, answer_mask
from labkit.tasks.alphabet import END, VOCAB
from labkit.trainers import DistillSettings, Lesson, TrainSettings, distill, imitate, loop, roll_out, written
from labkit.trainers.rollout import Rollout

trainer = importlib.import_module("labkit.trainers.distill")
losses = importlib.import_module("labkit.trainers.distill_losses")
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


@pytest.mark.parametrize("change", [*SUPPORTS, {"support": "topk", "k": 3, "menu": "union", "mode": "tail"},
                                    {"support": "sampled", "baseline": True}, {"direction": "jsd", "beta": 0.9}],
                         ids=str)
def test_settings_reach_the_objective(monkeypatch, change):
    """Every setting of the loss arrives as it was set, and the ids of drawn tokens where, and only where, tokens are
    the support."""
    seen, as_it_is = [], losses.distill_loss
    monkeypatch.setattr(losses, "distill_loss", lambda *rows, **named: seen.append(named) or as_it_is(*rows, **named))
    settings = dataclasses.replace(SETTINGS, steps=1, **change)
    distill(student(), teacher(), WORLD, settings)
    names = ("support", "k", "menu", "mode", "baseline", "direction", "beta", "renormalize")
    assert all(seen[0][name] == getattr(settings, name) for name in names)
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
    distill(learner, leader, WORLD, dataclasses.replace(SETTINGS, steps=3, seed=5, temperature=0.7, top_p=0.9,
                                                        stop_also=(3,)))
    assert asked == [{"prompts": 16, "samples": 2, "seed": 5, "step": step, "temperature": 0.7, "top_p": 0.9,
                      "stop_also": (3,)} for step in range(3)]


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
                  {"support": "sampled", "temperature": 0.7}, {"support": "sampled", "on_policy": 0.5},
                  {"gamma": 0.5, "on_policy": 0.5}, {"weighting": "word"}, {"on_policy": 1.2}, {"gold": -1.0},
                  {"kl_start": -0.1}):
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


# ---- which answers and positions count, and how they are averaged

ANSWER_BA = torch.tensor([[1, 5, END], [END, 4, 5], [2, 6, END], [7, 8, 9]] * 8)  # the last of each four has no end
COUNTS_BA = answer_mask(ANSWER_BA)


def given_answers(monkeypatch, answer_BA=ANSWER_BA):
    """Let the trainer meet these answers instead of the student's; returns their losses [B, A] at the first step."""
    def given(model, world, **named):
        return Rollout(world.problems(16).repeat_interleave(2, 0), answer_BA, answer_mask(answer_BA),
                       torch.zeros(answer_BA.shape), torch.zeros(len(answer_BA)))

    monkeypatch.setattr(trainer, "roll_out", given)
    prompt_BT = WORLD.problems(16).repeat_interleave(2, 0)
    with torch.no_grad():
        log_q, log_p = (answer_logits(model, prompt_BT, answer_BA).log_softmax(2) for model in (student(), teacher()))
    return (log_q.exp() * (log_q - log_p)).sum(2)


def first_loss(**change):
    return distill(student(), teacher(), WORLD, dataclasses.replace(SETTINGS, steps=1, **change)).train["loss"][0]


def test_weightings_differ_as_they_say(monkeypatch):
    """Per token: the sum over all counted tokens by their number. Per sequence: the mean of the answers' means."""
    loss_BA = given_answers(monkeypatch) * COUNTS_BA
    assert first_loss() == pytest.approx(float(loss_BA.sum() / COUNTS_BA.sum()), rel=1e-5)
    by_answer = float((loss_BA.sum(1) / COUNTS_BA.sum(1)).mean())
    assert first_loss(weighting="sequence") == pytest.approx(by_answer, rel=1e-5)
    assert abs(by_answer - float(loss_BA.sum() / COUNTS_BA.sum())) > 1e-3


def test_dropped_answers_and_ignored_tokens_leave_sum_and_count(monkeypatch):
    """drop_truncated leaves out the answers without END; ignore the positions that hold a token, END among them; with
    nothing left the loss is 0, not NaN."""
    loss_BA = given_answers(monkeypatch)
    ended_BA = COUNTS_BA & (ANSWER_BA == END).any(1)[:, None]
    assert first_loss(drop_truncated=True) == pytest.approx(float(loss_BA[ended_BA].mean()), rel=1e-5)
    for ignore in ((5,), (END, 7)):
        kept_BA = COUNTS_BA & ~torch.isin(ANSWER_BA, torch.tensor(ignore))
        assert first_loss(ignore=ignore) == pytest.approx(float(loss_BA[kept_BA].mean()), rel=1e-5)
    assert first_loss(ignore=tuple(range(12))) == 0
    given_answers(monkeypatch, torch.full((32, 3), 7))
    assert first_loss(drop_truncated=True) == 0


def test_the_books_say_how_answers_end(monkeypatch):
    """Length and truncation of all answers, kl and tokens of those that count; another stop token ends an answer."""
    loss_BA = given_answers(monkeypatch)
    row = {name: column[0] for name, column in distill(student(), teacher(), WORLD, dataclasses.replace(
        SETTINGS, steps=1, drop_truncated=True)).rollouts.items()}
    ended_BA = COUNTS_BA & (ANSWER_BA == END).any(1)[:, None]
    assert (row["truncated"], row["length"], row["tokens"]) == (0.25, 2.5, 7 * 8)
    assert row["kl"] == pytest.approx(float(loss_BA[ended_BA].mean()), rel=1e-5)
    also = distill(student(), teacher(), WORLD, dataclasses.replace(SETTINGS, steps=1, stop_also=(9,)))
    assert also.rollouts["truncated"] == [0.0]


def test_another_stop_token_ends_the_students_answers():
    """What is drawn behind it is filled up and does not count; the verifier reads it as END, so a bare digit before it
    can be right, and as itself it would not be."""
    model = strange_student()
    drawn = roll_out(model, WORLD, prompts=200, samples=1, seed=0, step=0, stop_also=(3, 4))
    plain = roll_out(model, WORLD, prompts=200, samples=1, seed=0, step=0)
    others = torch.isin(drawn.answer_BA, torch.tensor([3, 4]))
    stops_BA = (others | (drawn.answer_BA == END)) & drawn.mask_BA
    assert (stops_BA.sum(1) <= 1).all() and (drawn.answer_BA[~drawn.mask_BA] == END).all()
    read_BA = drawn.answer_BA.masked_fill(others, END)
    as_read_B, as_it_stands_B = (WORLD.verify(drawn.prompt_BT, each).float() for each in (read_BA, drawn.answer_BA))
    assert (others & drawn.mask_BA).any() and torch.equal(drawn.reward_B, as_read_B)
    assert not torch.equal(drawn.reward_B, as_it_stands_B)
    assert torch.equal(plain.mask_BA, answer_mask(plain.answer_BA))


def test_weigh_sees_the_losses_and_multiplies_them(monkeypatch):
    """Weights of positions multiply their losses; the mean still divides by the number of counted positions."""
    loss_BA, seen = given_answers(monkeypatch), []

    def first_token(drawn, cost_BA):
        seen.append(cost_BA)
        return (torch.arange(3) == 0).float() * 2.0

    history = distill(student(), teacher(), WORLD, dataclasses.replace(SETTINGS, steps=1), weigh=first_token)
    torch.testing.assert_close(seen[0], loss_BA * COUNTS_BA, atol=1e-6, rtol=1e-5)
    assert history.train["loss"][0] == pytest.approx(float(2 * loss_BA[:, 0].sum() / COUNTS_BA.sum()), rel=1e-5)


def test_a_share_of_steps_learns_from_written_solutions(monkeypatch):
    """With on_policy 0.4, two steps in five draw from the student; the others bring the world's own solutions."""
    asked, as_it_is = [], trainer.roll_out
    monkeypatch.setattr(trainer, "roll_out", lambda *a, **named: asked.append(named["step"]) or as_it_is(*a, **named))
    settings = dataclasses.replace(SETTINGS, steps=10, on_policy=0.4)
    history = distill(student(), teacher(), WORLD, settings)
    assert len(asked) == 4 and max(b - a for a, b in itertools.pairwise(asked)) <= 3
    assert all(history.rollouts["reward"][step] == 1 for step in range(10) if step not in asked)
    asked.clear()
    distill(student(), teacher(), WORLD, dataclasses.replace(settings, on_policy=0.0))
    assert asked == []


# ---- the stabilisers


def test_gold_adds_the_cross_entropy_of_written_solutions():
    """L + gold * cross-entropy per token of one solution a prompt, in the dialect named, of the step's own problems."""
    prompt_NT = WORLD.problems(16, seed=0, step=0)
    for dialect in (None, "same"):
        gold = written(WORLD, prompts=16, seed=0, step=0, dialect=dialect)
        assert torch.equal(gold.prompt_BT, prompt_NT)
        logp_BA = answer_logprob(student(), gold.prompt_BT, gold.answer_BA)[0]
        expected = first_loss() - 0.7 * float(logp_BA[gold.mask_BA].mean().detach())
        assert first_loss(gold=0.7, gold_dialect=dialect) == pytest.approx(expected, rel=1e-5)
    assert written(WORLD, prompts=16, seed=0, step=0).reward_B.mean() == 1
    assert written(WORLD, prompts=64, seed=0, step=0, dialect="same").reward_B.mean() < 1


def test_the_leash_pulls_back_to_the_start():
    """kl_start adds nothing at the first step, where student and start are one; then beta * KL(student, start). With
    much of it the student stays where it was, although the teacher pulls as before."""
    assert first_loss(kl_start=5.0) == pytest.approx(first_loss(), rel=1e-6)
    free, held = student(), student()
    settings = dataclasses.replace(SETTINGS, steps=20)
    distill(free, teacher(), WORLD, settings)
    distill(held, teacher(), WORLD, dataclasses.replace(settings, kl_start=20.0))
    assert sequence_kl(held, student()) < 0.2 * sequence_kl(free, student())


def test_the_leash_of_a_resumed_run_is_tied_to_the_first_start(tmp_path):
    """Resumed with the student that began, the run ends as the unbroken one."""
    settings = dataclasses.replace(SETTINGS, steps=8, kl_start=1.0, checkpoint_every=4)
    unbroken, resumed, path = student(), student(), tmp_path / "run.safetensors"
    distill(unbroken, teacher(), WORLD, settings)
    with pytest.raises(KeyboardInterrupt):
        distill(student(), teacher(), WORLD, settings, checkpoint=path, after_step=stop_at(6))
    distill(resumed, teacher(), WORLD, settings, checkpoint=path)
    assert torch.equal(weights(resumed), weights(unbroken))


def stop_at(last):
    def after_step(model, done):
        if done == last:
            raise KeyboardInterrupt
    return after_step


# ---- teachers


def test_a_teacher_that_only_lists_its_likeliest_tokens():
    """A function that returns a TeacherList, as an API would, trains as the model behind it does with that menu."""
    ends = []
    for leader in (teacher(), lambda prompt_BT, answer_BA: top_list(
            answer_logits(teacher(), prompt_BT, answer_BA).flatten(0, 1).detach(), 8)):
        learner = student()
        distill(learner, leader, WORLD, dataclasses.replace(SETTINGS, support="topk", k=8))
        ends.append(weights(learner))
    assert torch.equal(*ends)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_sparse_head_is_the_dense_one(monkeypatch, direction):
    """The path for a GPU, taken here on the CPU: the same losses and updates without the other logits."""
    ends = []
    for sparse in (False, True):
        monkeypatch.setattr(losses, "sparse_head_will_do", lambda *_, sparse=sparse: sparse)
        learner = student()
        history = distill(learner, teacher(), WORLD, dataclasses.replace(SETTINGS, steps=3, support="topk", k=6,
                                                                         direction=direction))
        ends.append((history.train["loss"], weights(learner)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    torch.testing.assert_close(ends[0][1], ends[1][1], atol=3e-4, rtol=0)


def test_when_the_sparse_head_will_do():
    """Only for a list on a GPU, renormalised, where nothing else needs the logits."""
    listed = TeacherList(torch.zeros(2, 3, dtype=torch.long, device="meta"), torch.zeros(2, 3, device="meta"))
    settings = dataclasses.replace(SETTINGS, support="topk", k=3)
    assert not losses.sparse_head_will_do(listed, settings)
    on_gpu = SimpleNamespace(is_cuda=True)
    listed = TeacherList(on_gpu, on_gpu)
    assert losses.sparse_head_will_do(listed, settings)
    for change in ({"mode": "tail"}, {"renormalize": False}, {"direction": "jsd"}, {"gamma": 0.5}, {"kl_start": 1.0}):
        assert not losses.sparse_head_will_do(listed, dataclasses.replace(settings, **change))


def test_a_teacher_with_other_ids_is_translated():
    """A teacher whose END is another token, with the id map, is the teacher without that difference, bit for bit: what
    it reads and what it says are translated. Without the map it is another teacher."""
    strange = teacher()
    with torch.no_grad():
        strange.embedding.weight[[END, 40]] = strange.embedding.weight[[40, END]]
    assert CONFIG.tied
    ends = []
    for leader, id_map in ((teacher(), ()), (strange, ((END, 40),)), (strange, ())):
        learner = student()
        distill(learner, leader, WORLD, dataclasses.replace(SETTINGS, steps=3, id_map=id_map))
        ends.append(weights(learner))
    torch.testing.assert_close(ends[0], ends[1], atol=1e-6, rtol=0)
    assert (ends[0] - ends[2]).abs().max() > 1e-3


# ---- the price of the future


@pytest.mark.parametrize("support", [{}, {"support": "sampled"}, {"support": "sampled", "baseline": True}], ids=str)
def test_with_gamma_one_the_gradient_is_that_of_the_sequence(support):
    """All 5^3 answers of a tiny model, weighted by their probabilities: the mean gradient with gamma 1 is the gradient
    of KL(student's answers, teacher's answers); with gamma 0 it is another one. In float64, by enumeration."""
    config = GPTConfig(5, context=8, width=8, layers=1, heads=2)
    learner, leader = GPT(config, seed=1).double(), GPT(config, seed=2).double()
    with torch.no_grad():
        for model in (learner, leader):
            model.embedding.weight.mul_(3)
    answer_BA = torch.cartesian_prod(*[torch.arange(5)] * 3)
    prompt_BT = torch.ones(len(answer_BA), 2, dtype=torch.long)
    mask_BA = torch.ones_like(answer_BA, dtype=torch.bool)
    drawn = Rollout(prompt_BT, answer_BA, mask_BA, torch.zeros(answer_BA.shape), torch.zeros(len(answer_BA)))
    parameters = list(learner.parameters())

    def log_probability(model):
        return answer_logits(model, prompt_BT, answer_BA).log_softmax(2).gather(2, answer_BA[..., None])[..., 0].sum(1)

    log_q_B, log_p_B = log_probability(learner), log_probability(leader).detach()
    exact = torch.autograd.grad((log_q_B.exp() * (log_q_B - log_p_B)).sum(), parameters)
    slopes = {}
    for gamma in (0.0, 1.0):
        settings = dataclasses.replace(SETTINGS, gamma=gamma, **support)
        loss_BA, _ = losses.position_losses(learner, drawn, answer_logits(leader, prompt_BT, answer_BA).detach(),
                                            mask_BA, settings)
        slopes[gamma] = torch.autograd.grad((log_q_B.exp().detach()[:, None] * loss_BA).sum(), parameters)
    for at_one, true in zip(slopes[1.0], exact, strict=True):
        torch.testing.assert_close(at_one, true, atol=1e-9, rtol=1e-7)
    assert max((zero - true).abs().max() for zero, true in zip(slopes[0.0], exact, strict=True)) > 1e-3
