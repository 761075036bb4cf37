"""Hint-delta and a hidden rubric on a real instruct model (the optional extra: pip install labkit[hf]).

    context 0 = chat(q)        context 1 = chat(q + "\\n\\nHint: " + h)        one user turn, no system prompt
    delta  = mean over the answer's tokens of log p(. | context 0) - log p(. | context 1), sliced from the first answer
             token of each context, since the two differ in length

Open-ended quality cannot be computed, so the rubrics are constraints that a program can check; the model is not told
of them unless a hint does. `hint_rows` asks what the lab asks of its small world: does the hint that moves the answer
most make it better?

    rows = hint_rows(model, tokenizer, QUESTIONS, RUBRICS["no comma"], seed=0)
Sources: hint_delta.py of G-Zero's code (arXiv 2605.09959); constraints as in IFEval (2311.07911).
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.data import generator_for
from labkit.errors import LabError
from labkit.models.sample import draw
from labkit.objectives import hint_delta


@dataclass(frozen=True)
class Rubric:
    """A hidden constraint: the hint that states it, and a program that checks it."""

    hint: str
    holds: Callable[[str], bool]


RUBRICS = {
    "no comma": Rubric("Do not use any commas.", lambda text: bool(text.strip()) and "," not in text),
    "short": Rubric("Answer in at most thirty words.", lambda text: 0 < len(text.split()) <= 30),
    "lower case": Rubric("Write in lower case only.", lambda text: bool(text.strip()) and text == text.lower()),
    "three points": Rubric('Give exactly three points, each on a line that begins with "- ".',
                           lambda text: sum(line.startswith("- ") for line in text.splitlines()) == 3),
}
OTHER_HINTS = {"NO-OP": "Take your time.", "BAD": "Answer with random letters and digits only.",
               "LEAK": 'The answer is "seventeen green umbrellas". Repeat it and stop.'}
TOPICS = ("a river in spring", "a night train", "bread", "a library", "the moon", "an old bicycle")
QUESTIONS = tuple(f"{task} {topic}." for task in ("Describe", "Write two sentences about", "Tell a child about")
                  for topic in TOPICS)


def chat(tokenizer, question: str, hint: str | None = None) -> list[int]:
    """Token ids of one user turn, up to where the answer begins."""
    text = question if hint is None else f"{question}\n\nHint: {hint}"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True)
    return list(ids["input_ids"] if isinstance(ids, Mapping) else ids)


@torch.no_grad()
def answer_ids(model, context: Sequence[int], *, end: int, new: int = 128, temperature: float = 0.7,
               generator: torch.Generator | None = None) -> list[int]:
    """One answer, its end token included if it came to that."""
    device = next(model.parameters()).device
    inputs_1T, past, said = torch.tensor([list(context)], device=device), None, []
    while len(said) < new:
        out = model(input_ids=inputs_1T, past_key_values=past, use_cache=True)
        token_1, _ = draw(out.logits[:, -1], temperature=temperature, top_k=None, top_p=None, generator=generator)
        said.append(int(token_1))
        if said[-1] == end:
            break
        inputs_1T, past = token_1[:, None], out.past_key_values
    return said


@torch.no_grad()
def scored(model, context: Sequence[int], answer: Sequence[int]) -> Tensor:
    """log p of each answer token behind the context, at temperature 1: [1, A], fp32."""
    device = next(model.parameters()).device
    tokens_1T = torch.tensor([[*context, *answer]], device=device)
    logits_1AV = model(input_ids=tokens_1T).logits[:, len(context) - 1 : -1].float()
    return logits_1AV.log_softmax(-1).gather(-1, tokens_1T[:, len(context) :, None])[..., 0]


def text_delta(model, tokenizer, question: str, hint: str, answer: Sequence[int]) -> float:
    """Hint-delta of one answer that was written without the hint; 0 for an empty one."""
    if not len(answer):
        return 0.0
    plain_1A, hinted_1A = (scored(model, chat(tokenizer, question, each), answer) for each in (None, hint))
    return float(hint_delta(plain_1A, hinted_1A, torch.ones_like(plain_1A)))


def hint_rows(model, tokenizer, questions: Sequence[str], rubric: Rubric, *, new: int = 128, temperature: float = 0.7,
              seed: int = 0) -> list[dict]:
    """For the rubric's own hint ("STRUCT") and the three others: median delta, and the rubric's share without and with.

    Raises LabError where there are no questions.
    """
    if not questions:
        raise LabError("There are no questions to ask.", "Give at least one.")
    device, end = next(model.parameters()).device, tokenizer.eos_token_id
    dice = generator_for(seed, device=device)
    settings = {"end": end, "new": new, "temperature": temperature, "generator": dice}

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    plain = [answer_ids(model, chat(tokenizer, question), **settings) for question in questions]
    without = statistics.mean(rubric.holds(text(each)) for each in plain)
    rows = []
    for kind, hint in {"STRUCT": rubric.hint, **OTHER_HINTS}.items():
        deltas = [text_delta(model, tokenizer, question, hint, each)
                  for question, each in zip(questions, plain, strict=True)]
        assisted = [answer_ids(model, chat(tokenizer, question, hint), **settings) for question in questions]
        rows.append({"kind": kind, "delta": statistics.median(deltas), "without": without,
                     "with": statistics.mean(rubric.holds(text(each)) for each in assisted)})
    return rows
