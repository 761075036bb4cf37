"""What is asked of a real instruct model, which hints there are, and rubrics that a program can check.

Open-ended quality cannot be computed, so a hidden rubric is a constraint; the model is not told of it unless a hint
does. Questions are tasks times topics, and the topics of the exam are asked in no training question.
Source: constraints as in IFEval (arXiv 2311.07911).
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rubric:
    """A hidden constraint: the hint that states it, and a program that checks it."""

    hint: str
    holds: Callable[[str], bool]

    def hints(self) -> dict[str, str]:
        """The lab's kinds of hints by name: this rubric's own is STRUCT."""
        return {"STRUCT": self.hint, **OTHER_HINTS}


RUBRICS = {
    "no comma": Rubric("Do not use any commas.", lambda text: bool(text.strip()) and "," not in text),
    "short": Rubric("Answer in at most thirty words.", lambda text: 0 < len(text.split()) <= 30),
    "lower case": Rubric("Write in lower case only.", lambda text: bool(text.strip()) and text == text.lower()),
    "three points": Rubric('Give exactly three points, each on a line that begins with "- ".',
                           lambda text: sum(line.startswith("- ") for line in text.splitlines()) == 3),
}
OTHER_HINTS = {"NO-OP": "Take your time.", "BAD": "Answer with random letters and digits only.",
               "LEAK": 'The answer is "seventeen green umbrellas". Repeat it and stop.'}

TASKS = ("Describe", "Write two sentences about", "Tell a child about", "Write a postcard about",
         "Begin a story about", "Tell a visitor what is special about", "Write down a memory of", "Advertise")
TOPICS = ("a river in spring", "a night train", "bread", "a library", "the moon", "an old bicycle", "a lighthouse",
          "a market in the morning", "snow", "a kitchen", "the sea", "a first day at school", "a garden", "coffee",
          "a long walk", "a thunderstorm", "an empty theatre", "a family of foxes", "a wooden boat", "a bridge",
          "a village dance", "honey", "a mountain hut", "a piano", "letters", "an island", "a bakery", "autumn leaves",
          "a blue door", "a clock", "a football match", "the desert")
EXAM_TOPICS = ("a windmill", "rain", "a museum", "a small airport", "apples", "a street musician", "a campfire",
               "an orchard")
QUESTIONS, EXAM = (tuple(f"{task} {topic}." for topic in topics for task in TASKS) for topics in (TOPICS, EXAM_TOPICS))
