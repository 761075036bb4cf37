"""Exercises of 01_first_kernel: three puzzles whose answer is a kernel, in the form of Triton-Puzzles (sentence,
formula, picture, reference, empty kernel, test), and three whose answer is a number or a formula.

A kernel is launched here on small tensors with odd sizes, in Triton's interpreter.
"""

import math

import torch

from labkit.course.check import Check, close, number
from labkit.course.kernel_check import bytes_remark, grade
from labkit.kernels.language import tl, triton

N, V, BLOCK = 5, 300, 128


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [N, V], a scale a row, and targets that are the largest in two of five rows. One row is all negative."""
    generator = torch.Generator().manual_seed(0)
    x_NV, s_N = torch.randn(N, V, generator=generator) * 3, torch.rand(N, generator=generator) + 0.5
    x_NV[2] -= 20
    return x_NV, s_N, torch.where(torch.tensor([True, False, True, False, False]), x_NV.argmax(1), torch.tensor(17))


def _empty(*shape: int) -> torch.Tensor:
    return torch.full(shape, math.nan)


def _scale(kernel):
    x_NV, s_N, _ = _inputs()
    y_NV = _empty(N, V)
    return (lambda: kernel[(N, triton.cdiv(V, BLOCK))](x_NV, s_N, y_NV, V, BLOCK=BLOCK), y_NV, s_N[:, None] * x_NV,
            8 * N * V + 4 * N * triton.cdiv(V, BLOCK))


def _hits(kernel):
    x_NV, _, target_N = _inputs()
    hit_N = _empty(N)
    exact_N = (x_NV.gather(1, target_N[:, None]) >= x_NV).all(1).float()
    return lambda: kernel[(N,)](x_NV, target_N, hit_N, V, BLOCK=BLOCK), hit_N, exact_N, 4 * N * V + 16 * N


def _entropy(kernel):
    x_NV, _, _ = _inputs()
    x_NV = x_NV + 300.0  # without the maximum, exp overflows
    entropy_N = _empty(N)
    exact_N = torch.distributions.Categorical(logits=x_NV.double()).entropy()
    return lambda: kernel[(N,)](x_NV, entropy_N, V, BLOCK=BLOCK), entropy_N, exact_N, 4 * N * V + 4 * N


def _kernel_check(setup):
    """test and remark of an exercise whose answer is a kernel."""
    def test(kernel) -> str | None:
        if not hasattr(kernel, "fn"):
            raise TypeError("a kernel is asked for: a function under @triton.jit")
        return grade(*setup(kernel))

    def remark(kernel) -> str:
        launch, _, _, fewest = setup(kernel)
        return bytes_remark(launch, fewest)

    return test, remark


def _floor(answer) -> str | None:
    for n, v, e, bandwidth in ((8192, 151_936, 2, 4.3e12), (4096, 32_000, 4, 1.8e12)):
        got, right = number(answer(n, v, e, bandwidth)), 3 * n * v * e / bandwidth * 1e3
        if close(got, right, within=0.01 * right):
            continue
        for factor, sentence in ((1e-3, "That is in seconds; the answer is asked for in milliseconds."),
                                 (1 / 3, "That is one pass. Forward reads once; backward reads once and writes once."),
                                 (2 / 3, "Two of the three passes are there. The gradient must be written as well.")):
            if close(got, factor * right, within=0.01 * factor * right):
                return sentence
        return f"At N={n}, V={v}, e={e} you say {got:.4g} ms. Count the passes over the logits, reads and writes."
    return None


def _registers(answer) -> str | None:
    for warps, right in ((4, 255), (8, 255), (16, 128), (32, 64)):
        got = number(answer(warps))
        if got == right:
            continue
        if warps < 16 and got == 65_536 // (32 * warps):
            return f"With {warps} warps the file has {got:g} for each, but an instruction can name 255 at most."
        return f"With {warps} warps you say {got:g}. A block has 32 threads a warp, and an SM has 65,536 registers."
    return None


def _break_even(answer) -> str | None:
    for v, rate, bandwidth in ((151_936, 790e12, 4.3e12), (32_000, 200e12, 1.8e12)):
        got, right = number(answer(v, rate, bandwidth)), v * bandwidth / rate
        if close(got, right, within=0.01 * right):
            continue
        if close(got, rate / bandwidth, within=0.01 * rate / bandwidth):
            return "That is the ridge, F / BW. The dense head's FLOPs grow with V; where is V?"
        return f"At V={v} you say {got:.4g}. Set 6 N H V / F equal to 3 N K H e / BW with e = 2, and solve for K."
    return None


# the course's own answers, and mistakes that people make -----------------------------------------------------------

@triton.jit
def scale_right(x, s, y, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + row * V + v, tl.load(s + row) * tl.load(x + row * V + v, mask=v < V), mask=v < V)


@triton.jit
def scale_without_mask(x, s, y, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + row * V + v, tl.load(s + row) * tl.load(x + row * V + v))


@triton.jit
def scale_first_block(x, s, y, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    v = tl.arange(0, BLOCK)
    tl.store(y + row * V + v, tl.load(s + row) * tl.load(x + row * V + v, mask=v < V), mask=v < V)


@triton.jit
def hits_right(x, target, hit, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    ours = tl.load(x + row * V + tl.load(target + row))
    best = float("-inf")
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.max(tl.load(x + row * V + v, mask=v < V, other=float("-inf")), 0))
    tl.store(hit + row, tl.where(ours >= best, 1.0, 0.0))


@triton.jit
def hits_read_twice(x, target, hit, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    best = float("-inf")
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.max(tl.load(x + row * V + v, mask=v < V, other=float("-inf")), 0))
    found = 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(x + row * V + v, mask=v < V, other=float("-inf"))
        found += tl.sum(tl.where((z == best) & (v == tl.load(target + row)), 1.0, 0.0), 0)
    tl.store(hit + row, found)


@triton.jit
def hits_other_zero(x, target, hit, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    best = float("-inf")
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.max(tl.load(x + row * V + v, mask=v < V, other=0.0), 0))
    tl.store(hit + row, tl.where(tl.load(x + row * V + tl.load(target + row)) >= best, 1.0, 0.0))


@triton.jit
def entropy_right(x, entropy, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    m = float("-inf")
    s = 0.0
    w = 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(x + row * V + v, mask=v < V, other=float("-inf"))
        new = tl.maximum(m, tl.max(z, 0))
        keep = tl.exp(m - new)
        moved = tl.where(s > 0, m - new, 0.0)
        d = tl.where(v < V, z - new, 0.0)
        e = tl.where(v < V, tl.exp(d), 0.0)
        w = keep * (w + moved * s) + tl.sum(e * d, 0)
        s = keep * s + tl.sum(e, 0)
        m = new
    tl.store(entropy + row, tl.log(s) - w / s)


@triton.jit
def entropy_without_maximum(x, entropy, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    s = 0.0
    w = 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(x + row * V + v, mask=v < V, other=0.0)
        e = tl.where(v < V, tl.exp(z), 0.0)
        s += tl.sum(e, 0)
        w += tl.sum(e * z, 0)
    tl.store(entropy + row, tl.log(s) - w / s)


@triton.jit
def entropy_two_reads(x, entropy, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    m = float("-inf")
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        m = tl.maximum(m, tl.max(tl.load(x + row * V + v, mask=v < V, other=float("-inf")), 0))
    s = 0.0
    w = 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        d = tl.where(v < V, tl.load(x + row * V + v, mask=v < V, other=0.0) - m, 0.0)
        e = tl.where(v < V, tl.exp(d), 0.0)
        s += tl.sum(e, 0)
        w += tl.sum(e * d, 0)
    tl.store(entropy + row, tl.log(s) - w / s)


def _puzzle(question: str, minutes: int, hint: str, setup, right: list, wrong: list) -> Check:
    test, remark = _kernel_check(setup)
    return Check(question, minutes, hint, test, right=right, wrong=wrong, remark=remark, interpreted=True)


CHECKS = {
    "01.1": Check(
        "Write floor_ms(N, V, e, bandwidth): the shortest time of a loss with its gradient, in milliseconds.",
        3, "The forward reads the logits. The backward reads them again and writes as many numbers.", _floor,
        right=[lambda n, v, e, bandwidth: 3e3 * n * v * e / bandwidth],
        wrong=[(lambda n, v, e, bandwidth: 3 * n * v * e / bandwidth, "milliseconds"),
               (lambda n, v, e, bandwidth: 1e3 * n * v * e / bandwidth, "one pass"),
               (lambda n, v, e, bandwidth: 2e3 * n * v * e / bandwidth, "must be written"),
               (lambda n, v, e, bandwidth: 5e3 * n * v * e / bandwidth, "Count the passes")]),
    "01.2": _puzzle(
        "Scale each row: y[n, v] = s[n] x[n, v].", 6,
        "tl.program_id(0) is the row, tl.program_id(1) the block in it; which v are past the end of the row?", _scale,
        right=[scale_right], wrong=[(scale_without_mask, "outside its tensors"), (scale_first_block, "never written")]),
    "01.3": _puzzle(
        "hit[n] = 1 where the target's logit is the largest of its row, else 0, reading the logits once.", 8,
        "Load the target's own logit first; then only the row's maximum is needed.", _hits,
        right=[hits_right], wrong=[(hits_read_twice, "load twice"), (hits_other_zero, "your kernel gives")]),
    "01.4": _puzzle(
        "The entropy of each row's softmax, reading the logits once.", 15,
        "entropy = log s - w / s with s = sum e^(z-m), w = sum e^(z-m) (z-m). And w when m moves?", _entropy,
        right=[entropy_right],
        wrong=[(entropy_without_maximum, "NaN"), (entropy_two_reads, "load twice")]),
    "01.5": Check(
        "Write registers(warps): the most registers a thread can have in a block of that many warps.",
        4, "An SM has 65,536 registers, and an instruction has eight bits to name one (one name is taken).", _registers,
        right=[lambda warps: min(255, 65_536 // (32 * warps))],
        wrong=[(lambda warps: 65_536 // (32 * warps), "at most"), (lambda warps: 255, "65,536 registers")]),
    "01.6": Check(
        "Write break_even(V, rate, bandwidth): the set size K at which the sparse head is as slow as the dense one.",
        5, "Dense: 6 N H V FLOPs at `rate`. Sparse: 3 N K H e bytes at `bandwidth`, with e = 2.", _break_even,
        right=[lambda v, rate, bandwidth: v * bandwidth / rate],
        wrong=[(lambda v, rate, bandwidth: rate / bandwidth, "ridge"),
               (lambda v, rate, bandwidth: v * rate / bandwidth, "solve for K")]),
}
