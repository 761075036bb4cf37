"""Exercises of 01_first_kernel: three puzzles whose answer is a kernel, in the form of Triton-Puzzles (sentence,
formula, picture, reference, empty kernel, test), and three whose answer is a number or a formula.

A kernel is launched here on small tensors with odd sizes, in Triton's interpreter.
"""

import torch

from labkit.course import kernel_answers as answers
from labkit.course.check import Check, Unreadable
from labkit.course.kernel_check import Puzzle, bytes_remark, grade
from labkit.course.reading import called, close, number
from labkit.kernels.language import triton

N, V, BLOCK = 5, 300, 128


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [N, V], a scale a row, and targets that are the largest in two of five rows. One row is all negative."""
    generator = torch.Generator().manual_seed(0)
    x_NV, s_N = torch.randn(N, V, generator=generator) * 3, torch.rand(N, generator=generator) + 0.5
    x_NV[2] -= 20
    return x_NV, s_N, torch.where(torch.tensor([True, False, True, False, False]), x_NV.argmax(1), torch.tensor(17))


def _scale(kernel) -> Puzzle:
    x_NV, s_N, _ = _inputs()
    y_NV = torch.empty(N, V)
    return Puzzle(lambda: kernel[(N, triton.cdiv(V, BLOCK))](x_NV, s_N, y_NV, V, BLOCK=BLOCK), y_NV,
                  s_N[:, None] * x_NV, 8 * N * V + 4 * N)


def _hits(kernel) -> Puzzle:
    x_NV, _, target_N = _inputs()
    hit_N = torch.empty(N)
    exact_N = (x_NV.argmax(1) == target_N).float()
    return Puzzle(lambda: kernel[(N,)](x_NV, target_N, hit_N, V, BLOCK=BLOCK), hit_N, exact_N, 4 * N * V + 12 * N)


def _entropy(kernel) -> Puzzle:
    x_NV = _inputs()[0] + 300.0  # without the maximum, exp overflows
    entropy_N = torch.empty(N)
    exact_N = torch.distributions.Categorical(logits=x_NV.double()).entropy()
    return Puzzle(lambda: kernel[(N,)](x_NV, entropy_N, V, BLOCK=BLOCK), entropy_N, exact_N, 4 * N * V + 4 * N)


def _floor(answer) -> str | None:
    for n, v, e, bandwidth in ((8192, 151_936, 2, 4.3e12), (4096, 32_000, 4, 1.8e12)):
        got, right = number(called(answer, n, v, e, bandwidth)), 3 * n * v * e / bandwidth * 1e3
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
        got = number(called(answer, warps))
        if close(got, right):
            continue
        if got == 256:
            return "255, not 256: eight bits name 256 registers, and one name stands for zero."
        if warps < 16 and got == 65_536 // (32 * warps):
            return f"With {warps} warps the file has {got:g} for each, but an instruction can name 255 at most."
        return f"With {warps} warps you say {got:g}. A warp has 32 threads, and an SM has 65,536 registers."
    return None


def _speedup(answer) -> str | None:
    for k, v, rate, bandwidth in ((64, 151_936, 790e12, 4.3e12), (256, 32_000, 200e12, 1.8e12)):
        got, dense, gather = number(called(answer, k, v, rate, bandwidth)), v / rate, k / bandwidth
        right = 3 * dense / (dense + 3 * gather)
        if close(got, right, within=0.01 * right):
            continue
        if close(got, dense / gather, within=0.01 * dense / gather):
            return "That is the ratio when the set is known. Here a dense forward pass has to find it first."
        if close(got, dense / (dense + gather), rel=0.01):
            return "The dense head makes three passes of 2 N H V, the new one one; and the sparse head reads 3 N K H e."
        if close(got, 1 / right, within=0.01 / right):
            return "Upside down: how many times faster is dense time over the new time."
        return f"At K={k}, V={v} you say {got:.4g}. Add 2 N H V / rate and 6 N K H / bandwidth; N and H cancel."
    return None


def _puzzle(question: str, minutes: int, level: str, hint: str, puzzle, right: list, wrong: list) -> Check:
    """An exercise whose answer is a kernel; `puzzle(kernel)` sets it up."""
    def test(kernel) -> str | None:
        if not hasattr(kernel, "fn"):
            raise Unreadable("A kernel is asked for: a function under @triton.jit.")
        return grade(puzzle(kernel))

    return Check(question, minutes, level, hint, test, right, wrong, lambda kernel: bytes_remark(puzzle(kernel)), True)


CHECKS = {
    "01.1": Check(
        "Write floor_ms(N, V, e, bandwidth): the time of the three passes of a loss and its gradient, in milliseconds.",
        3, "easy", "The forward reads the logits. The backward reads them again and writes as many numbers.", _floor,
        right=[lambda n, v, e, bandwidth: 3e3 * n * v * e / bandwidth,
               lambda N, V, e, bandwidth: sum(N * V * e / bandwidth for _ in ("read", "read", "write")) / 1e-3],
        wrong=[(lambda n, v, e, bandwidth: 3 * n * v * e / bandwidth, "milliseconds"),
               (lambda n, v, e, bandwidth: 1e3 * n * v * e / bandwidth, "one pass"),
               (lambda n, v, e, bandwidth: 2e3 * n * v * e / bandwidth, "must be written"),
               (lambda n, v, e, bandwidth: 5e3 * n * v * e / bandwidth, "Count the passes")]),
    "01.2": Check(
        "Write registers(warps): the most registers a thread can have in a program of that many warps.",
        4, "easy",
        "An SM has 65,536 registers, and an instruction has eight bits to name one (one name is taken).", _registers,
        right=[lambda warps: min(255, 65_536 // (32 * warps)),
               lambda warps: 255.0 if warps < 16 else 2048 / warps],
        wrong=[(lambda warps: 65_536 // (32 * warps), "at most"), (lambda warps: 255, "65,536 registers"),
               (lambda warps: min(256, 65_536 // (32 * warps)), "not 256")]),
    "01.3": _puzzle(
        "Scale each row: y[n, v] = s[n] x[n, v].", 6, "medium",
        "tl.program_id(0) is the row, tl.program_id(1) the block in it; which v are past the end of the row?", _scale,
        right=[answers.scale_right, answers.scale_by_the_first_program],
        wrong=[(answers.scale_without_mask, "outside its tensors"), (answers.scale_first_block, "never written"),
               (answers.scale_into_the_next_row, "run in order"), (answers.scale_addresses, "tl.load what stands")]),
    "01.4": _puzzle(
        "hit[n] = 1 where the target's logit is the largest of its row, else 0, reading the logits once.", 8, "medium",
        "Load the target's own logit first; then only the row's maximum is needed.", _hits,
        right=[answers.hits_right, answers.hits_by_counting],
        wrong=[(answers.hits_read_twice, "store twice"), (answers.hits_other_zero, "your kernel gives")]),
    "01.5": Check(
        "Write speedup(K, V, rate, bandwidth) of the sparse head when a dense pass must find the set first.",
        8, "medium",
        "Dense: 6 N H V FLOPs at `rate`. Now: 2 N H V FLOPs, and 3 N K H e bytes at `bandwidth`, e = 2.", _speedup,
        right=[lambda k, v, rate, bandwidth: 6 * v / rate / (2 * v / rate + 6 * k / bandwidth),
               lambda k, v, rate, bandwidth: 3 / (1 + 3 * k * rate / (v * bandwidth))],
        wrong=[(lambda k, v, rate, bandwidth: v * bandwidth / (k * rate), "when the set is known"),
               (lambda k, v, rate, bandwidth: (v + 3 * k * rate / bandwidth) / (3 * v), "Upside down"),
               (lambda k, v, rate, bandwidth: v / rate / (v / rate + k / bandwidth), "three passes"),
               (lambda k, v, rate, bandwidth: 3.0, "cancel")]),
    "01.6": _puzzle(
        "The entropy of each row's softmax, reading the logits once.", 15, "hard",
        "When m moves to m', each term of w gets the factor e^(m-m') and (m-m') more of its own e. Two traps: a masked "
        "lane gives 0 * -inf, and in the first block m is -inf.", _entropy,
        right=[answers.entropy_right, answers.entropy_from_a_low_start],
        wrong=[(answers.entropy_without_guards, "first block"),
               (answers.entropy_from_large_products, "digits are lost"),
               (answers.entropy_forgets_the_shift, "your kernel gives"), (answers.entropy_two_reads, "store twice")]),
}
