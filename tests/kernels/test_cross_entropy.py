"""K2, gate (a): loss, log-sum-exp and gradient of the interpreted kernels against float64, torch and Liger-Kernel."""

import importlib

import gate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_rows import VIEWS, rows
from torch import Tensor
from torch.library import opcheck

from labkit import kernels
from labkit.kernels.configs import forced
from labkit.kernels.interpreter import count_traffic, guard_bounds, overflow_checks

pytestmark = pytest.mark.interp

k2 = importlib.import_module("labkit.kernels.cross_entropy")
INF = float("inf")
FLOATS = [torch.float32, torch.float16]


def ids(*shape: int, V: int, seed: int = 1) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def check(logits_NV: Tensor, target: Tensor, weight: Tensor | None = None, options: dict | None = None,
          **named) -> dict[str, Tensor]:
    """The whole gate in blocks of 64, row by row (reduction="none"), with upstream gradients at both outputs."""
    with forced("cross_entropy", BLOCK_V=64):
        return gate.check(kernels.cross_entropy, {"logits_NV": logits_NV, "target": target, "weight": weight},
                          {"reduction": "none"} | (options or {}), ["logits_NV"], **named)


def by_torch(logits_NV, target, weight=None, reduction="none", z_loss=0.0, ignore_index=-100):
    """Loss and lse from F.cross_entropy; a bag becomes a row of probabilities."""
    lse_N = logits_NV.logsumexp(1)
    if target.ndim == 1:
        loss_N = F.cross_entropy(logits_NV, target, ignore_index=ignore_index, reduction="none")
        counts_N = target != ignore_index
    else:
        share_NS = (target != ignore_index).double() * (1 if weight is None else weight.double())
        counts_N = share_NS.sum(1) > 0
        share_NS = share_NS / share_NS.sum(1, keepdim=True).where(counts_N[:, None], 1.0)
        chosen_NV = torch.zeros_like(logits_NV).scatter_add(1, target.clamp(min=0), share_NS.to(logits_NV.dtype))
        loss_N = F.cross_entropy(logits_NV, chosen_NV, reduction="none")
    loss_N = torch.where(counts_N, loss_N + z_loss * lse_N**2, 0.0)
    if reduction != "none":
        loss_N = loss_N.sum() / (counts_N.sum().clamp(min=1) if reduction == "mean" else 1)
    return loss_N, lse_N


# ---- shapes and layouts


@pytest.mark.parametrize("dtype", FLOATS, ids=["fp32", "fp16"])
@pytest.mark.parametrize("N, V", [(1, 1), (1, 127), (7, 31), (3, 64), (3, 65), (2, 257)])
def test_odd_shapes(N, V, dtype):
    """Primes, one past a power of two, one row: one to five blocks of 64 give what float64 gives."""
    check(rows(N, V), ids(N, V=V), dtype=dtype)


@pytest.mark.parametrize("S", [1, 3])
def test_no_rows(S):
    """An empty batch has an empty loss, a mean of 0, and an empty gradient."""
    check(rows(0, 7), ids(0, S, V=7))
    logits_NV = rows(0, 7).requires_grad_()
    loss, lse_N = kernels.cross_entropy(logits_NV, ids(0, S, V=7))
    loss.backward()
    assert loss == 0 and lse_N.shape == (0,) and logits_NV.grad.shape == (0, 7)


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_the_logits(view):
    """Strides of the logits change nothing."""
    check(VIEWS[view](), ids(2, V=75))


@pytest.mark.parametrize("view", VIEWS)
def test_inplace_on_views(view):
    """With inplace=True the gradient is right for every layout, also where it cannot lie over the logits."""
    check(VIEWS[view](), ids(2, V=75), options={"inplace": True}, overwrites=["logits_NV"])


def test_views_of_target_and_weight():
    """Bags that lie transposed, or in every second place, and weights with a stride are read as they are meant."""
    for target_NS in (ids(3, 4, V=75).t(), ids(4, 6, V=75)[:, ::2]):
        check(rows(4, 75), target_NS, torch.tensor([1.0, 9.0, 2.0, 9.0, 4.0])[::2])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_both_types(dtype):
    """int32 ids are taken as they are."""
    check(rows(3, 70), ids(3, 2, V=70).to(dtype))


# ---- against other implementations


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_equals_torch(reduction):
    """F.cross_entropy in float64, with ignored rows: loss and gradient under each reduction."""
    target_N = ids(5, V=70)
    target_N[2] = -100
    check(rows(5, 70), target_N, options={"reduction": reduction}, exact=by_torch)


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 0.0, 5.0]], ids=["equal", "weighted"])
def test_bags_equal_torch(weight):
    """A bag is F.cross_entropy with probabilities: duplicates add up, ignored ids and weights of 0 drop out."""
    target_NS = torch.tensor([[3, 3, 69, 3], [0, -100, 5, 64], [-100] * 4, [-100, -100, -100, 7], [1, 2, 3, 4]])
    check(rows(5, 70), target_NS, None if weight is None else torch.tensor(weight), exact=by_torch)


def test_z_loss_equals_torch():
    """z_loss * lse^2 is added to rows that count, and to no other."""
    target_NS = torch.tensor([[3, 4], [-100, 5], [-100, -100]])
    check(rows(3, 70) + 4, target_NS, options={"z_loss": 0.01}, exact=by_torch)


def test_equals_liger():
    """Liger-Kernel's kernel, interpreted: the same loss and gradient; it also moves 2 N V e in and N V e out."""
    liger = pytest.importorskip("liger_kernel.ops.cross_entropy")
    logits_NV, target_N = rows(4, 515), ids(4, V=515)
    target_N[1] = -100
    theirs_NV = logits_NV.clone().requires_grad_()
    with count_traffic() as traffic:
        loss, *_, gradient_NV = liger.cross_entropy_forward(theirs_NV, target_N, None, -100, 0.01, 0.0, "mean", None,
                                                            False)
    ours_NV = logits_NV.clone().requires_grad_()
    with forced("cross_entropy", BLOCK_V=512), count_traffic() as own:
        ours = kernels.cross_entropy(ours_NV, target_N, z_loss=0.01)[0]
        ours.backward()
    gate.close(ours, loss, what="loss")
    gate.close(ours_NV.grad, gradient_NV, what="gradient")
    size = logits_NV.nbytes
    assert own.loaded / (2 * size) < 1.06 and own.stored / size < 1.02
    assert traffic.loaded / (2 * size * 3 / 4) < 1.06 and traffic.stored / size < 1.02  # it skips the ignored row


# ---- hard values


def test_forbidden_tokens():
    """-inf logits count for nothing, also where they fill the first blocks; as the target they make the loss inf."""
    logits_NV = rows(4, 140)
    logits_NV[0, :130] = -INF
    logits_NV[1, 64:] = -INF
    logits_NV[2, 7] = -INF
    logits_NV[3, ::2] = -INF
    result = check(logits_NV, torch.tensor([135, 3, 7, 139]))
    assert result["out0"].isfinite().tolist() == [True, True, False, True] and result["out0"][2] == INF
    assert result["grad_logits_NV"].isfinite().all()


def test_forbidden_token_inside_a_bag():
    """One forbidden id makes the bag's loss inf; where its weight is 0 or it is ignored, it changes nothing."""
    logits_NV = rows(3, 70)
    logits_NV[:, 7] = -INF
    result = check(logits_NV, torch.tensor([[3, 7], [7, 3], [3, 4]]), torch.tensor([1.0, 0.0]))
    assert result["out0"].isfinite().tolist() == [True, False, True]
    check(logits_NV, torch.tensor([[3, 7], [7, 3], [3, 7]]), options={"ignore_index": 7})


@pytest.mark.parametrize("place", [3, 100])
def test_plus_inf(place):
    """A +inf logit gives lse = inf and a loss that is no number, in its own row only, early or late in the row."""
    logits_NV = rows(3, 200)
    logits_NV[1, place] = INF
    result = check(logits_NV, torch.tensor([1, 2, 199]))
    assert result["out1"][1] == INF and result["out0"].isfinite().tolist() == [True, False, True]


def test_a_row_of_minus_inf():
    """Where every token is forbidden, lse = -inf and the loss is NaN; neighbours are untouched."""
    logits_NV = rows(3, 130)
    logits_NV[1] = -INF
    result = check(logits_NV, torch.tensor([1, 2, 3]))
    assert result["out1"][1] == -INF and result["out0"].isnan().tolist() == [False, True, False]


def test_an_ignored_row_may_hold_anything():
    """An ignored row of -inf, +inf or NaN has loss 0 and gradient 0. (F.cross_entropy's gradient is NaN there.)"""
    logits_NV = rows(4, 70)
    logits_NV[1], logits_NV[2, 3], logits_NV[3, 4] = -INF, INF, float("nan")
    logits_NV.requires_grad_()
    loss, _ = kernels.cross_entropy(logits_NV, torch.tensor([5, -100, -100, -100]), z_loss=0.1)
    loss.backward()
    alone = kernels.cross_entropy(logits_NV.detach()[:1], torch.tensor([5]), z_loss=0.1)[0]
    assert torch.equal(loss, alone) and (logits_NV.grad[1:] == 0).all() and logits_NV.grad[0].isfinite().all()


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_all_rows_ignored(reduction, impl):
    """Nothing counts: the loss is 0, not 0/0, and so is the gradient."""
    for target in (torch.full((3,), -100), torch.full((3, 2), -100)):
        logits_NV = rows(3, 70).requires_grad_()
        loss, _ = kernels.cross_entropy(logits_NV, target, reduction=reduction, impl=impl, z_loss=0.1)
        loss.sum().backward()
        assert (loss == 0).all() and (logits_NV.grad == 0).all()


def test_gradient_where_p_is_nearly_one():
    """p - 1 = -3e-4 in fp16: a p that is rounded first would be 1, or 5e-4 below it."""
    logits_NV = torch.full((2, 70), -INF)
    logits_NV[:, :2] = torch.tensor([0.0, -8.0])
    result = check(logits_NV, torch.tensor([0, 1]), dtype=torch.float16, scale={"out0": 1.0, "out1": 1.0},
                   upstream=[torch.ones(2), torch.zeros(2)])
    assert abs(result["grad_logits_NV"][0, 0] + 1 / (1 + torch.e**8)) < 4e-7  # the grain of fp16 there is 2.4e-7


def test_rows_at_ten_thousand():
    """A common offset of 1e4 costs the loss nothing. The gradient sees an fp32 lse, whose grain there is 1e-3."""
    check(rows(3, 70) + 1e4, ids(3, 2, V=70), factor={"grad_logits_NV": 500})
    outlier_NV = rows(3, 70)
    outlier_NV[1, 5] = 1e4
    check(outlier_NV, torch.tensor([1, 5, 3]))


def test_blocks_that_fall_and_rise():
    """The shift follows the largest block so far: 200 above or below the next one, exp would overflow or vanish."""
    fall_V = torch.linspace(400, -400, 200)
    # an lse near 400 is known to 1.5e-5, and so is p
    check(torch.stack([fall_V, -fall_V]), torch.tensor([0, 0]), factor={"grad_logits_NV": 8})


# ---- size, traffic, bad input


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_beyond_two_to_the_31(inplace):
    """Row offsets are int64, in the forward and in the backward, from the logits and over them."""
    small_NV, target_N, found = rows(3, 70).half(), ids(3, V=70), []
    for logits_NV in (gate.huge_rows(3, 70, torch.float16, 2**30 + 8).copy_(small_NV), small_NV):
        with np.errstate(all="ignore"), guard_bounds(), overflow_checks():
            loss, _ = kernels.cross_entropy(logits_NV.requires_grad_(), target_N, inplace=inplace)
            found.append((loss, torch.autograd.grad(loss, logits_NV)[0]))
    assert all(torch.equal(huge, small) for huge, small in zip(*found, strict=True))


@pytest.mark.parametrize("N, V, S", [(2, 5000, 1), (2, 4096, 3), (3, 40, 33)])
def test_traffic(N, V, S):
    """Each direction requests the bytes of its formula: padding places of a bag and padding columns cost nothing."""
    logits_NV, target_NS = rows(N, V).half(), ids(N, S, V=V)
    share_NS = k2.bag_shares(target_NS, -100, None)
    loss_N, lse_N = k2.launch_forward(logits_NV, target_NS, share_NS, 0.0)
    gate.check_traffic(lambda: k2.launch_forward(logits_NV, target_NS, share_NS, 0.0), k2.forward_cost(N, V, S))
    gate.check_traffic(lambda: k2.launch_backward(loss_N, loss_N, logits_NV, target_NS, share_NS, lse_N, 0.0,
                                                  torch.empty_like(logits_NV)), k2.backward_cost(N, V, S))


def test_inplace_takes_no_second_tensor():
    """The gradient is the logits' own memory, equal in bits to a separate one; columns outside stay as they are."""
    wide_NV, target_N = rows(3, 80), ids(3, V=70)
    plain_NV = wide_NV[:, :70].clone().requires_grad_()
    kernels.cross_entropy(plain_NV, target_N)[0].backward()
    before = wide_NV[:, 70:].clone()
    logits_NV = wide_NV[:, :70].requires_grad_()
    gradient_NV, = torch.autograd.grad(kernels.cross_entropy(logits_NV, target_N, inplace=True)[0], logits_NV)
    assert gradient_NV.data_ptr() == wide_NV.data_ptr() and torch.equal(gradient_NV, plain_NV.grad)
    assert torch.equal(wide_NV[:, 70:], before)


def test_a_second_backward_over_overwritten_logits_is_refused():
    """After inplace=True the logits are gone, and autograd says so instead of computing from a gradient."""
    logits_NV = rows(3, 7).requires_grad_()
    loss, _ = kernels.cross_entropy(logits_NV * 1, ids(3, V=7), inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("bad", [-5, 70, 2**40])
def test_a_bad_id_on_a_gpu_makes_its_row_nan(bad):
    """Where ids are not looked at, one outside [0, V) reads nothing and cannot go unnoticed."""
    target_NS = torch.tensor([[1, 2], [3, bad], [4, 5]])
    share_NS = k2.bag_shares(target_NS, -100, None)
    logits_NV = gate.guarded(rows(3, 70))
    with np.errstate(all="ignore"), guard_bounds():
        loss_N, lse_N = k2.launch_forward(logits_NV, target_NS, share_NS, 0.0)
    assert loss_N.isnan().tolist() == [False, True, False] and lse_N.isfinite().all()


BAD = {
    "logits of one dimension": (dict(logits_NV=rows(3, 7)[0]), "Reshape logits_NV"),
    "whole numbers as logits": (dict(logits_NV=ids(3, 7, V=5)), "logits_NV.float()"),
    "float64 in a kernel": (dict(logits_NV=rows(3, 7).double(), impl="triton"), 'impl="reference"'),
    "no vocabulary": (dict(logits_NV=rows(3, 0)), "V of 1 or more"),
    "a single id": (dict(target=torch.tensor(1)), "Use ids [N]"),
    "three dimensions of ids": (dict(target=ids(3, 1, 1, V=7)), "bags of one or more ids [N, S]"),
    "empty bags": (dict(target=ids(3, 0, V=7)), "bags of one or more ids"),
    "a row too few": (dict(target=ids(2, V=7)), "Reshape target"),
    "ids that are floats": (dict(target=torch.ones(3)), "target.long()"),
    "an id past the end": (dict(target=torch.tensor([1, 7, 0])), "ids go from 0 to 6, or -100 for none"),
    "a negative id": (dict(target=torch.tensor([1, -1, 0])), "tokenizer"),
    "too many weights": (dict(weight=torch.ones(2)), "Reshape weight"),
    "weights that are ids": (dict(weight=torch.ones(1, dtype=torch.int64)), "weight.float()"),
    "two devices": (dict(target=ids(3, V=7).to("meta")), "one device with .to(device)"),
    "z_loss nan": (dict(z_loss=float("nan")), "Give z_loss a finite value"),
    "an unknown reduction": (dict(reduction="median"), '"mean", "sum" or "none"'),
    "an unknown impl": (dict(impl="cuda"), 'impl="auto", "triton" or "reference"'),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    """Each is refused with a sentence that names the fix, and nothing is launched."""
    given_, fix = BAD[name]
    good = dict(logits_NV=rows(3, 7), target=ids(3, V=7))
    with count_traffic() as traffic:
        gate.expect_error(fix, lambda: kernels.cross_entropy(**(good | given_)))
    assert not traffic.launches


# ---- torch.library, torch.compile


@pytest.mark.parametrize("inplace", [False, True])
def test_opcheck(inplace):
    """Schema, fake, autograd registration and AOT dispatch agree with what the op does."""
    logits_NV = rows(3, 7).requires_grad_()
    opcheck(k2._op, (logits_NV, ids(3, 2, V=7), torch.full((3, 2), 0.5), 0.01, inplace))


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_without_a_graph_break(inplace):
    """torch.compile(fullgraph=True) gives the bits of eager mode, loss and gradient."""
    def loss_of(x_NV, target_N):
        return kernels.cross_entropy(2 * x_NV, target_N, z_loss=0.01, inplace=inplace)[0]

    x_NV, target_N = rows(3, 7).requires_grad_(), ids(3, V=7)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    ours, plain = (fn(x_NV, target_N) for fn in (compiled, loss_of))
    assert torch.equal(ours, plain)
    assert torch.equal(*(torch.autograd.grad(loss, x_NV)[0] for loss in (ours, plain)))


# ---- properties

EXAMPLES = settings(max_examples=8)


@EXAMPLES
@given(V=st.integers(1, 150), S=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_rows_of_the_gradient_sum_to_zero(V, S, seed):
    """Softmax minus shares: both sum to one, so without z_loss each row of the gradient sums to nothing."""
    logits_NV = rows(2, V, seed).requires_grad_()
    with forced("cross_entropy", BLOCK_V=64):
        kernels.cross_entropy(logits_NV, ids(2, S, V=V, seed=seed), reduction="sum")[0].backward()
    assert logits_NV.grad.sum(1).abs().max() < 1e-6


@EXAMPLES
@given(V=st.integers(1, 150), seed=st.integers(0, 2**16))
def test_a_bag_of_one_is_a_single_target(V, seed):
    """In equal bits: loss and gradient."""
    found = []
    for target in (ids(2, V=V, seed=seed), ids(2, 1, V=V, seed=seed)):
        logits_NV = rows(2, V, seed).requires_grad_()
        loss, _ = kernels.cross_entropy(logits_NV, target)
        found.append((loss, torch.autograd.grad(loss, logits_NV)[0]))
    assert all(torch.equal(one, bag) for one, bag in zip(*found, strict=True))


@EXAMPLES
@given(S=st.integers(2, 5), seed=st.integers(0, 2**16))
def test_the_order_in_a_bag_does_not_matter(S, seed):
    """A permuted bag has the same loss and gradient up to rounding."""
    target_NS = ids(2, S, V=40, seed=seed)
    found = []
    for bag_NS in (target_NS, target_NS.flip(1)):
        logits_NV = rows(2, 40, seed).requires_grad_()
        loss_N, _ = kernels.cross_entropy(logits_NV, bag_NS, reduction="none")
        found.append((loss_N, torch.autograd.grad(loss_N.sum(), logits_NV)[0]))
    for one, other in zip(*found, strict=True):
        gate.close(one, other)
