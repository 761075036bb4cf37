"""The divergence of two distributions on a small set of K tokens: what topk_kl (K6) and sparse_head_topk_kl (K7) share.

q is the student, p the teacher, S the row's set; both are given by logarithms, x_i = z_i / temperature and t_i.

    renorm   log q_i = x_i - log sum_S exp x     log p_i = t_i - log sum_S exp t            both sum to one on S
    tail     log q_i = x_i - lse                 log p_i = t_i      and one more bin r: q_r = 1 - q(S), p_r = 1 - p(S)
    none     log q_i = x_i - lse                 log p_i = t_i                              neither sums to one
    reverse  L = sum q (log q - log p)           forward  L = sum p (log p - log q)

With d = log p - log q, the gradient with respect to x is, on the set (value) and for every other token v (outside q_v):

    renorm, tail   value_i = q_i (mean f - f_i)        outside = mean f - f_r     f = d (reverse) or e^d - 1 (forward);
                   mean f = sum q f                    (renorm: outside = 0)      e^d - 1 makes the value q_i - p_i
    none, reverse  value_i = q_i (1 - d_i) + outside q_i     outside = -sum q (1 - d)    the "+1" trap: see topk_kl
    none, forward  value_i = outside q_i - p_i               outside = p(S)

Close distributions lose their digits in these forms, since L is a small remainder of large terms: at a KL of 1e-7,
fp32 leaves one or two digits. So where q and p sum to one, L is summed as sum a (e^r - 1 - r) with r = log(b/a) and
weights a: the same sum, since sum (b - a) = 0, but no term is negative, an error in a normaliser enters only squared,
and L >= 0 in any rounding. For |r| < 1 the bracket is taken from its series. `mean f` is subtracted for the same
reason: it removes that error.

What is in the set: an entry with the id -1, or whose teacher log-probability is -inf, is not; a token that stands twice
counts once, with the larger log-probability. A student logit of -inf has q = 0: its reverse term and gradient are 0,
its forward term is +inf. An empty set has loss 0, and so has (reverse) one on which the student has no mass.
A remainder q_r or p_r below 2^-20 is taken as 2^-20: log-probabilities in fp32 carry no less.

Source of the modes: arXiv 2603.25562 (renorm); verl's and TRL's distillation losses (none, tail).
"""

import math

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import check_float, check_ids, check_kernel_dtype, check_shape, check_temperature
from labkit.kernels.configs import Row, settings_for
from labkit.kernels.dispatch import choose
from labkit.kernels.language import tl, triton

MODES = ("renorm", "tail", "none")
SETTINGS = [  # by K. The comparison of ids holds BLOCK_J / 32 * K / num_warps pairs a lane: at 16 it took 215 registers
    Row("any", 64, {"BLOCK_J": 4, "num_warps": 1}),
    Row("any", 256, {"BLOCK_J": 4, "num_warps": 4}),
    Row("any", float("inf"), {"BLOCK_J": 4, "num_warps": 16}),
]
LARGEST_SET = 1024  # one program holds the set; larger ones go to the reference
FLOOR = 2.0**-20


def members(ids_NK: Tensor, logp_NK: Tensor) -> Tensor:
    """Which entries are in their row's set, [N, K]: not those without id or teacher mass, and of equals only one."""
    K = ids_NK.shape[1]
    column_K = torch.arange(K, device=ids_NK.device)
    same_NKK = ids_NK[:, :, None] == ids_NK[:, None, :]
    larger_NKK = logp_NK[:, None, :] > logp_NK[:, :, None]
    equal_NKK = (logp_NK[:, None, :] == logp_NK[:, :, None]) & (column_K[None, :] < column_K[:, None])
    return (ids_NK != -1) & (logp_NK != -math.inf) & ~(same_NKK & (larger_NKK | equal_NKK)).any(2)


def set_divergence(x_NK: Tensor, lse_N: Tensor | None, logp_NK: Tensor, member_NK: Tensor, mode: str,
                   direction: str) -> tuple[Tensor, Tensor]:
    """(loss [N], student's mass on the set [N] or NaN), in plain torch and float64; differentiable in x and lse."""
    x_NK, t_NK = x_NK.double(), logp_NK.double()
    both_NK = member_NK & (x_NK != -math.inf)
    x_NK, t_NK = x_NK.masked_fill(~member_NK, 0.0), t_NK.masked_fill(~member_NK, 0.0)
    lse_N1 = torch.full_like(x_NK[:, :1], math.nan) if lse_N is None else lse_N.double()[:, None]
    mass_N = torch.where(both_NK, (x_NK - lse_N1).exp(), 0.0).sum(1)
    if mode == "renorm":
        log_q_NK, log_p_NK = x_NK - _log_sum(x_NK, both_NK), t_NK - _log_sum(t_NK, member_NK)
    else:
        log_q_NK, log_p_NK = x_NK - lse_N1, t_NK
    q_NK = torch.where(both_NK, log_q_NK.exp(), 0.0)
    p_NK = torch.where(member_NK, log_p_NK.exp(), 0.0)
    weight_NK = q_NK if direction == "reverse" else p_NK
    d_NK = torch.where(weight_NK > 0, log_p_NK - log_q_NK, 0.0)  # 0 (log 0 - log p) is 0
    loss_N = (weight_NK * d_NK).sum(1) * (-1 if direction == "reverse" else 1)
    if mode == "tail":
        q_N, p_N = ((1 - mass_NK.sum(1)).clamp(min=FLOOR) for mass_NK in (q_NK, p_NK))
        d_N = p_N.log() - q_N.log()
        loss_N = loss_N + (-q_N * d_N if direction == "reverse" else p_N * d_N)
    return loss_N, mass_N


def _log_sum(x_NK: Tensor, valid_NK: Tensor) -> Tensor:
    """log sum exp over the valid entries, [N, 1]; 0 where a row has none, with gradient 0."""
    some_N1 = valid_NK.any(1, keepdim=True)
    x_NK = x_NK.masked_fill(~valid_NK, -math.inf).masked_fill(~some_N1, 0.0)
    return x_NK.logsumexp(1, keepdim=True).masked_fill(~some_N1, 0.0)


@triton.jit
def _in_set(ids, logp, i, t, k, K, BLOCK_J: tl.constexpr):
    """The same rule as `members`; the row is compared with itself in pieces of BLOCK_J, read again from cache."""
    twin = tl.zeros(i.shape, tl.int32)
    for start in range(0, K, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = tl.load(ids + j, mask=j < K, other=-1)
        u = tl.load(logp + j, mask=j < K, other=float("-inf")).to(tl.float32)
        wins = (u[None, :] > t[:, None]) | ((u[None, :] == t[:, None]) & (j[None, :] < k[:, None]))
        twin += tl.sum(tl.where((other[None, :] == i[:, None]) & wins, 1, 0), 1)
    return (i != -1) & (t != float("-inf")) & (twin == 0)


@triton.jit
def _excess(r):
    """e^r - 1 - r for |r| < 1, by its series to r^10."""
    s = r * 0.0 + 1.0
    for n in tl.static_range(8):  # what is left out is below 6e-8 of the sum
        s = 1.0 + r * s * (1.0 / (10 - n))
    return 0.5 * r * r * s


@triton.jit
def _term(a, b, r, NORMALISED: tl.constexpr):
    """a log(a/b), with r = log(b/a); plus b - a where both sides sum to one."""
    if NORMALISED:
        near = tl.abs(r) < 1.0
        term = tl.where(near, a * _excess(tl.where(near, r, 0.0)), b - a - a * r)
    else:
        term = -a * r
    return term


@triton.jit
def _times_f(q, p, d, FORWARD: tl.constexpr):
    """q f: q d for the reverse direction, q (e^d - 1) = p - q for the forward one."""
    if FORWARD:
        near = tl.abs(d) < 1.0
        close = tl.where(near, d, 0.0)
        product = tl.where(near, q * (close + _excess(close)), p - q)
    else:
        product = q * d
    return product


@triton.jit
def _set_kernel(student, ids, logp, lse, loss, student_mass, teacher_mass, kept, values, outside, V, K, stride,
                inverse_temperature, MODE: tl.constexpr, FORWARD: tl.constexpr, GATHERED: tl.constexpr,
                FLOOR: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr):
    """One program a row. Long because loss and gradient share every intermediate; nothing is read twice but the set."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    ids += row * K
    logp += row * K
    i = tl.load(ids + k, mask=k < K, other=-1)
    t = tl.load(logp + k, mask=k < K, other=float("-inf")).to(tl.float32)
    member = _in_set(ids, logp, i, t, k, K, BLOCK_J)
    inside = member & (i >= 0) & (i < V)
    place = k if GATHERED else i
    z = tl.load(student + row * stride + place, mask=inside, other=float("nan")).to(tl.float32)
    both = member & (z != float("-inf"))  # an id outside the vocabulary has read nothing: NaN, for its whole row

    # log q = x - x_shift and log p = u - u_shift, each after its own maximum is off. In a row without members or
    # without student mass maxima and shifts are infinite; each use of them is under `both` or `member`, which are off
    z = tl.where(both, z, float("-inf"))
    t = tl.where(member, t, float("-inf"))
    z_max = tl.max(z, 0)
    t_max = tl.max(t, 0)
    x = tl.where(both, z - z_max, 0.0) * inverse_temperature
    u = tl.where(member, t - t_max, 0.0)
    x_lse = tl.load(lse + row) - z_max * inverse_temperature
    student_total = tl.sum(tl.where(both, tl.exp(x - x_lse), 0.0), 0)
    teacher_total = tl.sum(tl.where(member, tl.exp(u + t_max), 0.0), 0)
    x_shift = x_lse
    u_shift = -t_max
    if MODE == "renorm":
        x_sum = tl.sum(tl.where(both, tl.exp(x), 0.0), 0)
        u_sum = tl.sum(tl.where(member, tl.exp(u), 0.0), 0)
        x_shift = tl.log(x_sum)
        u_shift = tl.log(u_sum)
    q = tl.where(both, tl.exp(x - x_shift), 0.0)
    p = tl.where(member, tl.exp(u - u_shift), 0.0)
    d = tl.where(both, (u - x) - (u_shift - x_shift), 0.0)

    if FORWARD:
        term = tl.where(both, _term(p, q, -d, MODE != "none"), tl.where(p > 0, float("inf"), 0.0))
    else:
        term = tl.where(both, _term(q, p, d, MODE != "none"), p if MODE != "none" else 0.0)
    total = tl.sum(term, 0)
    qf = tl.where(both, _times_f(q, p, d, FORWARD), p if FORWARD else 0.0)
    mean = tl.sum(qf, 0)
    rest = 0.0
    if MODE == "renorm":
        if not FORWARD:
            total = tl.where(x_sum == 0, 0.0, total)  # no student mass on the set: every reverse term is 0
    elif MODE == "tail":
        q_rest = tl.maximum(1.0 - student_total, FLOOR)
        p_rest = tl.maximum(1.0 - teacher_total, FLOOR)
        d_rest = tl.log(p_rest) - tl.log(q_rest)
        total += _term(p_rest, q_rest, -d_rest, True) if FORWARD else _term(q_rest, p_rest, d_rest, True)
        mean += _times_f(q_rest, p_rest, d_rest, FORWARD)
        rest = mean - _times_f(q_rest, p_rest, d_rest, FORWARD) / q_rest
    if MODE == "none":
        rest = teacher_total if FORWARD else mean - student_total
        value = q * rest - p if FORWARD else q * (1.0 + rest) - qf
    else:
        value = q * mean - qf
    tl.store(loss + row, total)
    tl.store(student_mass + row, student_total)
    tl.store(teacher_mass + row, teacher_total)
    tl.store(outside + row, rest * inverse_temperature)
    tl.store(kept + row * K + k, tl.where(inside, i, -1), mask=k < K)
    tl.store(values + row * K + k, value * inverse_temperature, mask=k < K)


def launch_set(student: Tensor, ids_NK: Tensor, logp_NK: Tensor, lse_N: Tensor, V: int, mode: str, direction: str,
               temperature: float, gathered: bool = False) -> tuple[Tensor, ...]:
    """loss, student mass, teacher mass [N]; kept ids (-1: not in the set), values [N, K]; outside [N].

    `student` is the logits [N, V]; or, `gathered`, only those of the set, [N, K].
    """
    N, K = ids_NK.shape
    loss_N, student_mass_N, teacher_mass_N, outside_N = (lse_N.new_empty(N) for _ in range(4))
    kept_NK, values_NK = torch.empty_like(ids_NK), lse_N.new_empty(N, K)
    if N:
        BLOCK_K = triton.next_power_of_2(max(K, 1))
        _set_kernel[(N,)](student, ids_NK, logp_NK, lse_N, loss_N, student_mass_N, teacher_mass_N, kept_NK, values_NK,
                          outside_N, V, K, student.stride(0), 1 / temperature, MODE=mode,
                          FORWARD=direction == "forward", GATHERED=gathered, FLOOR=FLOOR, BLOCK_K=BLOCK_K,
                          **settings_for("topk_set", SETTINGS, K, ids_NK.device))
    return loss_N, student_mass_N, teacher_mass_N, kept_NK, values_NK, outside_N


def runs_kernel(impl: str, ids_NK: Tensor, **floats: Tensor) -> bool:
    """Whether the kernel runs on these. Sets above LARGEST_SET go to the reference, unless the kernel was asked for.

    Raises:
        LabError: what `choose` raises, a dtype that kernels do not take, or impl="triton" with too large a set.
    """
    if not all(choose(impl, tensor) for tensor in (ids_NK, *floats.values())):  # float64 and torch.func: see choose
        return False
    for name, tensor in floats.items():
        check_kernel_dtype(name, tensor)
    if ids_NK.shape[1] > LARGEST_SET and impl == "triton":
        raise LabError(f"A set of {ids_NK.shape[1]} ids is more than the kernel's {LARGEST_SET}.",
                       'Use a smaller K, or impl="auto".')
    return ids_NK.shape[1] <= LARGEST_SET


def check_set(N: int, V: int, ids_NK: Tensor, logp_NK: Tensor, mode: str, direction: str, temperature: float) -> None:
    """Raise LabError where a set or a setting does not fit N rows and V tokens."""
    check_shape("teacher_ids_NK", ids_NK, (N, None), "[N, K]")
    check_shape("teacher_logp_NK", logp_NK, tuple(ids_NK.shape), "[N, K]")
    check_float("teacher_logp_NK", logp_NK)
    if ids_NK.shape[1] > V or not V:
        raise LabError(f"The set has K = {ids_NK.shape[1]} ids, but the vocabulary has {V}.", "Use K of V or less.")
    check_ids("teacher_ids_NK", ids_NK, V, skip=-1)
    if mode not in MODES:
        raise LabError(f"There is no mode {mode!r}.", 'Choose "renorm", "tail" or "none".')
    if direction not in ("reverse", "forward"):
        raise LabError(f"There is no direction {direction!r}.", 'Choose "reverse" or "forward".')
    check_temperature(temperature)
