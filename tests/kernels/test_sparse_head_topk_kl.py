"""Gate (a) of K7. Exact values come from a dense head and textbook formulas in float64: the identity is the test."""

import contextlib
import importlib
import math
from unittest import mock

import gate
import pytest
import torch
from torch import Tensor

from labkit import kernels
from labkit.kernels.configs import forced
from labkit.kernels.interpreter import guard_bounds

k7 = importlib.import_module("labkit.kernels.sparse_head_topk_kl")
pytestmark = pytest.mark.interp
each_direction = pytest.mark.parametrize("direction", ["reverse", "forward"])
WRT = ["hidden_NH", "weight_VH"]


def example(N: int = 3, V: int = 19, K: int = 5, H: int = 21, seed: int = 0) -> dict[str, Tensor]:
    """A student's hidden states and head, and the top K of a teacher near it."""
    generator = torch.Generator().manual_seed(seed)
    hidden_NH, weight_VH = torch.randn(N, H, generator=generator), 0.5 * torch.randn(V, H, generator=generator)
    teacher_NV = (hidden_NH @ weight_VH.T + torch.randn(N, V, generator=generator)).log_softmax(1)
    logp_NK, ids_NK = teacher_NV.topk(K, 1)
    return {"hidden_NH": hidden_NH, "weight_VH": weight_VH, "teacher_ids_NK": ids_NK, "teacher_logp_NK": logp_NK}


def dense(hidden_NH, weight_VH, teacher_ids_NK, teacher_logp_NK, *, direction="reverse", temperature=1.0, impl=None):
    """All V logits, their log-softmax over V, the set taken from it and renormalised: what K7 leaves out."""
    log_q_NV = (hidden_NH @ weight_VH.T / temperature).log_softmax(1)
    log_q, log_p = log_q_NV.gather(1, teacher_ids_NK).log_softmax(1), teacher_logp_NK.log_softmax(1)
    a, b = (log_q, log_p) if direction == "reverse" else (log_p, log_q)
    return (a.exp() * (a - b)).sum(1)


@contextlib.contextmanager
def small_blocks():
    """Several blocks of ids and of H, and segments cut at every fourth place, out of small tensors."""
    with (forced("sparse_head_dots", BLOCK_K=4, BLOCK_H=16), forced("sparse_head_rows", BLOCK_K=4, BLOCK_H=16),
          forced("segments", BLOCK_D=16, PIECE=4)):
        yield


@each_direction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_a_dense_head(direction, dtype):
    """Loss and both gradients; K and H fill no block; several blocks of each."""
    tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in example().items()}
    with small_blocks():
        gate.check(kernels.sparse_head_topk_kl, tensors, {"direction": direction, "temperature": 1.3}, WRT, exact=dense)


@pytest.mark.parametrize(("N", "V", "K", "H"), [(1, 6, 6, 5), (2, 40, 33, 3)])
def test_other_shapes(N, V, K, H):
    """A set that is the whole vocabulary, and one of several blocks, at the settings that a GPU gets."""
    gate.check(kernels.sparse_head_topk_kl, example(N, V, K, H), {}, WRT, exact=dense)


def test_equals_topk_kl_on_dense_logits():
    """In float64 both references are the same function of hidden states and head, and so are their gradients."""
    tensors = {name: x.double() if x.is_floating_point() else x for name, x in example().items()}
    hidden_NH, weight_VH = (tensors[name].requires_grad_() for name in WRT)
    sparse_N = kernels.sparse_head_topk_kl(**tensors, impl="reference")
    dense_N = kernels.topk_kl(hidden_NH @ weight_VH.T, *list(tensors.values())[2:], impl="reference")[0]
    for ours, theirs in zip((sparse_N, *torch.autograd.grad(sparse_N.sum(), (hidden_NH, weight_VH))),
                            (dense_N, *torch.autograd.grad(dense_N.sum(), (hidden_NH, weight_VH))), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_the_reference_in_float64():
    """The reference gathers rows; it equals the dense head to float64's rounding."""
    tensors = {name: x.double() if x.is_floating_point() else x for name, x in example().items()}
    for direction in ("reverse", "forward"):
        torch.testing.assert_close(kernels.sparse_head_topk_kl(**tensors, direction=direction, impl="reference"),
                                   dense(**tensors, direction=direction), rtol=1e-12, atol=1e-14)


@each_direction
def test_one_token_is_exactly_zero(direction):
    """K = 1: loss and both gradients are 0, whatever the head."""
    ours = gate.run(kernels.sparse_head_topk_kl, example(K=1), {"direction": direction}, WRT)
    assert not any(result.any() for result in ours.values())


def test_what_is_not_in_the_set():
    """A row without ids, gaps, a token twice, a teacher's -inf: as in topk_kl on dense logits."""
    tensors = example(4)
    ids_NK, logp_NK = tensors["teacher_ids_NK"], tensors["teacher_logp_NK"]
    ids_NK[0], ids_NK[1, 2], ids_NK[2, 4], logp_NK[3, 0] = -1, -1, ids_NK[2, 1], -math.inf
    with small_blocks():
        ours = gate.check(kernels.sparse_head_topk_kl, tensors, {}, WRT)
    loss_N = kernels.topk_kl(tensors["hidden_NH"] @ tensors["weight_VH"].T, ids_NK, logp_NK)[0]
    gate.close(ours["out0"], loss_N)
    assert ours["out0"][0] == 0 and not ours["grad_hidden_NH"][0].any()


def test_a_student_logit_of_minus_infinity():
    """A head row of -inf (a forbidden token): its term and its gradient are 0, and do not spoil the others'."""
    tensors = example()
    hidden_NH, weight_VH, ids_NK, logp_NK = tensors.values()
    hidden_NH[:, 0], weight_VH[ids_NK[0, 2], 0] = 1.0, -math.inf
    loss_N, kept_NK, values_NK = k7.launch_forward(*tensors.values(), "reverse", 1.0)
    gate.close(loss_N, kernels.topk_kl(hidden_NH @ weight_VH.T, ids_NK, logp_NK)[0])
    assert loss_N.isfinite().all() and not values_NK[kept_NK == ids_NK[0, 2]].any()


def test_an_id_outside_the_vocabulary_makes_its_row_nan():
    """On a GPU ids are not looked at before the launch; no kernel dereferences them."""
    tensors = example()
    tensors["teacher_ids_NK"][0, 2], tensors["teacher_ids_NK"][2, 4] = 10**6, -9
    with guard_bounds():
        loss_N, kept_NK, values_NK = k7.launch_forward(*tensors.values(), "reverse", 1.0)
        k7.launch_hidden_gradient(loss_N, values_NK, kept_NK, tensors["weight_VH"], torch.float32)
    assert loss_N.isnan().tolist() == [True, False, True] and kept_NK[0, 2] == kept_NK[2, 4] == -1
    assert k7.reference(*tensors.values())[0].isnan()


def test_one_token_in_every_row():
    """A full stop in every set: its segment is longer than a piece, is cut, and its sum is right and repeatable."""
    tensors = example(11, K=2)
    tensors["teacher_ids_NK"][:, 0], tensors["teacher_ids_NK"][:, 1] = 7, torch.arange(11) % 5
    with small_blocks():
        gate.check(kernels.sparse_head_topk_kl, tensors, {}, WRT, exact=dense)


def test_a_tied_head():
    """Where the head is the embedding too, its two gradients add."""
    _, weight_VH, ids_NK, logp_NK = example().values()
    context_N = torch.tensor([4, 7, 1])
    weights = [weight_VH.clone().requires_grad_() for _ in range(2)]
    for tied_VH, loss in zip(weights, (kernels.sparse_head_topk_kl, dense), strict=True):
        loss(tied_VH[context_N], tied_VH, ids_NK, logp_NK).sum().backward()
    gate.close(weights[0].grad, weights[1].grad, factor=2.0)  # both are fp32


def test_only_what_is_asked_for_is_computed():
    """A frozen head, or frozen hidden states: the other gradient is the same."""
    tensors = example()
    whole = gate.run(kernels.sparse_head_topk_kl, tensors, {}, WRT)
    for name, launch in zip(WRT, ("segment_sums", "launch_hidden_gradient"), strict=True):
        with mock.patch.object(k7, launch, side_effect=AssertionError("not asked for")):
            alone = gate.run(kernels.sparse_head_topk_kl, tensors, {}, [name])
        assert torch.equal(alone[f"grad_{name}"], whole[f"grad_{name}"])


def test_nothing_of_size_n_times_v():
    """No tensor that the op allocates is as large as the logits would be."""
    largest, allocate = [0], torch.empty

    def watched(*args, **named):
        made = allocate(*args, **named)
        largest[0] = max(largest[0], made.numel())
        return made

    tensors = example(24, 61, 2, 4)
    tensors["hidden_NH"].requires_grad_()
    tensors["weight_VH"].requires_grad_()
    with (mock.patch.object(torch, "empty", watched), mock.patch.object(torch, "zeros", watched),
          forced("segments", BLOCK_D=16)):
        kernels.sparse_head_topk_kl(**tensors).sum().backward()
    assert 61 * 4 <= largest[0] < 24 * 61  # dW


def test_no_rows():
    """N = 0: an empty loss, and a head gradient of zeros."""
    ours = gate.run(kernels.sparse_head_topk_kl, example(0), {}, WRT)
    assert ours["out0"].shape == (0,) and ours["grad_weight_VH"].shape == (19, 21) and not ours["grad_weight_VH"].any()


def test_strided_inputs():
    """Rows of a packed tensor are read where they are; a transposed head is copied."""
    tensors = example()
    packed = torch.cat([tensors["hidden_NH"], torch.full((3, 9), math.nan)], 1)
    for change in ({"hidden_NH": packed[:, :21]}, {"weight_VH": tensors["weight_VH"].T.contiguous().T}):
        gate.check(kernels.sparse_head_topk_kl, tensors | change, {}, WRT, exact=dense)


def test_a_head_beyond_two_to_the_31_elements():
    """id * stride is 64 bits wide, in the products and in the gradient of the hidden states."""
    hidden_NH, near_VH, _, _ = example(2, 4, 2, 16).values()
    weight_VH = gate.huge_rows(4, 16, torch.float16, row_stride=2**30 + 64)
    weight_VH.copy_(near_VH)
    ids_NK, logp_NK = torch.tensor([[3, 0], [2, 1]], dtype=torch.int32), torch.tensor([[-1.0, -1], [-2, -1]])
    results = []
    for head_VH in (weight_VH, weight_VH.clone()):
        loss_N, kept_NK, values_NK = k7.launch_forward(hidden_NH, head_VH, ids_NK, logp_NK, "reverse", 1.0)
        results.append((loss_N, k7.launch_hidden_gradient(loss_N, values_NK, kept_NK, head_VH, torch.float32)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_hidden_states_beyond_two_to_the_31_elements():
    """row * stride is 64 bits wide."""
    near_NH, weight_VH, ids_NK, logp_NK = example(4, 9, 2, 16).values()
    hidden_NH = gate.huge_rows(4, 16, torch.float16, row_stride=2**30 + 64)
    hidden_NH.copy_(near_NH)
    losses = [k7.launch_forward(x, weight_VH, ids_NK, logp_NK, "reverse", 1.0)[0] for x in (hidden_NH, near_NH.half())]
    assert torch.equal(*losses)


def test_products_are_summed_in_fp32():
    """fp16 inputs whose products pass fp16's range and grain: 40,000 * 2 - 40,000 * 2 + 0.01 per token."""
    H = 4
    hidden_NH = torch.tensor([[200.0, 200, 1, 1]]).half()
    weight_VH = torch.zeros(3, H).half()
    weight_VH[0], weight_VH[1] = torch.tensor([400.0, -400, 0.25, 0]), torch.tensor([400.0, -400, 0, 0.5])
    ids_NK, logp_NK = torch.tensor([[0, 1]]), torch.tensor([[-0.5, -1.0]])
    loss_N = kernels.sparse_head_topk_kl(hidden_NH, weight_VH, ids_NK, logp_NK)
    gate.close(loss_N, dense(hidden_NH.double(), weight_VH.double(), ids_NK, logp_NK.double()))


def test_traffic():
    """Bytes requested are those of the formulas."""
    tensors = {name: x.half() if name in WRT else x for name, x in example(3, 23, 6, 1200).items()}
    cost = {"N": 3, "V": 23, "K": 6, "H": 1200}
    gate.check_traffic(lambda: kernels.sparse_head_topk_kl(**tensors), k7.forward_cost(**cost))
    hidden_NH, weight_VH = (tensors[name].requires_grad_() for name in WRT)
    loss_N = kernels.sparse_head_topk_kl(**tensors)
    gate.check_traffic(lambda: torch.autograd.grad(loss_N.sum(), (hidden_NH, weight_VH)),
                       k7.backward_cost(**cost))


def test_break_even():
    """The docstring's numbers: bytes at the break-even size take as long as the dense head's FLOPs."""
    V, K, N, H = 151_936, 64, 8192, 4096
    for bandwidth, rate, ratio, break_even in ((4.3e12, 790e12, 12.9, 827), (1.79e12, 209e12, 20.3, 1301)):
        dense_seconds = 6 * N * H * V / rate
        sparse_seconds = 3 * N * K * H * 2 / bandwidth
        assert dense_seconds / sparse_seconds == pytest.approx(ratio, rel=0.02)
        assert V * bandwidth / rate == pytest.approx(break_even, rel=0.01)
    both = k7.forward_cost(N, V, K, H).plus(k7.backward_cost(N, V, K, H))
    assert 3 * N * K * H * 2 <= both.bytes <= 3 * N * K * H * 2 + V * H * 2 + 0.05 * both.bytes


def test_bad_input_is_refused():
    """Each with a sentence, and before a launch."""
    good = example()
    ids_NK, logp_NK = good["teacher_ids_NK"], good["teacher_logp_NK"]
    for match, change in (
        ("the vocabulary has 4", {"weight_VH": torch.randn(4, 21), "teacher_ids_NK": ids_NK % 4}),
        ("teacher_ids_NK holds the id 19", {"teacher_ids_NK": ids_NK.clone().fill_(19)}),
        ("teacher_ids_NK holds the id -2", {"teacher_ids_NK": ids_NK.clone().fill_(-2)}),
        ("teacher_ids_NK has dtype bool", {"teacher_ids_NK": ids_NK > 0}),
        ("weight_VH has shape [19, 20]", {"weight_VH": torch.randn(19, 20)}),
        ("hidden_NH has shape [1, 3, 21]", {"hidden_NH": good["hidden_NH"][None]}),
        ("teacher_ids_NK has shape [2, 5]", {"teacher_ids_NK": ids_NK[:2]}),
        ("teacher_logp_NK has shape [3, 4]", {"teacher_logp_NK": logp_NK[:, :4]}),
        ("hidden_NH has dtype int64", {"hidden_NH": good["hidden_NH"].long()}),
        ("weight_VH has dtype int64", {"weight_VH": good["weight_VH"].long()}),
        ("does not take weight_VH in float64", {"weight_VH": good["weight_VH"].double(), "impl": "triton"}),
        ("on different devices", {"weight_VH": good["weight_VH"].to("meta")}),
        ("no direction 'left'", {"direction": "left"}), ("temperature is nan", {"temperature": math.nan}),
        ("temperature of -2", {"temperature": -2}), ("no implementation 'cuda'", {"impl": "cuda"}),
    ):
        gate.expect_error(match, lambda change=change: kernels.sparse_head_topk_kl(**good | change))
