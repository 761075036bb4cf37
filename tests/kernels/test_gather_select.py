"""K9 gather_select: chosen rows of base and pyramid, bit for bit, and the gradient that is a look-up as well."""

import importlib

import gate
import pytest
import torch
from lighthouse_rows import choice, far_apart, heads
from torch import Tensor

from labkit import kernels
from labkit.kernels.configs import forced
from labkit.kernels.interpreter import count_traffic
from labkit.kernels.lighthouse_levels import inverted

pytestmark = pytest.mark.interp
module = importlib.import_module("labkit.kernels.lighthouse_gather")
ROWS = ["q_BTHK", "k_BTHK", "v_BTHK", "q_BMHK", "k_BMHK", "v_BMHK"]


def gather(q_BTHK, k_BTHK, v_BTHK, q_BMHK, k_BMHK, v_BMHK, index_BHS, **named):
    """With the pyramid as three tensors, as the gate needs them."""
    return kernels.gather_select(q_BTHK, k_BTHK, v_BTHK, (q_BMHK, k_BMHK, v_BMHK), index_BHS, **named)


def draw(B: int, T: int, M: int, H: int, J: int, K: int, S: int, **named) -> dict[str, Tensor]:
    """Base, pyramid (which need not be its means), and a choice of S of T + M entries with holes."""
    base, coarse = heads(B, T, H, J, K), heads(B, M, H, J, K, seed=1)
    return base | dict(zip(ROWS[3:], coarse.values(), strict=True)) | {"index_BHS": choice(B, H, T + M, S, **named)}


def check(tensors: dict[str, Tensor], *, rows: int = 4, **named) -> dict[str, Tensor]:
    """Against float64, with `rows` places or entries a program."""
    with forced("lighthouse", ROWS=rows):
        return gate.check(gather, tensors, {}, ROWS, **named)


def by_hand(tensors: dict[str, Tensor]) -> list[Tensor]:
    """Row by row: q, k and v of each place of the choice."""
    q, k, v = (torch.cat((tensors[a], tensors[b]), 1) for a, b in zip(ROWS[:3], ROWS[3:], strict=True))
    (B, H, S), group = tensors["index_BHS"].shape, q.shape[2] // k.shape[2]
    outs = [torch.zeros(B, H, S, q.shape[3], dtype=q.dtype) for _ in range(3)]
    for b, h, s in torch.cartesian_prod(*map(torch.arange, (B, H, S))).tolist():
        n = tensors["index_BHS"][b, h, s]
        for out, x, head in zip(outs, (q, k, v), (h, h // group, h // group), strict=True):
            if n >= 0:
                out[b, h, s] = x[b, n, head]
    return outs


# ---- against rows taken by hand, and gradients in float64


@pytest.mark.parametrize("B, T, M, H, J, K, S, dtype", [
    (2, 13, 6, 2, 2, 5, 11, torch.float32), (1, 13, 6, 6, 2, 5, 11, torch.float32),
    (1, 7, 2, 3, 1, 33, 9, torch.float16), (1, 9, 0, 1, 1, 4, 9, torch.float32),
])
def test_rows_and_gradients(B, T, M, H, J, K, S, dtype):
    """Rows bit for bit; gradients of base and pyramid in float64, summed over the heads that share a key head."""
    tensors = draw(B, T, M, H, J, K, S)
    results = check(tensors, dtype=dtype)
    rounded = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    for place, right in enumerate(by_hand(rounded)):
        assert torch.equal(results[f"out{place}"], right)


def test_the_reference_takes_the_same_rows():
    """In float64; its gradients are checked by finite differences."""
    tensors = {name: x.double() if x.is_floating_point() else x for name, x in draw(1, 5, 2, 2, 1, 2, 5).items()}
    for ours, right in zip(gather(**tensors, impl="reference"), by_hand(tensors), strict=True):
        assert torch.equal(ours, right)
    leaves = [tensors[name].requires_grad_() for name in ROWS]
    assert torch.autograd.gradcheck(lambda *x: gather(*x, tensors["index_BHS"], impl="reference"), leaves)


def test_values_are_copied_as_they_are():
    """-0.0, infinities, the smallest and largest numbers; and a row that is NaN comes out as NaN."""
    for dtype in (torch.float32, torch.float16):
        limits = torch.finfo(dtype)
        special = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, limits.max, limits.tiny, limits.smallest_normal / 4])
        x = special.to(dtype).expand(1, 6, 1, 7).clone()
        x[:, 5] = float("nan")
        for out in kernels.gather_select(x, x, x, (x, x, x), torch.tensor([[[0, 11, 7, 5]]])):
            assert torch.equal(out[0, 0, [0, 2]].view(gate.BITS[dtype.itemsize]),
                               x[0, :2, 0].view(gate.BITS[dtype.itemsize]))
            assert out[0, 0, [1, 3]].isnan().all()


def test_rows_that_are_not_chosen_take_no_part():
    """They may be NaN, and their gradient is exactly 0; so is the output of an empty slot, and it sends nothing."""
    tensors = draw(1, 9, 4, 2, 1, 3, 6, holes=False)
    tensors["index_BHS"][..., 2] = -1
    chosen_HN = torch.zeros(2, 13, dtype=torch.bool).scatter(1, tensors["index_BHS"][0].clamp(min=0), True)
    chosen_HN[:, 0] = (tensors["index_BHS"][0] == 0).any(1)
    for name, head in (("q", chosen_HN), ("k", chosen_HN.any(0, keepdim=True)), ("v", chosen_HN.any(0, keepdim=True))):
        tensors[f"{name}_BTHK"][0][~head.T[:9]] = float("nan")
        tensors[f"{name}_BMHK"][0][~head.T[9:]] = float("nan")
    upstream = [torch.ones(1, 2, 6, 3) for _ in range(3)]
    for each in upstream:
        each[:, :, 2] = float("nan")
    results = gate.run(gather, tensors, {}, ROWS, upstream=upstream)
    for place, name in enumerate(("q", "k", "v")):
        assert not results[f"out{place}"][:, :, 2].any() and results[f"out{place}"].isfinite().all()
        grad = torch.cat((results[f"grad_{name}_BTHK"], results[f"grad_{name}_BMHK"]), 1)[0, ..., 0]
        times = chosen_HN.T if name == "q" else chosen_HN.T.sum(1, keepdim=True)
        assert torch.equal(grad, times.float())


def test_heads_that_share_a_key_head_are_added_in_fp32():
    """2048 and three times 1 make 2051, which rounds to 2052 in fp16; added in fp16 they would stay 2048."""
    tensors = {name: x.half() if x.is_floating_point() else x for name, x in draw(1, 2, 0, 4, 1, 2, 2).items()}
    tensors["index_BHS"] = torch.tensor([[[1, 0]]]).expand(1, 4, 2)
    arriving = torch.ones(1, 4, 2, 2)
    arriving[:, 0] = 2048
    results = gate.run(gather, tensors, {}, ROWS, upstream=[arriving] * 3)
    for name in ("k", "v"):
        assert (results[f"grad_{name}_BTHK"] == 2052).all()


# ---- where things lie


def test_strided_views_and_int32():
    """Heads before time, a packed tensor, gaps in the last dimension; gradients that arrive transposed or expanded."""
    tensors = draw(2, 8, 3, 2, 2, 3, 7)
    packed = torch.randn(2, 16, 6, 4, generator=torch.Generator().manual_seed(1))
    tensors |= {"q_BTHK": packed[:, ::2, :2, 1:],
                "k_BTHK": packed[:, 1::2, 2:4].transpose(1, 2).contiguous().transpose(1, 2)[..., :3],
                "v_BTHK": packed.repeat_interleave(2, 3)[:, :8, 4:, :6:2],
                "index_BHS": choice(2, 4, 11, 9).int()[:, ::2, 1:8]}
    check(tensors, upstream=[torch.randn(2, 7, 2, 3).transpose(1, 2), torch.randn(1, 1, 1, 3).expand(2, 2, 7, 3),
                             torch.randn(2, 2, 3, 7).mT])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_int32(dim):
    """Batches, tokens or heads of q, k and v 2^30 elements apart, and places of an int32 choice."""
    tensors = draw(*((3, 2, 1, 1, 1, 4, 3), (1, 3, 1, 1, 1, 4, 4), (1, 2, 1, 3, 3, 4, 3))[dim], holes=False)
    tensors = {name: x.half() if x.is_floating_point() else x.int() for name, x in tensors.items()}
    expected = gather(**tensors)
    for name in ROWS[:3]:
        found = gate.run(gather, tensors | {name: far_apart(tensors[name], dim)})
        for ours, right in zip(found.values(), expected, strict=True):
            assert torch.equal(ours, right)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gradients_beyond_int32(dim):
    """Batches, heads or places of the gradients 2^30 elements apart."""
    B, H, S = ((3, 1, 2), (1, 3, 2), (1, 1, 3))[dim]
    grads = [torch.randn(B, H, S, 4).half() for _ in range(3)]
    inverse = inverted(choice(B, H, 5, S, holes=False).int(), 5)
    expected = module.launch_backward(tuple(grads), inverse, 3, H)
    for place in range(3):
        named = {str(i): far_apart(g, dim) if i == place else g for i, g in enumerate(grads)}
        found = gate.run(lambda inverse, **g: module.launch_backward(tuple(g.values()), inverse, 3, H),
                         named | {"inverse": inverse})
        for ours, right in zip(found.values(), expected, strict=True):
            assert torch.equal(ours, right)


def test_outputs_beyond_int32():
    """Rows of the gathered tensors, and of the gradients of base and pyramid, 2^30 elements apart."""
    far, x = 2**30, torch.arange(1.0, 7.0)[:, None]
    index = torch.tensor([5, 0, 3], dtype=torch.int32)
    out, base, coarse = (gate.huge_rows(3, 1, torch.float32, far) for _ in range(3))
    with gate.overflow_checks():
        module._forward_kernel[(1,)](x, x, x, x, x, x, index, out, out, out, 6, 6, 3, 1, 1, far, 1, *(0, 1, 0) * 3,
                                     ROWS=4, BLOCK_K=1)
        assert out[:, 0].tolist() == [6, 1, 4]
        inverse = torch.tensor([2, -1, 0, 4, 1, 5], dtype=torch.int32)
        module._backward_kernel[(1,)](x, x, x, inverse, base, base, base, coarse, coarse, coarse, 3, 6, 6, 1, 1, far, 1,
                                      *(0, 0, 1) * 3, ROWS=8, BLOCK_K=1)
    assert base[:, 0].tolist() == [3, 0, 1] and coarse[:, 0].tolist() == [5, 2, 6]


# ---- the hard cases


@pytest.mark.parametrize("B, T, M, H, J, K, S", [
    (1, 5, 2, 2, 1, 3, 0), (0, 5, 2, 2, 1, 3, 4), (1, 0, 0, 2, 1, 3, 0), (1, 5, 2, 2, 1, 0, 4), (1, 0, 0, 1, 1, 3, 4),
])
def test_nothing_to_gather(B, T, M, H, J, K, S):
    """No place, no batch, no entries (all slots empty), no width: empty or zero, and gradients of zeros."""
    tensors = draw(B, T, M, H, J, K, min(S, T + M), holes=False)
    if not T:
        tensors["index_BHS"] = torch.full((B, H, S), -1)
    with count_traffic() as traffic:
        results = check(tensors)
    assert bool(traffic.launches) == bool(B * K and (S or T))
    assert results["out1"].shape == (B, H, S, K) and not (T == 0 and results["out1"].any())
    assert results["grad_k_BTHK"].shape == (B, T, J, K) and not (S == 0 and results["grad_k_BTHK"].any())


@pytest.mark.parametrize("wrong", [-2, 8, 2**40])
def test_an_entry_that_is_none_is_nan_and_touches_nothing_else(wrong):
    """As on a GPU, where values are not looked at: its row is NaN, all others and all gradients are as without it."""
    tensors = draw(1, 6, 2, 1, 1, 3, 4, holes=False)
    index_BHS = tensors.pop("index_BHS")
    spoiled = index_BHS.clone()
    spoiled[..., 2] = wrong
    found = gate.run(lambda index, **x: module.launch_forward(*x.values(), index), tensors | {"index": spoiled})
    right = module.launch_forward(*tensors.values(), index_BHS)
    for ours, expected in zip(found.values(), right, strict=True):
        assert ours.isnan().all(3)[0, 0].tolist() == [False, False, True, False]
        assert torch.equal(ours[:, :, [0, 1, 3]], expected[:, :, [0, 1, 3]])
    inverse = inverted(spoiled, 8)
    assert sorted(inverse[inverse >= 0].tolist()) == [0, 1, 3]


def test_inverted_is_the_inverse():
    """Each entry's place, -1 for those that are not chosen; twice inverted it is the choice itself."""
    index_BHS = choice(2, 3, 11, 8)
    inverse_BHN = inverted(index_BHS, 11)
    assert inverse_BHN.is_contiguous() and inverse_BHN.shape == (2, 3, 11)
    assert torch.equal(inverted(inverse_BHN, 8), index_BHS)
    places = torch.where(index_BHS < 0, -1, torch.arange(8))
    assert torch.equal(inverse_BHN.gather(2, index_BHS.clamp(min=0)).where(index_BHS >= 0, -1), places)
    assert ((inverse_BHN >= 0).sum(2) == (index_BHS >= 0).sum(2)).all()


# ---- what it costs, and what it refuses


def test_traffic_is_what_the_docstring_says():
    """S rows of three tensors in and out; in the backward S rows in, each of N out once. One launch each."""
    B, T, M, H, J, K, S = 1, 60, 20, 4, 2, 48, 30
    tensors = draw(B, T, M, H, J, K, S, holes=False)
    index_BHS = tensors.pop("index_BHS")
    traffic = gate.check_traffic(lambda: module.launch_forward(*tensors.values(), index_BHS),
                                 module.forward_cost(B, H, S, K, element=4), slack=1.0)
    assert traffic.launches == 1
    grads = tuple(torch.randn(B, H, S, K) for _ in range(3))
    traffic = gate.check_traffic(lambda: module.launch_backward(grads, inverted(index_BHS, 80), T, J),
                                 module.backward_cost(B, H, J, S, 80, K, element=4), slack=1.0)
    assert traffic.launches == 1 and traffic.distinct_stored == traffic.stored


def test_the_op_keeps_torch_s_contract():
    """Schema, fake tensors, dynamic shapes and autograd registration, as torch.compile needs them."""
    *rows, index_BHS = draw(1, 5, 2, 2, 1, 3, 4).values()
    torch.library.opcheck(torch.ops.labkit.gather_select.default, (*(x.requires_grad_() for x in rows), index_BHS))


@pytest.mark.parametrize("match, change", [
    ("index_BHS goes from 0 to 7, but places go from 0 to 6", {"index_BHS": torch.tensor([[[0, 1], [0, 7]]])}),
    ("index_BHS goes from -2 to 1", {"index_BHS": torch.tensor([[[1, -2], [0, 1]]])}),
    ("index_BHS holds a place twice in one head", {"index_BHS": torch.tensor([[[1, 0], [3, 3]]])}),
    ("index_BHS has dtype torch.float32", {"index_BHS": torch.zeros(1, 2, 2)}),
    ("index_BHS has shape [1, 1, 2]", {"index_BHS": torch.zeros(1, 1, 2).long()}),
    ("k_BMHK has shape [1, 2, 2, 3]", {"k_BMHK": torch.ones(1, 2, 2, 3)}),
    ("v_BMHK has shape [1, 3, 1, 3]", {"v_BMHK": torch.ones(1, 3, 1, 3)}),
    ("q_BMHK has shape [2, 3]", {"q_BMHK": torch.ones(2, 3)}),
    ("q_BTHK is torch.float32 and q_BMHK torch.float16", {"q_BMHK": torch.ones(1, 2, 2, 3).half()}),
    ("v_BTHK has dtype int64", {"v_BTHK": torch.ones(1, 5, 1, 3).long()}),
    ("different devices", {"k_BMHK": torch.ones(1, 2, 1, 3, device="meta")}),
    ("does not take k_BTHK in float64", {"k_BTHK": torch.ones(1, 5, 1, 3).double(), "impl": "triton",
                                         "k_BMHK": torch.ones(1, 2, 1, 3).double()}),
])
def test_what_does_not_fit_is_refused_with_a_sentence(match, change):
    """Every mistake is named before any launch; twice the same empty slot is none."""
    good = draw(1, 5, 2, 2, 1, 3, 4) | {"index_BHS": torch.tensor([[[-1, -1], [0, 6]]])}
    gather(**good, impl="reference")
    with count_traffic() as traffic:
        gate.expect_error(match, lambda: gather(**good | change))
    assert not traffic.launches
