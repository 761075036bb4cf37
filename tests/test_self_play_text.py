"""Lab 15 on text: a batch says what its rows say alone, arms are what they say, and DPO raises a planted preference.

The model is a tiny random Llama that is written to a folder and opened like a real one; nothing is downloaded.
"""

import json
import math
import string
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from planted import altered
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from labkit.course.header import NOTEBOOKS
from labkit.errors import LabError
from labkit.trainers import self_play_text, self_play_text_model, self_play_text_pool
from labkit.trainers.dpo import DPOSettings, Pairs, dpo
from labkit.trainers.self_play_pool import TextFilters
from labkit.trainers.self_play_text import EXAM, QUESTIONS, RUBRICS, TextSettings, hint_rows, summary, text_lab
from labkit.trainers.self_play_text_model import PADDING, Instruct, answer_counts, cut_behind, load_instruct
from labkit.trainers.self_play_text_pool import TextPool, deltas, draw_text_pool, proposals
from labkit.trainers.self_play_text_rubrics import Rubric

transformers = pytest.importorskip("transformers")
TEMPLATE = ("{% for m in messages %}<user>{{ m['content'] }}<end>{% endfor %}"
            "{% if add_generation_prompt %}<answer>{% if enable_thinking is defined and not enable_thinking %}!"
            "{% endif %}{% endif %}")
SPECIAL = ["<end>", "<user>", "<answer>"]
SAYS_E = Rubric("Say e.", lambda text: "e" in text)
ANY = TextFilters(shortest=0, most_times=1e9, common_prefix=10_000)


def letter_tokenizer():
    """A token a letter, with a chat template; all other signs are the unknown token."""
    words = [*SPECIAL, "?", *string.ascii_lowercase, " ", "!"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="?",
                                                     additional_special_tokens=SPECIAL[1:])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder as the hub has them."""
    torch.manual_seed(0)
    path, tokenizer = tmp_path_factory.mktemp("tiny"), letter_tokenizer()
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, eos_token_id=0,
                                      num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512,
                                      initializer_range=0.1)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tiny(folder):
    return load_instruct(str(folder))


@pytest.fixture(scope="module")
def chat(tiny):
    return Instruct(*tiny, new=9, temperature=0, drawn_at_once=3, scored_at_once=2)


ASKED = ["a", "a longer question", "mid"]
HINTS = ["short", None, "some other hint"]


def assert_batches(chat):
    """Greedy answers are those of transformers' own generate, prompt by prompt, and log p is that of one row alone."""
    prompt_NP = chat.prompts(ASKED, HINTS)
    answer_NA = chat.answers(prompt_NP)
    logp_NA = chat.logprob(prompt_NP, answer_NA)
    assert prompt_NP.shape[0] == 3 and (prompt_NP[0] == PADDING).any() and (prompt_NP[:, -1] != PADDING).all()
    for question, hint, answer_A, logp_A in zip(ASKED, HINTS, answer_NA, logp_NA, strict=True):
        one_1P = chat.prompt(question, hint)[None]
        theirs = chat.model.generate(one_1P, attention_mask=torch.ones_like(one_1P), do_sample=False, pad_token_id=0,
                                     max_new_tokens=chat.new)[0, one_1P.shape[1]:]
        ours = answer_A[answer_A != PADDING]
        assert ours.tolist() == theirs.tolist()
        with torch.no_grad():
            logits_TV = chat.model(torch.cat((one_1P[0], ours))[None]).logits[0].log_softmax(-1)
        want = [float(logits_TV[one_1P.shape[1] + t - 1, token]) for t, token in enumerate(ours.tolist())]
        assert logp_A[: len(ours)].tolist() == pytest.approx(want, abs=1e-4)
        assert not logp_A[len(ours):].any()


def test_a_batch_says_what_its_rows_say_alone(chat):
    """Left padding, masks and positions: three prompts of three lengths, also where one answer ends early."""
    assert_batches(chat)
    tokens = chat.answers(chat.prompts(ASKED, HINTS))
    end = int(tokens[0, 3])  # a token that one greedy answer contains becomes one that ends answers
    settings, before = chat.model.generation_config, chat.model.generation_config.eos_token_id
    settings.eos_token_id = [0, end]
    try:
        assert_batches(chat)
        assert (chat.answers(chat.prompts(ASKED, HINTS)) == PADDING).any()
    finally:
        settings.eos_token_id = before


def assert_inputs():
    """One row with padding in front and one behind."""
    got = self_play_text_model.inputs_of(torch.tensor([[PADDING, 5, 6], [7, 8, PADDING]]))
    assert got["input_ids"].tolist() == [[0, 5, 6], [7, 8, 0]]
    assert got["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 0]]
    assert got["position_ids"].tolist() == [[0, 0, 1], [0, 1, 1]]


@pytest.mark.parametrize(("old", "new"), [
    ("(shown_BT.cumsum(1) - 1)", "torch.ones_like(text_BT).cumsum(1)"),
    ('"attention_mask": shown_BT.long()', '"attention_mask": torch.ones_like(text_BT)')])
def test_a_fault_in_the_padding_is_seen(chat, monkeypatch, old, new):
    """Positions that count the padding; a mask that shows it."""
    assert_inputs()
    space, inputs_of = vars(self_play_text_model), self_play_text_model.inputs_of
    monkeypatch.setattr(self_play_text_model, "inputs_of", altered(inputs_of, "inputs_of", old, new, dict(space)))
    with pytest.raises(AssertionError):
        assert_inputs()
    if "mask" in old:  # rotary positions are relative, so a Llama would not notice a shift of the whole row
        with pytest.raises(AssertionError):
            assert_batches(chat)


def test_gradients_of_parts(chat):
    """In parts and computed twice, the gradient is that of one pass; so it is in bf16, within its precision."""
    prompt_NP = chat.prompts(ASKED, HINTS)
    answer_NA = chat.answers(prompt_NP)

    def gradient(chat):
        chat.model.zero_grad()
        chat.logprob(prompt_NP, answer_NA).sum().backward()
        return torch.cat([each.grad.flatten() for each in chat.model.parameters()])

    whole = gradient(replace(chat, scored_at_once=3))
    assert whole.isfinite().all() and whole.abs().max() > 0.1
    torch.testing.assert_close(gradient(replace(chat, scored_at_once=1)), whole, rtol=1e-3, atol=1e-4)
    coarse = gradient(replace(chat, scored_at_once=1, precision="bf16"))
    assert 0 < (coarse - whole).norm() / whole.norm() < 0.1
    chat.model.zero_grad()


def test_delta_is_the_written_out_mean(chat):
    """Two passes by hand, sliced where each context ends; a hint of other length moves the slice."""
    questions, hints = ["q", "q"], ["short", "a much longer hint"]
    plain_NA = torch.tensor([[5, 6, 7, 0], [5, 6, 0, PADDING]])
    got = deltas(chat, questions, hints, plain_NA)
    for delta, hint, answer in zip(got, hints, ([5, 6, 7, 0], [5, 6, 0]), strict=True):
        means = []
        for context in (chat.prompt("q"), chat.prompt("q", hint)):
            with torch.no_grad():
                logits_TV = chat.model(torch.tensor([[*context, *answer]])).logits[0].log_softmax(-1)
            means.append(sum(float(logits_TV[len(context) + t - 1, a]) for t, a in enumerate(answer)) / len(answer))
        assert float(delta) == pytest.approx(means[0] - means[1], abs=1e-5)


def test_prompts_are_the_templates(chat):
    """One user turn, the hint behind it, the answer opened; a model that thinks first is told not to."""
    assert chat.tokenizer.decode(chat.prompt("why", "so")) == "<user>why??int? so<end><answer>!"  # ?: no letter
    assert cut_behind(torch.tensor([[5, 0, 7, 0], [5, 6, 7, 8], [2, 0, 0, 0]]), (0, 2)).tolist() == [
        [5, 0, PADDING, PADDING], [5, 6, 7, 8], [2, PADDING, PADDING, PADDING]]
    assert chat.texts(torch.tensor([[*chat.tokenizer("hi you<end>")["input_ids"], PADDING]])) == ["hi you"]


def pool_of(delta, better, fits):
    N = len(delta)
    empty_NA = torch.zeros(N, 1, dtype=torch.long)
    return TextPool(empty_NA, empty_NA, empty_NA + 1, torch.tensor(delta), torch.tensor(fits), torch.arange(N)[:, None],
                    ["BAD"] * N, torch.tensor(better))


def assert_arms(pool, kept):
    """The arms of a pool of six whose fourth the filters refuse."""
    assert kept(pool, "lower half", 0).tolist() == [True, True, True, False, False, False]
    assert torch.equal(kept(pool, "SFT", 0), kept(pool, "lower half", 0))
    assert kept(pool, "upper half", 0).tolist() == [False, False, False, False, True, True]
    assert kept(pool, "oracle", 0).tolist() == [False, True, False, False, True, False]
    for seed in range(20):
        drawn = kept(pool, "random half", seed)
        assert drawn.sum() == 3 and not drawn[3]
    assert len({tuple(kept(pool, "random half", seed).tolist()) for seed in range(20)}) > 3


def test_arms_by_hand():
    """Bands of delta, the rubric's pairs, a random part as large as the lower half, and a coin for labels."""
    pool = pool_of([0.0, 1, 2, 3, 4, 5], [0, 1, -1, 1, 1, -1], [True, True, True, False, True, True])
    assert_arms(pool, TextPool.kept)
    pairs, better = pool.pairs_of("lower half", 0)
    assert pairs.prompt_NP[:, 0].tolist() == [0, 1, 2] and better.tolist() == [0, 1, -1]
    assert pairs.chosen_NA.unique() == 1 and pairs.rejected_NA.unique() == 0
    large = pool_of([0.0] * 400, [1] * 400, [True] * 400)
    pairs, better = large.pairs_of("shuffled", 0)
    assert torch.equal(better == 1, pairs.chosen_NA[:, 0] == 1) and 150 < (better == 1).sum() < 250
    with pytest.raises(LabError, match="no arm 'middle'"):
        pool.kept("middle", 0)


@pytest.mark.parametrize(("old", "new"), [
    ("self.fits_N & (self.better_N > 0)", "self.better_N > 0"), ("self.better_N > 0", "self.better_N < 0"),
    ("self.band(50, 100)", "self.band(40, 100)"), ("len(fits)", "3"),
    ("self.fits_N.nonzero()", "(self.fits_N | True).nonzero()")])
def test_a_fault_in_an_arm_is_seen(old, new):
    """An oracle that takes refused or worse pairs, a wrong band, a random half of the first or of refused pairs."""
    pool = pool_of([0.0, 1, 2, 3, 4, 5], [0, 1, -1, 1, 1, -1], [True, True, True, False, True, True])
    with pytest.raises(AssertionError):
        assert_arms(pool, altered(TextPool.kept, "kept", old, new, dict(vars(self_play_text_pool))))


def test_a_pool_is_what_it_says(chat):
    """Drawn greedily: answers without and with the hint, deltas of the first, and what filters and rubric say."""
    questions, kinds = proposals(SAYS_E, 12, 5)
    hints = [SAYS_E.hints()[kind] for kind in kinds]
    plain_NA, assisted_NA = (chat.answers(chat.prompts(questions, each)) for each in (None, hints))
    said = [*zip(chat.texts(plain_NA), chat.texts(assisted_NA), strict=True)]
    letter = next(each for each in string.ascii_lowercase if len({(each in b) - (each in a) for a, b in said}) == 3)
    filters = TextFilters(shortest=1 + min(len(b) for _, b in said), most_times=1e9)
    pool = draw_text_pool(chat, replace(SAYS_E, holds=lambda text: letter in text), 12, seed=5, filters=filters)
    assert pool.kinds == kinds and not torch.equal(plain_NA, assisted_NA)
    assert torch.equal(pool.plain_NA, plain_NA) and torch.equal(pool.assisted_NA, assisted_NA)
    torch.testing.assert_close(pool.delta_N, deltas(chat, questions, hints, plain_NA))
    assert pool.better_N.tolist() == [(letter in b) - (letter in a) for a, b in said]
    assert pool.fits_N.tolist() == [len(b) >= filters.shortest for _, b in said] and not pool.fits_N.all()
    assert torch.equal(pool.question_NP, chat.prompts(questions))


def test_proposals_and_questions():
    """Different pairs of training questions and kinds, another draw for another seed; the exam asks about other
    things."""
    questions, kinds = proposals(RUBRICS["short"], 300, 1)
    assert len({*zip(questions, kinds, strict=True)}) == 300 and set(questions) <= set(QUESTIONS)
    assert all(60 <= kinds.count(kind) <= 90 for kind in ("STRUCT", "NO-OP", "BAD", "LEAK"))
    assert proposals(RUBRICS["short"], 300, 2) != (questions, kinds) == proposals(RUBRICS["short"], 300, 1)
    assert not set(QUESTIONS) & set(EXAM) and len(QUESTIONS) == 256 and len(EXAM) == 64
    with pytest.raises(LabError, match="pool of 1025"):
        proposals(RUBRICS["short"], 1025, 0)


SMALL = TextSettings(DPOSettings(12, 1e-2), pool=96, exam=48, new=8, temperature=1.0, filters=ANY,
                     arms=("oracle", "shuffled"), drawn_at_once=96, scored_at_once=96)


def test_dpo_raises_a_planted_preference(tiny):
    """A random model says "e" now and then. Where the rubric picks the pairs, DPO makes it say it on questions it never
    saw; a coin in place of the rubric does not. The model is afterwards what it was."""
    before = [each.clone() for each in tiny[0].parameters()]
    rows = text_lab(*tiny, SAYS_E, seeds=(0,), settings=SMALL)
    base, hinted, oracle, shuffled = rows
    assert [row["arm"] for row in rows] == ["base", "base with the hint", "oracle", "shuffled"]
    assert 0.1 < base["meets"] < 0.5 and 0.1 < hinted["meets"] < 0.5
    assert oracle["meets"] > base["meets"] + 0.3 and abs(shuffled["meets"] - base["meets"]) < 0.2
    assert oracle["better"] == 1 and oracle["worse"] == 0 and 5 < oracle["pairs"] < shuffled["pairs"] == 48
    assert all(torch.equal(a, b) for a, b in zip(before, tiny[0].parameters(), strict=True))


def test_the_same_seed_plays_the_same(tiny):
    """Draws depend on the seed alone, not on what was played before; SFT and DPO differ on the same pairs."""
    settings = replace(SMALL, dpo=DPOSettings(4, 1e-2), pool=12, exam=32, arms=("lower half", "SFT"))
    rows = text_lab(*tiny, SAYS_E, seeds=(0, 1), settings=settings)
    assert text_lab(*tiny, SAYS_E, seeds=(1,), settings=settings) == [row for row in rows if row["seed"] == 1]
    assert len(rows) == 8 and rows[2]["pairs"] == rows[3]["pairs"] and {**rows[2], "arm": "SFT"} != rows[3]


def test_an_arm_that_learns_nothing_scores_as_the_base(tiny):
    """All sit the same exam with the same dice, without the hint."""
    settings = replace(SMALL, dpo=DPOSettings(1, 1e-12), pool=12, exam=32, arms=("lower half",))
    base, hinted, arm = text_lab(*tiny, SAYS_E, seeds=(3,), settings=settings)
    exam = [{name: row[name] for name in ("meets", "words", "cut")} for row in (base, hinted, arm)]
    assert exam[0] == exam[2] != exam[1]


def test_weights_come_back_where_an_arm_fails(tiny, monkeypatch):
    """A run that is broken off leaves the model as it was."""
    before = [each.clone() for each in tiny[0].parameters()]

    def broken(chat, *_):
        with torch.no_grad():
            next(chat.model.parameters()).add_(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(self_play_text, "learned", broken)
    with pytest.raises(KeyboardInterrupt):
        text_lab(*tiny, SAYS_E, seeds=(0,), settings=replace(SMALL, pool=8, exam=2))
    assert all(torch.equal(a, b) for a, b in zip(before, tiny[0].parameters(), strict=True))


def test_the_reference_is_asked_once(chat):
    """Its log-probabilities are computed before the first step, for all pairs, and never again."""
    asked = []

    def counted(_, prompt_BP, answer_BA):
        asked.append((torch.is_grad_enabled(), len(prompt_BP)))
        return chat.logprob(prompt_BP, answer_BA)

    rows_3P = chat.prompts(ASKED, HINTS)
    start = {name: each.clone() for name, each in chat.model.named_parameters()}
    pairs = Pairs(rows_3P, chat.answers(rows_3P), torch.full((3, 2), 20))
    with self_play_text.weights_put_back(chat.model, start):
        history = dpo(chat.model, pairs, DPOSettings(3, 1e-3, batch=2), logprob=counted, mask=answer_counts)
    assert asked == [(False, 3)] * 2 + [(True, 2)] * 6
    assert history.rollouts["margin"][0] == 0 < history.rollouts["margin"][-1]


def test_summary_by_hand():
    """Means over seeds, changes paired by seed; an arm that found no pairs in one seed has the other's."""
    some, few = {"pairs": 6, "better": 1, "worse": 0}, {"pairs": 4, "better": 0, "worse": 1}
    known = ((0, "base", 0.2, {}), (1, "base", 0.4, {}), (0, "oracle", 0.5, some),
             (0, "SFT", 0.4, some | {"pairs": 8}), (1, "SFT", 0.8, few))
    rows = [{"seed": seed, "arm": arm, "meets": meets, "words": 10.0, "cut": 0.0, **more}
            for seed, arm, meets, more in known]
    base, oracle, sft = summary([*rows, {"seed": 1, "arm": "oracle", "pairs": 0}])
    assert base["arm"] == "base" and base["change"] == 0 and "pairs" not in base
    assert oracle["seeds"] == 1 and oracle["change"] == pytest.approx(0.3) and oracle["high"] == math.inf
    assert sft["pairs"] == 6 and sft["meets"] == pytest.approx(0.6) and sft["change"] == pytest.approx(0.3)
    assert sft["low"] < 0.3 < sft["high"] < 10


def test_hint_rows(tiny):
    """Four hints, the plain share alike in all rows, the same numbers again, and a sentence where nothing is asked."""
    asked = {"questions": ("a", "b"), "settings": TextSettings(new=6)}
    rows = hint_rows(*tiny, RUBRICS["no comma"], **asked)
    assert [row["kind"] for row in rows] == ["STRUCT", "NO-OP", "BAD", "LEAK"]
    assert len({row["without"] for row in rows}) == 1 and len({row["delta"] for row in rows}) == 4
    assert rows == hint_rows(*tiny, RUBRICS["no comma"], **asked)
    with pytest.raises(LabError, match="no questions"):
        hint_rows(*tiny, RUBRICS["no comma"], questions=())


@pytest.mark.parametrize(("name", "good", "bad"), [
    ("no comma", "one two", "one, two"), ("short", "few words", "word " * 31), ("lower case", "all low 3", "One"),
    ("three points", "- a\n- b\n- c", "- a\n- b"), ("no comma", "x", " "),
])
def test_rubrics(name, good, bad):
    """Each constraint on a text that meets it and one that does not; nothing said meets none."""
    assert RUBRICS[name].holds(good) and not RUBRICS[name].holds(bad) and not RUBRICS[name].holds("")


def test_a_sentence_for_each_model_that_cannot_be_had(folder, tiny, tmp_path, monkeypatch):
    """No library, no such model, no chat template, no token that ends, no usable pool, settings that cannot be."""
    with pytest.raises(LabError, match=r"can't be opened.*hf download"):
        load_instruct(str(tmp_path / "nothing" / "here"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such architecture"}))
    with pytest.raises(LabError, match="can't be opened"):
        load_instruct(str(tmp_path))
    plain = letter_tokenizer()
    plain.chat_template = None
    with pytest.raises(LabError, match="no chat template"):
        text_lab(tiny[0], plain, SAYS_E)
    endless = letter_tokenizer()
    endless.eos_token = None
    with pytest.raises(LabError, match="which token ends"):
        text_lab(SimpleNamespace(generation_config=None), endless, SAYS_E)
    with pytest.raises(LabError, match="refused all 4"):
        text_lab(*tiny, SAYS_E, settings=replace(SMALL, pool=4, exam=1, filters=TextFilters(shortest=9999)))
    for wrong in ({"arms": ("best half",)}, {"exam": 65}):
        with pytest.raises(LabError, match="can't be run"):
            replace(SMALL, **wrong)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LabError, match=r"transformers.*pip install -e '.\[hf\]'"):
        load_instruct(str(folder))


def optional_cell():
    """The cell of notebook 15 that a named model runs."""
    cells = json.loads((NOTEBOOKS / "15_g_zero.ipynb").read_text())["cells"]
    source, = ("".join(cell["source"]) for cell in cells
               if cell["cell_type"] == "code" and "LABKIT_HF_MODEL" in "".join(cell["source"]))
    return source


@pytest.mark.parametrize("named", [True, False])
def test_the_optional_cell(folder, monkeypatch, capsys, named):
    """With a model's name it plays and shows a table; without one it says in one sentence how to."""
    shown = []
    lab = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32,
                          table=lambda rows, *_, **__: shown.extend(rows))
    s = SimpleNamespace(text=(8, 1, 24, 1))
    if named:
        monkeypatch.setenv("LABKIT_HF_MODEL", str(folder))
    else:
        monkeypatch.delenv("LABKIT_HF_MODEL", raising=False)
    exec(optional_cell(), {"lab": lab, "s": s, "torch": torch, "DPOSettings": DPOSettings})
    said = capsys.readouterr().out
    assert ("LABKIT_HF_MODEL=" in said) != named
    wanted = {"base", "base with the hint", "lower half", "SFT"} if named else set()
    assert wanted <= {row[0] for row in shown} and bool(shown) == named
