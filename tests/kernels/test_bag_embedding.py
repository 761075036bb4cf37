"""K8 bag_embedding: means of bags and the table's gradient, against float64 and F.embedding_bag, and the hard cases."""

import contextlib
import importlib

import gate
import pytest
import torch
from torch.nn import functional as F

from labkit import kernels
from labkit.kernels import segments
from labkit.kernels.configs import forced
from labkit.kernels.interpreter import overflow_checks

pytestmark = pytest.mark.interp
module = importlib.import_module("labkit.kernels.bag_embedding")


def draw(R: int, S: int, V: int, D: int, pad: int | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    """Bags in which a third of the places are pads, the first bag wholly; and a table."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (R, S), generator=source)
    if pad is not None:
        ids[torch.rand(R, S, generator=source) < 0.3] = pad
        ids[:1] = pad
    return {"ids": ids, "weight_VD": torch.randn(V, D, generator=source)}


@contextlib.contextmanager
def small_blocks():
    """Two blocks out of a row of 70 elements, and a cut at every 16th place."""
    with forced("bag_embedding", BLOCK_D=64), forced("segments", BLOCK_D=64, PIECE=16):
        yield


def embedding_bag(ids, weight_VD, pad=None):
    """torch's own, with a row added for a pad outside the table."""
    V = len(weight_VD)
    if pad is None or 0 <= pad < V:
        return F.embedding_bag(ids, weight_VD, mode="mean", padding_idx=pad)
    table = torch.cat([weight_VD, weight_VD.new_zeros(1, weight_VD.shape[1])])
    return F.embedding_bag(torch.where(ids == pad, V, ids), table, mode="mean", padding_idx=V)


# ---- against float64 and against an independent implementation


@pytest.mark.parametrize("pad, dtype", [(None, torch.float32), (3, torch.float32), (-100, torch.float32),
                                        (12, torch.float32), (0, torch.float16)])
def test_agrees_with_embedding_bag_in_float64(pad, dtype):
    """Means and gradient, with a pad inside the table, below and above it; D is no multiple of the block."""
    with small_blocks():
        gate.check(kernels.bag_embedding, draw(9, 5, 12, 70, pad), {"pad": pad}, wrt=["weight_VD"], dtype=dtype,
                   exact=embedding_bag)


@pytest.mark.parametrize("pad", [None, 0, -100])
def test_reference_agrees_with_embedding_bag(pad):
    """The plain torch reference in float64: mean and gradient."""
    results = []
    for op in (embedding_bag, lambda *args, **named: kernels.bag_embedding(*args, **named, impl="reference")):
        tensors = draw(9, 4, 6, 5, pad)
        weight_VD = tensors["weight_VD"].double().requires_grad_()
        mean_RD = op(tensors["ids"], weight_VD, pad=pad)
        mean_RD.square().sum().backward()
        results.append((mean_RD.detach(), weight_VD.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-13, atol=1e-13)


def test_int32_ids_and_any_shape():
    """ids [B, T, S] of int32 give [B, T, D]."""
    tensors = draw(6, 3, 11, 20)
    ids = tensors["ids"].int().reshape(2, 3, 3)
    mean = kernels.bag_embedding(ids, tensors["weight_VD"])
    assert mean.shape == (2, 3, 20)
    assert torch.equal(mean.reshape(6, 20), kernels.bag_embedding(**tensors))
    gate.check(kernels.bag_embedding, tensors | {"ids": ids}, wrt=["weight_VD"])


def test_strided_tables_and_ids():
    """A slice of a wider table, a table transposed in memory, ids that are a view of a longer sequence."""
    tensors = draw(5, 4, 9, 24, seed=2)
    wide = torch.zeros(9, 40)
    wide[:, 8:32] = tensors["weight_VD"]
    for weight_VD in (wide[:, 8:32], tensors["weight_VD"].T.contiguous().T):
        gate.check(kernels.bag_embedding, {"ids": torch.cat([tensors["ids"]] * 2, 1)[:, 4:], "weight_VD": weight_VD},
                   wrt=["weight_VD"])


def test_a_gradient_that_is_expanded():
    """.sum() sends back one value with stride 0, which the kernel cannot read by rows of neighbours."""
    tensors = draw(4, 3, 7, 10)
    tensors["weight_VD"].requires_grad_()
    kernels.bag_embedding(**tensors).sum().backward()
    counts_V = torch.bincount(tensors["ids"].flatten(), minlength=7)
    gate.close(tensors["weight_VD"].grad, (counts_V / 3)[:, None].expand(7, 10).double())


# ---- the hard cases


def test_a_bag_of_one_is_the_plain_embedding_bit_for_bit():
    """S = 1: F.embedding, in every dtype, -0.0 and the largest and smallest numbers included."""
    for dtype in (torch.float32, torch.float16):
        limits = torch.finfo(dtype)
        weight_VD = torch.randn(5, 70).to(dtype)
        weight_VD[1, :5] = torch.tensor([-0.0, 0.0, limits.max, limits.min, limits.smallest_normal]).to(dtype)
        ids = torch.tensor([[1], [4], [1], [0]])
        ours, theirs = kernels.bag_embedding(ids, weight_VD), F.embedding(ids[:, 0], weight_VD)
        assert torch.equal(ours.view(gate.BITS[dtype.itemsize]), theirs.view(gate.BITS[dtype.itemsize]))


def test_the_same_id_throughout_a_bag():
    """It counts S times in the mean, which is then the row itself, and its gradient is the bag's whole gradient."""
    weight_VD = torch.randn(4, 33, requires_grad=True)
    upstream_RD = torch.randn(2, 33)
    mean_RD = kernels.bag_embedding(torch.tensor([[2] * 7, [0] * 7]), weight_VD)
    mean_RD.backward(upstream_RD)
    gate.close(mean_RD, weight_VD[[2, 0]].double())
    gate.close(weight_VD.grad[[2, 0]], upstream_RD.double())
    assert not weight_VD.grad[[1, 3]].any()


def test_one_id_in_every_bag_makes_a_long_segment():
    """A segment over many cuts between short ones, in two blocks of D; an id that nobody names has gradient 0."""
    tensors = draw(20, 3, 5, 70, seed=1)
    tensors["ids"][:, 0] = 2
    tensors["ids"][tensors["ids"] == 4] = 1  # 4 is the last row, and nobody's
    with small_blocks():
        results = gate.check(kernels.bag_embedding, tensors, wrt=["weight_VD"], exact=embedding_bag)
    assert not results["grad_weight_VD"][4].any()


@pytest.mark.parametrize("lengths", [[16, 16, 16], [15, 17, 16], [1, 46, 1], [0, 48, 0], [7, 0, 41]])
def test_segments_that_end_at_around_and_between_cuts(lengths):
    """Every place is summed once, whatever the segments' ends have to do with the cuts at 16 and 32."""
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    ids = ids[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    with small_blocks():
        gate.check(kernels.bag_embedding, {"ids": ids.reshape(-1, 4), "weight_VD": torch.zeros(3, 5)},
                   wrt=["weight_VD"], exact=embedding_bag, scale={"out0": 1.0})


def test_ids_outside_the_table_are_left_out():
    """Of any value, and also where they fill whole pieces: they are not summed, and no start is looked up for them."""
    ids = torch.tensor([[0, 1]] + [[-7, 2]] * 20)
    share = torch.ones(21, 2)
    with small_blocks():
        gate.check(lambda ids, rows: segments.segment_sums(ids, share, rows, 2, torch.float32),
                   {"ids": ids, "rows": torch.ones(21, 5)}, exact=lambda ids, rows: torch.ones(2, 5))


def test_many_small_addends_in_half_precision():
    """64 rows of 1e-3 onto one of 16: in fp16 each would be lost, in fp32 they make 0.064. Segments and bags."""
    upstream_RD = torch.full((65, 8), 1e-3, dtype=torch.float16)
    upstream_RD[0] = 16.0
    weight_VD = torch.zeros(1, 8, dtype=torch.float16, requires_grad=True)
    kernels.bag_embedding(torch.zeros(65, 1, dtype=torch.int64), weight_VD).backward(upstream_RD)
    gate.close(weight_VD.grad, upstream_RD.double().sum(0, keepdim=True))
    ids = torch.tensor([[0] + [1] * 64])
    gate.close(kernels.bag_embedding(ids, upstream_RD), upstream_RD.double()[ids[0]].mean(0, keepdim=True))


@pytest.mark.parametrize("R, S, V, D", [(0, 3, 5, 4), (3, 0, 5, 4), (3, 2, 5, 0), (0, 3, 0, 4)])
def test_nothing_to_sum(R, S, V, D):
    """No bag, no place in a bag, no width, no table: zeros of the right shape, and a gradient of zeros."""
    for impl in ("triton", "reference"):
        weight_VD = torch.ones(V, D, requires_grad=True)
        mean_RD = kernels.bag_embedding(torch.zeros(R, S, dtype=torch.int64), weight_VD, impl=impl)
        mean_RD.sum().backward()
        assert mean_RD.shape == (R, D) and not (S == 0 and mean_RD.any())
        assert weight_VD.grad.shape == (V, D) and (R * S > 0 or not weight_VD.grad.any())


def test_a_bag_of_pads_is_zero_also_where_the_table_is_not_finite():
    """Its mean is 0 and it sends no gradient; the pad's own row may hold NaN, and gets gradient 0."""
    weight_VD = torch.ones(4, 6)
    weight_VD[3] = float("nan")
    tensors = {"ids": torch.tensor([[3, 3, 3], [3, 1, 3]]), "weight_VD": weight_VD}
    results = gate.run(kernels.bag_embedding, tensors, {"pad": 3}, wrt=["weight_VD"])
    assert torch.equal(results["out0"], torch.tensor([[0.0] * 6, [1.0] * 6]))
    assert torch.isfinite(results["grad_weight_VD"]).all() and not results["grad_weight_VD"][[0, 2, 3]].any()


@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_an_id_outside_the_table_is_nan_and_touches_nothing_else(wrong):
    """As on a GPU, where values are not looked at: its bag is NaN, the others and the gradient's other rows are not."""
    def launch(ids, weight_VD):
        return module.launch_forward(ids, weight_VD, None), module.launch_backward(torch.ones(3, 6), ids, 5, None)

    results = gate.run(launch, {"ids": torch.tensor([[0, 1], [2, wrong], [3, 3]]), "weight_VD": torch.ones(5, 6)})
    assert results["out0"].isnan().all(1).tolist() == [False, True, False]
    assert results["out1"][[0, 1, 3, 4]].tolist() == [[0.5] * 6, [0.5] * 6, [1.0] * 6, [0.0] * 6]


def test_offsets_beyond_int32():
    """Rows 2^30 elements apart: ids, bags, rows of the gradient and of the partial sums all pass 2^31."""
    far = 2**30
    rows, out, partial = (gate.huge_rows(3, 16, torch.float32, far) for _ in range(3))
    rows[:, :] = torch.arange(1.0, 4)[:, None]
    ids = torch.tensor([[0], [1], [2]], dtype=torch.int32)
    with overflow_checks():
        module._forward_kernel[(3, 1)](ids, rows, out, 1, 3, far, far, None, BLOCK_D=16)
        assert torch.equal(out, rows)
        # 12 places, all of id 2, from rows 0, 1 and 2 in turn: two cuts
        inputs = (torch.tensor([0, 0, 0, 12], dtype=torch.int32), torch.arange(12, dtype=torch.int32) % 3,
                  torch.ones(12), rows, partial)
        segments._partial_kernel[(2, 1)](torch.full((12,), 2), *inputs, 3, far, far, PIECE=4, BLOCK_D=16)
        segments._row_kernel[(3, 1)](*inputs, out, far, far, PIECE=4, BLOCK_D=16)
    assert out[:, 0].tolist() == [0, 0, 12 * 2]


# ---- what it costs, and what it refuses


def test_traffic_is_what_the_docstring_says():
    """Forward: S rows in and one out a bag. Backward: each place's row in, the table out, and the partial rows."""
    tensors = draw(16, 8, 20, 1100)
    gate.check_traffic(lambda: module.launch_forward(tensors["ids"], tensors["weight_VD"], None),
                       module.forward_cost(16, 8, 1100, element=4))
    ids = torch.cat([torch.full((80,), 7), torch.arange(20).repeat(4)]).reshape(-1, 8)  # id 7: places 28 to 112
    cost = segments.segment_cost(160, 20, 1100, element=4, cuts=5, piece=16)  # at 32, 48, 64, 80 and 96
    with forced("segments", PIECE=16):
        gate.check_traffic(lambda: module.launch_backward(torch.randn(20, 1100), ids, 20, None), cost)
    assert module.backward_cost(20, 8, 1100, 20, element=4).read > 160 * 4400


def test_the_op_keeps_torch_s_contract():
    """Schema, fake tensors and autograd registration, as torch.compile needs them."""
    tensors = draw(4, 3, 6, 5, pad=1)
    torch.library.opcheck(module._op, (tensors["ids"], tensors["weight_VD"].requires_grad_(), 1),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("change, match", [
    ({"ids": torch.tensor([[0, 5]])}, "holds the id 5"), ({"ids": torch.tensor([[0, -1]])}, "holds the id -1"),
    ({"ids": torch.tensor([[0, -1]]), "pad": -100}, "or -100 for none"), ({"ids": torch.tensor(1)}, "no dimension"),
    ({"ids": torch.tensor([[0.0]])}, "ids has dtype float32"),
    ({"weight_VD": torch.zeros(5)}, "weight_VD has shape [5]"),
    ({"weight_VD": torch.zeros(5, 4, dtype=torch.int64)}, "weight_VD has dtype int64"),
    ({"weight_VD": torch.zeros(5, 4).double(), "impl": "triton"}, "does not take weight_VD in float64"),
    ({"weight_VD": torch.zeros(5, 4, device="meta")}, "different devices"),
])
def test_what_does_not_fit_is_refused_with_a_sentence(change, match):
    """Every mistake raises a LabError that names the argument, before any launch."""
    good = {"ids": torch.tensor([[0, 1]]), "weight_VD": torch.zeros(5, 4)}
    kernels.bag_embedding(**good, impl="reference")
    gate.expect_error(match, lambda: kernels.bag_embedding(**good | change))
