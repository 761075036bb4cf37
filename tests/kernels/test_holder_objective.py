"""K5 holder_objective: the kernels against float64, the reference against the papers' formulas, and the hard cases."""

import importlib
import math

import gate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from labkit import kernels
from labkit.kernels.configs import forced
from labkit.kernels.holder_kernels import _sequence
from labkit.kernels.interpreter import count_traffic, overflow_checks
from labkit.kernels.language import tl, triton

pytestmark = pytest.mark.interp
module = importlib.import_module("labkit.kernels.holder_objective")
launchers = importlib.import_module("labkit.kernels.holder_kernels")
LEVELS = ("sequence", "token")
EXPONENTS = [0.0, 1e-6, -1e-6, 1e-4, -1e-3, 1e-2, 0.5, 1.0, 2.0, -2.0, 8.0, -8.0]


def objective(**arguments):
    """The op, with its statistics as further outputs."""
    loss, stats = kernels.holder_objective(**arguments)
    return loss, stats["clip_fraction"], stats["log_ratio_B"]


def batch(lengths: list[int], scale: float, seed: int = 0, masked: float = 0.0) -> dict[str, torch.Tensor]:
    """Packed sequences of these lengths, log-ratios of this scale, both signs of the advantage."""
    draw = torch.Generator().manual_seed(seed)
    M, B = sum(lengths), len(lengths)
    old = -torch.rand(M, generator=draw)
    tensors = {"logp": old + scale * torch.randn(M, generator=draw), "old_logp": old,
               "advantage_B": torch.randn(B, generator=draw), "cu_seqlens": bounds(lengths)}
    if masked:
        tensors["mask"] = torch.rand(M, generator=draw) >= masked
    return tensors


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def one(log_ratios: list[float], advantage: float, **settings) -> tuple:
    """Loss, statistics and gradient of a single sequence with these log-ratios."""
    logp = torch.tensor(log_ratios, requires_grad=True)
    loss, stats = kernels.holder_objective(logp, torch.zeros(len(log_ratios)), torch.tensor([advantage]),
                                           bounds([len(log_ratios)]), **settings)
    loss.backward()
    return loss.item(), stats, logp.grad


# ---- the kernels against float64


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_every_exponent_agrees_with_float64(level, scale):
    """Loss, statistics and gradient, with an exponent a sequence: zero, tiny, small, large, of both signs."""
    lengths = [33, 1, 80, 7, 128, 45, 64, 65, 3, 100, 17, 50]
    tensors = batch(lengths, scale, masked=0.2) | {"p": torch.tensor(EXPONENTS)}
    with forced("holder_objective", BLOCK=64):
        # the sequences' gains nearly cancel in the loss, and the tokens' log-ratios in log M
        gate.check(objective, tensors, {"level": level}, wrt=["logp"], scale={"out0": 1.0, "out2": scale})


@pytest.mark.parametrize("p", [0.0, 1e-6, -2])
def test_a_number_p_agrees_with_float64(p):
    """One exponent for all, given as a number; int32 bounds; clip ranges of two widths."""
    tensors = batch([5, 0, 40, 1], 0.3)
    tensors["cu_seqlens"] = tensors["cu_seqlens"].int()
    gate.check(objective, tensors, {"p": p, "clip_low": 0.1, "clip_high": 0.4}, wrt=["logp"])


@pytest.mark.parametrize("level", LEVELS)
def test_fp16_agrees_with_float64(level):
    """Half-precision log-probabilities are subtracted and summed in fp32; only the gradient is rounded."""
    tensors = batch([70, 9, 130], 0.5) | {"p": torch.tensor([1.0, 0.0, -1.0])}
    gate.check(objective, tensors, {"level": level}, wrt=["logp"], dtype=torch.float16)


def test_log_ratios_of_a_hundred():
    """exp(p l) would be exp(800). Far from 0 everywhere, so a position that does not count must not set the scale."""
    draw = torch.Generator().manual_seed(1)
    for sign in (1, -1):
        ratios = sign * torch.linspace(60, 100, 90) + torch.randn(90, generator=draw)
        tensors = {"logp": ratios, "old_logp": torch.zeros(90), "advantage_B": torch.tensor([sign * 1.0] * 3),
                   "cu_seqlens": bounds([30, 30, 30]), "p": torch.tensor([8.0, -8.0, 0.01]),
                   "mask": torch.rand(90, generator=draw) > 0.2}
        # clipped, or too small for fp32, so all there is to compare is log M
        ours, _, log_ratio_B = objective(**tensors)
        exact = objective(**{k: v.double() if v.is_floating_point() else v for k, v in tensors.items()},
                          impl="reference")
        gate.close(log_ratio_B, exact[2], what=f"log M, sign {sign}")
        assert ours.isfinite() and abs(ours.item() - exact[0].item()) < 1e-6


def test_log_ratios_of_plus_and_minus_a_hundred():
    """Wide spreads: the error is a rounding of the largest log-ratio (7.6e-6 at 100), and exp makes it relative."""
    tensors = batch([200, 200, 200, 200], 35.0, seed=3)
    tensors |= {"p": torch.tensor([-8.0, -1.0, 1e-6, 0.01]), "advantage_B": torch.tensor([1.0, 2.0, 0.5, 1.0])}
    gate.check(objective, tensors, wrt=["logp"], factor=10)


def test_both_forms_agree_where_they_meet():
    """The series up to |p c| = 0.5 and the extreme's form from there on: both at their worst, for both signs of p."""
    spread = torch.cat([torch.full((3,), -0.1), torch.tensor([0.3])])  # mean 0, and c = 0.3 of one token
    p = torch.tensor([0.49, 0.51, -0.49, -0.51]) / 0.3
    tensors = {"logp": spread.repeat(4), "old_logp": torch.zeros(16), "advantage_B": torch.ones(4), "p": p,
               "cu_seqlens": bounds([4] * 4)}
    gate.check(objective, tensors, wrt=["logp"])


def test_a_long_sequence_beside_short_ones():
    """3000 tokens in blocks of 1024, between an empty sequence and one of a single token."""
    tensors = batch([0, 3000, 1, 0], 0.1) | {"p": torch.tensor([1.0, 1e-4, 2.0, 0.0])}
    with forced("holder_objective", BLOCK=1024):
        gate.check(objective, tensors, wrt=["logp"])


def test_more_sequences_than_a_block():
    """The last program's sum over sequences takes several rounds, and ends inside a block."""
    with forced("holder_objective", BLOCK=16):
        gate.check(objective, batch([2] * 19, 0.3), {"p": 0.5, "level": "token"}, wrt=["logp"])


def test_a_number_and_a_tensor_p_give_equal_bits():
    """p as 0.5, as a tensor [] and as a tensor [B] are the same objective."""
    tensors = batch([5, 40, 12], 0.3)
    first, *others = [objective(**tensors, p=p) for p in (0.5, torch.tensor(0.5), torch.full((3,), 0.5))]
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


def test_padded_input_equals_packed():
    """[B, T] with a mask gives the bits of the packed form without pads, gradients too; here transposed in memory."""
    lengths, T = [3, 0, 7, 5], 7
    packed = batch(lengths, 0.4)
    inside = torch.arange(T) < torch.tensor(lengths)[:, None]
    padded = {name: torch.full((T, 4), float("nan")).T for name in ("logp", "old_logp")}
    for name, grid in padded.items():
        grid[inside] = packed[name]
    same = {"p": 0.7, "level": "token"}
    results = [gate.run(objective, tensors, same, wrt=["logp"]) for tensors in (
        packed, packed | padded | {"cu_seqlens": None, "mask": inside},
        packed | padded | {"cu_seqlens": None, "mask": inside.long()})]
    for other in results[1:]:
        for name in ("out0", "out1", "out2"):
            assert torch.equal(results[0][name], other[name])
        assert torch.equal(results[0]["grad_logp"], other["grad_logp"][inside])
        assert not other["grad_logp"][~inside].any()


# ---- the hard cases


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("p", [0.0, -2.0])
def test_a_sequence_that_is_masked_contributes_nothing(level, p):
    """No token that counts: log M 0, gradient 0, and the other sequences' sum as if it were not there."""
    tensors = batch([6, 20, 9], 0.3)
    tensors["mask"] = torch.arange(35) // 6 == 0
    results = gate.run(objective, tensors, {"p": p, "level": level}, wrt=["logp"])
    alone, _, _ = objective(**{name: value[:6] for name, value in tensors.items() if name.endswith("logp")}, p=p,
                            level=level, advantage_B=tensors["advantage_B"][:1], cu_seqlens=bounds([6]))
    assert torch.equal(results["grad_logp"][6:], torch.zeros(29))
    assert torch.equal(results["out2"][1:], torch.zeros(2))
    gate.close(results["out0"] * 3, alone, torch.float32)


def test_a_sequence_without_a_partner():
    """Nothing counts in the whole batch: loss, clip fraction and gradient are 0."""
    tensors = batch([4], 0.3) | {"mask": torch.zeros(4, dtype=torch.bool)}
    results = gate.run(objective, tensors, {"p": 1.0}, wrt=["logp"])
    assert all(not result.any() for result in results.values())


def test_nan_where_masked_does_not_leak():
    """Equal bits whether masked positions hold NaN or 0, in loss, statistics and gradient."""
    tensors = batch([30, 50], 0.3, masked=0.4)
    results = []
    for filler in (float("nan"), 0.0):
        filled = {name: tensors[name].masked_fill(~tensors["mask"], filler) for name in ("logp", "old_logp")}
        results.append(gate.run(objective, tensors | filled, {"p": -0.5}, wrt=["logp"]))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert results[0]["out0"].isfinite() and not results[0]["grad_logp"][~tensors["mask"]].any()


def test_a_nan_that_counts_is_seen():
    """A NaN at a token that counts makes the loss NaN, at advantage 0 too: it must not be clipped to a number."""
    for advantage in (1.0, -1.0, 0.0):
        assert math.isnan(one([0.1, float("nan"), 0.2], advantage, p=1.0)[0])


@pytest.mark.parametrize("p", [0.0, 1e-6, -1e-2, 1.0, 8.0, -8.0])
def test_equal_ratios_are_their_own_mean(p):
    """All l_t = 0 gives exactly M = 1 and weights 1/n; any other common value comes out within two roundings."""
    loss, stats, gradient = one([0.0] * 50, 1.5, p=p)
    assert loss == -1.5 and stats["log_ratio_B"].item() == 0
    gate.close(gradient, torch.full((50,), -1.5 / 50, dtype=torch.float64))
    assert one([0.1] * 50, 1.5, p=p)[1]["log_ratio_B"].item() == pytest.approx(0.1, rel=2e-7)


@pytest.mark.parametrize("advantage, log_ratio, cut", [
    (2.0, 0.5, True), (2.0, -0.5, False), (-2.0, -0.5, True), (-2.0, 0.5, False), (2.0, 0.1, False), (0.0, 0.5, False)])
@pytest.mark.parametrize("level", LEVELS)
def test_the_clip_cuts_on_the_side_that_the_advantage_pushes_to(advantage, log_ratio, cut, level):
    """Too likely already and praised, or too unlikely and blamed: a constant, gradient 0. Else the ratio itself."""
    loss, stats, gradient = one([log_ratio] * 3, advantage, p=1.0, clip_low=0.1, clip_high=0.3, level=level)
    ratio = (1.3 if advantage > 0 else 0.9) if cut else math.exp(log_ratio)
    assert loss == pytest.approx(-advantage * ratio, rel=1e-6)
    assert stats["clip_fraction"].item() == cut
    expected = 0.0 if cut else -advantage * ratio / 3
    assert gradient.tolist() == pytest.approx([expected] * 3, rel=1e-6)


def test_clip_fraction_counts_what_counts():
    """Sequences out of those with a token, or tokens out of those not masked."""
    tensors = {"logp": torch.tensor([1.0, 1.0, -1.0, 0.0, 9.0, 5.0]), "old_logp": torch.zeros(6), "p": 1.0,
               "advantage_B": torch.ones(3), "cu_seqlens": bounds([3, 2, 1]),
               "mask": torch.tensor([True, True, True, True, False, False])}
    assert objective(**tensors)[1].item() == pytest.approx(1 / 2)
    assert objective(**tensors, level="token")[1].item() == pytest.approx(2 / 4)


@pytest.mark.parametrize("level", LEVELS)
def test_advantage_zero_with_a_ratio_that_overflows(level):
    """0 times exp(100) is 0 here, in loss and gradient, not NaN."""
    loss, _, gradient = one([100.0, 95.0, -100.0], 0.0, p=2.0, level=level)
    assert loss == 0 and torch.equal(gradient, torch.zeros(3))


def test_a_ratio_that_overflows_is_infinite_and_not_nan():
    """A < 0 leaves large ratios unclipped: exp(100) is inf in fp32. Tokens of weight 0 still get gradient 0."""
    loss, _, gradient = one([100.0, 0.0], -1.0, p=8.0)
    assert loss == math.inf and gradient.tolist() == [math.inf, 0.0]


@pytest.mark.parametrize("cu", [[1, 4, 8], [0, 4, 7], [0, 9, 8], [0, -1, 8], [0, 4, 100], [-5, 4, 8]])
def test_a_broken_cu_seqlens_is_nan_and_touches_nothing_else(cu):
    """On a GPU nobody looks at the values beforehand: nothing outside is read, all is written, the loss is NaN."""
    def launch(logp, old_logp, advantage_B, cu_seqlens):
        inputs = (logp, old_logp, None, advantage_B, cu_seqlens, 0, 1.0, None, -0.2, 0.2, False)
        loss, _, kept_6B = module.launch_forward(*inputs)
        return loss, module.launch_backward(torch.ones(()), kept_6B, *inputs)

    tensors = batch([4, 4], 0.1) | {"cu_seqlens": torch.tensor(cu)}
    assert gate.run(launch, tensors, repeatable=sorted(cu) == cu)["out0"].isnan()


@triton.jit
def _positions_kernel(out, cu_seqlens, advantages, T, B, M, BLOCK: tl.constexpr):
    _, start, _, _, _, _, _, _ = _sequence(cu_seqlens, advantages, None, T, B, M, 1.0, 0, 0.0, 0.0)
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), start + tl.arange(0, BLOCK))


@pytest.mark.parametrize("cu", [None, torch.tensor([0, 2**31 - 8, 2**31 - 4, 2**31 - 1], dtype=torch.int32)],
                         ids=["padded", "packed"])
def test_positions_beyond_int32(cu):
    """b * T of a padded batch passes 2^31, and so does a block that starts just below it."""
    out_3x16 = torch.zeros(3, 16, dtype=torch.int64)
    with overflow_checks():
        _positions_kernel[(3,)](out_3x16, cu, torch.zeros(3), 2**30 + 1, 3, 2**31 - 1, BLOCK=16)
    starts = torch.arange(3) * (2**30 + 1) if cu is None else cu[:3].long()
    assert torch.equal(out_3x16, starts[:, None] + torch.arange(16))


# ---- the reference against the papers' formulas


@pytest.mark.parametrize("p", [-8.0, -2.0, -0.5, 1e-3, 1.0, 3.0])
def test_reference_is_the_naive_formula_where_that_is_safe(p):
    """(mean exp(p l))^(1/p) in float64, with its gradient by autograd."""
    naive = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours = naive.detach().clone().requires_grad_()
    ratio = (p * naive).exp().mean() ** (1 / p)
    (-1.5 * ratio).backward()
    loss, _ = kernels.holder_objective(ours, torch.zeros_like(ours), torch.tensor([1.5]).double(), bounds([40]), p,
                                       clip_high=1e9, impl="reference")
    loss.backward()
    torch.testing.assert_close(loss, -1.5 * ratio, rtol=1e-11, atol=0)
    torch.testing.assert_close(ours.grad, naive.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["GRPO", "GSPO", "GMPO"])
def test_the_named_algorithms_are_points_of_it(name):
    """Losses and gradients in float64 as TRL and verl write them, on a padded batch."""
    draw = torch.Generator().manual_seed(2)
    logp = torch.randn(5, 9, dtype=torch.float64, generator=draw)
    old = logp + 0.3 * torch.randn(5, 9, dtype=torch.float64, generator=draw)
    A = torch.randn(5, dtype=torch.float64, generator=draw)
    mask = torch.arange(9) < torch.tensor([9, 4, 1, 7, 9])[:, None]
    theirs, ours = logp.clone().requires_grad_(), logp.clone().requires_grad_()

    def mean(x_BT):
        return (x_BT * mask).sum(1) / mask.sum(1)

    if name == "GRPO":
        ratio = (theirs - old).exp()
        gain = mean(torch.minimum(ratio * A[:, None], ratio.clamp(0.8, 1.3) * A[:, None]))
    elif name == "GSPO":
        ratio = mean(theirs - old).exp()
        gain = torch.minimum(ratio * A, ratio.clamp(0.8, 1.3) * A)
    else:  # the one-sided clip of the log-ratio, before the geometric mean
        sign = A.sign()[:, None]
        clipped = (theirs - old).clamp(math.log(0.8), math.log(1.3))
        gain = mean(sign * torch.minimum(sign * (theirs - old), sign * clipped)).exp() * A
    (-gain.mean()).backward()
    loss, _ = kernels.holder_objective(ours, old, A, None, 1.0 if name == "GRPO" else 0.0, 0.2, 0.3, mask=mask,
                                       level="sequence" if name == "GSPO" else "token", impl="reference")
    loss.backward()
    torch.testing.assert_close(loss, -gain.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_the_fp32_reference_holds_near_p_zero():
    """log M is mu + p var/2 + ... without a jump: no digits are lost to the division by p."""
    tensors = batch([1000] * 12, 0.05) | {"p": torch.tensor(EXPONENTS)}
    wide = {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}
    gate.close(objective(**tensors, impl="reference")[2], objective(**wide, impl="reference")[2], scale=0.05)


@settings(max_examples=6)
@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=20))
def test_the_power_mean_rises_with_p_between_the_extremes(ratios):
    """min l <= log M <= max l, and log M never falls as p grows, up to fp32 rounding."""
    exponents = torch.tensor(sorted(EXPONENTS))
    logp = torch.tensor(ratios).repeat(12)
    log_ratio_B = objective(logp=logp, old_logp=torch.zeros_like(logp), advantage_B=torch.ones(12),
                            cu_seqlens=bounds([len(ratios)] * 12), p=exponents)[2]
    slack = 1e-6 * max(1.0, *map(abs, ratios))
    assert (log_ratio_B.diff() >= -slack).all()
    assert min(ratios) - slack <= log_ratio_B[0] and log_ratio_B[-1] <= max(ratios) + slack


# ---- what it costs, and what it refuses


@pytest.mark.parametrize("masked", [0.0, 0.3])
def test_traffic_is_what_the_docstring_says(masked):
    """Two readings of both inputs forward, one backward and the gradient."""
    lengths = [400, 0, 700, 900]
    tensors = batch(lengths, 0.1, masked=masked)
    inputs = (tensors["logp"], tensors["old_logp"], tensors.get("mask"), tensors["advantage_B"], tensors["cu_seqlens"],
              0, 1.0, None, -0.2, 0.2, False)
    *_, kept_6B = module.launch_forward(*inputs)
    gate.check_traffic(lambda: module.launch_forward(*inputs), module.forward_cost(2000, 4, mask=bool(masked)))
    gate.check_traffic(lambda: module.launch_backward(torch.ones(()), kept_6B, *inputs),
                       module.backward_cost(2000, 4, mask=bool(masked)))


class Recorder(TorchDispatchMode):
    """The names of the torch operations inside, views and allocations left out: each is a launch on a GPU."""

    FREE = ("aten::view", "aten::detach", "aten::expand", "aten::select", "aten::empty", "aten::alias")

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name not in self.FREE:
            self.names.append(name)
        return function(*args, **kwargs or {})


def test_one_launch_each_way_and_a_memset():
    """The wrapper adds no torch operation; the forward's launcher zeroes its counter, and that is all."""
    tensors = batch([5, 8], 0.1, masked=0.3)
    tensors["logp"].requires_grad_()
    upstream = torch.ones(())
    with pytest.MonkeyPatch.context() as patch, count_traffic() as traffic, Recorder() as outer:
        patch.setattr(module, "_readable", lambda tensor: False)  # as on a GPU
        loss, _ = kernels.holder_objective(**tensors, p=0.5)
        torch.autograd.grad(loss, tensors["logp"], upstream)
    assert traffic.launches == 2
    assert outer.names == ["labkit::holder_objective", "labkit::holder_objective_backward"]
    inputs = (tensors["logp"].detach(), tensors["old_logp"], tensors["mask"], tensors["advantage_B"],
              tensors["cu_seqlens"], 0, 0.5, None, -0.2, 0.2, False)
    with pytest.MonkeyPatch.context() as patch, Recorder() as inner:
        for name in ("_forward_kernel", "_backward_kernel"):  # the interpreter itself calls torch
            patch.setattr(launchers, name, {(2,): lambda *arguments, **settings: None})
        *_, kept_6B = module.launch_forward(*inputs)
        module.launch_backward(upstream, kept_6B, *inputs)
    assert inner.names == ["aten::zeros"]


def test_the_op_keeps_torch_s_contract():
    """Schema, fake tensors and autograd registration, as torch.compile needs them."""
    tensors = batch([5, 8], 0.1)
    inputs = (tensors["logp"].requires_grad_(), tensors["old_logp"], None, tensors["advantage_B"],
              tensors["cu_seqlens"], 0, 0.5, None, -0.2, 0.2, False)
    torch.library.opcheck(module._op, inputs,
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_an_empty_batch_costs_nothing():
    """No sequence: loss 0 that can be differentiated, gradient of no element."""
    for cu_seqlens, shape in ((torch.zeros(1, dtype=torch.int64), (0,)), (None, (0, 7))):
        for impl in ("triton", "reference"):
            logp = torch.zeros(shape, requires_grad=True)
            loss, stats = kernels.holder_objective(logp, torch.zeros(shape), torch.zeros(0), cu_seqlens, 1.0, impl=impl)
            loss.backward()
            assert loss.item() == 0 and stats["clip_fraction"].item() == 0 and logp.grad.shape == shape


@pytest.mark.parametrize("change, match", [
    ({"p": float("nan")}, "p is nan"), ({"p": torch.tensor([1.0, float("inf")])}, "not finite"),
    ({"p": torch.ones(3)}, "p has shape [3]"), ({"p": torch.ones(2, dtype=torch.int64)}, "p has dtype int64"),
    ({"clip_low": 1.0}, "1 - 1.0"), ({"clip_high": -0.1}, "1 + -0.1"), ({"clip_low": float("nan")}, "1 - nan"),
    ({"level": "batch"}, "level 'batch'"),
    ({"old_logp": torch.zeros(4)}, "old_logp has shape [4]"), ({"advantage_B": torch.ones(3)}, "cu_seqlens has shape"),
    ({"mask": torch.ones(4, dtype=torch.bool)}, "mask has shape [4]"),
    ({"logp": torch.zeros(5, dtype=torch.int64)}, "logp has dtype int64"),
    ({"logp": torch.zeros(5).double(), "impl": "triton"}, "does not take logp in float64"),
    ({"cu_seqlens": torch.tensor([0.0, 2, 5])}, "cu_seqlens has dtype torch.float32"),
    ({"cu_seqlens": torch.tensor([1, 2, 5])}, "goes from 1 to 5"),
    ({"cu_seqlens": torch.tensor([0, 6, 5])}, "back in between"), ({"cu_seqlens": torch.tensor([0, 2, 4])}, "to 4"),
    ({"cu_seqlens": None}, "logp has shape [5]"), ({"mask": torch.ones(5, device="meta")}, "different devices"),
])
def test_what_does_not_fit_is_refused_with_a_sentence(change, match):
    """Every mistake raises a LabError that names the argument, before any launch."""
    good = {"logp": torch.zeros(5), "old_logp": torch.zeros(5), "advantage_B": torch.ones(2),
            "cu_seqlens": torch.tensor([0, 2, 5]), "p": 1.0}
    kernels.holder_objective(**good, impl="reference")
    gate.expect_error(match, lambda: kernels.holder_objective(**good | change))
