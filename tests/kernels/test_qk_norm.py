"""Gate (a) of qk_norm, K1's second part: two norms in one launch. The oracle is F.rms_norm in float64."""

import importlib

import gate
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from labkit import kernels
from labkit.kernels.configs import forced
from labkit.kernels.interpreter import count_traffic

pytestmark = pytest.mark.interp
k1 = importlib.import_module("labkit.kernels.rms_norm")
qk = importlib.import_module("labkit.kernels.qk_norm")
both = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal, and other ones than the gate's upstream gradients: along x itself the gradient cancels to zero."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))


def check(q_NHD: Tensor, k_NHD: Tensor, weights: tuple[Tensor | None, Tensor | None] | None = None, *, rows: int = 4,
          eps: float = 1e-5, **named) -> dict[str, Tensor]:
    """Against float64, with tiles of `rows` rows."""
    D = q_NHD.shape[2]
    weight_q_D, weight_k_D = weights or (1 + numbers(D, seed=8), 1 + numbers(D, seed=9))
    tensors = {"q_NHD": q_NHD, "k_NHD": k_NHD, "weight_q_D": weight_q_D, "weight_k_D": weight_k_D}
    with forced("rms_norm", ROWS=rows):
        return gate.check(kernels.qk_norm, tensors, {"eps": eps},
                          [name for name, tensor in tensors.items() if tensor is not None], **named)


@both
@pytest.mark.parametrize("N, Hq, Hk, D, rows", [(7, 3, 1, 33, 4), (1, 1, 1, 64, 8), (3, 5, 2, 67, 2), (2, 1, 3, 5, 16)])
def test_queries_and_keys(N, Hq, Hk, D, rows, dtype):
    """Each head by its own norm, queries and keys by their own weights; neither fills its last tile."""
    check(numbers(N, Hq, D), numbers(N, Hk, D, seed=1), rows=rows, dtype=dtype)


@pytest.mark.parametrize("D", [64, 96, 128, 256])
def test_head_sizes_with_the_settings_that_are_shipped(D):
    """Tiles of 32 or 8 rows."""
    q_NHD, k_NHD = numbers(3, 4, D).half(), numbers(3, 1, D, seed=1).half()
    for mine, x in zip(kernels.qk_norm(q_NHD, k_NHD), (q_NHD, k_NHD), strict=True):
        gate.close(mine, F.rms_norm(x.double(), (D,), None, 1e-5))


def test_it_is_rms_norm_twice():
    """The same bits as two calls of rms_norm."""
    q_NHD, k_NHD, weight_D = numbers(5, 3, 33), numbers(5, 2, 33, seed=1), numbers(33, seed=2)
    q, k = kernels.qk_norm(q_NHD, k_NHD, weight_D, None, 1e-6)
    assert torch.equal(q, kernels.rms_norm(q_NHD, weight_D, 1e-6))
    assert torch.equal(k, kernels.rms_norm(k_NHD, None, 1e-6))


@pytest.mark.parametrize("queries, keys", [(True, False), (False, True), (False, False)])
def test_weight_none_is_a_weight_of_one(queries, keys):
    """For either or both."""
    check(numbers(3, 3, 33), numbers(3, 2, 33, seed=1),
          (numbers(33, seed=2) if queries else None, numbers(33, seed=3) if keys else None))


def test_one_of_the_two_may_get_no_gradient():
    """Differentiated through the keys alone, the queries get zero."""
    tensors = {"q_NHD": numbers(3, 3, 33), "k_NHD": numbers(3, 2, 33, seed=1)}
    found = gate.check(lambda **named: kernels.qk_norm(**named)[1], tensors, {}, list(tensors))
    assert not found["grad_q_NHD"].any() and found["grad_k_NHD"].any()


def test_q_and_k_in_a_packed_projection():
    """Both are read where they lie in qkv [N, (Hq + 2 Hk) D], of which the gaps stay untouched; nothing is copied."""
    qkv = numbers(5, 8 * 33).unflatten(1, (8, 33))
    q_NHD, k_NHD = qkv[:, :4], qkv[:, 4:6]
    check(q_NHD, k_NHD)
    assert qk.rows_by_group(q_NHD).data_ptr() == q_NHD.data_ptr()
    assert qk.rows_by_group(k_NHD).data_ptr() == k_NHD.data_ptr()


@pytest.mark.parametrize("view", [lambda x: x.transpose(0, 1), lambda x: x[:1].expand(4, 4, 33), lambda x: x[::2],
                                  lambda x: x.flatten()[7:7 + 3 * 33].view(1, 3, 33),
                                  lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)],
                         ids=["heads first", "expanded", "every second token", "offset", "heads side by side"])
def test_strided_views(view):
    """Strides of tokens and heads are q's and k's own; a last dimension with gaps is copied."""
    q_NHD = view(numbers(4, 4, 33))
    k_NHD = numbers(q_NHD.shape[0], 3, 2 * 33, seed=1)[:, 1:, 33:]
    check(q_NHD, k_NHD, (numbers(66, seed=2)[::2], numbers(66, seed=3)[::2]))


@pytest.mark.parametrize("N, Hq, Hk", [(0, 3, 2), (3, 2, 0), (3, 0, 2)])
def test_nothing_to_norm(N, Hq, Hk):
    """No tokens, no key heads, no query heads: the empty side is empty, the other as ever."""
    with count_traffic() as traffic:
        found = check(numbers(N, Hq, 33), numbers(N, Hk, 33, seed=1))
    assert found["out0"].shape == (N, Hq, 33) and found["out1"].shape == (N, Hk, 33)
    assert bool(traffic.launches) == bool(N)


def test_queries_beyond_2_to_the_31_elements():
    """Token times stride is computed in int64, for queries and for keys."""
    for place in ("q_NHD", "k_NHD"):
        x = gate.huge_rows(3, 66, torch.float16, 2**30 + 8)
        x[2] = numbers(66)
        tensors = {"q_NHD": numbers(3, 2, 33).half(), "k_NHD": numbers(3, 1, 33, seed=1).half()}
        tensors[place] = x.unflatten(1, (2, 33))
        with forced("rms_norm", ROWS=4):
            found = gate.run(kernels.qk_norm, tensors)
        for name, tensor in zip(("out0", "out1"), tensors.values(), strict=True):
            assert torch.equal(found[name][2], kernels.rms_norm(tensor[2].clone()))


def test_fp32_weights_of_fp16_heads():
    """The weight is used as it is, and its gradient is fp32."""
    found = check(numbers(3, 3, 33).half(), numbers(3, 2, 33, seed=1).half())
    assert found["out0"].dtype == torch.float16 and found["grad_weight_k_D"].dtype == torch.float32


def test_traffic_is_that_of_one_launch():
    """Bytes requested forward and backward are those of the formula; the forward is one launch."""
    N, Hq, Hk, D = 9, 4, 3, 160
    q_NHD, k_NHD, weight_D = numbers(N, Hq, D).half(), numbers(N, Hk, D, seed=1).half(), numbers(D, seed=2)
    with forced("rms_norm", ROWS=4):
        traffic = gate.check_traffic(lambda: qk.launch_forward(q_NHD, k_NHD, weight_D, weight_D, 1e-5),
                                     qk.forward_cost(N, Hq, Hk, D))
        assert traffic.launches == 1
        leaves = [q_NHD.requires_grad_(), k_NHD.requires_grad_()]
        outputs = kernels.qk_norm(q_NHD, k_NHD, weight_D.requires_grad_(), weight_D)
        upstream = [torch.ones_like(out) for out in outputs]
        gate.check_traffic(lambda: torch.autograd.grad(outputs, leaves, upstream), qk.backward_cost(N, Hq, Hk, D))


def test_heads_wider_than_a_program_holds_go_to_the_reference():
    """With "auto"; where the kernel was demanded, an error."""
    with pytest.MonkeyPatch.context() as patch, count_traffic() as traffic:
        patch.setattr(k1, "WIDEST", 32)
        q_NHD = numbers(2, 2, 33)
        assert torch.equal(kernels.qk_norm(q_NHD, q_NHD)[1], F.rms_norm(q_NHD, (33,), None, 1e-5))
        gate.expect_error("a row of 32 at most", lambda: kernels.qk_norm(q_NHD, q_NHD, impl="triton"))
    assert not traffic.launches


@pytest.mark.parametrize("match, named", [
    ("q_NHD has shape [3, 5]", {"q_NHD": torch.ones(3, 5)}),
    ("q_NHD has shape []", {"q_NHD": torch.ones(())}),
    ("k_NHD has shape [2, 2, 5], but [N, H, D] here is [3, any, 5]", {"k_NHD": torch.ones(2, 2, 5)}),
    ("k_NHD has shape [3, 2, 6]", {"k_NHD": torch.ones(3, 2, 6)}),
    ("the weight has shape [1], but [D] here is [5]", {"weight_k_D": torch.ones(1)}),
    ("k_NHD has dtype int32", {"k_NHD": torch.ones(3, 2, 5).int()}),
    ("with eps=-1 has no norm", {"eps": -1}),
    ("weight_q_D on meta", {"weight_q_D": torch.ones(5, device="meta")}),
    ("The kernel does not take k_NHD in float64", {"k_NHD": torch.ones(3, 2, 5).double(), "impl": "triton"}),
])
def test_bad_input_is_named_before_a_launch(match, named):
    """A sentence with what was passed, and nothing launched."""
    with count_traffic() as traffic:
        good = {"q_NHD": torch.ones(3, 2, 5), "k_NHD": torch.ones(3, 2, 5)}
        gate.expect_error(match, lambda: kernels.qk_norm(**good | named))
    assert not traffic.launches


def test_opcheck():
    """Schema, fakes, dynamic shapes and autograd registration, as torch itself checks them; strided q and k."""
    qkv = numbers(3, 7, 33)
    q, k = (part.requires_grad_() for part in (qkv[:, :4], qkv[:, 4:6]))  # leaves, since opcheck reads their .grad
    torch.library.opcheck(torch.ops.labkit.qk_norm.default, (q, k, numbers(33, seed=1).requires_grad_(), None, 1e-5))


def test_compiled_is_equal():
    """torch.compile takes it without a graph break, with the same bits forward and backward."""
    tensors = [numbers(5, 6, 33).requires_grad_(), numbers(33, seed=1).requires_grad_()]

    def call(qkv, weight_D):
        q, k = kernels.qk_norm(qkv[:, :3], qkv[:, 3:], weight_D, None)
        return (q * k).sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours, plain = compiled(*tensors), call(*tensors)
    assert torch.equal(ours, plain)
    for one, other in zip(torch.autograd.grad(ours, tensors), torch.autograd.grad(plain, tensors), strict=True):
        assert torch.equal(one, other)
