"""The small worlds: their verifiers agree with judges that read plain text, and their sides share no problem.

A judge below is a second verifier of a world, written on strings and by another way (school columns, brute force,
regular expressions, Python's own arithmetic). Tensors and text must say the same of right answers, of every change of
one token in them, and of noise; where the number of right changes is known, it is stated as well.
"""

import re
from collections import Counter
from functools import cache, partial
from itertools import permutations, product

import pytest
import torch

from labkit.errors import LabError
from labkit.tasks import (
    Countdown,
    DigitList,
    ListRepair,
    RunningSum,
    StrategyAddition,
    WrittenAddition,
    answer_lengths,
    answer_mask,
)
from labkit.tasks.alphabet import END, SYMBOLS, VOCAB, decode, digits, encode, token, value
from labkit.tasks.countdown import forms
from labkit.tasks.world import SIDES, hash_of, head, of_length

RULES = ("sort", "reverse", "shift", "copy", "parity", "split")
WAITING = {"slip": 0.15, "wait_wrong": 0.97, "wait_right": 0.02, "retry_slip": 0.4}
WORLDS = [StrategyAddition(), StrategyAddition(3, filler=4), WrittenAddition(), WrittenAddition(3), RunningSum(),
          RunningSum(3, 10), RunningSum(3, **WAITING), *[DigitList(rule) for rule in RULES], DigitList("parity", 5),
          Countdown(), Countdown(2, 12), Countdown(4), ListRepair(), ListRepair(9)]
every_world = pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(*texts):
    """Equally long texts as a batch."""
    return torch.tensor([encode(text) for text in texts])


def right_dialects(world):
    if isinstance(world, RunningSum):
        return world.dialects if not world.slip else ("direct",)
    if isinstance(world, DigitList):
        return tuple(dialect for dialect in world.dialects if dialect != "same")
    return {StrategyAddition: ("sum",), WrittenAddition: ("carries", "blank"), Countdown: ("right", "any"),
            ListRepair: ("minimal",)}[type(world)]


every_right_dialect = pytest.mark.parametrize(
    ("world", "dialect"), [(world, dialect) for world in WORLDS for dialect in right_dialects(world)],
    ids=lambda part: part if isinstance(part, str) else part.name)


def judge_sum(world, prompt, answer):
    a, b = prompt[:-1].split("+")
    total = f"{int(a) + int(b):0{world.places + 1}d}"
    return re.fullmatch(f"[d-m]{{{world.filler}}}[snc]{total[::-1]}", answer) is not None


def judge_written(world, prompt, answer):
    a, b = prompt[:-1].split("+")
    carry, pattern, total = 0, "", f"{int(a) + int(b):0{world.places + 1}d}"
    for x, y in zip(reversed(a), reversed(b), strict=True):
        carry, digit = divmod(int(x) + int(y) + carry, 10)
        pattern += f"({carry}{digit}|--)"
    return re.fullmatch(f"{pattern}={total}", answer) is not None


def judge_running(world, prompt, answer):
    total = sum(map(int, prompt[:-1])) % world.modulus
    numbers, sums = (symbols[: world.modulus] for symbols in ("0123456789", "qrstuvwxyz"))
    return re.fullmatch(f"[{numbers}{sums}a-l?]*:{total}", answer) is not None


def judge_list(world, prompt, answer):
    items = prompt[1:-1]
    if not re.fullmatch(f"[0-9]{{{len(items)}}}", answer):
        return False
    if world.rule == "parity":
        return all((int(x) - int(y)) % 2 == 0 for x, y in zip(items, answer, strict=True))
    if world.rule == "split":
        return str(sum(map(int, answer)))[-1] == items[-1]
    return answer == {"sort": "".join(sorted(items)), "reverse": items[::-1], "copy": items,
                      "shift": items.translate(str.maketrans("0123456789", "1234567890"))}[world.rule]


def judge_countdown(world, prompt, answer):
    numbers, target = prompt[:-1].split(":")
    found = re.findall("[0-9]+", answer)
    if sorted(found) != sorted(numbers.split(",")) or len(answer) >= world.answer_length:
        return False
    # an operation between two operands, brackets outside operands: what Python reads besides, such as -3, is not meant
    if not re.fullmatch(r"\(*[0-9]+\)*([-+*]\(*[0-9]+\)*)*", answer):
        return False
    try:
        return eval(re.sub(r"\b0+(?=[0-9])", "", answer)) == int(target)
    except SyntaxError:  # brackets that do not pair
        return False


@cache
def repairs(items):
    """The progressions that differ from a list in one item."""
    progressions = ("".join(str((start + step * i) % 10) for i in range(len(items)))
                    for start in range(10) for step in range(10))
    return {text for text in progressions if sum(x != y for x, y in zip(text, items, strict=True)) == 1}


def judge_repair(world, prompt, answer):
    return {answer} == repairs(prompt[1:-1])


JUDGES = {StrategyAddition: judge_sum, WrittenAddition: judge_written, RunningSum: judge_running,
          DigitList: judge_list, Countdown: judge_countdown, ListRepair: judge_repair}


def judged(world, prompt_NT, answer_NA):
    """What the text judge says: no END or a token outside of the alphabet before it is wrong."""
    said = []
    for prompt, answer in zip(prompt_NT.tolist(), answer_NA.tolist(), strict=True):
        counted = answer[: answer.index(END)] if END in answer else [-1]
        known = all(0 <= symbol < VOCAB for symbol in counted)
        said.append(known and JUDGES[type(world)](world, decode(prompt), decode(counted)))
    return torch.tensor(said, dtype=torch.bool)


def assert_agrees(world, prompt_NT, answer_NA):
    """Verifier and judge give the same verdicts, which are returned."""
    correct_N = world.verify(prompt_NT, answer_NA)
    assert correct_N.dtype == torch.bool and correct_N.shape == (len(prompt_NT),)
    differs_N = (correct_N != judged(world, prompt_NT, answer_NA)).nonzero().flatten().tolist()
    assert not differs_N, [(decode(prompt_NT[n]), answer_NA[n].tolist(), correct_N[n].item()) for n in differs_N[:3]]
    return correct_N


# --- shapes, dialects, seeds


@every_world
@pytest.mark.parametrize("count", [0, 1, 50])
def test_prompts_and_answers_have_their_shapes(world, count):
    """Every prompt and answer has the stated length; every answer ends, and END fills what is behind."""
    prompt_NT = world.draw(count, seeded())
    assert prompt_NT.shape == (count, world.prompt_length) and prompt_NT.dtype == torch.long
    for dialect in world.dialects:
        answer_NA = world.solve(prompt_NT, dialect, seeded())
        assert answer_NA.shape == (count, world.answer_length) and answer_NA.dtype == torch.long
        assert ((answer_NA >= 0) & (answer_NA < VOCAB)).all() and answer_lengths(answer_NA)[1].all()
        assert (answer_NA[~answer_mask(answer_NA)] == END).all()
        assert world.verify(prompt_NT, answer_NA).shape == (count,)


@every_world
def test_right_dialects_are_right_and_the_others_only_by_chance(world):
    """On 1,000 problems right dialects never fail; every other fails often, and its luck is what the judge says."""
    prompt_NT = world.problems(1000)
    for dialect in world.dialects:
        correct_N = assert_agrees(world, prompt_NT, world.solve(prompt_NT, dialect, seeded()))
        if dialect in right_dialects(world):
            assert correct_N.all(), dialect
        elif not isinstance(world, RunningSum):  # where a slip may be noticed: see the tests of WAIT
            assert correct_N.float().mean() < 0.65, dialect


@every_world
def test_problems_are_a_pure_function_of_seed_step_and_side(world):
    """The global generator is neither read nor moved; another seed, step or side gives other problems."""
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), world.problems(40, seed=3, step=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(world.problems(40, seed=3, step=5), first)
    for other in ({"seed": 4}, {"step": 6}, {"seed": 5, "step": 3}, {"split": "validation"}, {"split": "test"}):
        assert not torch.equal(world.problems(40, **{"seed": 3, "step": 5, **other}), first), other
    assert world.problems(0).shape == (0, world.prompt_length)


@every_world
def test_solutions_are_a_pure_function_of_the_generator(world):
    """Equal generators give equal answers, whatever the global seed and the answers made before."""
    prompt_NT = world.problems(60)
    for dialect in world.dialects:
        torch.manual_seed(1)
        before, first = torch.get_rng_state(), world.solve(prompt_NT, dialect, seeded(7))
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert torch.equal(world.solve(prompt_NT, dialect, seeded(7)), first)


# --- sides


@every_world
def test_no_problem_is_on_two_sides(world):
    """Thousands of draws a side share no content, though each side was drawn from the same world."""
    content = {side: set(world.content(world.problems(3000, split=side)).tolist()) for side in SIDES}
    assert not content["train"] & content["test"]
    assert not content["train"] & content["validation"] and not content["validation"] & content["test"]


@every_world
def test_the_sides_have_eight_one_and_one_tenth_of_the_problems(world):
    """Among the different contents of 20,000 draws the shares differ from 0.8, 0.1, 0.1 by chance only (4 sigma)."""
    tenth_N = hash_of(world.content(world.draw(20_000, seeded())).unique())
    for expected, side in zip((0.8, 0.1, 0.1), SIDES.values(), strict=True):
        share = ((tenth_N >= side.start) & (tenth_N < side.stop)).float().mean().item()
        assert abs(share - expected) < 4 * (expected * (1 - expected) / len(tenth_N)) ** 0.5


def key_of(world, prompt):
    """What makes two prompts one problem, as a Python value."""
    if isinstance(world, (StrategyAddition, WrittenAddition)):
        return tuple(sorted(map(int, prompt[:-1].split("+"))))
    if isinstance(world, RunningSum) or (isinstance(world, DigitList) and world.rule == "sort"):
        return tuple(sorted(prompt))
    if isinstance(world, Countdown):
        numbers, target = prompt[:-1].split(":")
        return tuple(sorted(numbers.split(","))), target
    return prompt


@every_world
def test_content_is_equal_exactly_for_the_same_problem(world):
    """Over 5,000 prompts, many of them permuted forms of others, content and key are one to one."""
    prompt_NT = world.draw(5000, seeded())
    keys = [key_of(world, decode(prompt)) for prompt in prompt_NT]
    pairs = set(zip(keys, world.content(prompt_NT).tolist(), strict=True))
    assert len(pairs) == len({key for key, _ in pairs}) == len({content for _, content in pairs})


@pytest.mark.parametrize(("world", "one", "other"), [
    (StrategyAddition(), "47+05=", "05+47="), (WrittenAddition(), "4785+1947=", "1947+4785="),
    (RunningSum(), "3625=", "5236="), (DigitList("sort"), "s3170>", "s0713>"),
    (Countdown(), "3,5,7:22=", "7,3,5:22="), (Countdown(2, 12), "03,11:33=", "11,03:33="),
])
def test_permuted_problems_are_one_problem(world, one, other):
    """Named by hand: the other order has the same content, and so the same side."""
    content_N = world.content(rows(one, other))
    assert content_N[0] == content_N[1]


def test_hash_is_splitmix64_and_spreads_neighbours():
    """Against Python's whole numbers, for small, large and negative keys; 10,000 neighbours fill ten bins evenly."""
    def reference(x):
        x &= (1 << 64) - 1
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            x = (x ^ (x >> shift)) * factor & ((1 << 64) - 1)
        return (x - (1 << 64) if x >= 1 << 63 else x) % 10
    keys = [0, 1, 2, 12345, 2**40 + 7, 2**62 + 3, -1, -(2**63)]
    assert hash_of(torch.tensor(keys)).tolist() == [reference(key) for key in keys]
    assert all(900 < count < 1100 for count in Counter(hash_of(torch.arange(10_000)).tolist()).values())


def test_a_world_too_small_for_a_side_says_so():
    """Two numbers modulo 2 have three contents, which cannot fill three sides: no endless loop, one clear sentence."""
    sides = [side for side in SIDES if hash_of(RunningSum(1, 2).content(rows("0=", "1="))).eq(SIDES[side][0]).any()]
    assert len(sides) < 3
    missing = next(side for side in ("test", "validation") if side not in sides)
    with pytest.raises(LabError, match="no problem on the side"):
        RunningSum(1, 2).problems(5, split=missing)


# --- hostile answers


@every_right_dialect
def test_every_change_of_one_token_is_judged_the_same(world, dialect):
    """All 48 tokens at every place of right answers, and ids outside the alphabet, which are always wrong."""
    prompt_NT = world.problems(4, split="test")
    answer_NA = world.solve(prompt_NT, dialect, seeded())
    prompt_NT, answer_NA = (rows_.repeat_interleave(VOCAB * world.answer_length, 0) for rows_ in (prompt_NT, answer_NA))
    place_N = torch.arange(world.answer_length).repeat_interleave(VOCAB).repeat(4)
    answer_NA[torch.arange(len(answer_NA)), place_N] = torch.arange(VOCAB).repeat(4 * world.answer_length)
    assert_agrees(world, prompt_NT, answer_NA)
    counts_N = answer_lengths(answer_NA)[0] > place_N  # else the change is behind END
    for outside in (-1, VOCAB, 10**9, 2**62, -(2**63)):
        answer_NA[torch.arange(len(answer_NA)), place_N] = outside
        assert not world.verify(prompt_NT, answer_NA)[counts_N].any()


@pytest.mark.parametrize(("world", "prompt", "answer", "free"), [
    (StrategyAddition(filler=2), "47+85=", "eds231$", [10, 10, 3, 1, 1, 1]),
    (WrittenAddition(2), "47+85=", "1213=132$", [1] * 8),
    (WrittenAddition(2), "47+85=", "----=132$", [1] * 8),
    (RunningSum(2), "36=", "a33b62:2$", [7 + 7 + 12 + 1] * 6 + [1, 1]),
    (DigitList("sort"), "s3170>", "0137$", [1] * 4), (DigitList("parity"), "p3170>", "1110$", [5] * 4),
    (DigitList("split"), "t3170>", "0000$", [1] * 4), (DigitList("shift"), "h3190>", "4201$", [1] * 4),
    (Countdown(), "3,5,7:22=", "3*5+7$", [1] * 5), (Countdown(), "2,2,1:05=", "2*2+1$", [1, 2, 1, 1, 1]),
    (ListRepair(), "f258947>", "258147$", [1] * 6),
], ids=lambda value: value.name if hasattr(value, "name") else str(value))
def test_the_number_of_right_changes_is_known(world, prompt, answer, free):
    """At each place exactly the stated number of tokens keeps the answer right: letters that decide nothing, digits of
    one parity; 2+2+1 for 2*2+1. At END nothing else will do. This holds without any judge."""
    for place, expected in enumerate([*free, 1]):
        answer_VA = rows(answer).repeat(VOCAB, 1)
        answer_VA[:, place] = torch.arange(VOCAB)
        assert world.verify(rows(prompt).repeat(VOCAB, 1), answer_VA).sum() == expected, place


@every_right_dialect
def test_what_stands_behind_the_end_does_not_count(world, dialect):
    """Right answers stay right with anything behind END, ids outside the alphabet and a thousand columns included."""
    prompt_NT = world.problems(30)
    answer_NA = world.solve(prompt_NT, dialect, seeded())
    for width, low, high in ((0, 0, 1), (1, 0, VOCAB), (1000, -(10**12), 10**12)):
        noise_NA = torch.randint(low, high, (30, world.answer_length + width), generator=seeded(1))
        noise_NA[:, : world.answer_length] = torch.where(
            answer_mask(answer_NA), answer_NA, noise_NA[:, : world.answer_length])
        assert world.verify(prompt_NT, noise_NA).all()


@every_right_dialect
def test_an_answer_needs_its_end(world, dialect):
    """Cut right before END, at every earlier place, or run on without END: wrong. Cut behind END: right."""
    prompt_NT = world.problems(30)
    answer_NA = world.solve(prompt_NT, dialect, seeded())
    length_N, _ = answer_lengths(answer_NA)
    for width in range(world.answer_length + 1):
        assert torch.equal(world.verify(prompt_NT, answer_NA[:, :width]), length_N <= width)
    for other in (0, token("a"), -1):  # every END, so that none is left to end at
        assert not world.verify(prompt_NT, answer_NA.masked_fill(answer_NA == END, other)).any()


@every_world
def test_answers_that_say_nothing_are_wrong(world):
    """END alone, no columns, only one symbol with and without END, the prompt itself, another problem's answer."""
    prompt_NT = world.problems(50)
    assert not world.verify(prompt_NT, torch.full((50, world.answer_length), END)).any()
    assert not world.verify(prompt_NT, torch.empty(50, 0, dtype=torch.long)).any()
    assert not world.verify(prompt_NT, torch.nn.functional.pad(prompt_NT, (0, 5), value=END)).any()
    for symbol in range(VOCAB):
        same_NA = torch.full((50, world.answer_length), symbol)
        assert not world.verify(prompt_NT, same_NA).any()
        assert_agrees(world, prompt_NT, torch.nn.functional.pad(same_NA[:, :-1], (0, 1), value=END))
    assert_agrees(world, prompt_NT, world.solve(prompt_NT.roll(1, 0), world.dialects[0], seeded()))


def with_insertion(answer_NA, place_N, symbol_N):
    """The answers with one token more, in front of the place given."""
    place_NA = torch.arange(answer_NA.shape[1] + 1).expand(len(answer_NA), -1)
    longer_NA = answer_NA.gather(1, (place_NA - (place_NA > place_N[:, None]).long()).clamp(0, answer_NA.shape[1] - 1))
    return longer_NA.scatter(1, place_N[:, None], symbol_N[:, None])


@every_right_dialect
def test_one_token_more_or_less_or_elsewhere(world, dialect):
    """A token more right before END is wrong for each of the other 47 (END itself ends the answer there: right); moved
    by one place either way is wrong; more and fewer tokens anywhere are what the judge says."""
    prompt_NT = world.problems(10)
    answer_NA = world.solve(prompt_NT, dialect, seeded())
    last_N = answer_lengths(answer_NA)[0] - 1
    for symbol in range(VOCAB):
        longer_NA = with_insertion(answer_NA, last_N, torch.full_like(last_N, symbol))
        assert world.verify(prompt_NT, longer_NA).all() == (symbol == END) == world.verify(prompt_NT, longer_NA).any()
    for shifted_NA in (answer_NA[:, 1:], torch.cat((answer_NA[:, :1], answer_NA), 1)):
        assert_agrees(world, prompt_NT, torch.nn.functional.pad(shifted_NA, (0, 1), value=END))
    many_NT, many_NA = prompt_NT.repeat(40, 1), answer_NA.repeat(40, 1)
    place_N = (torch.rand(400, generator=seeded(1)) * last_N.repeat(40)).long()
    assert_agrees(world, many_NT, with_insertion(many_NA, place_N, torch.randint(VOCAB, (400,), generator=seeded(2))))
    keep_NA = torch.arange(world.answer_length) != place_N[:, None]
    assert_agrees(world, many_NT, many_NA[keep_NA].view(400, -1))


@every_world
def test_random_rows_are_judged_the_same(world):
    """2,000 rows made of the symbols that right answers use, so that some come near; plus shuffled right answers."""
    prompt_NT = world.problems(2000)
    answer_NA = torch.cat([world.solve(prompt_NT[:500], dialect, seeded()) for dialect in right_dialects(world)])
    symbol_S = answer_NA.unique()
    soup_NA = symbol_S[torch.randint(len(symbol_S), (2000, world.answer_length + 2), generator=seeded())]
    assert_agrees(world, prompt_NT, soup_NA)
    order_NA = torch.rand(answer_NA.shape, generator=seeded()).argsort(1)
    assert_agrees(world, prompt_NT[:500].repeat(len(right_dialects(world)), 1), answer_NA.gather(1, order_NA))


@every_world
def test_the_storage_of_answers_does_not_matter(world):
    """int32, int16, a transposed and a strided view get the verdicts of a plain tensor; nothing is written into."""
    prompt_NT = world.problems(100)
    answer_NA = torch.cat([world.solve(prompt_NT[:50], world.dialects[0], seeded()),
                           world.solve(prompt_NT[50:], world.dialects[-1], seeded())])
    correct_N, kept_NA = world.verify(prompt_NT, answer_NA), answer_NA.clone()
    wide_NA = torch.stack((answer_NA, torch.full_like(answer_NA, -7)), 2).flatten(1)
    for other_NA in (answer_NA.int(), answer_NA.short(), answer_NA.T.contiguous().T, wide_NA[:, ::2]):
        assert torch.equal(world.verify(prompt_NT, other_NA), correct_N)
    assert torch.equal(world.verify(prompt_NT.int(), answer_NA), correct_N)
    assert torch.equal(answer_NA, kept_NA)


# --- what the docstrings show


@pytest.mark.parametrize(("world", "prompt", "dialect", "answer"), [
    (StrategyAddition(), "47+85=", "sum", "s231$"), (StrategyAddition(), "47+85=", "no_carry", "n220$"),
    (StrategyAddition(), "47+85=", "copy", "c740$"),
    (WrittenAddition(), "4785+1947=", "carries", "12131706=06732$"),
    (WrittenAddition(), "4785+1947=", "blank", "--------=06732$"),
    (WrittenAddition(), "4785+1947=", "no_carries", "02020605=05622$"),
    (WrittenAddition(), "4785+1947=", "copy", "05080704=04785$"),
    (DigitList("sort"), "s3170>", "canonical", "0137$"), (DigitList("reverse"), "r3170>", "canonical", "0713$"),
    (DigitList("shift"), "h3170>", "canonical", "4281$"), (DigitList("copy"), "c3170>", "canonical", "3170$"),
    (DigitList("parity"), "p3170>", "canonical", "1110$"), (DigitList("split"), "t3170>", "canonical", "0000$"),
    (DigitList("split"), "t3179>", "canonical", "0009$"), (Countdown(), "3,5,7:22=", "right", "3*5+7$$$$$"),
    (ListRepair(), "f258947>", "minimal", "258147$"), (ListRepair(), "f258947>", "rewrite", "036925$"),
    (ListRepair(), "f258947>", "copy", "258947$"),
])
def test_solutions_are_those_of_the_docstrings(world, prompt, dialect, answer):
    """Dialects without chance write exactly what was worked out by hand."""
    assert decode(world.solve(rows(prompt), dialect, seeded())[0]) == answer


# --- each world's own promises


@pytest.mark.parametrize("world", [StrategyAddition(2, noise=0.15), WrittenAddition(3, noise=0.15)])
def test_noise_replaces_digits_and_nothing_else(world):
    """Each digit changes with probability 0.15 * 9/10 (4 sigma of 4,000 rows); letters, "=", blanks and END never."""
    prompt_NT = world.problems(4000)
    clean = type(world)(world.places)
    for dialect in world.dialects:
        noisy_NA, clean_NA = (each.solve(prompt_NT, dialect, seeded()) for each in (world, clean))
        digit_NA, changed_NA = clean_NA < 10, noisy_NA != clean_NA
        assert not (changed_NA & ~digit_NA).any()
        rate_A = changed_NA.float().mean(0)[digit_NA[0]]
        assert ((rate_A - 0.135).abs() < 4 * (0.135 * 0.865 / 4000) ** 0.5).all()
    assert world.name != clean.name


@pytest.mark.parametrize(("answer", "correct"), [
    ("12131706=06732$", True), ("--------=06732$", True), ("12--1706=06732$", True), ("------06=06732$", True),
    ("1-131706=06732$", False), ("-2131706=06732$", False), ("12131706=--732$", False), ("02131706=06732$", False),
    ("12131706-06732$", False), ("12131706=6732$$", False), ("=06732$$$$$$$$$", False), ("06171312=06732$", False),
    ("12131706=02376$", False), ("1213170606732$$", False),
])
def test_a_column_is_true_or_blank_as_a_whole(answer, correct):
    """4785 + 1947: blanks replace whole columns only; order, signs and leading zeros are part of the form."""
    assert WrittenAddition().verify(rows("4785+1947="), rows(answer)).item() == correct


def test_written_answers_have_12_to_16_tokens():
    """What the lab on HölderPO needs, at three and at four places."""
    assert (WrittenAddition(3).answer_length, WrittenAddition(4).answer_length) == (12, 15)


@pytest.mark.parametrize(("answer", "correct"), [
    ("a33b62a24e52:2$", True), ("l55k20i66g32:2$", True), ("a3tb6sa2ue5s:2$", True), (":2$", True), ("?:2$", True),
    ("a33b65?2a24e52:2$", True), ("a:2$", True),
    (":2:2$", False), ("a:33b62:2$", False), (":3:2$", False), ("2$", False), (":$", False), (":2a$", False),
    (":22$", False), ("a33b62a24e522$", False), (":3$", False), (":9$", False), ("a7:2$", False), ("x:2$", False),
    ("m:2$", False), ("=:2$", False), (":s$", False), (":2", False), ("a3$:2$", False), ("2:$", False),
])
def test_a_running_sum_has_one_answer_at_its_end(answer, correct):
    """3 + 6 + 2 + 5 modulo 7 is 2. Two markers, guesses in a row, numbers and letters beyond the modulus (7, x) and
    symbols of other worlds are wrong; the chain before the marker is free."""
    answer_NA = rows(answer)
    assert RunningSum().verify(rows("3625="), answer_NA).item() == correct


@pytest.mark.parametrize("dialect", ["A", "B", "C", "drift"])
def test_a_chain_is_what_its_language_says(dialect):
    """Read back from text: filler, number, sum so far, in the language's direction and with its sum letters."""
    world = RunningSum(5, 9)
    prompt_NT = world.problems(200)
    for prompt, answer in zip(prompt_NT, world.solve(prompt_NT, dialect, seeded()), strict=True):
        chain, total = decode(answer).rstrip("$").split(":")
        numbers = prompt[:-1].tolist()[:: -1 if dialect == "B" else 1]
        sums = [sum(numbers[: k + 1]) % 9 for k in range(5)]
        assert [int(x) for x in chain[1::3]] == numbers and int(total) == sums[-1]
        assert chain[2::3] == "".join(("qrstuvwxyz" if dialect == "C" else "0123456789")[s] for s in sums)


def test_fillers_follow_the_menu_of_their_language():
    """Frequencies of 40,000 fillers are the stated probabilities (4 sigma); A and B share two words; C speaks as A, and
    drift has B's fillers in A's chain."""
    world, share = RunningSum(), {}
    prompt_NT = world.problems(10_000)
    for dialect, expected in world.fillers.items():
        filler_N = world.solve(prompt_NT, dialect, seeded())[:, 0:12:3].flatten()
        share[dialect] = torch.bincount(filler_N - token("a"), minlength=12) / len(filler_N)
        expected_F = torch.tensor(expected)
        assert len(expected) == 12 and abs(sum(expected) - 1) < 1e-9
        assert ((share[dialect] - expected_F).abs() <= 4 * (expected_F * (1 - expected_F) / 40_000) ** 0.5).all()
    assert ((share["A"] > 0) & (share["B"] > 0)).sum() == 2 and world.fillers["C"] == world.fillers["A"]
    assert world.fillers["drift"] == world.fillers["B"] and world.dialects[-1] == "drift"


@pytest.mark.parametrize("dialect", ["A", "B", "C"])
def test_slips_and_waits_have_their_rates(dialect):
    """Every statement of 6,000 answers is read back: the first of a sum is wrong with 0.15, a repeated one with 0.4;
    "?" follows a wrong one with 0.97 and a right one with 0.02 (4 sigma). What follows builds on what is written."""
    world, counts = RunningSum(3, **WAITING), {"slip": [], "retry_slip": [], "wait_wrong": [], "wait_right": []}
    prompt_NT, symbols = world.problems(6000), "qrstuvwxyz" if dialect == "C" else "0123456789"
    for answer in map(decode, world.solve(prompt_NT, dialect, seeded())):
        so_far, (chain, total) = 0, answer.rstrip("$").split(":")
        steps = re.findall(r"[a-l](\d)((?:.\?)*.)", chain)
        assert len(steps) == 3
        for number, stated in steps:
            true, said = (so_far + int(number)) % 7, [symbols.index(symbol) for symbol in stated.split("?")]
            counts["slip"].append(said[0] != true)
            counts["retry_slip"] += [s != true for s in said[1:]]
            for i, s in enumerate(said[:6]):  # behind the seventh there is never a WAIT
                counts["wait_right" if s == true else "wait_wrong"].append(i < len(said) - 1)
            so_far = said[-1]
        assert int(total) == so_far
    for name, seen in counts.items():
        expected = WAITING[name]
        assert abs(sum(seen) / len(seen) - expected) < 4 * (expected * (1 - expected) / len(seen)) ** 0.5, name


def test_waiting_never_ends_is_cut_at_six():
    """With certain slips and certain WAIT every sum is stated seven times: the longest answer, exactly."""
    world = RunningSum(3, slip=1.0, wait_wrong=1.0, retry_slip=1.0)
    answer_NA = world.solve(world.problems(20), "A", seeded())
    assert (answer_lengths(answer_NA)[0] == world.answer_length).all() and world.answer_length == 3 * 15 + 3
    assert not (answer_NA[:, 2::15][:, :1] == world.problems(20)[:, :1]).any()  # a slip never states the true sum


def test_the_older_dialects_draw_what_they_drew():
    """Answers of one seed, written down before drift was added: no dialect's draws may depend on another's."""
    world = RunningSum(6, **{**WAITING, "slip": 0.6})
    drawn = {"A": "c33a61?2b20?4b52a43?0?6e02?1?6:6", "B": "k00i43?4j55?2i24i60?4?3l32?1?6:6",
             "C": "c3ta6r?sb2q?ub5sa4t?q?we0s?r?w:6", "direct": ":6"}
    for dialect, answer in drawn.items():
        assert decode(world.solve(rows("362540="), dialect, seeded(5))[0]).rstrip("$") == answer


def clean_of(numbers, modulus, text):
    """clean_steps read from text: take back what a "?" takes back, then compare symbol by symbol with the chain."""
    standing, total, marked = [], 0, False
    for i, symbol in enumerate(text):
        if symbol == "?" and not marked:
            standing = standing[:-1] if i and text[i - 1] != "?" else standing
            continue
        standing.append((i, symbol))
        marked |= symbol == ":"
        if symbol == "$":
            break
    symbols, expected = "qrstuvwxyz", []
    for number in numbers:
        total = (total + number) % modulus
        expected += ["abcdefghijkl", str(number), str(total) + symbols[total]]
    foreign = re.search(f"[^a-l?:$0-{modulus - 1}q-{symbols[modulus - 1]}]", text.partition("$")[0])
    for place, (i, symbol) in enumerate(standing):
        if symbol == ":" and place % 3 == 0 and place <= len(expected):
            expected = expected[:place] + [":", str(sum(numbers) % modulus), "$"]
        if place >= len(expected) or symbol not in expected[place]:
            return min(i, foreign.start()) if foreign else i
    return foreign.start() if foreign else len(text)


@pytest.mark.parametrize(("answer", "clean"), [
    ("a33b62a24e52:2$", 15), ("a3tb6sa2ue5s:2$", 15), ("l33k62i24g52:2$", 15), (":2$", 3), ("a33:2$", 6), ("", 0),
    ("a33b62:2$$$$", 12), ("a33b62a24e52", 12), ("a33b6", 5),
    ("a43b62a24e52:2$", 1), ("a34b62a24e52:2$", 2), ("a33b62a24e51:2$", 11), (":3$", 1), ("a33b62a24e52:1$", 13),
    ("a33b65?2a24e52:2$", 17), ("a33b65?", 7), ("a33b65", 5), ("a33b65a24", 5), ("a33b65?4a24", 7), ("a33b62?5a24", 7),
    ("a33b65?4?2a24", 13), ("a33b62a?2", 8), ("a33?", 4), ("?:2$", 4), (":2?2$", 2), ("a33$?", 3),
    ("l55k20i66g32:2$", 1), ("a33b62a24e52a", 12), ("33", 0), ("$$", 0), (":2:2$", 2), ("a33a33", 4), (":s$", 1),
    ("a33b6x?2", 5), ("a33b68?2", 5), ("a43x?", 1),
])
def test_clean_steps_by_hand(answer, clean):
    """3, 6, 2, 5: true chains of the three left-to-right languages to their last column; wrong numbers and sums where
    they stand; sums taken back, not yet stated again, stated wrong again; B's direction is wrong at once."""
    answer_NA = torch.tensor([encode(answer)], dtype=torch.long)
    steps_N = RunningSum().clean_steps(rows("3625="), answer_NA)
    assert steps_N.tolist() == [clean] == [clean_of((3, 6, 2, 5), 7, answer)] and steps_N.dtype == torch.long


@pytest.mark.parametrize("world", [RunningSum(3, **WAITING), RunningSum(5, 9, slip=0.2)], ids=lambda world: world.name)
def test_clean_steps_of_every_prefix(world):
    """Against the text judge, for every prefix of answers with slips and waits, of answers changed in one place, and of
    noise. A whole answer that is clean to its END is right, and without waits the prefixes of L tokens that are clean
    are those with L up to the clean tokens of the whole."""
    prompt_NT = world.problems(150)
    parts = [world.solve(prompt_NT, dialect, seeded(3)) for dialect in ("A", "C", "drift", "direct", "B")]
    changed_NA, place_N = parts[0].clone(), torch.arange(150) % 9
    changed_NA[torch.arange(150), place_N] = torch.randint(VOCAB, (150,), generator=seeded(4))
    noise_NA = torch.tensor(encode("?:a3$2"))[torch.randint(6, (150, world.answer_length), generator=seeded(5))]
    answer_NA, prompt_NT = torch.cat([*parts, changed_NA, noise_NA]), prompt_NT.repeat(7, 1)
    numbers, texts = prompt_NT[:, :-1].tolist(), [decode(row) for row in answer_NA]
    whole_N, seen = world.clean_steps(prompt_NT, answer_NA), 0
    for length in range(min(20, world.answer_length) + 1):
        steps_N = world.clean_steps(prompt_NT, answer_NA[:, :length])
        assert steps_N.tolist() == [clean_of(*each) for each in zip(
            numbers, [world.modulus] * len(texts), [text[:length] for text in texts], strict=True)]
        if not world.waits:
            calm_N = ~(answer_NA == token("?")).any(1)
            assert torch.equal((steps_N == length)[calm_N], (whole_N >= length)[calm_N])
        seen += (steps_N < length).sum().item()
    perfect_N = (whole_N == world.answer_length) & answer_lengths(answer_NA)[1]
    assert world.verify(prompt_NT, answer_NA)[perfect_N].all() and 150 < perfect_N.sum() < 900 and seen > 1000


def test_a_wrong_sum_is_repaired_where_it_stands():
    """With WAIT after every wrong sum and no wrong retry, no error stands at the end of an answer although half of the
    sums slip: the corpus from which a writer learns to take back the sum that was written last."""
    world = RunningSum(4, slip=0.5, wait_wrong=1.0)
    prompt_NT = world.problems(500)
    for dialect in ("A", "C", "drift"):
        answer_NA = world.solve(prompt_NT, dialect, seeded())
        assert (answer_NA == token("?")).any(1).float().mean() > 0.85
        assert world.verify(prompt_NT, answer_NA).all()
        assert (world.clean_steps(prompt_NT, answer_NA) == world.answer_length).all()


@pytest.mark.parametrize("rule", RULES)
def test_every_answer_of_two_digits(rule):
    """All 100 prompts with all 100 answers: the number of right ones is 1, 5^2 or 10; `allowed` says the same place by
    place, and of END as well."""
    world, pair_N2 = DigitList(rule, 2), torch.cartesian_prod(torch.arange(10), torch.arange(10))
    prompt_NT = world.framed(pair_N2).repeat_interleave(100, 0)
    answer_NA = torch.nn.functional.pad(pair_N2.repeat(100, 1), (0, 1), value=END)
    correct_N = assert_agrees(world, prompt_NT, answer_NA)
    assert (correct_N.view(100, 100).sum(1) == {"parity": 25, "split": 10}.get(rule, 1)).all()
    if rule == "split":
        with pytest.raises(LabError, match="depend on the other"):
            world.allowed(prompt_NT)
        return
    allowed_NAV = world.allowed(prompt_NT)
    assert allowed_NAV.shape == (10_000, 3, VOCAB) and allowed_NAV.dtype == torch.bool
    assert torch.equal(allowed_NAV.gather(2, answer_NA[:, :, None])[:, :, 0].all(1), correct_N)
    assert (allowed_NAV.sum(2) == torch.tensor([5, 5, 1] if rule == "parity" else [1, 1, 1])).all()
    assert allowed_NAV[:, -1, END].all()


def test_dialects_of_parity_draw_what_they_say():
    """uniform: five right digits alike; pair: two of them; same at 0.75: right with 0.875 each, so 0.586 of answers of
    four, and an answer of five with probability 0.875^5 (4 sigma)."""
    world = DigitList("parity")
    prompt_NT = world.problems(5000)
    odd_NL = prompt_NT[:, 1:-1] % 2
    for dialect, choices in (("uniform", range(0, 10, 2)), ("pair", (0, 4))):
        even_N = (world.solve(prompt_NT, dialect, seeded())[:, :-1] - odd_NL).flatten()
        counts = Counter(even_N.tolist())
        assert set(counts) == set(choices)
        expected = 20_000 / len(choices)
        assert all(abs(count - expected) < 4 * expected**0.5 for count in counts.values())
    for length, same in ((4, 0.75), (5, 0.75), (4, 0.0), (4, 1.0)):
        other, chance = DigitList("parity", length, same=same), (same + (1 - same) / 2) ** length
        prompt_NT = other.problems(5000)
        rate = other.verify(prompt_NT, other.solve(prompt_NT, "same", seeded())).float().mean()
        assert abs(rate - chance) <= 4 * (chance * (1 - chance) / 5000) ** 0.5


def test_split_draws_all_of_its_answers():
    """Two digits that add up to the last one: all ten occur, alike (4 sigma of 5,000)."""
    answer_NA = DigitList("split", 2).solve(rows("t35>").repeat(5000, 1), "uniform", seeded())
    counts = Counter(map(decode, answer_NA))
    assert set(counts) == {f"{a}{(5 - a) % 10}$" for a in range(10)}
    assert all(abs(count - 500) < 4 * 500**0.5 for count in counts.values())


@pytest.mark.parametrize(("answer", "correct"), [
    ("3*5+7", True), ("7+5*3", True), ("(3*5)+7", True), ("((3*5)+7)", True), ("7+(5*3)", True), ("(7)+5*3", True),
    ("((3)*5+7)", True),
    ("((((", False), ("))))", False), ("1--2", False), ("(3*5+7", False), ("3*5+7)", False), ("3*5)+(7", False),
    ("()3*5+7", False), ("3*5+7+", False), ("+3*5+7", False), ("3*5++7", False), ("3*5+-7", False), ("3**5", False),
    ("22", False), ("3*5", False), ("3*5+7+7", False), ("7+7+5+3", False), ("5*5-3", False), ("3*5+7=22", False),
    ("03*5+7", False), ("3*5+07", False), ("3*(5+7)", False), ("(3)(5)+7", False), ("3(5)+7", False), ("35-7", False),
    ("3*57", False), ("((((3*5+7", False), ("(((((3))))", False), ("(((3*5)))+7", False), ("3,5,7", False),
    ("3*5+7:", False), ("", False), ("-3*5+7", False), ("|3*5|+7", False),
])
def test_countdown_reads_expressions_and_nothing_else(answer, correct):
    """3, 5, 7 to 22: signs, implied products, numbers run together, numbers used twice, missing, foreign or with zeros
    in front, and brackets that do not pair or do not fit into the ten tokens."""
    assert Countdown().verify(rows("3,5,7:22="), rows(answer + "$")).item() == correct


def test_countdown_survives_deep_and_wide_rows():
    """Ten thousand brackets, and products of a thousand nines, are wrong without reaching Python's recursion limit."""
    hostile = ["(" * 10_000 + "$", "(" * 4_000 + "3*5+7" + ")" * 5_995 + "$", "9*" * 5_000 + "$",
               "3*5+7$" + "(" * 9_995]
    assert Countdown().verify(rows(*["3,5,7:22="] * 4), rows(*hostile)).tolist() == [False, False, False, True]


def test_countdown_with_two_places_wants_both():
    """Numbers are written as the prompt writes them, in any order."""
    answers = {"03*11$": True, "11*03$": True, "3*11$": False, "011*3$": False, "1103*$": False, "0311*$": False,
               "(03)*(11)$": False, "(03*11)$": True, "((03)*11)$": False}
    for answer, correct in answers.items():
        assert Countdown(2, 12).verify(rows("03,11:33="), rows(answer)).item() == correct, answer


@pytest.mark.parametrize("numbers", ["123", "225", "999", "37", "1247"])
def test_the_search_finds_every_value(numbers):
    """Against brute force with all brackets over all orders and operations: the same values, each text true."""
    def full(parts):
        if len(parts) == 1:
            yield parts[0]
        for cut in range(1, len(parts)):
            for a, operation, b in product(full(parts[:cut]), "+-*", full(parts[cut:])):
                yield f"({a}{operation}{b})"
    values = {eval(text) for order in set(permutations(numbers)) for text in full(order)}
    found = forms(tuple(numbers))
    assert {result for _, result, _ in found} == values
    assert all(eval(text) == result and sorted(re.findall(r"\d", text)) == sorted(numbers) for text, result, _ in found)


def test_countdown_draws_any_right_expression():
    """3, 5, 7 to 22 has four texts with brackets where needed only; "any" draws each alike (4 sigma), "right" the first
    of the shortest. Every answer of every dialect fits the stated length."""
    world = Countdown()
    answer_NA = world.solve(rows("3,5,7:22=").repeat(4000, 1), "any", seeded())
    counts = Counter(decode(row).rstrip("$") for row in answer_NA)
    assert set(counts) == {"3*5+7", "5*3+7", "7+3*5", "7+5*3"}
    assert all(abs(count - 1000) < 4 * 1000**0.5 for count in counts.values())
    with pytest.raises(LabError, match="cannot make 99"):
        world.solve(rows("1,1,1:99="), "right", seeded())


def test_countdown_counts_how_often_a_number_is_used():
    """With 2, 2, 1 both numbers occur in 2+1+1 and 1+2+1, and the value is right; only 2*2*1 uses them as given."""
    answers = rows("2*2*1$", "2+1+1$", "1+2+1$", "2*1*2$")
    assert Countdown().verify(rows("2,2,1:04=").repeat(4, 1), answers).tolist() == [True, False, False, True]


def test_countdown_reads_no_negative_ids():
    """Ids below 0 beside as many digits as a right answer has, where the reader expects a number: wrong, no crash."""
    hostile = torch.tensor([[-1, -1, 0, 3, 1, 1, END], [0, -3, 3, 1, 1, END, END], [0, 3, -1, 1, 1, END, END]])
    assert not Countdown(2, 12).verify(rows("03,11:33=").repeat(3, 1), hostile).any()


def test_countdown_writes_the_shortest_expression():
    """No expression that "any" draws for 300 problems is shorter than the one of "right"; some are longer."""
    world = Countdown(4)
    prompt_NT = world.problems(300)
    right_N, any_N = (answer_lengths(world.solve(prompt_NT, dialect, seeded()))[0] for dialect in ("right", "any"))
    assert (right_N <= any_N).all() and (right_N < any_N).any()


def test_countdown_numbers_and_targets_are_in_range():
    """Numbers from 1 to the largest, all of them; targets from 1 to the largest target, with both brackets needed."""
    world = Countdown(3, 12, largest_target=150)
    number_NK, target_N = world.posed(world.draw(5000, seeded()))
    assert number_NK.unique().tolist() == list(range(1, 13)) and 1 <= target_N.min() and 144 <= target_N.max() <= 150
    tight = Countdown(2, 1, largest_target=1)
    assert set(map(decode, tight.draw(20, seeded()))) == {"1,1:1="}


def test_a_broken_list_has_one_repair_from_length_6_on():
    """All pairs of the 100 progressions: from 6 items on two of them differ in at least 3 places, so that no list is
    one item away from two of them; at 5 there is a pair that differs in 2, so 5 would not do."""
    def nearest(length):
        progression_PL = torch.tensor([[(a + d * i) % 10 for i in range(length)] for a in range(10) for d in range(10)])
        differing_PP = (progression_PL[:, None] != progression_PL).sum(2)
        return differing_PP.fill_diagonal_(length).min().item()
    assert nearest(5) == 2 and all(nearest(length) >= 3 for length in range(6, 17))


def test_every_broken_list_of_length_6_is_repaired():
    """All 5,400 prompts: the repair is the progression they were made from, one item away."""
    world = ListRepair()
    made_NL, broken_NL = [], []
    for a, d, place, error in product(range(10), range(10), range(6), range(1, 10)):
        made_NL.append([(a + d * i) % 10 for i in range(6)])
        broken_NL.append([(x + error * (i == place)) % 10 for i, x in enumerate(made_NL[-1])])
    prompt_NT = world.framed(torch.tensor(broken_NL))
    assert torch.equal(world.repaired(prompt_NT), torch.tensor(made_NL))
    drawn = set(map(decode, world.draw(100_000, seeded())))
    assert drawn == set(map(decode, prompt_NT))  # every prompt can be drawn, and no other


@pytest.mark.parametrize(("answer", "extra", "repaired"), [
    ("258147$", 0, True), ("258947$", 0, False), ("036925$", 5, False), ("258148$", 1, True), ("268137$", 2, True),
    ("258247$", 0, False), ("2581$$$", 2, True), ("258$$$$", 2, False), ("$$$$$$$", 5, False), ("2581471", 0, True),
    ("abc1de$", 5, True),
])
def test_edits_counts_what_was_changed_without_need(answer, extra, repaired):
    """258947, whose fourth item should be 1: changes of the five sound items, and whether that one is sound now."""
    extra_N, repaired_N = ListRepair().edits(rows("f258947>"), rows(answer))
    assert (extra_N.tolist(), repaired_N.tolist()) == ([extra], [repaired])


def test_edits_of_each_dialect():
    """minimal: none, repaired; copy: none, not repaired; rewrite: all other items, and a progression again. No columns
    at all is no crash."""
    world = ListRepair(8)
    prompt_NT = world.problems(300)
    for dialect, extra, repaired in (("minimal", 0, True), ("copy", 0, False), ("rewrite", 7, False)):
        answer_NA = world.solve(prompt_NT, dialect, seeded())
        extra_N, repaired_N = world.edits(prompt_NT, answer_NA)
        assert (extra_N == extra).all() and (repaired_N == repaired).all()
        assert torch.equal(world.verify(prompt_NT, answer_NA), (extra_N == 0) & repaired_N)
        if dialect == "rewrite":
            step_N7 = answer_NA[:, :-1].diff(dim=1) % 10
            assert (step_N7 == step_N7[:, :1]).all()
    assert world.edits(prompt_NT, torch.empty(300, 0, dtype=torch.long))[0].tolist() == [7] * 300


# --- sizes, alphabet, lengths


@pytest.mark.parametrize("make", [
    partial(StrategyAddition, 0), partial(StrategyAddition, 9), partial(StrategyAddition, filler=-1),
    partial(StrategyAddition, noise=1.5), partial(WrittenAddition, 0), partial(WrittenAddition, noise=-0.1),
    partial(RunningSum, 0), partial(RunningSum, 65), partial(RunningSum, 3, 1), partial(RunningSum, 3, 11),
    partial(RunningSum, slip=1.1), partial(RunningSum, wait_right=-1), partial(DigitList, "parities"),
    partial(DigitList, "sort", 0), partial(DigitList, "sort", 17), partial(DigitList, "parity", same=2),
    partial(Countdown, 1), partial(Countdown, 5), partial(Countdown, 3, 0), partial(Countdown, 3, 100),
    partial(Countdown, largest_target=0), partial(Countdown, largest_target=10**4), partial(ListRepair, 5),
    partial(ListRepair, 17),
])
def test_impossible_sizes_are_refused(make):
    """One clear sentence instead of a wrong world."""
    with pytest.raises(LabError):
        make()


@every_world
def test_unknown_dialects_sides_and_counts_are_refused(world):
    """A misspelt name must not silently give another world's answers."""
    prompt_NT = world.problems(2)
    for ask in (partial(world.solve, prompt_NT, "latin", seeded()), partial(world.problems, 3, split="dev"),
                partial(world.problems, -1)):
        with pytest.raises(LabError):
            ask()


@pytest.mark.parametrize("world", [RunningSum(64, 10), RunningSum(32), DigitList("sort", 16), ListRepair(16),
                                   StrategyAddition(8), WrittenAddition(8), Countdown(4, 99, largest_target=9999)],
                         ids=lambda world: world.name)
def test_the_largest_sizes_work(world):
    """Contents stay in 64 bits, so that they are not negative and the judge agrees with right and changed answers."""
    prompt_NT = world.problems(20, split="test")
    assert (world.content(prompt_NT) >= 0).all()
    for dialect in right_dialects(world):
        answer_NA = world.solve(prompt_NT, dialect, seeded())
        assert assert_agrees(world, prompt_NT, answer_NA).all()
        assert_agrees(world, prompt_NT, answer_NA.roll(1, 0))


def test_names_tell_worlds_apart():
    """A base checkpoint is found by its world's name."""
    worlds = [*WORLDS, RunningSum(3), RunningSum(3, slip=0.15), DigitList("parity", same=0.5),
              Countdown(3, 9, largest_target=50)]
    assert len({world.name for world in worlds}) == len(worlds)


def test_the_alphabet_round_trips():
    """Every symbol, both ways; the token of digit d is d; "$" is END; a foreign symbol is named."""
    assert decode(encode(SYMBOLS)) == SYMBOLS and VOCAB == len(set(SYMBOLS)) == 48
    assert [token(str(d)) for d in range(10)] == list(range(10)) and token("$") == END
    assert decode(torch.tensor([3, END])) == "3$"
    with pytest.raises(LabError, match="X Ä"):
        encode("3XÄ")


def test_digits_and_value_are_inverse():
    """With leading zeros; `digits` keeps the last places."""
    number_N = torch.tensor([0, 7, 10, 999, 1000])
    assert digits(number_N, 4).tolist() == [[0, 0, 0, 0], [0, 0, 0, 7], [0, 0, 1, 0], [0, 9, 9, 9], [1, 0, 0, 0]]
    assert torch.equal(value(digits(number_N, 4)), number_N)
    assert digits(torch.tensor([1234]), 2).tolist() == [[3, 4]]


def test_lengths_and_masks_by_hand():
    """END counts, what is behind does not, a missing END is told, and no columns are no answer."""
    answer_NA = rows("12$$", "1234", "$123", "1$3$")
    length_N, ended_N = answer_lengths(answer_NA)
    assert length_N.tolist() == [3, 4, 1, 2] and ended_N.tolist() == [True, False, True, True]
    assert answer_mask(answer_NA).sum(1).tolist() == [3, 4, 1, 2] and answer_mask(answer_NA)[:, 0].all()
    assert [decode(row) for row in head(answer_NA, 6)] == ["12$$$$", "1234$$", "$$$$$$", "1$$$$$"]
    assert [decode(row) for row in head(answer_NA, 2)] == ["12", "12", "$$", "1$"]
    assert of_length(answer_NA, 4).tolist() == [False] * 4 and of_length(answer_NA, 3).tolist() == [True] + [False] * 3
    empty_NA = torch.empty(2, 0, dtype=torch.long)
    assert answer_lengths(empty_NA)[0].tolist() == [0, 0] and not answer_lengths(empty_NA)[1].any()
    assert head(empty_NA, 2).tolist() == [[END, END]] * 2 and not of_length(empty_NA, 0).any()
