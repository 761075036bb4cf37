"""Lessons from worlds, the loop that learns them, what is kept of a run, and the shipped bases of the small worlds."""

import copy
import dataclasses
import importlib
import itertools
import shutil

import pytest
import torch

from labkit.errors import LabError
from labkit.files import sha256
from labkit.models import GPT, GPTConfig
from labkit.tasks import Countdown, DigitList, ListRepair, RunningSum, StrategyAddition, WrittenAddition, answer_mask
from labkit.tasks.alphabet import END, VOCAB, decode
from labkit.tasks.running_sum import ANSWER
from labkit.tasks.world import hash_of
from labkit.trainers import Keep, Lesson, TrainSettings, accuracy, imitate, load_world_base, loop, roll_out
from labkit.trainers.imitate import lesson_batch, rows_of
from labkit.trainers.world_bases import FOLDER, WORLD_BASES, world_recipe

trainer = importlib.import_module("labkit.trainers.imitate")  # the name in the package is the function
COPY, SORT = DigitList("copy", 1), DigitList("sort", 3)
CONFIG = GPTConfig(VOCAB, context=12, width=16, layers=1, heads=2)
SETTINGS = TrainSettings(12, 1e-2, batch=8, warmup=3, checkpoint_every=5)
LESSONS = (Lesson(COPY, "canonical", 1.0), Lesson(SORT, "canonical", 2.0), Lesson(StrategyAddition(2), "copy", 0.5))
WORLDS = (StrategyAddition(2, filler=3, noise=0.2), WrittenAddition(3), RunningSum(4, slip=0.2), Countdown(3),
          ListRepair(6), DigitList("parity"), DigitList("split"), SORT)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- batches


@pytest.mark.parametrize("shares, batch, rows", [
    ([0.2, 0.5, 0.3], 256, [51, 128, 77]), ([1, 1, 1], 8, [3, 3, 2]), ([160, 96], 256, [160, 96]), ([5], 7, [7]),
    ([0.05, 0.95], 10, [1, 9]), ([1, 1, 98], 10, [0, 0, 10]), ([0.1] * 10, 10, [1] * 10), ([3, 3, 3], 1, [1, 0, 0])])
def test_rows_by_largest_remainder(shares, batch, rows):
    """By hand: whole parts first, what is left to the largest remainders, the first of equals first."""
    assert rows_of([Lesson(COPY, "canonical", share) for share in shares], batch) == rows


def test_rows_always_fill_the_batch():
    """For many shares and sizes: the rows sum to the batch and no lesson is a whole row off its exact part."""
    for shares in itertools.product([0.1, 1 / 3, 0.7, 2.0], repeat=3):
        for batch in (1, 2, 5, 16, 33):
            rows = rows_of([Lesson(COPY, "canonical", share) for share in shares], batch)
            exact = [batch * share / sum(shares) for share in shares]
            assert sum(rows) == batch and all(abs(a - b) < 1 for a, b in zip(rows, exact, strict=True))


def test_the_mask_lies_on_answers_with_their_end():
    """Worlds of three lengths in one batch, read back as text: prompt, answer, "$", and nothing but "$" behind it. The
    mask marks the answer's symbols and its first "$", in every row; and each answer is the one of its own prompt."""
    tokens_BT, mask_BT = lesson_batch(LESSONS, 21, seed=0, step=0)
    world_of = [COPY] * 6 + [SORT] * 12 + [LESSONS[2].world] * 3
    assert tokens_BT.shape == mask_BT.shape == (21, 11)
    for world, row, mask in zip(world_of, tokens_BT, mask_BT, strict=True):
        P, text = world.prompt_length, decode(row)
        answer, filling = text[P:].split("$", 1)
        assert text[P - 1] in ">=" and "$" not in text[:P] and set(filling) <= {"$"}
        assert mask.tolist() == [P <= t <= P + len(answer) for t in range(11)]
        if world is LESSONS[2].world:  # taught the dialect that copies the first number, which is wrong
            assert answer == f"c{text[1]}{text[0]}0"
        else:
            assert bool(world.verify(row[None, :P], row[None, P:]))


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_every_world_and_dialect_fits_a_lesson(world):
    """Each dialect's batch: training-side problems, the mask of its answers, and no harm where a small share gives it
    no row at all."""
    for dialect in world.dialects:
        tokens_BT, mask_BT = lesson_batch([Lesson(world, dialect)], 40, seed=1, step=2)
        P = world.prompt_length
        answer_NA = tokens_BT[:, P:]
        assert answer_NA.shape[1] <= world.answer_length and bool((answer_NA == END).any(1).all())
        assert torch.equal(tokens_BT[:, :P], world.problems(40, seed=1, step=2)) and not mask_BT[:, :P].any()
        assert torch.equal(mask_BT[:, P:], answer_mask(answer_NA))
        none = [Lesson(COPY, "canonical", 1.0), Lesson(world, dialect, 1e-6)]
        tokens_BT, _ = lesson_batch(none, 6, seed=1, step=2)
        assert torch.equal(tokens_BT[:, : COPY.prompt_length], COPY.problems(6, seed=1, step=2))


def test_batches_are_a_function_of_seed_and_step():
    """The same bits for the same (seed, step), also with noise in the solutions; others for another one. All problems
    are of the training side."""
    noisy = [Lesson(StrategyAddition(2, noise=0.5), "sum"), Lesson(DigitList("parity"), "same")]
    first, again, step, seed = (lesson_batch(noisy, 30, seed=s, step=t)[0] for s, t in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert torch.equal(first, again) and not torch.equal(first, step) and not torch.equal(first, seed)
    torch.manual_seed(5)
    assert torch.equal(first, lesson_batch(noisy, 30, seed=0, step=0)[0])  # no global state takes part
    world = noisy[0].world
    for t in range(20):
        prompt_NT = lesson_batch(noisy[:1], 30, seed=0, step=t)[0][:, : world.prompt_length]
        assert hash_of(world.content(prompt_NT)).max() < 8


# ---- learning


def test_learns_a_world_and_nothing_of_the_prompts():
    """Copying a digit is learned to the last answer, greedy and sampled, on digits of every side. The prompts' tokens,
    which no loss has asked for, are no likelier than chance makes them: the loss stood on answers only."""
    model = GPT(CONFIG)
    history = imitate(model, [Lesson(COPY, "canonical")], dataclasses.replace(SETTINGS, steps=120, batch=32))
    assert history.train["loss"][0] == pytest.approx(3.87, abs=0.1) and history.train["loss"][-1] < 0.02  # ln 48 = 3.87
    for temperature in (0.0, 1.0):
        assert accuracy(model, COPY, problems=100, split="train", temperature=temperature) > 0.98
    prompt_NT = COPY.problems(50)
    logp_NTV = model(prompt_NT).log_softmax(-1)
    assert logp_NTV[:, 1].gather(1, prompt_NT[:, 2:]).mean() < -2  # the ">" that follows every digit


def test_the_loss_is_the_mean_over_answer_tokens():
    """The first step's loss, by hand: one call of the untrained model for each prefix of each answer."""
    model, small = GPT(CONFIG), dataclasses.replace(SETTINGS, steps=1, batch=5, warmup=0)
    lessons, surprise = LESSONS[:2], []
    tokens_BT, _ = lesson_batch(lessons, 5, seed=0, step=0)
    for row, world in zip(tokens_BT.tolist(), [COPY, COPY, SORT, SORT, SORT], strict=True):
        answer = row[world.prompt_length :]
        for t, token in enumerate(answer[: answer.index(END) + 1]):
            prefix = torch.tensor([row[: world.prompt_length + t]])
            surprise.append(-float(model(prefix)[0, -1].detach().log_softmax(-1)[token]))
    assert len(surprise) == 2 * 2 + 3 * 4
    loss = imitate(model, lessons, small).train["loss"]
    assert loss == pytest.approx([sum(surprise) / len(surprise)], abs=1e-5)


def test_each_step_reads_its_own_batch(monkeypatch):
    """Step n learns from the batch of (seed, n), nothing is read twice: a fixed batch would be learned by heart."""
    asked = []
    monkeypatch.setattr(trainer, "lesson_batch", lambda lessons, batch, **at: asked.append((batch, at))
                        or lesson_batch(lessons, batch, **at))
    imitate(GPT(CONFIG), LESSONS, dataclasses.replace(SETTINGS, seed=4))
    assert asked == [(8, {"seed": 4, "step": step}) for step in range(12)]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stop", [5, 8])
def test_resumed_equals_unbroken_bitwise(tmp_path, monkeypatch, optimizer, stop):
    """Broken off at a checkpoint and between two of them, then continued: weights and history have the same bits."""
    settings, path = dataclasses.replace(SETTINGS, optimizer=optimizer), tmp_path / "run.safetensors"
    unbroken, resumed, step_as_it_is = GPT(CONFIG), GPT(CONFIG), loop.train_step
    whole = imitate(unbroken, LESSONS, settings)

    def break_off(model, optimizer, loss_at, step, settings):
        if step == stop:
            raise KeyboardInterrupt
        return step_as_it_is(model, optimizer, loss_at, step, settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train_step", break_off)
        imitate(GPT(CONFIG), LESSONS, settings, checkpoint=path)
    history = imitate(resumed, LESSONS, settings, checkpoint=path)
    assert torch.equal(weights(resumed), weights(unbroken)) and history.train == whole.train


def test_a_checkpoint_belongs_to_one_run(tmp_path):
    """Other lessons, another share, dialect or size of a world, and another base to begin with, are refused."""
    path, parity = tmp_path / "run.safetensors", DigitList("parity", 2)
    lessons = [Lesson(parity, "same", 1.0), Lesson(COPY, "canonical", 1.0)]
    imitate(GPT(CONFIG), lessons, SETTINGS, checkpoint=path)
    firsts = [Lesson(parity, "same", 2.0), Lesson(parity, "uniform"), Lesson(DigitList("parity", 2, same=0.1), "same")]
    others = [lessons[:1], lessons[::-1], *([first, lessons[1]] for first in firsts)]
    for other in others:
        with pytest.raises(LabError, match="another run"):
            imitate(GPT(CONFIG), other, SETTINGS, checkpoint=path)
    with pytest.raises(LabError, match="another run"):
        imitate(GPT(CONFIG, seed=1), lessons, SETTINGS, checkpoint=path)
    imitate(GPT(CONFIG), lessons, SETTINGS, checkpoint=path)


def test_what_teaches_nothing_is_refused():
    """No lesson, an unknown dialect, a share that is not above 0, answers beyond the context: one sentence each."""
    with pytest.raises(LabError, match="nothing to learn"):
        imitate(GPT(CONFIG), [], SETTINGS)
    with pytest.raises(LabError, match="no dialect"):
        Lesson(COPY, "latin")
    for share in (0.0, -1.0, float("nan")):
        with pytest.raises(LabError, match="teaches nothing"):
            Lesson(COPY, "canonical", share)
    with pytest.raises(LabError, match="context of 4"):
        imitate(GPT(dataclasses.replace(CONFIG, context=4)), [Lesson(SORT, "canonical")], SETTINGS)


# ---- what is kept


def kept_run(keep, seen):
    """Twelve steps with a Keep; `seen` gets a true copy of the weights after each."""
    model = GPT(CONFIG)

    def after_step(model, step):
        keep(model, step)
        seen[step] = copy.deepcopy(model.state_dict())

    imitate(model, LESSONS, SETTINGS, after_step=after_step)
    return model


@pytest.mark.parametrize("every, steps", [(1, list(range(1, 13))), (5, [5, 10]), (12, [12]), (13, [])])
def test_kept_checkpoints_are_those_of_their_steps(tmp_path, every, steps):
    """In memory and on disk every k-th step is kept with the bits that the weights had then, though training went on:
    nothing kept is a view of the live weights. Reading one twice, or all in a loop, gives the same."""
    for keep in (Keep(every), Keep(every, tmp_path / "path")):
        seen = {}
        model = kept_run(keep, seen)
        assert keep.steps == steps and len(keep) == len(steps) == len(list(keep))
        for place, (step, state) in enumerate(zip(steps, keep, strict=True)):
            assert state.keys() == seen[step].keys() == keep[place].keys()
            assert all(torch.equal(state[name], seen[step][name]) for name in state)
            assert all(torch.equal(keep[place][name], seen[step][name]) for name in state)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(7.0)
        assert not any((state[name] == 7).all() for state in keep for name in state)


def test_kept_in_half_the_size(tmp_path):
    """With a dtype the states are the weights rounded to it, in memory and on disk alike, and fit into the model."""
    memory, disk = Keep(6, dtype=torch.bfloat16), Keep(6, tmp_path, torch.bfloat16)
    seen = {}
    model = kept_run(lambda model, step: (memory(model, step), disk(model, step)), seen)
    for one, other, step in zip(memory, disk, (6, 12), strict=True):
        for name, weight in seen[step].items():
            assert one[name].dtype == other[name].dtype == torch.bfloat16
            assert torch.equal(one[name], other[name]) and torch.equal(one[name], weight.bfloat16())
    model.load_state_dict(memory[-1])
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with pytest.raises(LabError, match="cannot be kept"):
        Keep(0)


def test_a_resumed_run_finds_its_earlier_checkpoints_or_says_that_they_are_lost(tmp_path):
    """A Keep that first hears of step 6 takes steps 2 and 4 from its folder; without one the gap is not passed over,
    since an extrapolation would take step 6 for the first."""
    model = GPT(CONFIG)
    for step in (2, 4):
        Keep(2, tmp_path)(model, step)
    resumed = Keep(2, tmp_path)
    resumed(model, 6)
    assert resumed.steps == [2, 4, 6] and len(list(resumed)) == 3
    with pytest.raises(LabError, match="goes on at step 6"):
        Keep(2)(model, 6)


def test_keeping_changes_no_weight():
    """A run that is watched ends with the bits of one that is not."""
    alone = GPT(CONFIG)
    imitate(alone, LESSONS, SETTINGS)
    assert torch.equal(weights(kept_run(Keep(1, dtype=torch.bfloat16), {})), weights(alone))


# ---- the shipped bases


@pytest.mark.parametrize("name", WORLD_BASES)
def test_every_base_is_what_its_manifest_says(name):
    """File, size of the model and steps are those stated, and sampled accuracy on 4000 test problems is within three
    standard errors of what is stated for each world (draws may differ with the version of torch)."""
    shipped, made = load_world_base(name), world_recipe(name)
    facts, path = shipped.facts, FOLDER / f"{name}.safetensors"
    assert facts["sha256"] == sha256(path) and facts["bytes"] == path.stat().st_size
    assert facts["parameters"] == shipped.model.count_parameters() and shipped.model.config == made.config
    assert facts["examples"] == made.examples
    assert shipped.worlds.keys() == facts["accuracy"].keys() == made.worlds.keys()
    for key, stated in facts["accuracy"].items():
        error = (max(stated * (1 - stated), 0.005) / 4000) ** 0.5
        assert abs(accuracy(shipped.model, shipped.worlds[key], problems=4000) - stated) < 3 * error + 0.0005, key


def ways(name):
    """Of 2000 answers on the test side: the share given at once, and how many of those and of the chains are right."""
    base = load_world_base(name)
    drawn = roll_out(base.model, base.worlds["running sum"], prompts=2000, samples=1, seed=0, step=0, split="test")
    direct_B = drawn.answer_BA[:, 0] == ANSWER
    right = [float(drawn.reward_B[part_B].mean()) if part_B.any() else None for part_B in (direct_B, ~direct_B)]
    return float(direct_B.float().mean()), *right


def test_the_mixed_bases_differ_in_what_they_can_do():
    """The labs on reverse distillation need this: the mixture answers at once in 60%, as taught, hardly better
    than chance (1/7), while its chains are right; rewards leave nothing but chains."""
    direct, at_once, chain = ways("sum-mixed")
    assert abs(direct - 0.6) < 0.05 and at_once < 0.25 and chain > 0.96
    direct, _, chain = ways("sum-mixed-rl")
    assert direct < 0.02 and chain > 0.95


def test_unknown_missing_or_altered_bases_are_refused(tmp_path):
    """Each of the four gets a sentence: no such name, not in the manifest, no file, one byte changed."""
    with pytest.raises(LabError, match="no base for a world called 'chess'"):
        load_world_base("chess")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(LabError, match="has not been made yet") as refusal:
        load_world_base("addition", folder)
    assert "data/build_checkpoints.py addition" in refusal.value.fix
    for file in ("manifest.json", "addition.safetensors"):
        shutil.copy(FOLDER / file, folder)
    load_world_base("addition", folder)
    path = folder / "addition.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(LabError, match="was altered"):
        load_world_base("addition", folder)
    path.unlink()
    with pytest.raises(LabError, match="is missing"):
        load_world_base("addition", folder)
