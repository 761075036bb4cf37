"""K9 unselect: the scatter as a gather, against a scatter in float64; and the three kernels together."""

import importlib

import gate
import pytest
import torch
from lighthouse_rows import choice, entries_of, far_apart, heads
from torch import Tensor

from labkit import kernels
from labkit.kernels.configs import forced
from labkit.kernels.interpreter import count_traffic
from labkit.kernels.lighthouse_levels import Levels, cascade_sizes, inverted
from labkit.models.lighthouse import Lighthouse

pytestmark = pytest.mark.interp
module = importlib.import_module("labkit.kernels.lighthouse_unselect")


def draw(B: int, H: int, S: int, K: int, T: int, p: int, levels: int, **named) -> dict[str, Tensor]:
    """Outputs of S entries, of which every fifth is an empty slot, and where each entry's row is."""
    N, source = len(entries_of(T, p, levels)), torch.Generator().manual_seed(2)
    return {"out_BHSK": torch.randn(B, H, S, K, generator=source),
            "inverse_BHN": inverted(choice(B, H, N, S, **named), N)}


def scattered(out_BHSK, inverse_BHN, T, p, levels):
    """The definition: each entry's row is added at all positions that it reaches."""
    B, H, _, K = out_BHSK.shape
    y_BTHK = out_BHSK.new_zeros(B, T, H, K)
    for b, h in torch.cartesian_prod(torch.arange(B), torch.arange(H)).tolist():
        for (level, i), s in zip(entries_of(T, p, levels), inverse_BHN[b, h].tolist(), strict=True):
            if s >= 0:
                f, row = p**level, torch.zeros_like(y_BTHK)
                row[b, i * f + f - 1 : i * f + 2 * f - 1, h] = 1
                y_BTHK = y_BTHK + row * out_BHSK[b, h, s]
    return y_BTHK


def check(tensors: dict[str, Tensor], T: int, p: int, levels: int, *, rows: int = 2, **named) -> dict[str, Tensor]:
    """Against the scatter in float64, with `rows` windows or rows a program."""
    with forced("lighthouse", ROWS=rows):
        return gate.check(kernels.unselect, tensors, {"T": T, "p": p, "levels": levels}, ["out_BHSK"], exact=scattered,
                          **named)


# ---- against a scatter


@pytest.mark.parametrize("B, H, S, K, T, p, levels, dtype", [
    (1, 2, 41, 5, 53, 4, 3, torch.float32), (2, 1, 30, 33, 37, 2, 4, torch.float32),
    (1, 1, 40, 4, 41, 3, 3, torch.float32), (1, 1, 30, 4, 29, 5, 2, torch.float32),
    (1, 1, 60, 4, 53, 4, 3, torch.float16), (1, 1, 13, 4, 16, 2, 1, torch.float32),
])
def test_a_scatter_as_a_gather(B, H, S, K, T, p, levels, dtype):
    """Sums and gradients where a tail has no window, p is no power of two or over the chunk of four, one level only."""
    check(draw(B, H, min(S, len(entries_of(T, p, levels))), K, T, p, levels), T, p, levels, dtype=dtype)


@pytest.mark.parametrize("T, p, levels", [(21, 2, 4), (17, 4, 2), (9, 3, 1), (3, 4, 3)])
def test_the_reference_is_the_scatter(T, p, levels):
    """In float64, and its gradient by finite differences."""
    tensors = draw(1, 2, min(9, T), 2, T, p, levels)
    out_BHSK = tensors["out_BHSK"].double().requires_grad_()
    torch.testing.assert_close(kernels.unselect(out_BHSK, tensors["inverse_BHN"], T, p, levels, impl="reference"),
                               scattered(out_BHSK, tensors["inverse_BHN"], T, p, levels))
    assert torch.autograd.gradcheck(
        lambda x: kernels.unselect(x, tensors["inverse_BHN"], T, p, levels, impl="reference"), out_BHSK)


@pytest.mark.parametrize("level, i", [(0, 6), (0, 18), (1, 2), (1, 7), (2, 0), (2, 3)])
def test_one_entry_reaches_its_positions_and_no_other(level, i):
    """From the last token that it sums up, as many as it has, cut off at T; and these are what its gradient sums."""
    T, p, levels, f = 19, 2, 3, 2**level
    inverse_BHN = torch.full((1, 1, 19 + 8 + 4), -1)
    inverse_BHN[0, 0, [0, 19, 27][level] + i] = 1
    out_BHSK = torch.ones(1, 1, 3, 1, requires_grad=True)
    y_T = kernels.unselect(out_BHSK, inverse_BHN, T, p, levels)[0, :, 0, 0]
    reached = list(range(i * f + f - 1, min(T, i * f + 2 * f - 1)))
    assert y_T.nonzero().flatten().tolist() == reached and y_T.max() == 1
    (grad,) = torch.autograd.grad(y_T, out_BHSK, 2.0 ** torch.arange(T))
    assert grad.flatten().tolist() == [0, sum(2.0**n for n in reached), 0]


def test_positions_without_a_source_are_zero():
    """Exactly, also where all rows are NaN: the first p^(L-1) - 1 of them, where only the coarsest level is chosen."""
    inverse_BHN = torch.full((1, 2, 21), -1)
    inverse_BHN[..., 20] = 0
    out = gate.run(kernels.unselect, {"out_BHSK": torch.full((1, 2, 1, 3), torch.nan), "inverse_BHN": inverse_BHN},
                   {"T": 16, "p": 4, "levels": 3})["out0"]
    assert not out[:, :15].any() and out[:, 15].isnan().all()


def test_sums_are_in_fp32():
    """60,000 + 60,000 - 60,000 leaves fp16's range on the way; 2048 and 15 times 1 are 2064 in its steps, not 2048."""
    inverse_BHN = torch.full((1, 1, 21), -1)
    inverse_BHN[0, 0, [15, 19, 20]] = torch.arange(3)  # the last token, and the entries of levels 1 and 2 over it
    out_BHSK = torch.tensor([-60_000.0, 60_000.0, 60_000.0]).half().view(1, 1, 3, 1)
    assert kernels.unselect(out_BHSK, inverse_BHN, 16, 4, 3)[0, 15] == 60_000
    arriving = torch.ones(1, 32, 1, 1).half()
    arriving[0, 15] = 2048
    inverse_BHN = torch.full((1, 1, 42), -1)
    inverse_BHN[..., 40] = 0
    leaf = out_BHSK[:, :, :1].clone().requires_grad_()
    (grad,) = torch.autograd.grad(kernels.unselect(leaf, inverse_BHN, 32, 4, 3), leaf, arriving)
    assert grad == 2064


# ---- where things lie


def test_strided_views_and_int32():
    """Outputs as attention leaves them, heads inside; an expanded gradient; an inverse that is a view."""
    tensors = draw(2, 2, 13, 6, 21, 2, 3)
    tensors["out_BHSK"] = tensors["out_BHSK"].transpose(1, 2).contiguous().transpose(1, 2)[..., ::2]
    tensors["inverse_BHN"] = tensors["inverse_BHN"].int().repeat_interleave(2, 2)[..., ::2]
    check(tensors, 21, 2, 3, upstream=[torch.randn(2, 1, 1, 3).expand(2, 21, 2, 3)])
    check(tensors, 21, 2, 3, upstream=[torch.randn(2, 2, 3, 21).permute(0, 3, 1, 2)])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_int32(dim):
    """Batches, heads or rows of the outputs, and batches, positions or heads of the gradient, 2^30 elements apart."""
    B, H, S = ((3, 1, 2), (1, 3, 2), (1, 1, 3))[dim]
    tensors = {name: x.half() if x.is_floating_point() else x.int()
               for name, x in draw(B, H, S, 4, 3, 2, 2, holes=False).items()}
    expected = kernels.unselect(**tensors, T=3, p=2, levels=2)
    far = gate.run(kernels.unselect, tensors | {"out_BHSK": far_apart(tensors["out_BHSK"], dim)},
                   {"T": 3, "p": 2, "levels": 2})
    assert torch.equal(far["out0"], expected)
    grad, index = torch.randn(B, 3, H, 4).half(), inverted(tensors["inverse_BHN"], S)
    far = gate.run(module.launch_backward, {"grad_BTHK": far_apart(grad, (0, 2, 1)[dim]), "index_BHS": index},
                   {"p": 2, "levels": 2})
    assert torch.equal(far["out0"], module.launch_backward(grad, index, 2, 2))


def test_outputs_beyond_int32():
    """Rows of the positions, and of the outputs' gradient, 2^30 elements apart."""
    far, out = 2**30, torch.arange(1.0, 5.0)[:, None]
    y, dout = (gate.huge_rows(3, 1, torch.float32, far) for _ in range(2))
    sizes = {"P": 2, "LEVELS": 2, "ROWS": 4, "BLOCK_K": 1}
    with gate.overflow_checks():
        inverse = torch.tensor([2, -1, 1, 0], dtype=torch.int32)
        module._forward_kernel[(1,)](out, inverse, y, 3, 4, 4, 1, far, 1, 1, 0, 0, 1, CHUNK=2, **sizes)
        assert y[:, 0].tolist() == [3, 1, 3]
        index = torch.tensor([0, 3, 2], dtype=torch.int32)
        module._backward_kernel[(1,)](out, index, dout, 3, 3, 1, far, 1, 1, 0, 1, 0, **sizes)
    assert dout[:, 0].tolist() == [1, 5, 3]


# ---- the hard cases


@pytest.mark.parametrize("B, H, S, K, T, p, levels", [
    (1, 1, 0, 3, 9, 2, 3), (0, 2, 3, 3, 9, 2, 3), (1, 2, 0, 3, 0, 2, 3), (1, 1, 3, 0, 9, 2, 3),
    (1, 1, 3, 2, 3, 1000, 9), (1, 1, 3, 2, 7, 4, 3),
])
def test_nothing_to_sum_or_no_pooled_entries(B, H, S, K, T, p, levels):
    """No rows, no batch, no positions, no width: zeros or nothing; a text shorter than a window has its tokens only."""
    with count_traffic() as traffic:
        results = check(draw(B, H, S, K, T, p, levels), T, p, levels)
    assert bool(traffic.launches) == bool(B * T * K)
    assert results["out0"].shape == (B, T, H, K) and not (S == 0 and results["out0"].any())


def test_rows_that_no_entry_has_get_no_gradient():
    """Empty slots, and a row that stands for an entry beyond T (which launch_backward is told of on a GPU only)."""
    index_BHS = torch.tensor([[[-1, 2, 999, 4]]])
    grad = gate.run(module.launch_backward, {"grad_BTHK": torch.ones(1, 6, 1, 2), "index_BHS": index_BHS},
                    {"p": 2, "levels": 2})["out0"]
    assert grad[0, 0, :, 0].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("wrong", [-2, 3, 2**40])
@pytest.mark.parametrize("entry, spoiled", [(2, [2]), (9, [5, 6])])
def test_a_row_that_is_none_is_nan_and_touches_nothing_else(entry, spoiled, wrong):
    """As on a GPU, where values are not looked at: the positions of its entry are NaN, and only these."""
    inverse_BHN = inverted(torch.tensor([[[0, 4, 7]]]), 10)
    inverse_BHN[..., entry] = wrong
    out = gate.run(module.launch_forward, {"out_BHSK": torch.ones(1, 1, 3, 2), "inverse_BHN": inverse_BHN},
                   {"T": 7, "p": 2, "levels": 2})["out0"]
    assert out.isnan().all(3)[0, :, 0].nonzero().flatten().tolist() == spoiled


# ---- the three kernels together


def attended(q_BTHK, k_BTHK, v_BTHK, index_BHS, inverse_BHN, p, levels, **named):
    """Lighthouse attention on a choice that is given."""
    pyramid = kernels.pyramid_pool(q_BTHK, k_BTHK, v_BTHK, p, levels, **named)
    q, k, v = kernels.gather_select(q_BTHK, k_BTHK, v_BTHK, pyramid, index_BHS, **named)
    S = q.shape[2]
    s_BHSS = (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~torch.ones(S, S, dtype=torch.bool).tril(), -torch.inf)
    return kernels.unselect(s_BHSS.softmax(3) @ v, inverse_BHN, q_BTHK.shape[1], p, levels, **named)


def chosen(T: int, H: int = 2, J: int = 1) -> dict[str, Tensor]:
    """Inputs, and what Lighthouse attention chooses of them."""
    tensors = heads(1, T, H, J, 3)
    method = Lighthouse(4, 3, 4, 4)
    pyramid = kernels.pyramid_pool(**tensors, p=4, levels=3)
    shared = pyramid._replace(k_score_BHN=pyramid.k_score_BHN.repeat_interleave(H // J, 1))
    index_BHS, inverse_BHN = method.select(shared, T)
    return tensors | {"index_BHS": index_BHS, "inverse_BHN": inverse_BHN}


@pytest.mark.parametrize("T", [48, 53])
def test_lighthouse_attention(T):
    """Against the models' own, with its own pyramid and choice, forward and backward; grouped queries."""
    tensors = chosen(T)
    leaves = [tensors[name].requires_grad_() for name in ("q_BTHK", "k_BTHK", "v_BTHK")]
    ours = attended(**tensors, p=4, levels=3)
    doubled = [x.detach().double().requires_grad_() for x in leaves]
    right = Lighthouse(4, 3, 4, 4)(*(x.transpose(1, 2) for x in doubled)).transpose(1, 2)
    gate.close(ours, right)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    for x, y in zip(torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(right, doubled, upstream.double()),
                    strict=True):
        gate.close(x, y)


def test_no_output_hears_of_a_later_input():
    """With the choice held fixed: whatever comes from t on, outputs before t keep their bits, and later ones change."""
    tensors = chosen(37)
    before = attended(**tensors, p=4, levels=3)
    for t in (0, 3, 4, 15, 16, 33, 36):
        changed = dict(tensors)
        for name in ("q_BTHK", "k_BTHK", "v_BTHK"):
            changed[name] = tensors[name].clone()
            changed[name][:, t:] = torch.randn(tensors[name][:, t:].shape) * 5
        after = attended(**changed, p=4, levels=3)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


def test_gathered_and_summed_back_is_the_identity():
    """With every token chosen and nothing else, bit for bit."""
    x = heads(2, 11, 2, 2, 5)["q_BTHK"]
    index_BHS = torch.rand(2, 2, 11).argsort(2)
    rows = kernels.gather_select(x, x, x, (x[:, :0],) * 3, index_BHS)[0]
    assert torch.equal(kernels.unselect(rows, inverted(index_BHS, 11), 11, 2, 1), x)


def test_under_torch_compile():
    """The three together in one graph, with the same bits forward and backward."""
    tensors = chosen(20)
    leaves = [tensors[name].requires_grad_() for name in ("q_BTHK", "k_BTHK", "v_BTHK")]

    def call(**x):
        return attended(**x, p=4, levels=3).square().sum()

    ours, plain = torch.compile(call, fullgraph=True, backend="aot_eager")(**tensors), call(**tensors)
    assert torch.equal(ours, plain)
    for one, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True):
        assert torch.equal(one, other)


# ---- what it costs, and what it refuses


def test_traffic_is_what_the_docstring_says():
    """Forward: each chosen row and the inverse in, each position out. Backward: positions in, S rows out."""
    T, H, K, method = 205, 2, 24, Lighthouse(4, 3, 8, 4)
    tensors = heads(1, T, H, H, K)
    index_BHS, inverse_BHN = method.select(kernels.pyramid_pool(**tensors, p=4, levels=3, impl="reference"), T)
    place, S = Levels(T, 4, 3), method.length(T)
    level_BHS = place.place(index_BHS)[0]
    assert index_BHS.shape[2] == S and cascade_sizes(place, S) == level_BHS[0, 0].bincount().tolist()
    out_BHSK = torch.randn(1, H, S, K)
    cost = module.forward_cost(1, H, T, S, K, 4, 3, element=4)
    traffic = gate.check_traffic(lambda: module.launch_forward(out_BHSK, inverse_BHN.contiguous(), T, 4, 3), cost,
                                 slack=1.0)
    assert traffic.distinct_loaded == cost.read - cost.cached and traffic.launches == 1
    cost = module.backward_cost(1, H, T, S, K, 4, 3, element=4)
    grad_BTHK = torch.randn(1, T, H, K)
    traffic = gate.check_traffic(lambda: module.launch_backward(grad_BTHK, index_BHS, 4, 3), cost)
    assert traffic.launches == 1 and traffic.distinct_loaded <= cost.read - cost.cached


def test_the_op_keeps_torch_s_contract():
    """Schema, fake tensors, dynamic shapes and autograd registration, as torch.compile needs them."""
    tensors = draw(1, 2, 6, 3, 9, 2, 3)
    torch.library.opcheck(torch.ops.labkit.unselect.default,
                          (tensors["out_BHSK"].requires_grad_(), tensors["inverse_BHN"], 9, 2, 3))


@pytest.mark.parametrize("match, change", [
    ("out_BHSK has shape [2, 3]", {"out_BHSK": torch.ones(2, 3)}),
    ("inverse_BHN has shape [1, 2, 12], but [B, H, N] here is [1, 2, 13]", {"T": 9}),
    ("inverse_BHN goes from -1 to 3, but places go from 0 to 2",
     {"inverse_BHN": torch.arange(-1, 11).clamp(max=3).expand(1, 2, 12)}),
    ("inverse_BHN holds a place twice", {"inverse_BHN": torch.zeros(1, 2, 12).long()}),
    ("inverse_BHN has dtype torch.float32", {"inverse_BHN": torch.zeros(1, 2, 12)}),
    ("Pooling 1 and 2 levels", {"p": 1}), ("out_BHSK has dtype int64", {"out_BHSK": torch.ones(1, 2, 3, 4).long()}),
    ("different devices", {"inverse_BHN": torch.zeros(1, 2, 12, device="meta").long()}),
    ("does not take out_BHSK in float64", {"out_BHSK": torch.ones(1, 2, 3, 4).double(), "impl": "triton"}),
])
def test_what_does_not_fit_is_refused_with_a_sentence(match, change):
    """Every mistake is named before any launch."""
    good = {"out_BHSK": torch.ones(1, 2, 3, 4), "inverse_BHN": inverted(choice(1, 2, 12, 3), 12), "T": 8, "p": 2,
            "levels": 2}
    with count_traffic() as traffic:
        gate.expect_error(match, lambda: kernels.unselect(**good | change))
    assert not traffic.launches
