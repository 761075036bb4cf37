"""The instruments themselves: each planted fault on a tiny kernel is seen by the instrument that is there for it."""

import os
from pathlib import Path

import gate
import pytest
import torch

from labkit.errors import LabError
from labkit.kernels import interpreter
from labkit.kernels.cost import Cost
from labkit.kernels.interpreter import count_traffic, guard_bounds, overflow_checks, program_order
from labkit.kernels.language import tl, triton

pytestmark = pytest.mark.interp


@triton.jit
def _double_kernel(x, out, N, load_to, store_to, BLOCK: tl.constexpr):
    """out = 2 x; right where load_to and store_to are both N."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + n, 2 * tl.load(x + n, mask=n < load_to, other=0.0).to(tl.float32), mask=n < store_to)


@triton.jit
def _sum_kernel(x, out, N, load_to, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + n, mask=n < load_to, other=0.0).to(tl.float32), 0))


@triton.jit
def _chain_kernel(x, out):
    """Each program adds what its predecessor wrote: right in one order only."""
    row = tl.program_id(0)
    before = tl.load(out + row - 1, mask=row > 0, other=0.0)
    tl.store(out + row, before + tl.load(x + row))


@triton.jit
def _row_kernel(x, out, stride, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(out + row, tl.load(x + row * stride))


@triton.jit
def _dot_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(left, right, input_precision="ieee"))


@triton.jit
def _twice_kernel(x, out, total, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    tl.store(out + n, tl.load(x + n) + tl.load(x + n))
    tl.atomic_add(total, 1.0)


@torch.library.custom_op("labkit_tests::double", mutates_args=())
def _double_op(x_N: torch.Tensor, load_past: int, store_past: int, rows: int) -> torch.Tensor:
    out_N, N = torch.empty_like(x_N), x_N.numel()
    _double_kernel[(rows,)](x_N, out_N, N, N + load_past, N + store_past, BLOCK=8)
    return out_N


_double_op.register_autograd(
    lambda ctx, grad_N: (_double_op(grad_N.contiguous(), *ctx.faults), None, None, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "faults", inputs[4:] or (0, 0, 2)))


def double(x_N, load_past=0, store_past=0, rows=2, impl="auto"):
    """2 x for 16 or fewer numbers; the settings plant faults."""
    return 2 * x_N if impl == "reference" else _double_op(x_N, load_past, store_past, rows)


def chain(x_N):
    out_N = torch.empty_like(x_N)
    _chain_kernel[(x_N.numel(),)](x_N, out_N)
    return out_N


def test_a_right_op_passes_the_whole_gate():
    """The harness has no complaint of its own: custom op, backward, fp32 and fp16, offset view, odd length."""
    for dtype in (torch.float32, torch.float16):
        found = gate.check(double, {"x_N": torch.randn(20)[5:18]}, {}, ["x_N"], dtype=dtype)
        assert list(found) == ["out0", "grad_x_N"] and found["out0"].dtype == dtype


@pytest.mark.parametrize("settings, complaint", [
    ({"load_past": 1}, "_double_kernel read outside its tensors: 1 of 6 elements, up to 4 bytes away"),
    ({"store_past": 2}, "_double_kernel wrote outside its tensors: 2 of 7 elements, up to 8 bytes away"),
    ({"rows": 1}, "5 of 13 elements of out0 were never written"),
])
def test_a_missing_mask_or_program_is_named(settings, complaint):
    """A load or store past the end is stopped before it happens; an element never written is found by its poison."""
    with pytest.raises(AssertionError, match=complaint):
        gate.run(double, {"x_N": torch.randn(13)}, settings)


def test_guards_work_in_the_backward_of_a_custom_op():
    """Bounds and poison also hold for what autograd launches and allocates."""
    def op(x_N):
        return _Faulty.apply(x_N)

    class _Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x_N):
            return x_N * 2

        @staticmethod
        def backward(ctx, grad_N):
            return _double_op(grad_N, 0, 0, 1)

    with pytest.raises(AssertionError, match="5 of 13 elements of grad_x_N were never written"):
        gate.run(op, {"x_N": torch.randn(13)}, {}, ["x_N"])


def test_nan_guards_reach_a_sum_that_lacks_its_mask():
    """Without bounds checks, what a missing mask adds is NaN, not a neighbour that happens to be small."""
    x_N, out = gate.guarded(torch.ones(13)), torch.zeros(1)
    _sum_kernel[(1,)](x_N, out, 13, 13, BLOCK=16)
    assert out == 13
    _sum_kernel[(1,)](x_N, out, 13, 14, BLOCK=16)
    assert out.isnan()


def test_guard_elements_behind_an_output_are_verified():
    """Without bounds checks, a store past the end is found when the block ends."""
    with pytest.raises(AssertionError, match="2 elements just outside an output of shape \\[13\\] were written"):
        with gate.poisoned():
            _double_op(gate.guarded(torch.ones(13)), 0, 2, 2)


def test_writing_to_an_input_is_found():
    """An op may write to an input only where the test says so."""
    def op(x_N):
        _double_kernel[(2,)](x_N, x_N, 13, 13, 13, BLOCK=8)
        return x_N + 0

    with pytest.raises(AssertionError, match="the op wrote to its input x_N"):
        gate.run(op, {"x_N": torch.ones(13)})
    gate.run(op, {"x_N": torch.ones(13)}, overwrites=["x_N"])


def test_reversed_and_mixed_orders_show_a_race():
    """A program that reads its predecessor's output is right in order, and differs out of order."""
    x_N = torch.randn(7)
    torch.testing.assert_close(chain(x_N), x_N.cumsum(0))
    for order in ("reversed", 1):
        out_N = torch.zeros(7)
        with program_order(order):
            _chain_kernel[(7,)](x_N, out_N)
        assert not torch.allclose(out_N, x_N.cumsum(0))
    with pytest.raises(AssertionError, match="out0 changes when the programs run in reversed order"):
        gate.run(lambda x_N: chain(x_N).nan_to_num(), {"x_N": x_N})


@pytest.mark.parametrize("order", ["reversed", 0, 5])
def test_every_program_runs_once_in_every_order(order):
    """A permutation loses no program and repeats none."""
    @triton.jit
    def count(out):
        place = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
        tl.atomic_add(out + place, 1)

    out_N = torch.zeros(2 * 3 * 4, dtype=torch.int32)
    with program_order(order):
        count[(2, 3, 4)](out_N)
    assert (out_N == 1).all()


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_int32_overflow_is_caught_and_int64_is_not():
    """row * stride beyond 2^31 wraps in silence without the check, raises with it, and is fine in int64.

    The memory between the view's rows is never touched, neither by the launch nor by the gate: it spans 4.3 GB.
    """
    before = resident_bytes()
    x_ND = gate.huge_rows(3, 2, torch.float16, 2**30 + 8)
    x_ND[2, 0] = 7.0
    out_N = torch.zeros(3, dtype=torch.float16)
    with overflow_checks(), pytest.raises(Exception, match="int32 overflow detected for operation mul"):
        _row_kernel[(3,)](x_ND, out_N, x_ND.stride(0), WIDE=False)
    with overflow_checks(), guard_bounds():
        _row_kernel[(3,)](x_ND, out_N, x_ND.stride(0), WIDE=True)
    assert out_N.tolist() == [0, 0, 7]
    gate.run(lambda x: x[:, 0] + 0, {"x": x_ND})
    assert resident_bytes() < before + 2**28


def test_bounds_stop_a_pointer_that_would_end_the_process():
    """An address far outside is refused before the interpreter dereferences it."""
    with pytest.raises(AssertionError, match=r"_row_kernel read outside its tensors: 1 of 1 elements, up to \d{12} b"):
        with guard_bounds():
            _row_kernel[(2,)](torch.ones(1), torch.zeros(2), 2**36, WIDE=True)


def test_a_view_gives_no_right_to_the_rest_of_its_buffer():
    """Bounds are those of the tensor that was passed, not of its storage; `also` extends them."""
    buffer_N, out_N = torch.ones(8), torch.zeros(2)
    with pytest.raises(AssertionError, match="up to 4 bytes away"), guard_bounds():
        _row_kernel[(2,)](buffer_N[:4], out_N, 4, WIDE=True)
    with guard_bounds(buffer_N):
        _row_kernel[(2,)](buffer_N[:4], out_N, 4, WIDE=True)


def test_requested_and_distinct_bytes_differ_where_a_read_is_repeated():
    """A tensor read twice counts twice in requested bytes and once in distinct bytes; an atomic counts apart."""
    x_N, out_N, total = torch.ones(16), torch.empty(16), torch.zeros(1)
    with count_traffic() as traffic:
        for _ in range(2):
            _twice_kernel[(1,)](x_N, out_N, total, BLOCK=16)
    assert (traffic.loaded, traffic.distinct_loaded) == (256, 64)
    assert (traffic.stored, traffic.atomic, traffic.distinct_stored) == (128, 8, 68)
    assert (traffic.programs, traffic.launches, traffic.bytes) == (2, 2, 392)


def test_masked_elements_cost_nothing():
    """13 of 16 elements are read and written in fp16: 26 bytes each way."""
    with count_traffic() as traffic:
        _double_op(torch.ones(13, dtype=torch.float16), 0, 0, 2)
    assert (traffic.loaded, traffic.stored, traffic.flops) == (26, 26, 0)


def test_flops_of_a_product():
    """tl.dot of [16, 32] and [32, 8] is 2 * 16 * 8 * 32 FLOPs."""
    a_MK, b_KN, out_MN = torch.randn(16, 32), torch.randn(32, 8), torch.empty(16, 8)
    with count_traffic() as traffic:
        _dot_kernel[(1,)](a_MK, b_KN, out_MN, M=16, N=8, K=32)
    assert traffic.flops == 2 * 16 * 8 * 32
    torch.testing.assert_close(out_MN, a_MK @ b_KN)


def test_check_traffic_holds_kernel_and_formula_together():
    """A formula below what is requested fails, and so does one far above; loads and stores are judged apart."""
    def call():
        return _double_op(torch.ones(13), 0, 0, 2)

    gate.check_traffic(call, Cost(52, 52, 0))
    with pytest.raises(AssertionError, match="loads: 52 bytes requested, 52 distinct, formula 40"):
        gate.check_traffic(call, Cost(40, 64, 0))
    with pytest.raises(AssertionError, match="stores: 52 bytes requested, 52 distinct, formula 90"):
        gate.check_traffic(call, Cost(52, 90, 0))


def test_close_sees_one_bad_element_a_bias_and_a_moved_infinity():
    """Each of its three conditions fails on its own; zeros have to be zeros unless a scale is given."""
    exact = torch.linspace(1, 2, 1000, dtype=torch.float64)
    one = torch.tensor(3.0)
    gate.close(exact.float(), exact)
    with pytest.raises(AssertionError, match="in the worst element"):
        bad = exact.clone()
        bad[7] += 5e-5  # 1e-6 of the norm
        gate.close(bad, exact, torch.float32)
    with pytest.raises(AssertionError, match="in the norm"):
        gate.close(exact * (1 + 4e-6), exact, torch.float32)
    with pytest.raises(AssertionError, match=": inf in other places"):
        gate.close(-one / 0, one / 0)
    with pytest.raises(AssertionError, match="-inf in other places"):
        gate.close(one, -one / 0)
    with pytest.raises(AssertionError, match="NaN in other places"):
        gate.close(one * float("nan"), one)
    gate.close(torch.zeros(3), torch.zeros(3))
    gate.close(torch.zeros(0, 4), torch.zeros(0, 4))
    gate.close(torch.full((3,), 1e-9), torch.zeros(3), scale=1.0)
    with pytest.raises(AssertionError, match="error inf"):
        gate.close(torch.full((3,), 1e-9), torch.zeros(3))


def test_check_compares_with_float64_on_the_rounded_values():
    """The reference gets the values after rounding to the dtype: with the values before, fp16 would not be so close."""
    seen = {}

    def exact(x_N):
        seen["x"] = x_N.detach()
        return 2 * x_N

    gate.check(double, {"x_N": torch.randn(13)}, wrt=["x_N"], dtype=torch.float16, exact=exact)
    assert seen["x"].dtype == torch.float64 and torch.equal(seen["x"], seen["x"].half().double())
    with pytest.raises(AssertionError, match="out0: error 1.00e-05"):
        gate.check(double, {"x_N": torch.randn(13)}, exact=lambda x_N: 2 * x_N * (1 + 1e-5))
    with pytest.raises(AssertionError, match="grad_x_N: error 1.00e-05"):
        gate.check(double, {"x_N": torch.randn(13)}, wrt=["x_N"], factor={"out0": 100},
                   exact=lambda x_N: 2 * x_N * (1 + 1e-5))


@pytest.mark.parametrize("view", [
    lambda x: x[:, 1:6], lambda x: x.t(), lambda x: x[0].expand(4, 7), lambda x: x[::2], lambda x: x[:0],
    lambda x: x[2, 3],
], ids=["columns", "transposed", "expanded", "every second row", "no rows", "scalar"])
def test_guarded_keeps_values_shape_and_strides(view):
    """Whatever the view, everything in the buffer that is not the view is NaN."""
    x = view(torch.randn(5, 7))
    copy = gate.guarded(x)
    assert copy.shape == x.shape and copy.stride() == x.stride() and torch.equal(copy, x)
    everything = torch.tensor([]).set_(copy.untyped_storage())
    distinct = x[:1].numel() if 0 in x.stride() else x.numel()
    assert int((~everything.isnan()).sum()) == distinct and copy._base is None


def test_instruments_leave_no_trace():
    """After a block, also one that raised, the interpreter is as it was."""
    builder = triton.runtime.interpreter.InterpreterBuilder
    before = dict(vars(builder))
    options = triton.runtime.interpreter.interpreter_builder.options
    with pytest.raises(AssertionError):
        gate.run(double, {"x_N": torch.randn(13)}, {"load_past": 1})
    assert dict(vars(builder)) == before and triton.runtime.interpreter.interpreter_builder.options is options


def test_without_the_interpreter_an_instrument_says_what_to_do(monkeypatch):
    """A process that does not interpret gets a LabError, not a count of zero."""
    monkeypatch.setattr(interpreter, "interpreting", lambda: False)
    for instrument in (count_traffic, overflow_checks, guard_bounds, lambda: program_order("reversed")):
        with pytest.raises(LabError, match="TRITON_INTERPRET=1"), instrument():
            pass
    with pytest.raises(LabError, match="no program order"), program_order("random"):
        pass
