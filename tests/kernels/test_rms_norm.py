"""Gate (a) of K1, rms_norm. The oracle is F.rms_norm in float64, which is what impl="reference" is for float64."""

import importlib

import gate
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from labkit import kernels
from labkit.kernels.configs import forced
from labkit.kernels.interpreter import count_traffic
from labkit.kernels.layout import rows_by_group

pytestmark = pytest.mark.interp
k1 = importlib.import_module("labkit.kernels.rms_norm")
both = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal, and other ones than the gate's upstream gradients: along x itself the gradient cancels to zero."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))


def check(x: Tensor, weight_D: Tensor | None, residual: Tensor | None = None, *, eps: float = 1e-5, rows: int = 4,
          parts: int = 2, **named) -> dict[str, Tensor]:
    """Against float64, with tiles of `rows` rows, and `parts` programs in the backward, which then take several."""
    tensors = {name: tensor for name, tensor in (("x", x), ("weight_D", weight_D), ("residual", residual))
               if tensor is not None}
    with pytest.MonkeyPatch.context() as patch, forced("rms_norm", ROWS=rows):
        patch.setattr(k1, "PARTS", parts)
        return gate.check(kernels.rms_norm, tensors, {"eps": eps}, list(tensors), **named)


@both
@pytest.mark.parametrize("N, D, rows", [(23, 67, 4), (1, 64, 8), (9, 65, 1), (5, 257, 2), (3, 2, 2), (3, 1000, 1)])
def test_primes_and_one_past_a_power_of_two(N, D, rows, dtype):
    """y, dx and dw, where the last tile of rows and the block of columns are only partly filled."""
    check(numbers(N, D), 1 + numbers(D, seed=1), rows=rows, dtype=dtype)


def test_rows_of_one_number():
    """y is the sign, and dx cancels: it is judged by the size of its two terms."""
    check(numbers(5, 1), torch.ones(1), scale={"grad_x": 1.0})


@pytest.mark.parametrize("D", [64, 128, 512, 2048, 4096, 8191, 8192])
def test_widths_with_the_settings_that_are_shipped(D):
    """64 to 8192, as launched on a GPU: a tile may hold more rows than there are."""
    tensors = {"x": numbers(3, D), "weight_D": numbers(D, seed=1)}
    gate.check(kernels.rms_norm, tensors, {}, list(tensors), dtype=torch.float16)


@both
def test_residual(dtype):
    """The sum comes back too, y is the norm of the sum, and gradients at y and at the sum reach both terms."""
    found = check(numbers(9, 67), numbers(67, seed=1), numbers(9, 67, seed=2), dtype=dtype)
    assert torch.equal(found["out1"], numbers(9, 67).to(dtype) + numbers(9, 67, seed=2).to(dtype))
    assert torch.equal(found["grad_x"], found["grad_residual"])


def test_the_norm_is_of_the_rounded_sum():
    """Whoever goes on from h gets the row that was normed: with the unrounded sum, y would differ in its last bit."""
    x, residual = (numbers(64, 33, seed=seed).half() for seed in (0, 1))
    y, h = kernels.rms_norm(x, None, 1e-5, residual)
    assert torch.equal(y, kernels.rms_norm(h, None, 1e-5))
    assert not torch.equal(y, kernels.rms_norm(x.float() + residual.float(), None, 1e-5).half())


def test_the_sum_may_get_no_gradient_or_be_all_that_does():
    """Either output alone can be differentiated."""
    tensors = {"x": numbers(5, 33), "weight_D": None, "residual": numbers(5, 33, seed=1)}
    for pick in (0, 1):
        gate.check(lambda pick=pick, **named: kernels.rms_norm(**named)[pick], tensors, {}, ["x", "residual"])


@pytest.mark.parametrize("residual", [None, 2], ids=["alone", "residual"])
def test_weight_none_is_a_weight_of_one(residual):
    """y and dx with the same bits, and no gradient for a weight that is not there."""
    x, residual = numbers(7, 33), None if residual is None else numbers(7, 33, seed=residual)
    without, ones = check(x, None, residual), check(x, torch.ones(33), residual)
    for name, result in without.items():
        assert torch.equal(result, ones[name])


def test_an_fp32_weight_of_fp16_rows_is_not_rounded():
    """y is fp16 and dw fp32, close to float64 with the weight as it is."""
    x, weight_D = numbers(9, 67).half(), 1 + 1e-4 * numbers(67, seed=1)
    found = check(x, weight_D, factor={"out0": 0.5})
    assert found["out0"].dtype == found["grad_x"].dtype == torch.float16
    assert found["grad_weight_D"].dtype == torch.float32


@both
@pytest.mark.parametrize("size, arriving", [(1e4, 1e3), (1e-4, 1e-2)])
def test_rows_of_1e4_and_of_1e_4(size, arriving, dtype):
    """1e4 squared overflows fp16, 1e-4 squared is zero there; eps is below both. Upstream lets dx and dw fit fp16."""
    upstream = [(arriving * numbers(5, 67, seed=3)).to(dtype)]
    check(size * numbers(5, 67), numbers(67, seed=1), eps=1e-12, dtype=dtype, upstream=upstream)


def test_large_and_small_rows_do_not_meet():
    """In one tile, rows of 1e4 and of 1e-4 come out as each does alone."""
    x = numbers(4, 67) * torch.tensor([1e4, 1e-4, 1.0, 1e4])[:, None]
    with forced("rms_norm", ROWS=4):
        together = kernels.rms_norm(x, eps=1e-12)
        assert torch.equal(together, torch.cat([kernels.rms_norm(row, eps=1e-12) for row in x.split(1)]))


@both
def test_a_row_of_zeros(dtype):
    """eps keeps it finite: y is 0, its gradient w g / sqrt(eps)."""
    x = numbers(5, 67)
    x[2] = 0
    found = check(x, numbers(67, seed=1), eps=1e-4, dtype=dtype)
    assert (found["out0"][2] == 0).all() and found["grad_x"].isfinite().all()


def test_a_row_of_zeros_without_eps_is_nan_as_in_torch():
    """0 / 0 stays in its row; dw, which sums over rows, is NaN."""
    x = numbers(5, 67)
    x[2] = 0
    found = check(x, numbers(67, seed=1), eps=0.0)
    assert found["out0"].isnan().any(1).tolist() == [False, False, True, False, False]
    assert found["grad_x"].isnan().any(1).tolist() == [False, False, True, False, False]


VIEWS = {
    "columns of a packed qkv": lambda: numbers(7, 99)[:, 33:66],
    "heads in a packed qkv": lambda: numbers(2, 3, 5 * 33).unflatten(2, (5, 33))[:, :, 1:3],
    "heads before tokens": lambda: numbers(2, 3, 4, 33).transpose(1, 2),
    "transposed": lambda: numbers(33, 7).t(),
    "expanded rows": lambda: numbers(1, 33).expand(7, 33),
    "expanded groups": lambda: numbers(1, 4, 33).expand(3, 4, 33),
    "every second row": lambda: numbers(14, 33)[::2],
    "offset": lambda: numbers(8 * 33)[17:17 + 7 * 33].view(7, 33),
    "one row, no rows' dimension": lambda: numbers(33),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strided_views(view):
    """Rows are found by two strides; what has none of that form is copied."""
    check(VIEWS[view](), numbers(33, seed=1))


@pytest.mark.parametrize("view", ["columns of a packed qkv", "heads in a packed qkv", "expanded groups",
                                  "every second row"])
def test_what_is_not_copied(view):
    """A slice of a packed projection is read where it lies."""
    x = VIEWS[view]()
    assert rows_by_group(x).data_ptr() == x.data_ptr()


def test_everything_but_x_may_be_strided_too():
    """A weight with gaps, a transposed residual, expanded gradients as sum() sends them."""
    x, weight_D, residual = numbers(7, 33), numbers(66, seed=1)[::2], numbers(33, 7, seed=2).t()
    upstream = [torch.tensor(1.5).expand(7, 33), numbers(33, 7, seed=3).half().float().t()]
    check(x, weight_D, residual, upstream=upstream)


@pytest.mark.parametrize("shape", [(0, 33), (2, 0, 33), (0, 4, 33)])
def test_no_rows(shape):
    """Empty outputs, a zero gradient of the weight, and no launch."""
    with count_traffic() as traffic:
        found = check(numbers(*shape), numbers(33, seed=1), numbers(*shape))
    assert found["out0"].shape == shape and not found["grad_weight_D"].any() and not traffic.launches


def test_rows_beyond_2_to_the_31_elements():
    """Row times stride is computed in int64, forward and backward."""
    x = gate.huge_rows(3, 33, torch.float16, 2**30 + 8)
    x[2] = numbers(33)
    with forced("rms_norm", ROWS=2):
        found = gate.run(kernels.rms_norm, {"x": x}, {}, ["x"])
    alone = gate.run(kernels.rms_norm, {"x": x[2:].clone()}, {}, ["x"],
                     upstream=[gate.upstream_for([found["out0"]], 0)[0][2:]])
    for name, result in alone.items():
        assert torch.equal(found[name][2:], result)


def test_a_row_wider_than_a_program_holds_goes_to_the_reference():
    """With "auto"; where the kernel was demanded, an error."""
    with pytest.MonkeyPatch.context() as patch, count_traffic() as traffic:
        patch.setattr(k1, "WIDEST", 64)
        x = numbers(3, 65)
        assert torch.equal(kernels.rms_norm(x), F.rms_norm(x, (65,), None, 1e-5)) and not traffic.launches
        gate.expect_error("a row of 64 at most, and D is 65", lambda: kernels.rms_norm(x, impl="triton"))
        kernels.rms_norm(x[:, :64], impl="triton")
    assert traffic.launches == 1


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_traffic(residual):
    """Bytes requested are those of the printed formula; a program that takes several tiles writes one part of dw."""
    N, D = 37, 320
    x, h, g, k = (numbers(N, D, seed=seed).half() for seed in range(4))
    weight_D, scale_N = numbers(D, seed=1), torch.ones(N)
    with pytest.MonkeyPatch.context() as patch, forced("rms_norm", ROWS=4):
        patch.setattr(k1, "PARTS", 3)
        gate.check_traffic(lambda: k1.launch_forward(x, weight_D, h if residual else None, 1e-5),
                           k1.forward_cost(N, D, 2, residual))
        gate.check_traffic(lambda: k1.launch_backward(g, k if residual else None, h, weight_D, scale_N),
                           k1.backward_cost(N, D, 2, residual))


def test_the_formula_at_a_real_size():
    """8192 rows of 4096 in bf16: 2 N D e forward and 3 N D e backward go to and from memory, 4 with a residual."""
    row_bytes = 8192 * 4096 * 2
    for residual, forward, backward in ((False, 2, 3), (True, 4, 4)):
        assert k1.forward_cost(8192, 4096, 2, residual).memory_bytes == pytest.approx(forward * row_bytes, rel=1e-3)
        assert k1.backward_cost(8192, 4096, 2, residual).memory_bytes == pytest.approx(backward * row_bytes, rel=0.05)


@pytest.mark.parametrize("match, named", [
    ("the weight has shape [6], but [D] here is [5]", {"weight_D": torch.ones(6)}),
    ("the weight has dtype int64", {"weight_D": torch.ones(5, dtype=torch.int64)}),
    ("x has dtype int64", {"x": torch.ones(3, 5, dtype=torch.int64)}),
    ("x of shape [] with eps=1e-05 has no norm", {"x": torch.ones(())}),
    ("x of shape [3, 0] with eps=1e-05 has no norm", {"x": torch.ones(3, 0)}),
    ("with eps=-0.1 has no norm", {"eps": -0.1}),
    ("eps is nan", {"eps": float("nan")}),
    ("residual has shape [2, 5]", {"residual": torch.ones(2, 5)}),
    ("x is torch.float32 and the residual torch.float16", {"residual": torch.ones(3, 5).half()}),
    ("different devices: x on cpu, weight_D on meta", {"weight_D": torch.ones(5, device="meta")}),
    ("The kernel does not take x in float64", {"x": torch.ones(3, 5).double(), "impl": "triton"}),
    ("no implementation 'fast'", {"impl": "fast"}),
])
def test_bad_input_is_named_before_a_launch(match, named):
    """A sentence with what was passed, and nothing launched."""
    with count_traffic() as traffic:
        gate.expect_error(match, lambda: kernels.rms_norm(**{"x": torch.ones(3, 5)} | named))
    assert not traffic.launches


@pytest.mark.parametrize("residual", [None, 2], ids=["alone", "residual"])
def test_opcheck(residual):
    """Schema, fakes, dynamic shapes and autograd registration, as torch itself checks them."""
    x, weight_D = numbers(2, 3, 33).requires_grad_(), numbers(33, seed=1).requires_grad_()
    residual = None if residual is None else numbers(2, 3, 33, seed=residual).requires_grad_()
    torch.library.opcheck(torch.ops.labkit.rms_norm.default, (x, weight_D, residual, 1e-5))


def test_compiled_is_equal():
    """torch.compile takes it as one node, without a graph break, with the same bits forward and backward."""
    tensors = [numbers(5, 33).requires_grad_(), numbers(33, seed=1).requires_grad_(),
               numbers(5, 33, seed=2).requires_grad_()]

    def call(x, weight_D, residual):
        y, h = kernels.rms_norm(x, weight_D, 1e-5, residual)
        return (y * h).sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours, plain = compiled(*tensors), call(*tensors)
    assert torch.equal(ours, plain)
    for one, other in zip(torch.autograd.grad(ours, tensors), torch.autograd.grad(plain, tensors), strict=True):
        assert torch.equal(one, other)
