"""The continuation advantage: equal to loops over single rows, to closed forms, and to its own split.

Some writers here are Markov chains over tokens, dressed as decoders: what they write next depends on the last token
only, so every accuracy behind every cut has a closed form. At temperature 0 nothing is random, and a loop that
continues one row after the other, without a cache, must give every number.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from labkit.errors import LabError
from labkit.measure import continuation_advantage, continue_prefixes
from labkit.models import GPT, GPTConfig, generate
from labkit.tasks import RunningSum, answer_lengths
from labkit.tasks.alphabet import END

GOOD, BAD, V = 1, 2, 11


class Markov(GPT):
    """Draws the next token from the row of the last one."""

    def __init__(self, chance_VV: torch.Tensor):
        super().__init__(GPTConfig(V, 64, V + 1, 1, 1, head_size=2))
        self.chance_VV = chance_VV

    def embed(self, tokens):
        return torch.nn.functional.one_hot(tokens, V).double()

    def trunk(self, x_BTD, *, mask_BTU=None, cache=None):
        return x_BTD

    def head(self, hidden):
        return (hidden @ self.chance_VV).clamp(min=1e-300).log()


def writer(error: float, repair: float = 0.0, stop: float = 0.0) -> Markov:
    """Stops with `stop`, else GOOD turns BAD with `error` and BAD turns GOOD with `repair`."""
    chance_VV = torch.zeros(V, V, dtype=torch.float64)
    for now, turn in ((GOOD, error), (BAD, repair)):
        chance_VV[now, [END, 3 - now, now]] = torch.tensor([stop, (1 - stop) * turn, (1 - stop) * (1 - turn)]).double()
    return Markov(chance_VV)


def states(error: float, repair: float, stop: float) -> torch.Tensor:
    """The same chain over (GOOD and never BAD, GOOD again, BAD) and these three stopped, from row to column."""
    turn_33 = torch.tensor([[1 - error, 0, error], [0, 1 - error, error], [0, repair, 1 - repair]]).double()
    one_33 = torch.eye(3).double()
    return torch.cat((torch.cat(((1 - stop) * turn_33, stop * one_33), 1), torch.cat((0 * one_33, one_33), 1)))


def last_is_good(prompt_NT, answer_NA):
    """Right: the last token before END, or of all, is GOOD; the prompt's, where the answer is empty."""
    length_N, ended_N = answer_lengths(answer_NA)
    last_N1 = (prompt_NT.shape[1] + length_N - ended_N.long() - 1)[:, None]
    return torch.cat((prompt_NT, answer_NA), 1).gather(1, last_N1)[:, 0] == GOOD


def odd_sum(prompt_NT, answer_NA):
    """Right: the tokens up to END, that included, have an odd sum."""
    counts_NA = torch.arange(answer_NA.shape[1]) < answer_lengths(answer_NA)[0][:, None]
    return (answer_NA * counts_NA).sum(1) % 2 == 1


def before_bad(prompt_NT, prefix_NL):
    """Clean: the tokens before the first BAD."""
    return ((prefix_NL == BAD).cumsum(1) == 0).sum(1)


def world_of(length, verify=last_is_good, prompt_length=1):
    return SimpleNamespace(name="chain", prompt_length=prompt_length, answer_length=length, verify=verify)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def goods(N):
    return torch.full((N, 1), GOOD)


def weighted_mean(value_6, weight_6, where_6):
    return float((value_6 * weight_6)[where_6].sum() / weight_6[where_6].sum())


def test_the_curve_of_markov_writers_has_a_closed_form():
    """A student that errs and rarely repairs, a teacher that mostly repairs, both stop by chance: every number of every
    cut is that of powers of the 6 x 6 transition matrix, within 4 standard errors of 6,000 prefixes."""
    cap, N, rates = 7, 6000, {"student": (0.25, 0.1, 0.08), "teacher": (0.05, 0.5, 0.03)}
    chain = {name: states(*each) for name, each in rates.items()}
    right_6, clean_6 = torch.tensor([1.0, 1, 0] * 2).double(), torch.tensor([1, 0, 0] * 2) == 1
    every_6 = clean_6 | True
    points = continuation_advantage(*(writer(*each) for each in rates.values()), world_of(cap), goods(N),
                                    cuts=(0, 1, 3, 6), samples=2, generator=seeded(1), clean=before_bad)
    for point in points:
        prefix_6, own_6 = (torch.linalg.matrix_power(each, point.cut)[0] for each in chain.values())
        student_6, teacher_6 = (torch.linalg.matrix_power(each, cap - point.cut) @ right_6 for each in chain.values())
        clean, own_clean = float(prefix_6[clean_6].sum()), float(own_6[clean_6].sum())
        delta_6 = teacher_6 - student_6
        expected = {"ended": (float(prefix_6[3:].sum()), 1), "clean_share": (clean, 1),
                    "teacher": (weighted_mean(teacher_6, prefix_6, every_6), 1),
                    "student": (weighted_mean(student_6, prefix_6, every_6), 1),
                    "advantage": (weighted_mean(delta_6, prefix_6, every_6), 1),
                    "advantage_clean": (weighted_mean(delta_6, prefix_6, clean_6), clean),
                    "advantage_broken": (weighted_mean(delta_6, prefix_6, ~clean_6), 1 - clean),
                    "teacher_clean": (weighted_mean(teacher_6, prefix_6, clean_6), clean),
                    "teacher_own": (weighted_mean(teacher_6, own_6, every_6), 1),
                    "teacher_own_clean": (weighted_mean(teacher_6, own_6, clean_6), own_clean)}
        if not point.cut:
            assert math.isnan(point.advantage_broken) and expected.pop("advantage_broken")
        for name, (value, share) in expected.items():
            assert abs(getattr(point, name) - value) < 4 * (0.3 / (share * N)) ** 0.5, (point.cut, name)
        assert point.rollouts == N


@pytest.mark.parametrize("select", [None, lambda prompt_NT, answer_NA: answer_lengths(answer_NA)[0] > 2])
def test_the_split_is_exact(select):
    """delta = pi delta_ok + (1 - pi) delta_broken to rounding, also where one side is empty (NaN there), and delta is
    acc_T - acc_S. Selecting rollouts of three tokens or more leaves none that ended before the cut at two."""
    points = continuation_advantage(writer(0.4, 0, 0.1), writer(0.1, 0.6, 0.1), world_of(6), goods(50), cuts=range(6),
                                    samples=3, generator=seeded(), clean=before_bad, select=select)
    for point in points:
        parts = [(point.clean_share, point.advantage_clean), (1 - point.clean_share, point.advantage_broken)]
        assert [math.isnan(value) for _, value in parts] == [share == 0 for share, _ in parts]
        total = sum(share * value for share, value in parts if share)
        assert point.advantage == pytest.approx(total, abs=1e-12) == pytest.approx(point.teacher - point.student)
    assert points[0].clean_share == 1 and 0 < points[3].clean_share < 1
    assert (points[2].ended == 0) == (select is not None) and points[5].ended > 0


def sharp(seed: int) -> GPT:
    """A decoder with its own opinion at every prefix."""
    model = GPT(GPTConfig(V, 12, 8, 1, 2, tied=False), seed=seed)
    with torch.no_grad():
        model.embedding.weight.normal_(0, 1.0, generator=seeded(seed))
        model.unembedding.weight.normal_(0, 1.0, generator=seeded(seed + 1))
    return model


def mean(values):
    return sum(values) / len(values) if values else math.nan


def chosen(values, marks):
    return [value for value, mark in zip(values, marks, strict=True) if mark]


@torch.no_grad()
def greedy(model, row, prefix, cap):
    """The whole answer of one row, token by token from scratch."""
    answer = list(prefix)
    while len(answer) < cap and END not in answer:
        answer.append(int(model(torch.tensor([row + answer]))[0, -1].argmax()))
    return answer


@pytest.mark.parametrize("cap", [None, 5])
def test_greedy_curves_equal_loops_over_single_rows(cap):
    """One row at a time: its rollout, its prefix, its two endings, the verdict; an answer that ended before the cut is
    judged as it is. top_k=1 and a tiny top_p draw the same, so the sampler's settings reach every draw."""
    student, teacher, world, room = sharp(9), sharp(15), world_of(7, odd_sum, 2), cap or 7
    prompt_NT = torch.randint(0, END, (60, 2), generator=seeded(4))
    rows, cuts = prompt_NT.tolist(), (0, 2, 4)
    curves = [continuation_advantage(student, teacher, world, prompt_NT, cuts=cuts, samples=2, generator=None,
                                     clean=before_bad, cap=cap, **sampler)
              for sampler in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6})]
    whole = [[greedy(model, row, [], room) for row in rows] for model in (student, teacher)]
    for i, cut in enumerate(cuts):
        prefixes, own = ([answer[:cut] for answer in answers] for answers in whole)
        good, own_good = ([BAD not in prefix for prefix in each] for each in (prefixes, own))
        by_teacher, by_student, by_own = (
            [sum(greedy(model, row, prefix, room)) % 2 for row, prefix in zip(rows, each, strict=True)]
            for model, each in ((teacher, prefixes), (student, prefixes), (teacher, own)))
        delta = [t - s for t, s in zip(by_teacher, by_student, strict=True)]
        expected = {"cut": cut, "rollouts": 60, "ended": mean([END in prefix for prefix in prefixes]),
                    "teacher": mean(by_teacher), "student": mean(by_student), "advantage": mean(delta),
                    "standard_error": (sum((d - mean(delta)) ** 2 for d in delta) / 59 / 60) ** 0.5,
                    "clean_share": mean(good), "advantage_clean": mean(chosen(delta, good)),
                    "advantage_broken": mean(chosen(delta, [not ok for ok in good])),
                    "teacher_clean": mean(chosen(by_teacher, good)), "teacher_own": mean(by_own),
                    "teacher_own_clean": mean(chosen(by_own, own_good))}
        for curve in curves:
            assert vars(curve[i]) == pytest.approx(expected, nan_ok=True)
        assert not cut or (0 < mean(good) < 1 and any(END in prefix for prefix in prefixes) and any(delta))


def test_prefixes_that_ended_are_judged_as_they_are():
    """With all of them ended nothing is drawn, whoever writes; among others they keep their verdict and their place."""
    prefix_NL = torch.tensor([[GOOD, END, END], [BAD, END, END], [END, END, END]])
    generator = seeded()
    before = generator.get_state()
    share_N = continue_prefixes(None, world_of(5), goods(3), prefix_NL, samples=4, generator=generator)
    assert share_N.tolist() == [1, 0, 1] and torch.equal(generator.get_state(), before)
    more_NL = torch.cat((goods(1).expand(1, 3), prefix_NL))
    more_N = continue_prefixes(writer(1.0), world_of(4), goods(4), more_NL, samples=4, generator=generator)
    assert more_N.tolist() == [0, 1, 0, 1] and more_N.dtype == torch.float64


def test_continuations_stay_with_their_prefix():
    """Samples are averaged by row: 1, 0, 1 where nothing turns, and halves where GOOD turns with 0.5 (4 sigma)."""
    prefix_NL = torch.tensor([[GOOD], [BAD], [GOOD]])
    share_N = continue_prefixes(writer(0.0), world_of(4), goods(3), prefix_NL, samples=5, generator=seeded())
    assert share_N.tolist() == [1, 0, 1]
    half_N = continue_prefixes(writer(0.5), world_of(2), goods(3), prefix_NL, samples=4000, generator=seeded())
    assert half_N[1] == 0 and (half_N[[0, 2]] - 0.5).abs().max() < 4 * 0.5 / 4000**0.5


def test_the_same_model_has_no_advantage():
    """Teacher and student alike: delta is 0 within 4 of its own standard errors at every cut, and the teacher's own
    prefixes are no better than the student's."""
    points = continuation_advantage(writer(0.3, 0.2), writer(0.3, 0.2), world_of(6), goods(2000), cuts=(0, 2, 5),
                                    samples=1, generator=seeded(2), clean=before_bad)
    for point in points:
        assert abs(point.advantage) < 4 * point.standard_error < 4 * 0.72 / 2000**0.5
        assert abs(point.teacher_own - point.teacher) < 4 * (0.5 / 2000) ** 0.5


def test_selection_looks_at_whole_rollouts():
    """`select` sees one draw of the student, and what it keeps is cut everywhere; the teacher's own are all kept."""
    student, teacher, seen = writer(0.3, 0, 0.2), writer(0, 1), []

    def long(prompt_NT, answer_NA):
        seen.append(answer_NA)
        return answer_lengths(answer_NA)[0] > 3

    def spy(prompt_NT, prefix_NL):
        seen.append(len(prefix_NL))
        return before_bad(prompt_NT, prefix_NL)

    points = continuation_advantage(student, teacher, world_of(6), goods(40), cuts=(0, 3), samples=1,
                                    generator=seeded(), clean=spy, select=long)
    first_NA = generate(student, goods(40), max_new_tokens=6, stop_tokens=(END,), generator=seeded()).tokens_BT
    kept = int((answer_lengths(first_NA)[0] > 3).sum())
    assert torch.equal(seen[0], first_NA) and 0 < kept < 40 and seen[1:] == [kept, 40] * 2
    assert [point.rollouts for point in points] == [kept] * 2
    single = continuation_advantage(student, teacher, world_of(6), goods(1), cuts=(0,), samples=1, generator=seeded(),
                                    clean=before_bad)[0]
    assert math.isnan(single.standard_error)


def test_a_running_sum_knows_its_clean_prefixes():
    """RunningSum.clean_steps fits as `clean`: a decoder of noise is clean before its first token and broken behind."""
    world, models = RunningSum(3), [GPT(GPTConfig(48, 24, 8, 1, 2), seed=seed) for seed in (0, 1)]
    none, nine = continuation_advantage(*models, world, world.problems(80, split="test"), cuts=(0, 9), samples=1,
                                        generator=seeded(), clean=world.clean_steps)
    assert none.clean_share == 1 and nine.clean_share == 0 and nine.rollouts == 80


def test_impossible_questions_are_refused():
    """One clear sentence instead of an empty curve."""
    for change in ({"cuts": (-1,)}, {"cuts": (4,)}, {"cuts": (2,), "cap": 2}, {"samples": 0},
                   {"select": lambda prompt_NT, answer_NA: torch.zeros(3, dtype=torch.bool)},
                   {"prompt_NT": goods(0)}, {"prompt_NT": goods(3).expand(3, 2)}):
        asked = {"cuts": (0,), "samples": 1, "generator": seeded(), "clean": before_bad, "prompt_NT": goods(3)}
        with pytest.raises(LabError):
            continuation_advantage(writer(0.1), writer(0.1), world_of(4), **{**asked, **change})
