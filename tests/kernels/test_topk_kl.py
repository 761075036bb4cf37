"""Gate (a) of K6, and of the set's arithmetic that K7 shares. The exact values are textbook formulas in float64."""

import importlib
import math

import gate
import pytest
import torch
from torch import Tensor

from labkit import kernels
from labkit.kernels.configs import forced
from labkit.kernels.cost import Cost
from labkit.kernels.interpreter import guard_bounds, overflow_checks

k6 = importlib.import_module("labkit.kernels.topk_kl")
pytestmark = pytest.mark.interp

MODES, DIRECTIONS = ("renorm", "tail", "none"), ("reverse", "forward")
each_kind = pytest.mark.parametrize(("mode", "direction"), [(m, d) for m in MODES for d in DIRECTIONS])
each_sum = pytest.mark.parametrize(("mode", "direction"), [(MODES[0], d) for d in DIRECTIONS] + [
    ("tail", "reverse"), ("none", "forward")])  # the parts of the kernel that the other two share
each_direction = pytest.mark.parametrize("direction", DIRECTIONS)
LOGITS = "student_logits_NV"


def example(N: int = 2, V: int = 37, K: int = 6, noise: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    """A student, and the top K of a teacher whose logits are the student's plus noise."""
    generator = torch.Generator().manual_seed(seed)
    student_NV = 2 * torch.randn(N, V, generator=generator)
    teacher_NV = (student_NV + noise * torch.randn(N, V, generator=generator)).log_softmax(1)
    logp_NK, ids_NK = teacher_NV.topk(K, 1)
    return {LOGITS: student_NV, "teacher_ids_NK": ids_NK, "teacher_logp_NK": logp_NK}


def textbook(student_logits_NV, teacher_ids_NK, teacher_logp_NK, *, mode="renorm", direction="reverse",
             temperature=1.0, impl=None):
    """The definition for distinct ids and finite numbers, in as many lines as it has."""
    log_q_NV = (student_logits_NV / temperature).log_softmax(1)
    log_q, log_p = log_q_NV.gather(1, teacher_ids_NK), teacher_logp_NK
    masses = log_q.exp().sum(1).detach(), log_p.exp().sum(1).detach()
    if mode == "renorm":
        log_q, log_p = log_q.log_softmax(1), log_p.log_softmax(1)
    if mode == "tail":
        log_q, log_p = (torch.cat([x, torch.log1p(-x.exp().sum(1, keepdim=True))], 1) for x in (log_q, log_p))
    a, b = (log_q, log_p) if direction == "reverse" else (log_p, log_q)
    return (a.exp() * (a - b)).sum(1), *masses


def loss_of(tensors: dict[str, Tensor], **settings) -> Tensor:
    return kernels.topk_kl(**tensors, **settings)[0]


def dense_gradient(tensors: dict[str, Tensor], **settings) -> Tensor:
    """Of the sum of the losses with respect to the logits."""
    logits_NV = tensors[LOGITS].clone().requires_grad_()
    return torch.autograd.grad(loss_of(tensors | {LOGITS: logits_NV}, **settings).sum(), logits_NV)[0]


# ---- the definition


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_textbook(mode, direction, dtype):
    """Loss, both masses and the gradient, for K that fills no power of two, at a temperature."""
    tensors = example() if dtype == torch.float32 else {
        name: x.half() if x.is_floating_point() else x for name, x in example().items()}
    # the rounded log-probabilities are the input; a remainder p_r near 0.1 cancels from 1, ten times coarser than 6e-8
    gate.check(kernels.topk_kl, tensors, {"mode": mode, "direction": direction, "temperature": 1.7}, [LOGITS],
               exact=textbook, factor=4.0 if mode == "tail" else 1.0)


@pytest.mark.parametrize(("N", "V", "K"), [(1, 5, 5), (2, 97, 70), (3, 64, 1)])
def test_other_shapes(N, V, K):
    """A set that is the whole vocabulary, one of several warps, and one token; several blocks of V in the backward."""
    with forced("topk_kl", BLOCK_V=32):
        for mode in ("renorm", "none"):
            gate.check(kernels.topk_kl, example(N, V, K), {"mode": mode}, [LOGITS], exact=textbook,
                       scale={"out0": 1.0, f"grad_{LOGITS}": 1.0} if mode == "renorm" and K == 1 else None)


def test_strided_logits():
    """Rows apart in memory are read where they are; a transposed matrix is copied."""
    tensors = example()
    wide = torch.randn(2, 60)
    wide[:, 11:48] = tensors[LOGITS]
    for view in (wide[:, 11:48], tensors[LOGITS].T.contiguous().T):
        gate.check(kernels.topk_kl, tensors | {LOGITS: view}, {"mode": "tail"}, [LOGITS], exact=textbook, factor=4.0)


def test_rows_beyond_two_to_the_31_elements():
    """Row offsets are 64 bits wide, in the set's kernel and in the one that fills the gradient."""
    logits_NV = gate.huge_rows(3, 40, torch.float16, row_stride=2**30 + 64)
    logits_NV.copy_(example(3, 40)[LOGITS])
    tensors = example(3, 40) | {LOGITS: logits_NV}
    near = tensors | {LOGITS: logits_NV.clone()}
    far, close = (k6.launch_forward(*x.values(), "tail", "reverse", 1.0, True) for x in (tensors, near))
    assert all(torch.equal(*pair) for pair in zip(far, close, strict=True))
    loss_N, *_, outside_N, lse_N = far
    assert torch.equal(*(k6.launch_fill(loss_N, x[LOGITS], lse_N, outside_N, 1.0) for x in (tensors, near)))


def test_a_gradient_beyond_two_to_the_31_elements():
    """Row offsets of the written gradient are 64 bits wide too ."""
    V = 2**30 + 64
    out_NV = gate.huge_rows(3, V, torch.float16, row_stride=V)
    kept_NK, values_NK = torch.tensor([[3, -1], [5, V - 1], [-1, 7]]), torch.arange(6.0).view(3, 2)
    with overflow_checks():
        k6.launch_scatter(torch.tensor([2.0, 3.0, 4.0]), kept_NK, values_NK + 1, out_NV)
    assert [float(out_NV[place]) for place in ((0, 3), (1, 5), (1, V - 1), (2, 7))] == [2, 9, 12, 24]


def test_no_rows_and_no_set():
    """N = 0 gives empty results, K = 0 an empty set."""
    for N, K in ((0, 3), (2, 0)):
        results = gate.run(kernels.topk_kl, example(N, 9, K), {}, [LOGITS])
        assert results["out0"].shape == (N,) and not results["out0"].any() and not results[f"grad_{LOGITS}"].any()


# ---- what is in the set


@each_sum
def test_ids_of_minus_one_are_not_in_the_set(mode, direction):
    """Rows with fewer ids than K equal the same rows with a smaller K, wherever the gaps stand."""
    tensors = example(2, 37, 4)
    ids_NK, logp_NK = torch.full((2, 7), -1), torch.full((2, 7), -0.5)
    place = torch.tensor([1, 2, 4, 6])
    ids_NK[:, place], logp_NK[:, place] = tensors["teacher_ids_NK"], tensors["teacher_logp_NK"]
    padded = tensors | {"teacher_ids_NK": ids_NK, "teacher_logp_NK": logp_NK}
    settings = {"mode": mode, "direction": direction}
    ours = gate.check(kernels.topk_kl, padded, settings, [LOGITS], factor=4.0)
    for place, short in enumerate(kernels.topk_kl(**tensors, **settings)):
        gate.close(ours[f"out{place}"], short, factor=4.0)


@each_sum
def test_a_token_that_stands_twice_counts_once(mode, direction):
    """The larger log-probability is taken, of equal ones either; the gradient reaches its logit once."""
    tensors = example(2, 37, 4)
    ids_NK, logp_NK = tensors["teacher_ids_NK"], tensors["teacher_logp_NK"]
    twice = tensors | {"teacher_ids_NK": ids_NK[:, [1, 0, 1, 2, 3, 0]],
                       "teacher_logp_NK": logp_NK[:, [1, 0, 1, 2, 3, 0]] - torch.tensor([0.0, 0, 2, 0, 0, 0])}
    settings = {"mode": mode, "direction": direction}
    ours = gate.check(kernels.topk_kl, twice, settings, [LOGITS], factor=4.0)
    for place, once in enumerate(kernels.topk_kl(**tensors, **settings)):
        gate.close(ours[f"out{place}"], once, factor=4.0)
    rounding = 1e-6 * float(ours[f"grad_{LOGITS}"].abs().max())
    assert mode != "renorm" or (ours[f"grad_{LOGITS}"].abs() > rounding).sum(1).tolist() == [4, 4]


@each_direction
def test_a_teacher_probability_of_zero_is_not_in_the_set(direction):
    """A top-k of a teacher that allows fewer than K tokens: entries of -inf are like an id of -1."""
    tensors = example(2)
    tensors["teacher_logp_NK"][:, 3] = -math.inf
    ours = gate.check(kernels.topk_kl, tensors, {"direction": direction}, [LOGITS])
    without = tensors | {"teacher_ids_NK": tensors["teacher_ids_NK"].clone()}
    without["teacher_ids_NK"][:, 3] = -1
    assert torch.equal(ours["out0"], loss_of(without, direction=direction))


@each_kind
def test_a_student_logit_of_minus_infinity(mode, direction):
    """q = 0: reverse, its term and gradient are 0; forward, the loss is +inf, and the gradient stays finite."""
    tensors = example(2)
    forbidden_N = tensors["teacher_ids_NK"][:, 2]
    tensors[LOGITS][torch.arange(2), forbidden_N] = -math.inf
    ours = gate.check(kernels.topk_kl, tensors, {"mode": mode, "direction": direction}, [LOGITS], factor=4.0)
    gradient_NV = ours[f"grad_{LOGITS}"]
    assert gradient_NV.isfinite().all()
    assert ours["out0"].isfinite().all() if direction == "reverse" else (ours["out0"] == math.inf).all()
    assert direction == "forward" or not gradient_NV[torch.arange(2), forbidden_N].any()


@each_sum
def test_an_empty_set(mode, direction):
    """Loss 0, masses 0 and no gradient, in one row among others."""
    tensors = example(3)
    tensors["teacher_ids_NK"][1] = -1
    ours = gate.check(kernels.topk_kl, tensors, {"mode": mode, "direction": direction}, [LOGITS], factor=4.0)
    assert not any(ours[name][1].any() for name in ours)


@each_direction
def test_a_student_without_mass_on_the_set(direction):
    """Reverse: every q is 0, so loss and gradient are. Forward: +inf, with a finite gradient."""
    tensors = example(2)
    tensors[LOGITS][0, tensors["teacher_ids_NK"][0]] = -math.inf
    ours = gate.check(kernels.topk_kl, tensors, {"direction": direction}, [LOGITS])
    assert ours["out0"][0] == (0 if direction == "reverse" else math.inf)
    assert ours[f"grad_{LOGITS}"].isfinite().all()
    assert direction == "forward" or not ours[f"grad_{LOGITS}"][0].any()


def test_an_id_outside_the_vocabulary_makes_its_row_nan():
    """On a GPU ids are not looked at before the launch: they are never dereferenced, and the row says so."""
    tensors = example(3)
    tensors["teacher_ids_NK"][0, 2], tensors["teacher_ids_NK"][2, 5] = 10**9, -7
    with guard_bounds():
        loss_N, _, _, kept_NK, *_ = k6.launch_forward(*tensors.values(), "renorm", "reverse", 1.0, False)
    assert loss_N.isnan().tolist() == [True, False, True]
    assert kept_NK[0, 2] == kept_NK[2, 5] == -1
    assert k6.reference(*tensors.values())[0].isnan().tolist() == [True, False, True]


# ---- arithmetic


@each_direction
def test_one_token_renormalised_is_exactly_zero(direction):
    """On a set of one token both sides are certain; there is nothing to learn."""
    tensors = example(2, 37, 1)
    assert torch.equal(loss_of(tensors, direction=direction), torch.zeros(2))
    assert not dense_gradient(tensors, direction=direction).any()


@pytest.mark.parametrize("mode", ["renorm", "tail"])
@each_direction
def test_never_negative(mode, direction):
    """Also where the textbook sum, in fp32, is negative from rounding: student and teacher nearly or wholly equal."""
    for noise in (0.0, 1e-7, 1e-5, 1e-2, 3.0):
        tensors = example(4, 40, 8, noise)
        assert (loss_of(tensors, mode=mode, direction=direction) >= 0).all(), noise


@each_direction
@pytest.mark.parametrize("noise", [1e-3, 3e-2])
def test_close_distributions_keep_their_digits(direction, noise):
    """A KL of 1e-7 or 1e-4: the textbook sum in fp32 is off by several per cent, and the kernel's loss is not.

    What remains is the rounding of d itself, 1e-7 beside d of the size of the noise.
    """
    tensors = example(3, 97, 12, noise)
    same = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    exact_N = textbook(**same, direction=direction)[0]
    both_N = loss_of(tensors, direction=direction), textbook(**tensors, direction=direction)[0]
    error, plain = (float(((x_N - exact_N) / exact_N).abs().max()) for x_N in both_N)
    assert error < 1e-6 / noise and plain > 20 * error, (error, plain)
    exact_NV = torch.autograd.grad(textbook(**same | {LOGITS: (z := same[LOGITS].requires_grad_())},
                                            direction=direction)[0].sum(), z)[0]
    gradient_error = (dense_gradient(tensors, direction=direction) - exact_NV).norm() / exact_NV.norm()
    assert gradient_error < 5e-8 / noise  # the textbook form in fp32: 12e-8 / noise


@each_direction
def test_where_the_series_ends(direction):
    """Log-ratios r from 0.5 to 2, across the 1 at which e^r - 1 - r is no longer taken from its series."""
    odds_N = torch.linspace(0.5, 2.5, 12)
    tensors = {LOGITS: torch.zeros(12, 2), "teacher_ids_NK": torch.arange(2).expand(12, 2),
               "teacher_logp_NK": torch.stack([torch.zeros(12), -odds_N], 1)}
    for name, x in zip((LOGITS, "teacher_logp_NK"), (tensors["teacher_logp_NK"], tensors[LOGITS]), strict=True):
        tensors[name] = x  # both ways round: r of either sign weighs most
        same = {key: y.double() if y.is_floating_point() else y for key, y in tensors.items()}
        gate.close(loss_of(tensors, direction=direction), textbook(**same, direction=direction)[0])


@each_kind
def test_far_distributions(mode, direction):
    """Log-ratios of 100 on either side: no overflow of a series or an exponential meant for close ones."""
    gate.check(kernels.topk_kl, example(noise=30.0), {"mode": mode, "direction": direction}, [LOGITS],
               factor=4.0)


@each_direction
def test_constants_and_large_logits(direction):
    """Both maxima come off first: logits near 300 and log-probabilities less a constant of 300 change nothing."""
    tensors = example()
    moved = tensors | {LOGITS: (64 * tensors[LOGITS]).round() / 64 + 300,
                       "teacher_logp_NK": tensors["teacher_logp_NK"] - 300}
    gate.check(kernels.topk_kl, moved, {"direction": direction, "mass": False}, [LOGITS],
               scale={"out2": 1.0})  # the teacher's mass, exp(-300), is 0 in fp32


@each_direction
def test_nothing_remains_for_the_tail(direction):
    """All of V in the set: the remainders are rounding, and 2^-20 stands in for them; loss and gradient stay finite."""
    tensors = example(3, 9, 9)
    loss_N = loss_of(tensors, mode="tail", direction=direction)
    gate.close(loss_N, loss_of(tensors, direction=direction), factor=4.0)
    assert dense_gradient(tensors, mode="tail", direction=direction).isfinite().all()


@each_sum
def test_the_order_of_columns_does_not_matter(mode, direction):
    """A set has no order."""
    tensors = example()
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    turned = tensors | {name: x[:, order] for name, x in tensors.items() if name != LOGITS}
    settings = {"mode": mode, "direction": direction}
    gate.close(loss_of(turned, **settings), loss_of(tensors, **settings))
    gate.close(dense_gradient(turned, **settings), dense_gradient(tensors, **settings), factor=4.0)


# ---- what the modes are for


@each_direction
def test_the_tail_is_a_lower_bound_and_all_of_v_is_the_kl(direction):
    """Merging tokens into one bin cannot raise a KL; with K = V all modes are the full KL."""
    tensors, whole = example(3, 37, 5), example(3, 37, 37)
    full_N = loss_of(whole, direction=direction)
    assert (loss_of(tensors, mode="tail", direction=direction) <= full_N + 1e-6).all()
    student_NV, teacher_NV = (whole[LOGITS].log_softmax(1),
                              torch.empty(3, 37).scatter(1, whole["teacher_ids_NK"], whole["teacher_logp_NK"]))
    p_NV, q_NV = (teacher_NV, student_NV) if direction == "reverse" else (student_NV, teacher_NV)
    full = torch.nn.functional.kl_div(p_NV.double(), q_NV.double(), log_target=True, reduction="none").sum(1)
    gate.close(full_N, full)
    gate.close(loss_of(whole, mode="none", direction=direction), full, factor=4.0)


def test_only_renorm_leaves_the_other_logits_alone():
    """Renormalised, tokens outside the set have gradient 0 exactly and those inside sum to 0; the sum over S has the
    "+1": where the teacher equals the student it still pushes mass out of the set."""
    tensors = example(noise=0.0)
    outside_NV = torch.ones(2, 37, dtype=torch.bool).scatter(1, tensors["teacher_ids_NK"], False)
    gradient_NV = dense_gradient(tensors | {LOGITS: example(seed=1)[LOGITS]})
    assert not gradient_NV[outside_NV].any() and gradient_NV.any() and gradient_NV.sum(1).abs().max() < 1e-6
    plus_one_NV = dense_gradient(tensors, mode="none")
    assert (plus_one_NV[outside_NV] < 0).all() and (plus_one_NV[~outside_NV] > 0).all()
    assert dense_gradient(tensors, mode="tail").abs().max() < 1e-6


# ---- gradient as ids and values, memory, traffic, errors


@each_direction
def test_the_sparse_gradient_is_the_dense_one(direction):
    """Scattered, (ids, values) gives the dense gradient; each id stands once, and -1 marks what is not in the set."""
    tensors = example(3)
    tensors["teacher_ids_NK"][0, 1] = tensors["teacher_ids_NK"][0, 4]
    tensors["teacher_ids_NK"][2, 3] = -1
    settings = {"direction": direction, "temperature": 0.7}
    ours = gate.check(kernels.topk_kl_gradient, tensors, settings)
    dense_NV = torch.zeros(3, 38).scatter_add(1, ours["out0"] % 38, ours["out1"])[:, :37]
    assert torch.equal(dense_NV, dense_gradient(tensors, **settings))
    assert (ours["out0"] == -1).sum(1).tolist() == [1, 0, 1] and not ours["out1"][ours["out0"] == -1].any()


def test_masses_carry_no_gradient_and_can_be_left_out():
    """They are for watching. Without them "renorm" does not read the other V - K logits, which here are NaN."""
    tensors = example()
    loss_N, student_N, teacher_N = kernels.topk_kl(**tensors | {LOGITS: tensors[LOGITS].clone().requires_grad_()})
    assert loss_N.requires_grad and not student_N.requires_grad and not teacher_N.requires_grad
    hidden_NV = torch.full((2, 37), math.nan).scatter(1, tensors["teacher_ids_NK"],
                                                      tensors[LOGITS].gather(1, tensors["teacher_ids_NK"]))
    for impl in ("triton", "reference"):
        alone_N, unknown_N, _ = kernels.topk_kl(**tensors | {LOGITS: hidden_NV}, mass=False, impl=impl)
        gate.close(alone_N, loss_N)
        assert unknown_N.isnan().all()


def test_renorm_does_not_hold_the_logits():
    """What is kept for the backward is [N, K]: the caller can free the logits before it."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        loss_of(example() | {LOGITS: example()[LOGITS].requires_grad_()})
    assert kept and all(shape[-1] <= 6 for shape in kept)


@pytest.mark.parametrize("mode", MODES)
def test_traffic(mode):
    """Bytes requested are those of the formulas; the zeros under a sparse gradient are torch's."""
    tensors = {name: x.half() if name == LOGITS else x for name, x in example(3, 5000, 6).items()}
    cost = {"N": 3, "V": 5000, "K": 6, "mode": mode}
    gate.check_traffic(lambda: loss_of(tensors, mode=mode), k6.forward_cost(**cost))
    if mode == "renorm":
        gate.check_traffic(lambda: loss_of(tensors, mode=mode, mass=False), k6.forward_cost(**cost, mass=False))
    loss_N = loss_of(tensors | {LOGITS: (z := tensors[LOGITS].requires_grad_())}, mode=mode)
    zeros = Cost(0, -3 * 5000 * 2 if mode == "renorm" else 0, 0)
    gate.check_traffic(lambda: torch.autograd.grad(loss_N.sum(), z), k6.backward_cost(**cost).plus(zeros))


def test_bad_input_is_refused():
    """Each with a sentence, and before a launch."""
    good = example()
    ids_NK, logp_NK = good["teacher_ids_NK"], good["teacher_logp_NK"]
    for match, change in (
        ("the vocabulary has 3", {LOGITS: torch.randn(2, 3), "teacher_ids_NK": ids_NK % 3}),
        ("the vocabulary has 0", {LOGITS: torch.randn(2, 0), "teacher_ids_NK": ids_NK[:, :0],
                                  "teacher_logp_NK": logp_NK[:, :0]}),
        ("teacher_ids_NK holds the id 37", {"teacher_ids_NK": ids_NK.clone().fill_(37)}),
        ("teacher_ids_NK holds the id -2", {"teacher_ids_NK": ids_NK.clone().fill_(-2)}),
        ("teacher_ids_NK has dtype float32", {"teacher_ids_NK": ids_NK.float()}),
        ("teacher_logp_NK has dtype int64", {"teacher_logp_NK": ids_NK}),
        ("student_logits_NV has dtype int64", {LOGITS: good[LOGITS].long()}),
        ("does not take student_logits_NV in float64", {LOGITS: good[LOGITS].double(), "impl": "triton"}),
        ("teacher_logp_NK has shape [2, 5]", {"teacher_logp_NK": logp_NK[:, :5]}),
        ("teacher_ids_NK has shape [1, 6]", {"teacher_ids_NK": ids_NK[:1]}),
        ("student_logits_NV has shape [37]", {LOGITS: good[LOGITS][0]}),
        ("on different devices", {"teacher_logp_NK": logp_NK.to("meta")}),
        ("no mode 'mean'", {"mode": "mean"}), ("no direction 'both'", {"direction": "both"}),
        ("temperature is nan", {"temperature": math.nan}), ("temperature is inf", {"temperature": math.inf}),
        ("temperature of 0", {"temperature": 0}), ("temperature of -1.0", {"temperature": -1.0}),
    ):
        gate.expect_error(match, lambda change=change: kernels.topk_kl(**good | change))
    large = example(1, 1100, 1030)
    gate.expect_error("1030 ids is more than the kernel's 1024", lambda: loss_of(large, impl="triton"))
    gate.close(loss_of(large), textbook(**large)[0], factor=10.0)  # "auto" takes the reference
