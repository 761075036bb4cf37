"""K9 pyramid_pool: means and scores of all levels and the tokens' gradient, against loops and float64."""

import importlib

import gate
import pytest
import torch
from lighthouse_rows import entries_of, far_apart, heads
from torch import Tensor

from labkit import kernels
from labkit.kernels.configs import forced
from labkit.kernels.interpreter import count_traffic

pytestmark = pytest.mark.interp
module = importlib.import_module("labkit.kernels.lighthouse_pool")
loops = importlib.import_module("labkit.kernels.lighthouse_pool_kernels")
BASE = ["q_BTHK", "k_BTHK", "v_BTHK"]


def check(tensors: dict[str, Tensor], p: int, levels: int, *, rows: int = 2, **named) -> dict[str, Tensor]:
    """Against float64, with `rows` windows a program."""
    with forced("lighthouse", ROWS=rows):
        return gate.check(kernels.pyramid_pool, tensors, {"p": p, "levels": levels}, BASE, **named)


# ---- against float64, and the reference against loops


@pytest.mark.parametrize("B, T, H, J, K, p, levels, dtype", [
    (2, 13, 2, 1, 5, 2, 3, torch.float32), (1, 37, 1, 1, 33, 2, 4, torch.float32),
    (1, 41, 1, 1, 6, 3, 3, torch.float32), (1, 29, 1, 1, 4, 5, 2, torch.float32),
    (1, 20, 1, 1, 3, 9, 2, torch.float32), (1, 53, 1, 1, 5, 4, 3, torch.float16),
])
def test_all_levels_scores_and_gradients(B, T, H, J, K, p, levels, dtype):
    """A tail that no level has, p that is no power of two or over the chunk of four, several tiles, shared heads."""
    check(heads(B, T, H, J, K), p, levels, dtype=dtype)


@pytest.mark.parametrize("T, p, levels", [(53, 4, 3), (12, 2, 3), (17, 3, 2), (5, 2, 1), (7, 4, 3)])
def test_the_reference_is_the_loops(T, p, levels):
    """Each entry is the mean of its tokens, its score the largest of their norms; in float64, entry by entry."""
    q_BTHK, k_BTHK, v_BTHK = (x.double() for x in heads(1, T, 2, 1, 3).values())
    pyramid = kernels.pyramid_pool(q_BTHK, k_BTHK, v_BTHK, p, levels, impl="reference")
    for number, (level, i) in enumerate(entries_of(T, p, levels)):
        tokens = slice(i * p**level, (i + 1) * p**level)
        for x, coarse in zip((q_BTHK, k_BTHK, v_BTHK), pyramid, strict=False):
            if level:
                torch.testing.assert_close(coarse[:, number - T], x[:, tokens].mean(1))
        for x, score in zip((q_BTHK, k_BTHK), pyramid[3:], strict=True):
            torch.testing.assert_close(score[..., number], x[:, tokens].norm(dim=-1).amax(1))
    assert pyramid.q_score_BHN.shape[2] == number + 1 and pyramid.q_BMHK.shape[1] == number + 1 - T


def test_the_gradient_hands_each_token_its_share():
    """1/p^l of what each ancestor got, and nothing behind the last whole window."""
    tensors = heads(1, 21, 1, 1, 2)
    for x in tensors.values():
        x.requires_grad_()
    pyramid = kernels.pyramid_pool(**tensors, p=2, levels=4)
    weight_M = torch.arange(1.0, 15.0)  # 8, 4 and 2 entries
    arriving = weight_M[None, :, None, None].expand(1, 14, 1, 2)
    grads = torch.autograd.grad(pyramid[:3], list(tensors.values()), [arriving] * 3)
    expected = [weight_M[t // 2] / 2 + weight_M[8 + t // 4] / 4 + weight_M[12 + t // 8] / 8 for t in range(16)]
    for grad in grads:
        gate.close(grad[0, :, 0, 0], torch.tensor(expected + [0.0] * 5).double())
        assert not grad[0, 16:].any()


# ---- where things lie


def test_strided_views():
    """Heads before time, q, k and v inside one packed tensor, every second token, a last dimension with gaps."""
    packed = torch.randn(1, 22, 4, 10, generator=torch.Generator().manual_seed(1))
    views = {"q_BTHK": packed[..., :3].transpose(1, 2).contiguous().transpose(1, 2)[:, ::2, :2],
             "k_BTHK": packed[:, 1::2, 2:3, 4:7], "v_BTHK": packed[:, ::2, 3:, 1:7:2]}
    check(views, 2, 3)
    check({name: x[:, :, :1, :1].expand(2, 11, 2, 3) for name, x in views.items()}, 2, 3)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_int32(dim):
    """Batches, tokens or heads 2^30 elements apart, of q, k and v: the third lies past 2^31."""
    tensors = {name: x.half() for name, x in heads(*((3, 2, 1, 1, 4), (1, 3, 1, 1, 4), (1, 2, 3, 3, 4))[dim]).items()}
    expected = kernels.pyramid_pool(**tensors, p=2, levels=2)
    for name, x in tensors.items():
        found = gate.run(kernels.pyramid_pool, tensors | {name: far_apart(x, dim)}, {"p": 2, "levels": 2})
        for ours, right in zip(found.values(), expected, strict=True):
            assert torch.equal(ours, right)


def test_outputs_beyond_int32():
    """Rows of the pyramid, and of the tokens' gradient, 2^30 elements apart."""
    far = 2**30  # K, of which one element is looked at
    coarse, score = gate.huge_rows(3, 1, torch.float32, far), torch.empty(9)
    x = torch.arange(1.0, 7.0)[:, None]
    sizes = {"P": 2, "LEVELS": 2, "ROWS": 4, "BLOCK_K": 1}
    with gate.overflow_checks():
        loops._forward_kernel[(1,)](x, x, x, coarse, coarse, coarse, score, score, 6, 6, 3, 3, far, 0, 1, 1,
                                    *(0, 1, 0) * 3, 1, CHUNK=2, **sizes)
        assert coarse[:, 0].tolist() == [1.5, 3.5, 5.5] and score.tolist() == [1, 2, 3, 4, 5, 6, 2, 4, 6]
        dx = gate.huge_rows(3, 1, torch.float32, far)
        loops._backward_kernel[(1,)](coarse, coarse, coarse, dx, dx, dx, 3, 3, 3, 1, 0, far, 1, 1, **sizes)
    assert dx[:, 0].tolist() == [0.75, 0.75, 1.75]


# ---- the hard cases


@pytest.mark.parametrize("B, T, H, J, K, p, levels", [
    (1, 7, 2, 1, 3, 4, 3), (1, 3, 1, 1, 2, 1000, 9), (1, 9, 2, 2, 3, 2, 1), (2, 0, 1, 1, 3, 2, 2),
    (0, 5, 1, 1, 3, 2, 2), (1, 5, 1, 1, 0, 2, 2), (1, 1, 1, 1, 1, 2, 2),
])
def test_no_pooled_entries_or_nothing_at_all(B, T, H, J, K, p, levels):
    """A text shorter than a window, one level, no tokens, no batch, no width: scores of the tokens, gradients of 0."""
    with count_traffic() as traffic:
        results = check(heads(B, T, H, J, K), p, levels)
    assert bool(traffic.launches) == bool(B and T)
    assert results["out0"].shape == (B, T // p if T == 5 else 0, H, K)
    assert not results["grad_v_BTHK"].any() or T == 5


def test_half_precision_sums_leave_its_range():
    """The mean of 16 tokens of 60,000 is 60,000, and their norm is 120,000: sums and scores are in fp32."""
    loud = {name: torch.full((1, 16, 1, 4), 60_000.0).half() for name in BASE}
    pyramid = kernels.pyramid_pool(**loud, p=4, levels=3)
    assert (pyramid.v_BMHK == 60_000).all() and pyramid.v_BMHK.dtype == torch.float16
    assert (pyramid.k_score_BHN == 120_000).all() and pyramid.k_score_BHN.dtype == torch.float32


def test_each_result_is_rounded_once():
    """Nine of 16 tokens are one step of fp16 above 1: their mean rounds to one step, that of rounded means to none."""
    x = torch.ones(1, 16, 1, 1).half()
    x[0, [0, 1, 4, 5, 8, 9, 12, 13, 15]] += 2**-10
    mean_M = kernels.pyramid_pool(x, x, x, 4, 3).q_BMHK.flatten().double()
    assert (mean_M - 1).tolist() == [0.0, 0.0, 0.0, 2**-10, 2**-10]


def test_shares_are_added_in_fp32():
    """1000 / 3 - 2998 / 9 is 2/9; had each been rounded to fp16 before, it would be 1/4."""
    grads = torch.full((1, 12, 1, 2), 1000.0).half()
    grads[:, 9:] = -2998
    for dx in loops.launch_backward((grads,) * 3, 27, 3, 3):
        gate.close(dx, torch.full((1, 27, 1, 2), 2 / 9).double())


def test_not_a_number_stays_in_its_windows():
    """A token that is NaN spoils the entries that it is in, and no other; the tail of v is not read at all."""
    tensors = heads(1, 18, 1, 1, 3)
    tensors["v_BTHK"][0, 5] = tensors["v_BTHK"][0, 17] = float("nan")
    v_M = gate.run(kernels.pyramid_pool, tensors, {"p": 2, "levels": 3})["out2"][0, :, 0].isnan().all(1)
    assert v_M.nonzero().flatten().tolist() == [2, 9]


def test_scores_carry_no_gradient():
    """They are for choosing; a loss of them does not reach q and k."""
    tensors = heads(1, 8, 1, 1, 3)
    pyramid = kernels.pyramid_pool(*(x.requires_grad_() for x in tensors.values()), 2, 2)
    assert [x.requires_grad for x in pyramid] == [True, True, True, False, False]


# ---- what it costs, and what it refuses


def test_traffic_is_what_the_docstring_says():
    """The base is read once, for all levels and for the norms, and each entry written once; so are the gradients."""
    B, T, H, J, K, p, levels = 1, 203, 2, 1, 24, 4, 3
    tensors = heads(B, T, H, J, K)
    cost = module.forward_cost(B, T, H, J, K, p, levels, element=4)
    traffic = gate.check_traffic(lambda: loops.launch_forward(*tensors.values(), p, levels), cost, slack=1.0)
    assert traffic.distinct_loaded == traffic.loaded == cost.read and traffic.launches == 1
    grads = tuple(torch.randn(B, 60, count, K) for count in (H, J, J))
    cost = module.backward_cost(B, T, H, J, K, p, levels, element=4)
    traffic = gate.check_traffic(lambda: loops.launch_backward(grads, T, p, levels), cost, slack=1.0)
    assert traffic.distinct_loaded == cost.read - cost.cached and traffic.launches == 1


def test_the_op_keeps_torch_s_contract():
    """Schema, fake tensors, dynamic shapes and autograd registration, as torch.compile needs them."""
    tensors = [x.requires_grad_() for x in heads(1, 10, 2, 1, 3).values()]
    torch.library.opcheck(torch.ops.labkit.pyramid_pool.default, (*tensors, 2, 3))


@pytest.mark.parametrize("match, change", [
    ("q_BTHK has shape [8, 3]", {"q_BTHK": torch.ones(8, 3)}),
    ("k_BTHK has shape [1, 7, 1, 3]", {"k_BTHK": torch.ones(1, 7, 1, 3)}),
    ("v_BTHK has shape [1, 8, 2, 3], but the shape of k here is [1, 8, 1, 3]", {"v_BTHK": torch.ones(1, 8, 2, 3)}),
    ("3 query heads cannot share 2 key heads", dict.fromkeys(("k_BTHK", "v_BTHK"), torch.ones(1, 8, 2, 3))),
    ("Pooling 1 and 2 levels fit no pyramid", {"p": 1}), ("Pooling 2 and 0 levels", {"levels": 0}),
    ("v_BTHK has dtype int64", {"v_BTHK": torch.ones(1, 8, 1, 3).long()}),
    ("different devices", {"k_BTHK": torch.ones(1, 8, 1, 3, device="meta")}),
    ("does not take k_BTHK in float64", {"k_BTHK": torch.ones(1, 8, 1, 3).double(), "impl": "triton"}),
])
def test_what_does_not_fit_is_refused_with_a_sentence(match, change):
    """Every mistake is named before any launch."""
    good = {"q_BTHK": torch.ones(1, 8, 3, 3)} | dict.fromkeys(("k_BTHK", "v_BTHK"), torch.ones(1, 8, 1, 3))
    with count_traffic() as traffic:
        gate.expect_error(match, lambda: kernels.pyramid_pool(**good | {"p": 2, "levels": 2} | change))
    assert not traffic.launches
