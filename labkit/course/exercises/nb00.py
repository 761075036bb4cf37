"""Exercises of 00_start_here: planning with one GPU. Numbers: labkit.measure.hardware and its sources."""

import math

import torch

from labkit.course.check import Check
from labkit.course.reading import called, close, known, number
from labkit.measure import hardware
from labkit.measure.hardware import CARDS, SHAPES, Shape


def _number_near(expected: float, wrong: dict[float, str], otherwise: str, rel: float = 0.01):
    """A test of a single number: right within `rel`, known mistakes by their sentence, else `otherwise`."""

    def test(answer) -> str | None:
        got = number(answer)
        if close(got, expected, rel=rel):
            return None
        return known(got, wrong, rel=rel) or f"{got:.4g} is not it. {otherwise}"

    return test


def _ridge(answer) -> str | None:
    for card in CARDS.values():
        tflops, gb_s = card.bf16_tflops.value, card.bandwidth_gb_s.value
        got, expected = number(called(answer, tflops, gb_s)), tflops * 1e3 / gb_s
        if close(got, expected, rel=0.01):
            continue
        mistakes = {tflops / gb_s: "The units differ by a thousand: a TFLOP is 1e12, a GB is 1e9.",
                    tflops * 1e12 / gb_s: "The bandwidth is given in GB/s; turn it into bytes a second too.",
                    expected * 1e9 / 2**30: "A data sheet's GB is 1e9 bytes, not 2^30.",
                    1 / expected: "That is bytes per FLOP. The ridge is FLOP per byte: peak over bandwidth.",
                    gb_s / tflops: "That is upside down, and TFLOP and GB differ by a thousand."}
        return known(got, mistakes) or f"For the {card.name} your function gives {got:.4g}. Divide FLOP/s by bytes/s."
    return None


def _largest_batch(answer) -> str | None:
    tried = ((24e9, "124M", 1024), (32e9, "350M", 2048), (96e9, "774M", 1024), (24e9, "1.56B", 1024))
    for memory, name, context in tried:
        shape = SHAPES[name]
        got, parts = number(called(answer, memory, shape, context)), _parts(shape, context)
        expected = max(0, math.floor((memory - parts["states"]) / (parts["activations"] + parts["logits"])))
        if close(got, expected):
            continue
        place = f"{name} with T = {context} on {memory / 1e9:.0f} GB"
        if expected == 0:
            return f"{place}: you say {got:g}, but the states alone leave no room for a single sequence. Then answer 0."
        return f"{place}: you say {got:g}. " + _batch_mistake(got, memory, parts)
    return None


def _parts(shape: Shape, context: int) -> dict[str, float]:
    """Bytes of the states, and bytes of one sequence."""
    return {"states": hardware.state_bytes(shape.parameters),
            "activations": hardware.activation_bytes(shape.layers, shape.width, context),
            "logits": hardware.logits_bytes(context, shape.vocab)}


def _batch_mistake(got: float, memory: float, parts: dict[str, float]) -> str:
    free = memory - parts["states"]
    sequence = parts["activations"] + parts["logits"]
    mistakes = {math.floor(free / parts["activations"]): "That fits only without the logits.",
                math.floor(free / parts["logits"]): "That fits only without the activations.",
                math.floor(memory / sequence): "That fits only without weights, gradients and optimizer states."}
    if got in mistakes:
        return mistakes[got]
    if got % 1 or free / sequence < got <= free / sequence + 1:
        return "Only whole sequences count, and rounding up does not fit: take the floor."
    return "Subtract the states from the memory; divide what is left by the bytes of one sequence."


def _smallest_batch(answer) -> str | None:
    for width, ridge in ((4096, 281.0), (8192, 117.0), (4096, 206.0), (512, 281.0)):
        got = called(answer, width, ridge)
        expected = math.ceil(ridge / (1 - 2 * ridge / width)) if 2 * ridge < width else None
        if expected is None:
            if got is None:
                continue
            number(got)
            return (f"D = {width}, ridge {ridge:g}: even an endless batch stays below {width / 2:g} FLOP per byte "
                    "here. Then return None.")
        if got is None or number(got) == math.inf:
            return f"D = {width}, ridge {ridge:g}: about {round(expected, -1)} rows are enough; you return {got}."
        if close(got, expected, within=1):
            continue
        if not number(got) >= 1:
            return f"D = {width}, ridge {ridge:g}: you say {number(got):g}. A batch has a row at least."
        mistakes = {ridge: "That is so if only the weights cross memory. Input and output of the layer do too.",
                    expected / 2: "Count two FLOPs for each multiply-add, and two bytes for each bf16 number.",
                    ridge / (1 - ridge / width): "One of [B, D] input and [B, D] output is missing from your bytes."}
        return (known(got, mistakes)
                or f"D = {width}, ridge {ridge:g}: you say {number(got):g}, where the intensity is "
                   f"{hardware.matmul_intensity(int(number(got)), width, width):.0f} FLOP per byte. "
                   "Look for the smallest B that reaches the ridge.")
    return None


def _intensity_search(width: int, ridge: float) -> int | None:
    """The solution by trying: a second derivation for the tests."""
    sizes = range(1, 100_000)
    return next((B for B in sizes if hardware.matmul_intensity(B, width, width) >= ridge), None)


def _unclipped(memory: float, shape: Shape, context: int) -> int:
    parts = _parts(shape, context)
    return int((memory - parts["states"]) // (parts["activations"] + parts["logits"]))


def _one_more_at_a_time(memory: float, shape: Shape, context: int) -> int:
    """The solution by trying."""
    sequence = context * (34 * shape.layers * shape.width + 4 * shape.vocab)
    return next(B for B in range(100_000) if 16 * shape.parameters + (B + 1) * sequence > memory)


def _fits(memory: float, shape: Shape, context: int) -> int:
    return max(0, _unclipped(memory, shape, context))


CHECKS = {
    "00.1": Check(
        question="Write ridge(tflops, gb_per_s): the ridge point in FLOP per byte, from a peak in TFLOP/s and a "
                 "bandwidth in GB/s.",
        minutes=3, level="easy",
        hint="At the ridge both ceilings are equal: peak = intensity * bandwidth. Use plain FLOP/s and bytes/s.",
        test=_ridge,
        right=[lambda tflops, gb: tflops * 1e12 / (gb * 1e9), lambda tflops, gb: 1000 * tflops / gb,
               lambda tflops, gb: round(tflops / (gb / 1e3)), lambda tflops, gb: torch.tensor(1e3 * tflops / gb)],
        wrong=[(lambda tflops, gb: tflops * 1e12 / gb, "turn it into bytes"),
               (lambda tflops, gb: tflops * 1e12 / (gb * 2**30), "not 2^30"),
               (lambda tflops, gb: tflops / gb, "thousand"), (lambda tflops, gb: gb / (tflops * 1e3), "bytes per FLOP"),
               (lambda tflops, gb: gb / tflops, "upside down"), (lambda tflops, gb: 164.0, "RTX 5090")],
    ),
    "00.2": Check(
        question="The RTX 5090's box says 3,352 AI TOPS: FP4, sparse, FP16 accumulation. How many dense bf16 TFLOP/s "
                 "with fp32 accumulation?",
        minutes=3, level="easy",
        hint="Three factors to divide by: sparsity, precision (FP4 to 16 bits), and GeForce's accumulation.",
        test=_number_near(209.5, {419: "One factor of two is left: GeForce accumulates fp32 at half the rate.",
                                  838: "That is FP16, but still sparse and accumulated in FP16: four is left.",
                                  1676: "That takes only the sparsity off.",
                                  104.75: "That is one factor of two too many."},
                          "Divide 3,352 by every factor in turn."),
        right=[209.5, 3352 / 16, 209, 210, torch.tensor(209.5, dtype=torch.bfloat16)],
        wrong=[(419, "GeForce"), (838, "still sparse"), (1676, "only the sparsity"), (3352, "every factor")],
    ),
    "00.3": Check(
        question="bf16 weights and gradients, an fp32 master copy, and Adam's m and v in 8 bits. Bytes per parameter?",
        minutes=3, level="easy",
        hint="Five parts; write down the bytes of each. Only two of them change from the 16-byte recipe.",
        test=_number_near(10, {16: "That is Adam with m and v in fp32: 4 + 4 bytes. In 8 bits they take 1 + 1.",
                               6: "The fp32 master copy is missing. Without it small updates are rounded away in bf16.",
                               8: "The gradients are missing, or counted in 8 bits.",
                               12: "m and v take one byte each, not two.",
                               13: "Both m and v are in 8 bits."},
                          "Add weights, gradients, master copy, m, v.", rel=1e-6),
        right=[10, 10.0, torch.tensor(10)],
        wrong=[(16, "4 + 4"), (6, "master copy is missing"), (8, "gradients are missing"), (12, "one byte each"),
               (7, "Add weights")],
    ),
    "00.4": Check(
        question="350M parameters, 7B tokens, an RTX PRO 6000 at 45% MFU. How many hours, by the 6ND rule?",
        minutes=5, level="medium",
        hint="FLOPs = 6 * parameters * tokens. Divide by what the card really does a second, then by 3600.",
        test=_number_near(18.0, {8.1: "The card does not reach its peak: divide by MFU * peak.",
                                 3.65: "Divide by the MFU; you multiplied with it.",
                                 6.0: "That is the forward pass alone: 2 FLOPs a parameter. Backward takes 4 more.",
                                 12.0: "That is the backward pass alone: 4 FLOPs a parameter. Forward takes 2 more.",
                                 2.27: "4,000 AI TOPS is FP4 and sparse. Use the dense bf16 peak.",
                                 64_841: "That is in seconds.", 1080.7: "That is in minutes.",
                                 43.3: "That is the RTX 5090. The PRO card's peak is 503.8 TFLOP/s."},
                          "First all FLOPs, 6 N D; then how many the card does in a second; then hours.", rel=0.015),
        right=[18.0, 18.01, hardware.training_hours(350e6, 7e9, 0.45, CARDS["RTX PRO 6000"].peak)],
        wrong=[("18 hours", "A number is asked for"), (8.1, "MFU * peak"), (6.0, "forward pass alone"),
               (64841, "seconds"), (43.3, "RTX 5090"),
               (25, "First all FLOPs")],
    ),
    "00.5": Check(
        question="Write largest_batch(memory, shape, context): the most sequences that fit beside the states (bf16 "
                 "Adam), with activations at 34 L D bytes a token and one copy of fp32 logits; 0 if none fits.",
        minutes=10, level="medium",
        hint="State bytes do not depend on the batch; activations and logits are proportional to it.",
        test=_largest_batch,
        right=[_fits, _one_more_at_a_time],
        wrong=[(lambda m, s, T: max(0, (m - 16 * s.parameters) // _parts(s, T)["activations"]), "without the logits"),
               (lambda m, s, T: _fits(m + 16 * s.parameters, s, T), "without weights"),
               (lambda m, s, T: _fits(m, s, T) + 1, "take the floor"),
               (_unclipped, "answer 0")],
    ),
    "00.6": Check(
        question="A linear layer multiplies [B, D] by [D, D] in bf16. Write smallest_batch(D, ridge): the smallest B "
                 "whose arithmetic intensity reaches the ridge, or None if no B does.",
        minutes=15, level="hard",
        hint="FLOPs 2BD^2, bytes 2(BD + D^2 + BD). Set their ratio to the ridge, solve for B, watch the denominator.",
        test=_smallest_batch,
        right=[lambda D, ridge: math.ceil(ridge / (1 - 2 * ridge / D)) if 2 * ridge < D else None, _intensity_search],
        wrong=[(lambda D, ridge: math.ceil(ridge), "only the weights"),
               (lambda D, ridge: math.ceil(ridge / (1 - 2 * ridge / D)), "return None"),
               (lambda D, ridge: math.ceil(ridge / (1 - ridge / D)) if ridge < D else None, "missing from your bytes"),
               (lambda D, ridge: None, "you return None"),
               (lambda D, ridge: math.inf, "rows are enough"),
               (lambda D, ridge: math.nan, "a row at least"), (lambda D, ridge: D * D, "smallest B"),
               (lambda D, ridge: D, "the intensity is")],
    ),
}
