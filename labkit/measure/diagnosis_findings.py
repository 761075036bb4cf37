"""From the numbers of a diagnosis to a sentence for each way to fail."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Where a number begins to speak."""

    shared_mass: float = 0.8  # below: the student's mass on the teacher's nucleus is too small
    news: float = 0.02  # nats a token; below: the teacher says what the student says
    truncated: float = 0.1  # above: share of answers that reach the cap
    looped: float = 0.1  # above: share of tokens in loops
    one_token: float = 0.3  # above: share of the whole cost at positions of one token...
    surprise: float = 8.0  # ...where the teacher's log-probability lies this far below the student's, in nats
    common_share: float = 0.01  # below: gradients of positions share no direction
    rms: float = 0.05  # above: single gradients that are not small
    lasting: float = 0.25  # below: what is left at the last cut of the teacher's advantage at the first


@dataclass(frozen=True)
class Finding:
    """One way to fail: found, not found, or not measured (None), and why in a sentence."""

    mode: str
    found: bool | None
    sentence: str


def findings(n: dict[str, float], curve: dict[int, tuple[float, float]], limits: Limits) -> tuple[Finding, ...]:
    return (_fit(n, limits), _news(n, limits), _loops(n, limits), _signal(n, limits), _adding(n, limits),
            _horizon(curve, limits))


def _fit(n: dict[str, float], limits: Limits) -> Finding:
    apart = n["shared_mass"] < limits.shared_mass
    return Finding("menu", apart, f"{n['shared_mass']:.0%} of the student's mass lies on the teacher's likely tokens, "
                   f"and {n['overlap']:.0%} of the likeliest are shared ({n['chance']:.0%} by chance)"
                   + ("; let it imitate some of the teacher's answers first." if apart else "."))


def _news(n: dict[str, float], limits: Limits) -> Finding:
    none = n["kl"] < limits.news
    return Finding("no news", none, f"the divergence is {n['kl']:.3f} nats a token"
                   + ("; this teacher says what the student says." if none else "."))


def _loops(n: dict[str, float], limits: Limits) -> Finding:
    found = n["truncated"] > limits.truncated or n["looped"] > limits.looped
    text = f"{n['truncated']:.0%} of the answers reach the cap and {n['looped']:.0%} of the tokens stand in loops"
    if n["looped"] > 0:
        text += f", with an advantage of {n['advantage_looped']:.2f} there and {n['advantage_other']:.2f} elsewhere"
    return Finding("loops", found, text + ("; mend the stop token first, then add gold answers and a KL to the start."
                                           if found else "."))


def _signal(n: dict[str, float], limits: Limits) -> Finding:
    found = n["worst_token_share"] > limits.one_token and n["worst_token_advantage"] < -limits.surprise
    return Finding("signal", found, f"token {n['worst_token']:.0f} carries {n['worst_token_share']:.0%} of the cost, "
                   f"at a mean advantage of {n['worst_token_advantage']:.1f} nats"
                   + ("; look whether the two models number it alike." if found else "."))


def _adding(n: dict[str, float], limits: Limits) -> Finding:
    # R grows with N; c = |mean g|^2 / mean |g|^2 does not: for independent gradients E R = 1 + (N - 1) c
    found = n["common_share"] < limits.common_share and n["rms_gradient"] > limits.rms
    return Finding("coherence", found, f"{n['positions']:.0f} gradients of the head add up to R = "
                   f"{n['amplification']:.1f} (1 is orthogonal): {n['common_share']:.1%} of their squares is common to "
                   f"all; their rms is {n['rms_gradient']:.2f}"
                   + ("; each position asks for something else, as they also do at an optimum." if found else "."))


def _horizon(curve: dict[int, tuple[float, float]], limits: Limits) -> Finding:
    gain = {cut: teacher - student for cut, (teacher, student) in curve.items() if not math.isnan(teacher)}
    if len(gain) < 2:
        return Finding("horizon", None, "needs a verifier and two cuts that the answers reach.")
    first, last = min(gain), max(gain)
    found = gain[first] > 0 and gain[last] < limits.lasting * gain[first]
    return Finding("horizon", found, f"going on for the student, the teacher is right more often by {gain[first]:+.2f} "
                   f"after {first} tokens and by {gain[last]:+.2f} after {last}"
                   + ("; earlier errors, or prefixes that it cannot read: split the two." if found else "."))
