"""K3, gate (a): the chunked loss and its gradients against float64, K2 on dense logits, and F.linear_cross_entropy."""

import importlib
from functools import partial

import gate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from labkit import kernels
from labkit.kernels import interpreter
from labkit.kernels.configs import forced
from labkit.kernels.cost import Cost
from labkit.kernels.interpreter import count_traffic, guard_bounds, overflow_checks

pytestmark = pytest.mark.interp

k2 = importlib.import_module("labkit.kernels.cross_entropy")
k3 = importlib.import_module("labkit.kernels.linear_cross_entropy")
INF = float("inf")
FLOATS = [torch.float32, torch.float16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(*shape: int, V: int = 70, seed: int = 1) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def check(hidden_NH: Tensor, weight_VH: Tensor, target: Tensor, weight: Tensor | None = None, options=None,
          **named) -> dict[str, Tensor]:
    """The whole gate, K2 in blocks of 64, gradients of hidden states and head. In fp16 the gradient of the logits is
    fp16 too, so its rounding (2.8e-4) comes on top of that of dH and dW."""
    with forced("cross_entropy", BLOCK_V=64):
        return gate.check(kernels.linear_cross_entropy,
                          {"hidden_NH": hidden_NH, "weight_VH": weight_VH, "target": target, "weight": weight},
                          options, ["hidden_NH", "weight_VH"], **named)


# ---- shapes, layouts, options


@pytest.mark.parametrize("dtype", FLOATS, ids=["fp32", "fp16"])
@pytest.mark.parametrize("N, V, H, chunk", [(1, 1, 1, 1), (5, 70, 7, 2), (3, 65, 17, 1), (4, 31, 8, 4), (3, 70, 8, 9)])
def test_odd_shapes_and_chunks(N, V, H, chunk, dtype):
    """Chunks of one row, with a shorter last one, exactly fitting, and larger than the batch."""
    check(normal(N, H), normal(V, H), ids(N, V=V), options={"chunk": chunk}, dtype=dtype)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", FLOATS, ids=["fp32", "fp16"])
def test_reductions(reduction, dtype):
    """Each of the three, with an ignored row and an upstream gradient that is not 1."""
    target_N = ids(5)
    target_N[3] = -100
    check(normal(5, 8), normal(70, 8), target_N, options={"reduction": reduction, "chunk": 2}, dtype=dtype)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_no_rows(reduction):
    """An empty batch: loss 0 (or empty), and zeros for the head's gradient."""
    check(normal(0, 8), normal(70, 8), ids(0), options={"reduction": reduction})


VIEWS = {
    "columns of wider tensors": lambda: (normal(4, 12)[:, 2:10], normal(70, 12)[:, 3:11]),
    "every second row": lambda: (normal(8, 8)[::2], normal(140, 8)[::2]),
    "transposed": lambda: (normal(8, 4).t(), normal(8, 70).t()),
    "one row expanded": lambda: (normal(1, 8).expand(4, 8), normal(70, 8)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    """Strides of hidden states and head change nothing."""
    check(*VIEWS[view](), ids(4), options={"chunk": 3})


def test_bags_weights_and_z_loss():
    """What K2 can do with targets: bags with duplicates and ignored ids, weights by place, z_loss."""
    target_NS = torch.tensor([[3, 3, 69], [-100, 5, 64], [-100] * 3, [1, 2, -100]])
    for weight in (None, torch.tensor([1.0, 2.0, 4.0])):
        check(normal(4, 8), normal(70, 8), target_NS, weight, options={"chunk": 3, "z_loss": 0.01})


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_transposed_bags(reduction):
    """Strides of the targets change nothing."""
    check(normal(2, 8), normal(70, 8), ids(3, 2).t(), options={"reduction": reduction})


def test_gradients_lie_as_the_fakes_say():
    """Contiguous, also for transposed hidden states and head: a compiled program relies on it."""
    _, dH_NH, dW_VH = k3.sweep(normal(8, 3).t(), normal(8, 7).t(), ids(3, 1, V=7), torch.ones(3, 1), torch.ones(3), 0.0,
                               2, "fp32", [True, True])
    assert dH_NH.is_contiguous() and dW_VH.is_contiguous()


def test_rows_through_a_sum():
    """reduction="none" and a sum behind it, whose gradient arrives expanded, is reduction="sum"."""
    tensors, found = [normal(5, 8).requires_grad_(), normal(70, 8).requires_grad_()], []
    for reduction in ("none", "sum"):
        loss = kernels.linear_cross_entropy(*tensors, ids(5), reduction=reduction, chunk=2).sum()
        found.append(torch.autograd.grad(loss, tensors))
    for rowwise, whole in zip(*found, strict=True):
        gate.close(rowwise, whole)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_all_rows_ignored(reduction, impl):
    """Nothing counts: the loss is 0, not 0/0, and so are both gradients."""
    hidden_NH, weight_VH = normal(3, 8).requires_grad_(), normal(70, 8).requires_grad_()
    loss = kernels.linear_cross_entropy(hidden_NH, weight_VH, torch.full((3,), -100), reduction=reduction, chunk=2,
                                        impl=impl)
    loss.sum().backward()
    assert (loss == 0).all() and (hidden_NH.grad == 0).all() and (weight_VH.grad == 0).all()


def test_logits_in_bf16():
    """logits_dtype="bf16" is the loss of rounded logits: near the exact one, and not equal to it."""
    hidden_NH, weight_VH, target_N = normal(6, 32), normal(70, 32), ids(6)
    exact = kernels.linear_cross_entropy(hidden_NH.double(), weight_VH.double(), target_N, impl="reference")
    rounded = kernels.linear_cross_entropy(hidden_NH, weight_VH, target_N, logits_dtype="bf16", chunk=4)
    assert 1e-5 < abs(rounded - exact) / exact < 1e-2


# ---- against other implementations


def of_dense_logits(hidden_NH, weight_VH, target, weight=None, chunk=None, **options):
    return kernels.cross_entropy(hidden_NH @ weight_VH.T, target, weight=weight, **options)[0]


def test_equals_k2_on_dense_logits():
    """One chunk of everything is K2 itself, interpreted, on hidden @ head.T: loss and gradients."""
    tensors = [normal(5, 8).requires_grad_(), normal(70, 8).requires_grad_()]
    target_N, found = ids(5), []
    target_N[1] = -100
    for op in (partial(kernels.linear_cross_entropy, chunk=2), of_dense_logits):
        loss = op(*tensors, target_N, z_loss=0.01)
        found.append((loss, *torch.autograd.grad(loss, tensors)))
    for chunked, dense in zip(*found, strict=True):
        gate.close(chunked, dense)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_equals_torch(reduction):
    """F.linear_cross_entropy in float64, where torch has it."""
    theirs = getattr(F, "linear_cross_entropy", None) or pytest.skip("this torch has no F.linear_cross_entropy")

    def exact(hidden_NH, weight_VH, target, weight, chunk, reduction):
        return theirs(hidden_NH, weight_VH, target, reduction=reduction)

    target_N = ids(5)
    target_N[2] = -100
    check(normal(5, 8), normal(70, 8), target_N, options={"chunk": 2, "reduction": reduction}, exact=exact)


def test_the_head_gradient_is_summed_in_fp32():
    """fp16, 32 chunks of one row: the error of dW is that of one rounding, as with one chunk.

    Rounded after every chunk it would be past the bound. The norm is judged; element by element it is noise.
    """
    hidden_NH, weight_VH, target_N = normal(32, 4).half(), normal(6, 4).half(), ids(32, V=6)
    exact_VH = weight_VH.double().requires_grad_()
    kernels.linear_cross_entropy(hidden_NH.double(), exact_VH, target_N, reduction="sum", impl="reference").backward()
    ours_VH = weight_VH.clone().requires_grad_()
    kernels.linear_cross_entropy(hidden_NH, ours_VH, target_N, reduction="sum", chunk=1).backward()
    error = (ours_VH.grad.double() - exact_VH.grad).norm() / exact_VH.grad.norm()
    assert error < 3e-4, f"dW is off by {error:.1e}"


def test_fp16_logits_are_never_rounded():
    """hidden @ head.T of fp16 tensors is kept in fp32: the loss is right to 2e-6, not to fp16's 1e-3."""
    hidden_NH, weight_VH, target_N = normal(3, 64).half(), normal(70, 64).half(), ids(3)
    gate.close(kernels.linear_cross_entropy(hidden_NH, weight_VH, target_N),
               kernels.linear_cross_entropy(hidden_NH.double(), weight_VH.double(), target_N, impl="reference"))


# ---- what training does with it


def test_tied_embeddings():
    """One tensor as embedding and head: its gradient is the sum of both uses."""
    tokens_N, target_N, found = ids(6, seed=3), ids(6), []
    for dtype, impl in ((torch.float32, "triton"), (torch.float64, "reference")):
        table_VH = normal(70, 8).to(dtype).requires_grad_()
        hidden_NH = torch.tanh(F.embedding(tokens_N, table_VH))
        kernels.linear_cross_entropy(hidden_NH, table_VH, target_N, chunk=4, impl=impl).backward()
        found.append(table_VH.grad)
    gate.close(*found)


@pytest.mark.parametrize("trained", ["hidden_NH", "weight_VH"])
def test_one_of_the_two_is_frozen(trained):
    """A frozen head or frozen hidden states: the other's gradient is as with both, ends the graph, and is all that is
    made (dW is fp32 [V, H], the largest tensor here)."""
    tensors = {"hidden_NH": normal(5, 8), "weight_VH": normal(70, 8)}
    both = gate.run(kernels.linear_cross_entropy, tensors | {"target": ids(5)}, {"chunk": 2}, list(tensors))
    tensors[trained].requires_grad_()
    with gate.largest_allocation() as largest:
        loss = kernels.linear_cross_entropy(**tensors, target=ids(5), chunk=2)
    assert largest() == 4 * 70 * (8 if trained == "weight_VH" else 2)
    gradient, = torch.autograd.grad(loss, tensors[trained], gate.upstream_for([loss], 0))
    assert torch.equal(gradient, both[f"grad_{trained}"]) and gradient.grad_fn is None


def test_a_second_backward_is_refused():
    """The gradients are scaled in place, so a second pass would scale them twice: autograd refuses it."""
    hidden_NH = normal(3, 8).requires_grad_()
    loss = kernels.linear_cross_entropy(hidden_NH, normal(70, 8), ids(3))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_losses_of_one_head():
    """Two losses added up: each scales its own gradients."""
    hidden_NH, weight_VH = normal(4, 8).requires_grad_(), normal(70, 8).requires_grad_()
    def parts(impl):
        return [factor * kernels.linear_cross_entropy(hidden_NH[rows], weight_VH, ids(2), impl=impl)
                for factor, rows in ((0.3, slice(0, 2)), (1.0, slice(2, 4)))]

    ours, exact = (torch.autograd.grad(sum(parts(impl)), [hidden_NH, weight_VH]) for impl in ("triton", "reference"))
    for gradient, expected in zip(ours, exact, strict=True):
        gate.close(gradient, expected)


@pytest.mark.parametrize("grad", [True, False], ids=["training", "no_grad"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_no_tensor_of_all_logits(reduction, grad):
    """The largest allocation is dW, or without gradients a chunk of logits; N * V elements are never there."""
    N, V, H, chunk = 40, 70, 8, 4
    hidden_NH, weight_VH = normal(N, H).requires_grad_(grad), normal(V, H).requires_grad_(grad)
    with gate.largest_allocation() as largest:
        loss = kernels.linear_cross_entropy(hidden_NH, weight_VH, ids(N), reduction=reduction, chunk=chunk)
        if grad:
            loss.sum().backward()
    assert largest() == (4 * V * H if grad else max(4 * chunk * V, 8 * N))


# ---- traffic, size, bad input


def test_two_launches_a_chunk():
    """Five rows in chunks of two: three launches of K2's forward, and with gradients three of its backward."""
    for grad, launches in ((True, 6), (False, 3)):
        with count_traffic() as traffic:
            kernels.linear_cross_entropy(normal(5, 8).requires_grad_(grad), normal(70, 8), ids(5), chunk=2)
        assert traffic.launches == launches


@pytest.mark.parametrize("dtype", FLOATS, ids=["fp32", "fp16"])
def test_traffic(dtype):
    """The kernels of a sweep request K2's bytes over fp32 logits, and write the gradient in the head's dtype."""
    N, V, H, S = 4, 500, 3, 2
    share_NS = torch.full((N, S), 0.5)
    hidden_NH, weight_VH = normal(N, H).to(dtype), normal(V, H).to(dtype)
    cost = k2.forward_cost(N, V, S, 4).plus(k2.backward_cost(N, V, S, 4))
    cost = cost._replace(written=8 * N + N * V * dtype.itemsize)
    gate.check_traffic(lambda: k3.sweep(hidden_NH, weight_VH, ids(N, S, V=V), share_NS, torch.ones(N), 0.0, 2, "fp32",
                                        [True, True]), cost)


def test_cost_of_a_step():
    """The printed formula, by hand: 6 rows of width 4, 10 tokens, chunks of 3, bf16."""
    cost = k3.forward_backward_cost(6, 10, 4, 3)
    assert cost.flops == 6 * 6 * 4 * 10
    logits, head, hidden = 6 * 10, 10 * 4, 6 * 4
    assert cost.read == 2 * 2 * hidden + 2 * (2 * 2 * head + 4 * head) + 2 * 4 * logits + 2 * 2 * logits
    assert cost.written == 2 * hidden + 2 * 4 * head + 4 * logits + 2 * logits


@pytest.mark.parametrize("factor, moved", [(1.0, 0), (0.5, 1)])
def test_scaling_by_one_moves_nothing(factor, moved):
    """An upstream gradient of 1 costs a 4-byte read a program; any other reads and writes the gradient once."""
    x = torch.ones(5000).half()
    gate.check_traffic(lambda: k3.launch_scale(x, torch.tensor(factor)), Cost(8 + moved * 10_000, moved * 10_000, 0))


@pytest.mark.parametrize("dtype", FLOATS, ids=["fp32", "fp16"])
def test_scaling_in_place(dtype):
    """Every element once, in fp32 and rounded once, and none beside them; a part of a block, and two blocks."""
    for length in (3, 4097):
        x, factor = gate.guarded(normal(length), dtype), torch.tensor(1.0003)
        expected = (x.float() * factor).to(dtype)
        with np.errstate(all="ignore"), guard_bounds():
            k3.launch_scale(x, factor)
        assert torch.equal(x, expected)
        assert torch.tensor([], dtype=dtype).set_(x.untyped_storage()).isnan().sum() == 2 * gate.PAD


def test_scaling_beyond_two_to_the_31():
    """dW of 152k tokens and a width of 16,384 has more than 2^31 elements: the last block's place is int64.

    Only that one program runs, out of 524,289.
    """
    last = 2**31 // 4096
    x = gate.huge_rows(2, 10, torch.float16, 2**31)
    x[1] = 2.0

    def only_the_last(original, builder, *index):
        builder.grid_idx = (last, 0, 0)

    flat = x.as_strided((2**31 + 10,), (1,))
    with np.errstate(all="ignore"), guard_bounds(), overflow_checks():
        with interpreter._wrapped(interpreter._builder(), set_grid_idx=only_the_last):
            k3._scale_kernel[(1,)](flat, torch.tensor(3.0), flat.numel(), BLOCK=4096, num_warps=8)
    assert (x[1] == 6).all() and (x[0] == 0).all()


BAD = {
    "hidden of one dimension": (dict(hidden_NH=normal(5)), "Reshape hidden_NH"),
    "a head of another width": (dict(weight_VH=normal(7, 4)), "Reshape weight_VH"),
    "no vocabulary": (dict(weight_VH=normal(0, 5)), "V of 1 or more"),
    "two dtypes": (dict(hidden_NH=normal(3, 5).half()), "Give both one dtype"),
    "whole numbers": (dict(hidden_NH=ids(3, 5)), "hidden_NH.float()"),
    "float64 in a kernel": (dict(hidden_NH=normal(3, 5).double(), weight_VH=normal(7, 5).double(), impl="triton"),
                            'impl="reference"'),
    "a single id": (dict(target=torch.tensor(1)), "Use ids [N]"),
    "empty bags": (dict(target=ids(3, 0)), "bags of one or more ids"),
    "a row too few": (dict(target=ids(2, V=7)), "Reshape target"),
    "an id past the end": (dict(target=torch.tensor([1, 7, 0])), "ids go from 0 to 6, or -100 for none"),
    "too many weights": (dict(weight=torch.ones(2)), "Reshape weight"),
    "two devices": (dict(weight_VH=normal(7, 5).to("meta")), "one device with .to(device)"),
    "weights elsewhere": (dict(weight=torch.ones(1, device="meta")), "one device with .to(device)"),
    "z_loss inf": (dict(z_loss=INF), "Give z_loss a finite value"),
    "a chunk of 0": (dict(chunk=0), "Use a chunk of 1 or more"),
    "logits in fp16": (dict(logits_dtype="fp16"), 'Use logits_dtype "fp32" or "bf16"'),
    "an unknown reduction": (dict(reduction="median"), '"mean", "sum" or "none"'),
    "an unknown impl": (dict(impl="cuda"), 'impl="auto", "triton" or "reference"'),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    """Each is refused with a sentence that names the fix, and nothing is launched."""
    given_, fix = BAD[name]
    good = dict(hidden_NH=normal(3, 5), weight_VH=normal(7, 5), target=ids(3, V=7))
    with count_traffic() as traffic:
        gate.expect_error(fix, lambda: kernels.linear_cross_entropy(**(good | given_)))
    assert not traffic.launches


# ---- torch.library, torch.compile


def test_opcheck():
    """Schema, fakes and autograd registration of both ops agree with what they do, also for transposed inputs."""
    tensors = (normal(8, 3).t().requires_grad_(), normal(8, 7).t().requires_grad_(), ids(3, 2, V=7),
               torch.full((3, 2), 0.5))
    opcheck(k3._rowwise_op, (*tensors, 0.01, 2, "fp32"))
    # not AOT dispatch: it uses dH and dW as results of the op, while the public function keeps them for the backward,
    # which overwrites them; test_compiled_without_a_graph_break covers what AOT makes of it
    opcheck(k3._op, (*tensors, torch.ones(3), 0.01, 2, "fp32", [True, True]),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiled_without_a_graph_break(reduction):
    """torch.compile(fullgraph=True) gives the bits of eager mode, loss and gradients."""
    def loss_of(x_NH, weight_VH, target_N):
        return (3 * kernels.linear_cross_entropy(2 * x_NH, weight_VH, target_N, chunk=2, reduction=reduction)).sum()

    tensors, target_N = [normal(3, 5).requires_grad_(), normal(7, 5).requires_grad_()], ids(3, V=7)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    ours, plain = (fn(*tensors, target_N) for fn in (compiled, loss_of))
    assert torch.equal(ours, plain)
    for mine, eager in zip(*(torch.autograd.grad(loss, tensors) for loss in (ours, plain)), strict=True):
        assert torch.equal(mine, eager)


@settings(max_examples=8)
@given(N=st.integers(1, 7), chunk=st.integers(1, 8), seed=st.integers(0, 2**16))
def test_the_chunk_changes_nothing(N, chunk, seed):
    """Any chunk gives the loss and gradients of one chunk of all rows, up to the order of the sums."""
    tensors = [normal(N, 5, seed=seed).requires_grad_(), normal(9, 5, seed=seed + 1).requires_grad_()]
    found = []
    for rows in (chunk, N):
        loss = kernels.linear_cross_entropy(*tensors, ids(N, V=9, seed=seed), chunk=rows)
        found.append((loss, *torch.autograd.grad(loss, tensors)))
    for chunked, whole in zip(*found, strict=True):
        gate.close(chunked, whole)
