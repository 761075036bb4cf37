"""The diagnosis names the failure that was planted and no other, and reads Hugging Face's decoders as it reads ours."""

import copy
import dataclasses
import functools
import math

import pytest
import torch

from labkit.course.diagnosis_card import draw_diagnosis
from labkit.course.figures import png
from labkit.errors import LabError
from labkit.measure import diagnose_distillation
from labkit.measure.decoders import HuggingFaceDecoder, OurDecoder, decoder_for
from labkit.measure.diagnosis_findings import Limits, findings
from labkit.models import GPT, GPTConfig
from labkit.models.llama import from_llama
from labkit.tasks import DigitList
from labkit.tasks.alphabet import END, VOCAB
from labkit.trainers import Lesson, TrainSettings, imitate

transformers = pytest.importorskip("transformers")
WORLD = DigitList("sort", 3)
CONFIG = GPTConfig(VOCAB, context=24, width=32, layers=1, heads=2)
ASKED = {"max_new_tokens": WORLD.answer_length, "verify": WORLD.verify, "cuts": (0, 2), "k": 5}


@functools.cache
def trained(steps: int) -> GPT:
    model = GPT(CONFIG)
    imitate(model, [Lesson(WORLD, "canonical")], TrainSettings(steps, 1e-2, batch=64, warmup=5))
    return model


def prompts(count=40):
    return WORLD.problems(count, split="test")


def found(diagnosis):
    return {finding.mode for finding in diagnosis.findings if finding.found}


def test_a_teacher_that_is_the_student_has_no_news():
    """Equal models: no divergence, all mass shared, no cost, and going on for each other changes nothing much."""
    diagnosis = diagnose_distillation(trained(150), trained(150), prompts(200), **ASKED)
    numbers = diagnosis.numbers
    assert found(diagnosis) == {"no news"}
    assert numbers["kl"] == pytest.approx(0, abs=1e-9) and numbers["overlap"] == 1 and numbers["shared_mass"] > 0.97
    assert all(abs(teacher - student) < 0.15 for teacher, student in diagnosis.cuts.values())


def test_a_teacher_with_other_words_is_a_menu_failure():
    """A teacher whose likely tokens lie elsewhere; a better teacher of the same words is none."""
    other = trained(150)
    apart = copy.deepcopy(other)
    with torch.no_grad():  # the digits 0-4 as 5-9 and the other way round, on both sides of a tied head
        apart.embedding.weight[:10] = apart.embedding.weight[:10].roll(5, 0)
    assert "menu" in found(diagnose_distillation(other, apart, prompts(), **ASKED))
    better = diagnose_distillation(trained(40), trained(150), prompts(), **ASKED)
    assert "menu" not in found(better) and better.numbers["kl"] > 0.02
    teacher, student = better.cuts[0]
    assert teacher > student + 0.2


def test_answers_without_an_end_are_loops():
    """A student that cannot stop and says one thing again and again."""
    stuck = copy.deepcopy(trained(150))
    stuck.forward = stuck.head = lambda hidden: torch.nn.functional.one_hot(
        torch.full(hidden.shape[:2] if hidden.ndim == 3 else hidden.shape[:1], 7), VOCAB) * 20.0
    diagnosis = diagnose_distillation(stuck, trained(150), prompts(), max_new_tokens=12, k=5)
    assert "loops" in found(diagnosis)
    assert diagnosis.numbers["truncated"] == 1 and diagnosis.numbers["looped"] > 0.95
    assert diagnosis.findings[-1].found is None  # no verifier, no horizon


def test_an_end_marker_with_another_number_is_named():
    """Teacher and student differ in the id of END alone: its positions carry the cost, and the sentence has its id."""
    strange = copy.deepcopy(trained(150))
    with torch.no_grad():
        strange.embedding.weight[[END, 40]] = strange.embedding.weight[[40, END]]
    diagnosis = diagnose_distillation(trained(150), strange, prompts(), **ASKED)
    assert "signal" in found(diagnosis) and diagnosis.numbers["worst_token"] == END
    assert f"token {END} " in next(each.sentence for each in diagnosis.findings if each.mode == "signal")


def test_doom_is_a_short_horizon():
    """A teacher that is right from the start and cannot repair what the student has written: its help is gone at the
    last cut. With a limit of 0 nothing of that is found."""
    asked = ASKED | {"cuts": (0, 1, 2, 3)}
    diagnosis = diagnose_distillation(trained(25), trained(150), prompts(200), **asked)
    gain = {cut: teacher - student for cut, (teacher, student) in diagnosis.cuts.items()}
    assert gain[0] > 0.3 and gain[3] < 0.25 * gain[0] and "horizon" in found(diagnosis)
    without = diagnose_distillation(trained(25), trained(150), prompts(200), **asked, limits=Limits(lasting=-9.0))
    assert "horizon" not in found(without)


def test_the_coherence_row_does_not_depend_on_the_number_of_answers():
    """R grows with N; the share of the squares that is common does not, so the verdict is the same for few and many."""
    few, many = (diagnose_distillation(trained(25), trained(150), prompts(n), **ASKED) for n in (40, 400))
    assert many.numbers["amplification"] > 4 * few.numbers["amplification"]
    assert many.numbers["common_share"] == pytest.approx(few.numbers["common_share"], rel=0.4)
    assert "coherence" not in found(few) and "coherence" not in found(many)


@pytest.mark.parametrize("numbers, verdict", [(dict(common_share=0.001), True), (dict(common_share=-0.0001), True),
                                              (dict(common_share=0.05), False),
                                              (dict(common_share=0.001, rms_gradient=0.01), False)])
def test_gradients_that_share_nothing_are_found_where_they_are_large(numbers, verdict):
    """Nothing in common counts where the single gradients are large; small ones are no news."""
    diagnosis = diagnose_distillation(trained(25), trained(150), prompts(), **ASKED)
    rows = findings(diagnosis.numbers | dict(rms_gradient=1.0) | numbers, {}, Limits())
    assert next(row.found for row in rows if row.mode == "coherence") is verdict


def test_numbers_repeat_with_the_seed():
    """The same seed gives the same numbers, another one others."""
    one, again, other = (diagnose_distillation(trained(40), trained(150), prompts(), seed=seed, **ASKED).numbers
                         for seed in (0, 0, 1))
    assert one == again and one != other


# ---- Hugging Face


@functools.cache
def llamas():
    """A random Llama, and the labkit GPT with its weights."""
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=24, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_theta=10_000.0, attention_bias=False)).eval()
    for parameter in llama.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return llama, from_llama(llama.state_dict(), dataclasses.replace(CONFIG, ffn=64))


@torch.no_grad()
def test_both_kinds_of_decoder_say_the_same():
    """One set of weights, asked as a transformers model and as ours: hidden states and logits are equal, and what is
    drawn has the same distribution at the first and the last place of 1,000 answers."""
    theirs, ours = (decoder_for(model) for model in llamas())
    assert isinstance(theirs, HuggingFaceDecoder) and isinstance(ours, OurDecoder) and theirs.vocabulary == VOCAB
    prompt, shown = prompts(4), torch.ones(4, WORLD.prompt_length, dtype=torch.bool)
    drawn = [each.draw(prompt, shown, 5, (END,), 1000, torch.Generator().manual_seed(3)) for each in (theirs, ours)]
    for a, b in zip(*(each.states(prompt.repeat_interleave(1000, 0), shown.repeat_interleave(1000, 0), drawn[0])
                      for each in (theirs, ours)), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
    for place in (0, 4):
        shares = [torch.bincount(each[:1000, place], minlength=VOCAB) / 1000 for each in drawn]
        assert (shares[0] - shares[1]).abs().max() < 0.07
    for answer in drawn:
        behind = (answer == END).cumsum(1) - (answer == END).long() > 0
        assert (answer[behind] == END).all()


def test_padding_in_front_changes_nothing():
    """A prompt with padding before it, and a mask, gives the states and the draws of the prompt alone."""
    theirs = decoder_for(llamas()[0])
    prompt, answer = prompts(3), torch.tensor([[1, 2, END], [3, END, END], [4, 5, 6]])
    shown = torch.ones_like(prompt, dtype=torch.bool)
    padded = torch.cat((torch.full((3, 4), 9), prompt), 1)
    mask = torch.cat((torch.zeros(3, 4, dtype=torch.bool), shown), 1)
    with torch.no_grad():
        plain, other = theirs.states(prompt, shown, answer), theirs.states(padded, mask, answer)
        for a, b in zip(plain, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        draws = [theirs.draw(*each, 4, (END,), 2, torch.Generator().manual_seed(0))
                 for each in ((prompt, shown), (padded, mask))]
    assert torch.equal(*draws)
    with pytest.raises(LabError, match="one length"):
        decoder_for(llamas()[1]).states(padded, mask, answer)


def test_a_pair_of_transformers_models_is_diagnosed():
    """The whole card for a Hugging Face pair: the numbers of the same pair as labkit models, up to the draws."""
    (llama, gpt), teacher = llamas(), trained(150)
    config = llama.config
    twin = transformers.LlamaForCausalLM(config).eval()
    mine = diagnose_distillation(gpt, gpt, prompts(), max_new_tokens=5, k=5)
    theirs = diagnose_distillation(llama, llama, prompts(), max_new_tokens=5, k=5)
    assert theirs.numbers["kl"] == pytest.approx(0, abs=1e-9)
    assert theirs.numbers["truncated"] == pytest.approx(mine.numbers["truncated"], abs=0.15)
    assert diagnose_distillation(llama, twin, prompts(), max_new_tokens=5, k=5).numbers["kl"] > 0.1
    assert diagnose_distillation(gpt, teacher, prompts(), max_new_tokens=5, k=5).numbers["kl"] > 0.1


# ---- the card, and bad input


def test_the_card_is_a_table_and_a_picture():
    """Six rows, each with a yes, a no or a reason; a picture that a reader who sees no colours can read: the words of
    the verdicts are in it."""
    diagnosis = diagnose_distillation(trained(40), trained(150), prompts(), **ASKED)
    rows = diagnosis.table()
    assert [row["what fails"] for row in rows] == ["menu", "no news", "loops", "signal", "coherence", "horizon"]
    assert all(row["found"] in ("yes", "no", "not measured") and row["why"].endswith(".") for row in rows)
    figure = draw_diagnosis(diagnosis)
    words = " ".join(text.get_text() for ax in figure.axes for text in ax.texts)
    assert all(row["what fails"] in words for row in rows) and png(figure)[:4] == b"\x89PNG"


def test_bad_input_gets_a_sentence():
    """Vocabularies that differ, no prompts, cuts beyond the answer, something that is no decoder."""
    model, wider = trained(40), GPT(dataclasses.replace(CONFIG, vocab_size=VOCAB + 1))
    for arguments, says in (((model, wider, prompts()), f"{VOCAB} tokens, the teacher {VOCAB + 1}"),
                            ((model, model, prompts()[:0]), "no prompt"),
                            ((model, torch.nn.Linear(2, 2), prompts()), "Linear is no decoder")):
        with pytest.raises(LabError, match=says):
            diagnose_distillation(*arguments, max_new_tokens=5)
    with pytest.raises(LabError, match="cannot be cut"):
        diagnose_distillation(model, model, prompts(), max_new_tokens=5, cuts=(5,))


def test_answers_that_end_at_once():
    """A student that says END first: one token an answer, nothing to cut behind it, and no NaN in the table."""
    silent = copy.deepcopy(trained(40))
    silent.head = lambda hidden: torch.nn.functional.one_hot(torch.full(hidden.shape[:-1], END), VOCAB) * 40.0
    diagnosis = diagnose_distillation(silent, trained(150), prompts(), **ASKED)
    assert diagnosis.numbers["length"] == 1 and diagnosis.numbers["truncated"] == 0
    assert math.isnan(diagnosis.cuts[2][0]) and diagnosis.findings[-1].found is None
    assert not any("nan" in row["why"] for row in diagnosis.table())
