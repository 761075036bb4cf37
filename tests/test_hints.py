"""The world with hints: what it writes, how it judges, and that proposals are read as they were written.

The judges below are regular expressions on text; tensors must say the same of solutions, of every change of one token
in them, and of noise.
"""

import re

import pytest
import torch
from planted import altered

from labkit.errors import LabError
from labkit.tasks import HintProposals, HintWorld, hints
from labkit.tasks.alphabet import END, VOCAB, decode, encode
from labkit.tasks.hints import KINDS, PI

WORLDS = [HintWorld(), HintWorld(1), HintWorld(4, kinds=("none", "LEAK"))]
every_world = pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def row(text, length):
    return torch.tensor([encode(text) + [END] * (length - len(text))])


def spelling(word):
    return "".join(str(PI["abcdefghijkl".index(letter)]) for letter in word)


def judge(world, prompt, answer):
    """(right, worked form) of an answer with its END; None for one without."""
    word = prompt[: world.length]
    body = None if "$" not in answer else answer[: answer.index("$")]
    if body is None:
        return False, False
    right = body.count(":") == 1 and body.endswith(":" + spelling(word))
    form = "".join(letter + "[0-9]" for letter in word) + ":" + "[0-9]" * len(word)
    return right, re.fullmatch(form, body) is not None


def assert_agrees(world, prompt_NT, answer_NA, verify=None):
    said = zip((verify or world.verify)(prompt_NT, answer_NA).tolist(), world.is_worked(prompt_NT, answer_NA).tolist(),
               strict=True)
    for prompt, answer, verdicts in zip(prompt_NT, answer_NA, said, strict=True):
        assert judge(world, decode(prompt), decode(answer)) == verdicts, (decode(prompt), decode(answer))


def changed_answers(world, count=30):
    """Solutions of both dialects, each with one token changed to a random one, or shifted by one place."""
    prompt_NT = world.draw(count, dice(1))
    for dialect in world.dialects:
        answer_NA = world.solve(prompt_NT, dialect, dice(2))
        yield prompt_NT, answer_NA
        for place in range(answer_NA.shape[1]):
            other_NA = answer_NA.clone()
            other_NA[:, place] = torch.randint(VOCAB, (count,), generator=dice(place))
            yield prompt_NT, other_NA
        yield prompt_NT, answer_NA.roll(1, 1)
        yield prompt_NT, answer_NA[:, :3]


@every_world
def test_verdicts_agree_with_text(world):
    """Right and worked, by tensors and by regular expressions."""
    for prompt_NT, answer_NA in changed_answers(world):
        assert_agrees(world, prompt_NT, answer_NA)


@pytest.mark.parametrize(("old", "new"), [("ended_N & once_N", "once_N"), ("ended_N & once_N", "ended_N"),
                                          ("said_NS[:, 1 : L + 1]", "said_NS[:, 0:L]")])
def test_a_fault_in_the_verifier_is_seen(old, new):
    """An answer without END, one with two ":", and numbers read one place too early."""
    world = HintWorld()
    wrong = altered(HintWorld.verify, "verify", old, new, vars(hints).copy()).__get__(world)
    extra = [(row("abc----=", 8), row("::314$", 11)), (row("abc----=", 8), torch.tensor([encode(":314")]))]
    with pytest.raises(AssertionError):
        for prompt_NT, answer_NA in (*changed_answers(world), *extra):
            assert_agrees(world, prompt_NT, answer_NA, wrong)


@pytest.mark.parametrize(("prompt", "pattern"), [
    ("fabw*--=", r"f9a3b1:931\$"), ("fabt277=", r":277\$+"), ("fabx---=", r"[0-9a-l:]{6}\$+"),
    ("fabq***=", r":[0-9]{3}\$+"), ("fab----=", r"(f9a3b1:931|:[0-9]{3})\$+"),
    ("fabn*--=", r"(f9a3b1:931|:[0-9]{3})\$+"),
])
def test_hints_are_obeyed(prompt, pattern):
    """Each kind of hint gives the answers of the docstring, 200 times out of 200."""
    world = HintWorld()
    answer_NA = world.solve(row(prompt, 8).expand(200, -1), "corpus", dice())
    assert all(re.fullmatch(pattern, decode(answer)) for answer in answer_NA)


def test_the_corpus_has_its_rates():
    """Without a hint: worked in 60% of the easy words, 25% of the others; terse answers right in 25%, and by luck."""
    world = HintWorld(kinds=("none",))
    prompt_NT = world.draw(40_000, dice())
    answer_NA = world.solve(prompt_NT, "corpus", dice(1))
    worked_N, easy_N = world.is_worked(prompt_NT, answer_NA), world.is_easy(prompt_NT)
    assert worked_N[easy_N].float().mean().item() == pytest.approx(0.6, abs=0.015)
    assert worked_N[~easy_N].float().mean().item() == pytest.approx(0.25, abs=0.015)
    assert world.verify(prompt_NT, answer_NA)[worked_N].all()
    assert world.verify(prompt_NT, answer_NA)[~worked_N].float().mean().item() == pytest.approx(0.2508, abs=0.012)


def test_a_prompt_without_its_hint_is_the_same_problem():
    """Equal content, the other tokens kept, and no hint left; sides share no word."""
    world = HintWorld()
    prompt_NT = world.draw(50, dice())
    bare_NT = world.without_hint(prompt_NT)
    assert torch.equal(world.content(prompt_NT), world.content(bare_NT)) and world.is_kind(bare_NT, "none").all()
    assert torch.equal(bare_NT[:, :3], prompt_NT[:, :3]) and torch.equal(bare_NT[:, -1], prompt_NT[:, -1])
    sides = [set(world.content(world.problems(500, split=side)).tolist()) for side in ("train", "test")]
    assert not sides[0] & sides[1]
    assert len(set(world.content(torch.cartesian_prod(*[torch.arange(23, 35)] * 3)).tolist())) == 12**3


@pytest.mark.parametrize("kinds", [("STRUCT", "NO-OP"), KINDS])
def test_kinds_are_drawn_alike(kinds):
    """Each about as often as the others, and no other."""
    world = HintWorld(kinds=kinds)
    prompt_NT = world.draw(6000, dice())
    shares = [float(world.is_kind(prompt_NT, kind).float().mean()) for kind in kinds]
    assert shares == pytest.approx([1 / len(kinds)] * len(kinds), abs=0.03) and sum(shares) == pytest.approx(1)


# ---- proposals


@pytest.mark.parametrize("count", [0, 1, 300])
def test_proposals_are_read_as_they_were_written(count):
    """Proper proposals give back word and hint; the corpus's slips cannot be read, and have their rate."""
    world = HintWorld()
    proposals = HintProposals(world)
    ask_NT = proposals.problems(count)
    prompt_NT, valid_N = proposals.read(proposals.solve(ask_NT, "proper", dice()))
    assert valid_N.all() and prompt_NT.shape == (count, world.prompt_length)
    word_NL, hint_NS = prompt_NT[:, :3], prompt_NT[:, 3:7]
    again_NT, valid_N = proposals.read(proposals.written(word_NL, hint_NS))
    assert valid_N.all() and torch.equal(again_NT, prompt_NT)
    if count == 300:
        assert not proposals.verify(ask_NT, proposals.solve(ask_NT, "corpus", dice())).all()


@pytest.mark.parametrize(("text", "prompt"), [
    ("fab>w$", "fabw---="), ("fab>n**$", "fabn**-="), ("fab>t277$", "fabt277="), ("fab>q***$", "fabq***="),
    ("fab>t27$", None), ("fab>w2$", None), ("fab>t***$", None), ("fabw***$", None), ("fa>w***$", None),
    ("f2b>w***$", None), ("fab>-$", None), ("fab>$", None), ("fab>w****$", None), ("fab>w***", None), ("$", None),
    ("fab>w$*", "fabw---="), ("fab>*$", None),
])
def test_what_can_be_read(text, prompt):
    """Word, ">", a known letter, stars or (after LEAK) three digits, END in time; what follows END does not count."""
    proposals = HintProposals(kinds=KINDS[1:])
    tokens = encode(text) if text == "fab>w***" else (encode(text) + [END] * 9)[: max(9, len(text))]
    read_1T, valid_1 = proposals.read(torch.tensor([tokens]))
    assert bool(valid_1) == (prompt is not None)
    if prompt:
        assert decode(read_1T[0]) == prompt


def test_a_kind_that_is_not_proposed_cannot_be_read():
    """The same proposal under two settings: this is how a lab takes a kind of hint away from the proposer."""
    proposal_NA = torch.cat([row(text, 9) for text in ("fab>q", "fab>x", "fab>w")])
    assert HintProposals().read(proposal_NA)[1].tolist() == [False, True, True]
    assert HintProposals(kinds=("STRUCT", "NO-OP")).read(proposal_NA)[1].tolist() == [False, False, True]


def test_hint_lengths():
    """The letter and what stands behind it, without blanks."""
    prompt_NT = torch.cat([row(text, 8) for text in ("fabw---=", "fabw**-=", "fabt277=", "fab----=")])
    assert HintProposals().hint_length(prompt_NT).tolist() == [1, 3, 4, 0]


def test_settings_that_make_no_sense():
    """A sentence for each."""
    for wrong in (lambda: HintWorld(0), lambda: HintWorld(careless=2), lambda: HintWorld(kinds=()),
                  lambda: HintWorld(kinds=("NICE",)), lambda: HintProposals(slips=-1),
                  lambda: HintProposals(kinds=("none",)), lambda: HintWorld().is_kind(row("fabw---=", 8), "NICE")):
        with pytest.raises(LabError):
            wrong()
