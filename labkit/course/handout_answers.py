"""What was recorded for a prediction, and what the checks know about wrong answers. Nothing here is typed by hand.

The answer of a prediction comes, in this order, from
1. the shipped results, where a run kept it: data/results/<scale>/NN.figures.json, "answers" → key → answer, sentence;
2. the call `lab.reveal(key, "answer", "sentence")` itself, where the notebook states it as plain text;
3. the stored output of the cell that reveals it: printed lines, and the alternative text of its figure.
The third is shown in any case, since it holds the numbers.
"""

import ast
import importlib
import inspect
from dataclasses import dataclass

from labkit.course import record
from labkit.course.check import verdict
from labkit.course.handout_read import ASKED, Prediction, stored_texts
from labkit.course.header import text_of
from labkit.course.scale import SCALES


@dataclass(frozen=True)
class Answer:
    """One recorded answer: from which run ("quick", "desk", ...) or from "the notebook's text", and its sentence."""

    source: str
    option: str
    sentence: str


def recorded_answers(notebook: dict, number: str, prediction: Prediction) -> list[Answer]:
    """The answers by scale, or the one that the notebook states; empty where only the output tells it."""
    kept = {scale: (record.recorded(number, "answers", scale) or {}).get(prediction.key) for scale in SCALES}
    found = [Answer(scale, each["answer"], each["sentence"]) for scale, each in kept.items() if each]
    stated, sentence = _stated(notebook, prediction)
    return found or ([Answer("the notebook's text", stated, sentence)] if stated in prediction.options else [])


def sentence_of(notebook: dict, prediction: Prediction) -> str:
    """The explanation in the `lab.reveal` call, where it is plain text, else nothing."""
    return _stated(notebook, prediction)[1]


def _stated(notebook: dict, prediction: Prediction) -> tuple[str, str]:
    """(answer, sentence) of the call, each empty unless it stands there as plain text."""
    if prediction.revealed is None:
        return "", ""
    for node in ast.walk(ast.parse(text_of(notebook["cells"][prediction.revealed]))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "reveal":
            words = [part.value if isinstance(part, ast.Constant) else "" for part in node.args]
            if words[:1] == [prediction.key]:
                return (*(words + ["", ""])[1:3],)
    return "", ""


def shown_output(notebook: dict, prediction: Prediction) -> list[str]:
    """What the notebook stores as output where the answer appears, or in the last cell with an output before that."""
    if prediction.revealed is None:
        return []
    for cell in reversed(notebook["cells"][prediction.asked + 1 : prediction.revealed + 1]):
        if texts := [text for text in stored_texts(cell) if not text.startswith(ASKED)]:
            return texts
    return []


# exercises -----------------------------------------------------------------------------------------------------------

def wrong_answers(number: str) -> dict[str, list[tuple[str, str]]]:
    """Exercise → (a known wrong answer as code, what its check says to it)."""
    try:
        module = importlib.import_module(f"labkit.course.exercises.nb{number}")
    except ModuleNotFoundError:
        return {}
    written = _written_wrong(inspect.getsource(module))
    return {name: [(_in_words(answer, written.get(name, {}).get(place)), _said(check, answer, words))
                   for place, (answer, words) in enumerate(check.wrong)] for name, check in module.CHECKS.items()}


def _said(check, answer: object, words: str) -> str:
    """The check's whole sentence; of a check that launches kernels, the words that it must contain."""
    return words if check.interpreted else verdict(check, answer) or words


def _in_words(answer: object, written: str | None) -> str:
    return written or getattr(answer, "__name__", None) or repr(answer)


def _written_wrong(source: str) -> dict[str, dict[int, str]]:
    """Exercise → place → the wrong answer as it is written in CHECKS, where that is a list of pairs."""
    found: dict[str, dict[int, str]] = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            lists = [each.value for each in getattr(value, "keywords", []) if each.arg == "wrong"]
            if isinstance(key, ast.Constant) and lists and isinstance(lists[0], ast.List):
                found[key.value] = {place: ast.unparse(pair.elts[0]) for place, pair in enumerate(lists[0].elts)
                                    if isinstance(pair, ast.Tuple)}
    return found
