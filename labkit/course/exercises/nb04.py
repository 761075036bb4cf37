"""Exercises of 04_compute_optimal_tokenization (Limisiewicz and others, arXiv 2605.01188)."""

import numpy as np
import torch

from labkit.course.check import Check
from labkit.course.reading import alike, array, called, close, number


def _per_doubling(answer) -> str | None:
    for beta in (0.471, 1.0, 0.25):
        got = number(called(answer, beta))
        if close(got, 2 ** (2 * beta - 2), rel=1e-6):
            continue
        if close(got, 2 ** (2 * beta - 1), rel=1e-6):
            return "That is for *bytes* per parameter. Tokens per parameter are that divided by T, which doubles too."
        if close(got, 2 ** (beta - 1), rel=1e-6):
            return "That is the text alone, in tokens. The best model changes as well: N* = C T / (6 B*)."
        if close(got, 2 ** (2 - 2 * beta), rel=1e-6):
            return "That is parameters per token: the other way round."
        return f"At beta={beta} you say {got:.4g}. Take law I for rho*, divide by T, and put 2 T for T."
    return None


def _tokens(answer) -> str | None:
    for T, rho in ((4.57, 60.0), (1.0, 60.0), (3.0, 91.0)):
        got = number(called(answer, T, rho))
        if close(got, rho / T, rel=1e-6):
            continue
        if close(got, rho * T, rel=1e-6):
            return "A token holds T bytes, so the same text has fewer tokens than bytes: divide."
        if close(got, 20.0, rel=1e-6):
            return "20 whatever T is: that is the rule of thumb in tokens which the paper questions."
        return f"At T={T}, rho={rho} your function gives {got:.4g}. Bytes per parameter = T times tokens per parameter."
    return None


def _far(answer) -> str | None:
    if close(answer, 18.2 / 1e25**0.035, within=0.03):
        return None
    if close(answer, 18.2 / 2e21**0.035, within=0.03):
        return "That is T* at 2e21, the largest budget of the paper."
    if number(answer) > 18.2:
        return "T* falls as compute grows: divide T0 by C^delta."
    if close(answer, 18.2 / 25**0.035, within=0.05):
        return "C is 1e25, not 25."
    return "Put the budget, in FLOPs, into law II with the two constants: T* = T0 / C^delta."


def _context(answer) -> str | None:
    for t, T, reach in ((0, 4, 2), (8, 4, 1), (9, 8, 3), (15, 8, 1), (22, 12, 2), (7, 1, 1), (11, 4, 9)):
        got, own = number(called(answer, t, T, reach)), t % T
        if got == t - own + min(own, reach):
            continue
        where = f"At t={t}, T={T}, reach={reach} your function gives {got:g}."
        if got > t:
            return f"{where} Only {t} bytes come before byte {t}."
        if got == t:
            return f"{where} That is every byte before it, but inside its own patch it sees the last {reach} only."
        if got == min(own, reach):
            return f"{where} Earlier patches reach it too, through the global module, and with all their bytes."
        if got == t - own:
            return f"{where} That is the earlier patches; inside its own patch it sees up to {reach} bytes as well."
        return f"{where} Count the earlier patches first, then the bytes of its own patch."
    return None


def _double(answer) -> str | None:
    for T, bpb in ((3.0, 1.0), (4.5, 0.96)):
        got = array(called(answer, T, bpb))
        if got.shape != (2,):
            return "Return two numbers: the best T and the bits per byte of the doubled text."
        if alike(got, (2 * T, bpb / 2)):
            continue
        if alike(got, (T, bpb)):
            return "Half of the bytes are new and carry nothing. What does a patch of T bytes hold now?"
        if close(got[0], 2 * T, rel=1e-9) and close(got[1], bpb, rel=1e-9):
            return "T is right. The same bits are now spread over twice the bytes."
        if alike(got, (T / 2, 2 * bpb)) or close(got[0], T / 2, rel=1e-9):
            return "A patch should hold the same words as before. Does it need more bytes for that, or fewer?"
        return f"For T={T}, {bpb} bits per byte you return {got.tolist()}. Keep the content of a patch as it was."
    return None


CHECKS = {
    "04.1": Check(
        "Write per_doubling(beta): by what the best tokens per parameter are multiplied where T doubles.",
        3, "easy", "Tokens per parameter are rho*/T.", _per_doubling,
        right=[lambda beta: 2 ** (2 * beta - 2), lambda beta: 4.0**beta / 4, lambda beta: np.exp2(2 * beta - 2),
               lambda beta: torch.tensor(2 * beta - 2).exp2().half(),
               lambda beta: 6 ** (2 * beta - 2) / 3 ** (2 * beta - 2)],
        wrong=[(lambda beta: 2 ** (2 * beta - 1), "bytes"), (lambda beta: 2 ** (beta - 1), "model changes"),
               (lambda beta: 4 ** (1 - beta), "other way round"), (lambda beta: 0.5, "put 2 T for T"),
               (0.48, "A function is asked for")]),
    "04.2": Check(
        "Write tokens_per_parameter(T, rho): tokens a parameter, when rho bytes a parameter are best.",
        3, "easy", "A text of B bytes has B / T tokens.", _tokens,
        right=[lambda T, rho: rho / T, lambda T, rho: np.float64(rho) / T,
               lambda T, rho: torch.tensor(rho).half() / T, lambda T, rho: rho * T**-1],
        wrong=[(lambda T, rho: rho * T, "divide"), (lambda T, rho: 20, "rule of thumb"),
               (lambda T, rho: 7, "gives 7")]),
    "04.3": Check(
        "The best T at 1e25 FLOPs by the printed constants T0 = 18.2, delta = 0.035.",
        3, "easy", "1e25 ** 0.035 is about 7.5.", _far,
        right=[18.2 / 1e25**0.035, 2.43, 2.4, np.float32(2.427), torch.tensor(2.427, dtype=torch.float16)],
        wrong=[(18.2 * 1e25**0.035, "divide"), (3.28, "2e21"), (18.2 / 25**0.035, "not 25"), (1.0, "T0 / C^delta")]),
    "04.4": Check(
        "Write context(t, T, reach): how many bytes the prediction of byte t can learn from, with one local layer.",
        6, "medium", "t // T patches lie before the patch of byte t; t % T bytes lie before t inside it.", _context,
        right=[lambda t, T, reach: t // T * T + min(t % T, reach),
               lambda t, T, reach: float(t - max(t % T - reach, 0)),
               lambda t, T, reach: len([b for b in range(t) if b // T < t // T or t - b <= reach])],
        wrong=[(lambda t, T, reach: t + 1, "come before byte 0"), (lambda t, T, reach: t, "every byte before it"),
               (lambda t, T, reach: min(t % T, reach), "through the global module"),
               (lambda t, T, reach: t // T * T, "as well"), (lambda t, T, reach: t // T, "Count the earlier patches"),
               (lambda t, T, reach: t // T * T + reach, "gives")]),
    "04.5": Check(
        "Write double(T, bpb): the best T and bits per byte after a dummy byte is put behind each byte.",
        6, "hard", "Nothing is learned from a dummy byte and nothing is lost by it.", _double,
        right=[lambda T, bpb: (2 * T, bpb / 2), lambda T, bpb: [2.0 * T, 0.5 * bpb],
               lambda T, bpb: torch.tensor([T + T, bpb / 2])],
        wrong=[(lambda T, bpb: (T, bpb), "carry nothing"), (lambda T, bpb: (2 * T, bpb), "twice the bytes"),
               (lambda T, bpb: (T / 2, 2 * bpb), "more bytes"), (lambda T, bpb: (T + 5, bpb), "content of a patch"),
               (lambda T, bpb: 2 * T, "two numbers")]),
}
