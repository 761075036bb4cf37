"""Formulas for slides without a script: TeX → an inline SVG drawing, made by matplotlib's mathtext.

mathtext knows a part of TeX. What it does not know stays on the slide as TeX, so that nothing is lost. Every drawing
carries its TeX as label for screen readers.
"""

import functools
import html
import re

SIZE = 100.0  # units of the drawing per em
SAME = {  # TeX that mathtext spells in another way
    r"\dots": r"\ldots", r"\lvert": "|", r"\rvert": "|", r"\lVert": r"\Vert", r"\rVert": r"\Vert",
    r"\tilde": r"\widetilde", r"\le": r"\leq", r"\ge": r"\geq", r"\ne": r"\neq",
    r"\to": r"\rightarrow", r"\quad": r"\ \ \ ", r"\qquad": r"\ \ \ \ \ \ ", r"\bigl": "", r"\bigr": "",
    r"\Bigl": "", r"\Bigr": "", r"\big": "", r"\Big": "", r"\bigm": "", r"\Bigm": "", r"\;": r"\ ", r"\top": "T",
    r"\limits": "", r"\displaystyle": "", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\iff": r"\Leftrightarrow",
    r"\bmod": r"\ \mathrm{mod}\ ", r"\textstyle": "",
}
BRACED = [  # command, its arguments, and how mathtext wants them
    ("tfrac", 2, r"\frac{{{}}}{{{}}}"), ("frac", 2, r"\frac{{{}}}{{{}}}"), ("sqrt", 1, r"\sqrt{{{}}}"),
    ("mathbb", 1, r"\mathbb{{{}}}"), ("hat", 1, r"\hat{{{}}}"), ("bar", 1, r"\bar{{{}}}"), ("boxed", 1, "{}"),
    ("underbrace", 2, r"\underset{{{1}}}{{{0}}}"),
]
STEPS = {1: "M", 2: "L", 3: "Q", 4: "C"}  # matplotlib's codes of a path


def formula(tex: str, *, block: bool) -> str:
    """One formula as HTML: an SVG as high as the text around it, or the TeX itself."""
    try:
        drawing = _drawing(" ".join(tex.split()))
    except ValueError:  # mathtext can't parse it
        drawing = f'<code class="tex">{html.escape(tex.strip())}</code>'
    return f'<div class="formula">{drawing}</div>' if block else drawing


def spelt_for_mathtext(tex: str) -> str:
    """The same formula in the commands that mathtext knows, arguments in braces."""
    tex = re.sub(r"\\operatorname\*?\s*\{([^{}]*)\}", r"\\mathrm{\1}", tex)
    tex = re.sub(r"\\text\{([^{}]*)\}", lambda found: "\\mathrm{" + found[1].replace(" ", r"\ ") + "}", tex)
    for command, arguments, form in BRACED:
        tex = _with_braces(tex, command, arguments, form)
    return re.sub(r"\\(?:[A-Za-z]+|;)", lambda found: SAME.get(found[0], found[0]), tex)


def _with_braces(tex: str, command: str, count: int, form: str) -> str:
    r"""Every `\command` with its `count` arguments, braced or single, written as `form`."""
    found = re.search(rf"\\{command}(?![A-Za-z])", tex)
    if not found:
        return tex
    arguments, rest = [], tex[found.end():]
    for _ in range(count):
        argument, rest = _argument(rest)
        arguments.append(argument)
    rest = _with_braces(rest, command, count, form)
    inside = [_with_braces(argument, command, count, form) for argument in arguments]
    return tex[: found.start()] + form.format(*inside) + rest


def _argument(tex: str) -> tuple[str, str]:
    """(first argument, what follows it): a group in braces, a command, or one sign."""
    tex = tex.lstrip(" _")
    if not tex.startswith("{"):
        found = re.match(r"\\[A-Za-z]+|\\?.", tex)
        return (found[0], tex[found.end():]) if found else ("", "")
    depth = 0
    for place, sign in enumerate(tex):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return tex[1:place], tex[place + 1 :]
    raise ValueError(f"a brace is not closed: {tex}")


@functools.cache
def _drawing(tex: str) -> str:
    """An SVG with the baseline where the text has it. Raises ValueError for TeX that mathtext does not know."""
    from matplotlib import rc_context
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    with rc_context({"mathtext.fontset": "stix"}):
        path = TextPath((0, 0), f"${spelt_for_mathtext(tex)}$", SIZE, FontProperties(size=SIZE))
    (left, bottom), (right, top) = path.vertices.min(0), path.vertices.max(0)  # exact extents take ten times as long
    low, high, left, width = min(bottom, 0), max(top, SIZE / 2), left - 4, right - left + 8
    steps = " ".join("Z" if code == 79 else STEPS[code] + " ".join(
        f"{x - left:.1f} {high - y:.1f}" for x, y in points.reshape(-1, 2))
        for points, code in path.iter_segments(simplify=False))
    style = f"height:{(high - low) / SIZE:.3f}em; vertical-align:{low / SIZE:.3f}em"
    return (f'<svg role="img" aria-label="{html.escape(tex)}" viewBox="0 0 {width:.1f} {high - low:.1f}" '
            f'style="{style}"><path d="{steps}"/></svg>')
