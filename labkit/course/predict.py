"""Commit first, then look: the learner's predictions, kept in .labkit/predictions.json.

`ask` draws radio buttons and a Commit button; `reveal` puts the answer beside the measurement, in words. The file
stays on the learner's machine (LABKIT_PREDICTIONS names another one) and is written whole at each commit.
"""

import datetime
import html
import json
import os
from pathlib import Path

from labkit.course import display, widget_access
from labkit.errors import LabError
from labkit.files import REPOSITORY, write_json


def store() -> Path:
    """The file of this learner's predictions."""
    return Path(os.environ.get("LABKIT_PREDICTIONS") or REPOSITORY / ".labkit" / "predictions.json")


def kept() -> dict[str, dict[str, dict]]:
    """Everything this learner committed to: notebook → key → {question, answer, time, options, measured}."""
    try:
        return json.loads(store().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError:
        raise LabError(f"The file of your predictions, {store().name}, can't be read as JSON.",
                       f"Delete or mend {store()}.") from None


def commit(notebook: str, key: str, question: str, answer: str, options: int | None = None) -> None:
    """Keep an answer with its question, its time and the number of options it was chosen from."""
    everything = kept()
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    said = {"question": question, "answer": answer, "time": now} | ({"options": options} if options else {})
    everything.setdefault(notebook, {})[key] = said
    write_json(store(), everything)


def _keep_measured(notebook: str, key: str, truth: str) -> None:
    """Put the measurement beside the answer, so that all predictions can be looked back on together."""
    everything = kept()
    if everything[notebook][key].get("measured") != truth:
        everything[notebook][key]["measured"] = truth
        write_json(store(), everything)


def answer(notebook: str, key: str) -> str | None:
    """The answer kept under this key, or None."""
    return kept().get(notebook, {}).get(key, {}).get("answer")


def ask(notebook: str, key: str, question: str, options: list[str], default: str, *, interactive: bool) -> None:
    """Ask in a widget; where nobody can answer, show the question with its options, or nothing in plain Python.

    `default` is the option that a reader without an opinion would take; it is named in the static form only.
    """
    if default not in options or len(set(options)) != len(options):
        raise LabError(f"The prediction {key!r} needs options that differ, and a default among them.",
                       f"The options are {options}, the default is {default!r}.")
    if not display.kernel():
        return
    if interactive:
        _widget(notebook, key, question, options)
    else:
        items = "".join(f"<li>{html.escape(option)}</li>" for option in options)
        display.publish_html(f"<p><b>Predict before you run on:</b> {html.escape(question)}</p><ul>{items}</ul>",
                             f"Predict before you run on: {question}\n" + "\n".join(f"- {o}" for o in options))


def _widget(notebook: str, key: str, question: str, options: list[str]) -> None:
    import ipywidgets

    before = answer(notebook, key)
    choices = ipywidgets.RadioButtons(options=options, value=before if before in options else None,
                                      layout=ipywidgets.Layout(width="max-content", max_width="100%"))
    button = ipywidgets.Button(description="Commit", tooltip="Keep this prediction and run on")
    said = ipywidgets.HTML()

    def close(text: str) -> None:
        choices.disabled, button.description = True, "Predict again"
        said.value = f'<p role="status">Your prediction: <b>{html.escape(text)}</b>. Now run on.</p>'

    def press(_) -> None:
        if choices.disabled:
            choices.disabled, button.description = False, "Commit"
        elif choices.value is None:
            said.value = '<p role="status">Choose one of the options first.</p>'
        else:
            commit(notebook, key, question, choices.value, len(options))
            close(choices.value)

    button.on_click(press)
    if before in options:
        close(before)
    heading = ipywidgets.HTML(f"<p><b>Predict before you run on.</b> {html.escape(question)}</p>")
    widget_access.show(ipywidgets.VBox([heading, choices, button, said]))


def reveal(notebook: str, key: str, truth: str, explain: str) -> None:
    """Say in words how prediction and measurement compare."""
    said = answer(notebook, key)
    if said is not None:
        _keep_measured(notebook, key, truth)
    if said is None:
        text = f"You made no prediction here. Measured: {truth}."
    elif said == truth:
        text = f"You said “{said}”, and so it was measured."
    else:
        text = f"You said “{said}”; measured: “{truth}”."
    text = f"{text} {explain}".strip()
    display.publish_html(f"<p><b>{html.escape(text)}</b></p>", text)
