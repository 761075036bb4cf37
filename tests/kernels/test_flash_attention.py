"""Gate (a) of K10, flash_attention. Oracles: the whole matrix in float64, and torch's SDPA (math) in float64.

Its bytes are walks over blocks, which depend on the block sizes, so FLOPs are held to the formula, and of the bytes the
distinct ones.
"""

import contextlib
import importlib

import gate
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from labkit import kernels
from labkit.kernels import interpreter
from labkit.kernels.configs import forced
from labkit.kernels.interpreter import count_traffic, guard_bounds, overflow_checks

pytestmark = pytest.mark.interp
k10 = importlib.import_module("labkit.kernels.flash_attention")
k10_back = importlib.import_module("labkit.kernels.flash_backward")
causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))


def qkv(H: int, J: int, T: int, U: int, D: int, B: int = 1) -> dict[str, Tensor]:
    return {"q_BHTD": numbers(B, H, T, D), "k_BJUD": numbers(B, J, U, D, seed=1), "v_BJUD": numbers(B, J, U, D, seed=2)}


@contextlib.contextmanager
def blocks(q: int = 16, k: int = 16):
    """Blocks of q queries and k keys, forward and backward."""
    with forced("flash_attention", BLOCK_Q=q, BLOCK_K=k), forced("flash_attention_backward", BLOCK_Q=q, BLOCK_K=k):
        yield


def check(tensors: dict[str, Tensor], q: int = 16, k: int = 16, *, settings: dict | None = None,
          **named) -> dict[str, Tensor]:
    """out, lse and all gradients, for gradients that arrive at both outputs, against the whole matrix in float64."""
    with blocks(q, k):
        return gate.check(kernels.flash_attention, tensors, settings or {}, list(tensors), **named)


def check_once(*args, **named) -> dict[str, Tensor]:
    """`check` in one order of the programs instead of three: the interpreter takes 10 ms for each block of scores."""
    def run(op, tensors, settings, wrt, seed, *, dtype, repeatable, overwrites, upstream):
        return gate._once(op, tensors, settings, wrt, seed, dtype, set(overwrites), upstream, None, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "run", run)
        return check(*args, **named)


@pytest.mark.parametrize("q, k, causal, dtype", [
    (16, 16, True, torch.float32), (32, 16, True, torch.float16), (16, 32, True, torch.float32),
    (32, 16, False, torch.float32), (16, 32, False, torch.float16),
])
def test_lengths_that_no_block_divides(q, k, causal, dtype):
    """37 places in blocks of 16 or 32: full blocks, one on the diagonal, one at the end."""
    orders = check if q == k else check_once
    orders(qkv(1, 1, 37, 37, 16), q, k, settings={"causal": causal}, dtype=dtype)


@pytest.mark.parametrize("D", [1, 16, 64, 80, 96, 128, 256])
def test_head_sizes(D):
    """Powers of two and others, in fp16; below 16 the block is still 16 wide, as a matrix product needs."""
    check_once(qkv(1, 1, 17, 17, D), 32, 32, dtype=torch.float16)


def test_a_block_of_keys_that_is_full_has_no_room_behind_its_last_row():
    """24 channels in a block of 32: the columns are masked also where the rows need no mask."""
    check_once(qkv(1, 1, 5, 16, 24), settings={"causal": False})


@pytest.mark.parametrize("T, U, causal", [(1, 67, True), (5, 38, True), (5, 38, False), (1, 1, True), (33, 32, True),
                                          (33, 5, False)])
def test_as_many_queries_as_keys_fewer_and_more(T, U, causal):
    """One query and a long cache, a piece of a prompt behind a cache, more queries than keys."""
    check_once(qkv(1, 1, T, U, 16), 16, 32, settings={"causal": causal})


def test_queries_without_a_key_give_zero():
    """Of 40 queries the first 33, two blocks and one row, see none of 7 keys: 0, lse -inf, gradient 0, no NaN."""
    found = check_once(qkv(1, 1, 40, 7, 16))
    assert not found["out0"][0, 0, :33].any() and (found["out1"][0, 0, :33] == float("-inf")).all()
    assert not found["grad_q_BHTD"][0, 0, :33].any() and found["out1"][0, 0, 33:].isfinite().all()
    assert all(found[f"grad_{name}"].isfinite().all() for name in ("q_BHTD", "k_BJUD", "v_BJUD"))


@causal_or_not
def test_no_keys_at_all(causal):
    """U = 0: every query gets 0 and lse -inf, dq is 0, dk and dv are empty."""
    with count_traffic() as traffic:
        found = check_once(qkv(2, 1, 17, 0, 16), settings={"causal": causal})
    assert traffic.launches == 3  # forward, delta and dq: a launch for dk and dv would have no programs
    assert not found["out0"].any() and not found["grad_q_BHTD"].any() and found["grad_k_BJUD"].shape == (1, 1, 0, 16)


@pytest.mark.parametrize("B, H, T", [(0, 2, 5), (2, 2, 0), (2, 0, 5)], ids=["no batch", "no queries", "no heads"])
def test_nothing_to_attend(B, H, T):
    """Empty outputs, zero gradients of keys that nobody read, no launch."""
    with count_traffic() as traffic:
        found = check_once(qkv(H, 1, T, 5, 16, B=B))
    assert found["out0"].shape == (B, H, T, 16) and not found["grad_k_BJUD"].any() and not traffic.launches


@pytest.mark.parametrize("H, J, B", [(4, 2, 2), (3, 1, 1), (2, 2, 1)])
def test_grouped_queries(H, J, B):
    """Head h reads key head h // (H / J); gradients of a key head sum over its group; batches stay apart."""
    check_once(qkv(H, J, 7, 7, 16, B=B))


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_scale(scale):
    """Any number: 0 makes every key equal, a negative one turns the order round."""
    check_once(qkv(1, 1, 7, 7, 16), settings={"scale": scale})


@pytest.mark.parametrize("pick", [0, 1], ids=["out", "lse"])
def test_a_gradient_through_one_output_alone(pick):
    """Through lse alone the values get none."""
    def op(**named):
        return kernels.flash_attention(**named)[pick]

    with blocks():
        found = gate.check(op, qkv(1, 1, 7, 7, 16), {}, ["q_BHTD", "k_BJUD", "v_BJUD"])
    assert found["grad_v_BJUD"].any() == (pick == 0)


@pytest.mark.parametrize("shift, causal", [(1e4, True), (-1e4, False)])
def test_large_scores(shift, causal):
    """exp(1e4) is inf and exp(-1e4) is 0: the maximum is subtracted first. The scores differ by a few among 1e4.

    lse is close to float64; a probability has what is left of a score's digits (6e-8 * 1e4), hence the factor.
    """
    tensors = qkv(1, 1, 17, 17, 16)
    tensors["q_BHTD"][..., 0], tensors["k_BJUD"][..., 0] = 4.0, shift
    loose = dict.fromkeys(("out0", "grad_q_BHTD", "grad_k_BJUD", "grad_v_BJUD"), 1e3)
    check_once(tensors, settings={"causal": causal}, factor=loose)


def test_growing_scores():
    """Every block of keys raises the maximum: sum and output so far are corrected each time."""
    tensors = qkv(1, 1, 1, 48, 16)
    tensors["k_BJUD"] = tensors["q_BHTD"] * torch.linspace(0, 8, 48)[:, None]
    check_once(tensors)


def test_nan_stays_in_its_row_and_is_not_hidden():
    """A NaN query makes its own output, lse and gradient NaN, and nobody else's output."""
    tensors = qkv(1, 1, 20, 20, 16)
    tensors["q_BHTD"][0, 0, 3, 5] = float("nan")
    with blocks(32, 32):
        found = gate.run(kernels.flash_attention, tensors, {}, ["q_BHTD"])
    for name in ("out0", "out1", "grad_q_BHTD"):
        assert found[name].reshape(20, -1).isnan().any(1).nonzero().tolist() == [[3]]


VIEWS = {
    "tokens before heads": lambda: [numbers(2, 7, heads, 16, seed=heads).transpose(1, 2) for heads in (2, 1, 1)],
    "packed projection": lambda: list(numbers(1, 7, 4 * 16).unflatten(2, (4, 16)).transpose(1, 2).split([2, 1, 1], 1)),
    "part of a cache": lambda: [numbers(1, 2, 17, 16)] + [numbers(1, 1, 40, 16, seed=i)[:, :, 8:26] for i in (1, 2)],
    "expanded": lambda: [numbers(1, 1, 7, 16).expand(2, 2, 7, 16)] + [numbers(1, 1, 1, 16).expand(2, 1, 7, 16)] * 2,
    "channels before tokens": lambda: [numbers(1, 1, 16, 17, seed=i).transpose(2, 3) for i in range(3)],
}


@pytest.mark.parametrize("view", VIEWS)
def test_strided_views(view):
    """Each of q, k and v by its own three strides; a last dimension with gaps is copied."""
    check_once(dict(zip(("q_BHTD", "k_BJUD", "v_BJUD"), VIEWS[view](), strict=True)), 32, 32)


def test_arriving_gradients_may_be_strided():
    """As sum() sends them, expanded; or [B, T, H, D] turned round."""
    upstream = [numbers(1, 7, 2, 16).transpose(1, 2), torch.tensor(0.5).expand(1, 2, 7)]
    check_once(qkv(2, 1, 7, 7, 16), upstream=upstream)


@causal_or_not
def test_equal_to_sdpa(causal):
    """For as many queries as keys: torch's scaled_dot_product_attention in float64, output and gradients, with GQA."""
    def sdpa(q_BHTD, k_BJUD, v_BJUD):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(q_BHTD, k_BJUD, v_BJUD, is_causal=causal, enable_gqa=True)

    tensors = qkv(2, 1, 17, 17, 24)
    with blocks(32, 16):
        gate.check(lambda **named: kernels.flash_attention(**named, causal=causal)[0], tensors, {}, list(tensors),
                   exact=sdpa)


def test_nothing_later_is_seen():
    """Outputs before n keep their bits when keys and values from n on change, and the others do not."""
    tensors, n = qkv(1, 1, 40, 40, 16), 21
    with blocks():
        out, lse = kernels.flash_attention(**tensors)
        tensors["k_BJUD"][:, :, n:] *= 9
        tensors["v_BJUD"][:, :, n:] -= 9
        later, later_lse = kernels.flash_attention(**tensors)
    assert torch.equal(out[:, :, :n], later[:, :, :n]) and torch.equal(lse[:, :, :n], later_lse[:, :, :n])
    assert not torch.isclose(out[:, :, n:], later[:, :, n:]).all(3).any()


def test_a_cache_is_the_end_of_a_longer_attention():
    """The last queries alone, with all keys, get what they get among all queries."""
    tensors = qkv(1, 1, 40, 40, 16)
    with blocks(16, 32):
        whole, lse = kernels.flash_attention(**tensors)
        last, last_lse = kernels.flash_attention(tensors["q_BHTD"][:, :, 29:], tensors["k_BJUD"], tensors["v_BJUD"])
    gate.close(last, whole[:, :, 29:])
    gate.close(last_lse, lse[:, :, 29:])


def counted(T: int, U: int, q: int, k: int, causal: bool) -> tuple[float, float]:
    """FLOPs of forward and backward in units of one block pair's product, 2 q k D; one head of size 16."""
    tensors = [tensor.requires_grad_() for tensor in qkv(1, 1, T, U, 16).values()]
    with blocks(q, k):
        with count_traffic() as forward:
            out, lse = kernels.flash_attention(*tensors, causal=causal)
        with count_traffic() as backward:
            torch.autograd.grad([out, lse], tensors, [torch.ones_like(out), torch.ones_like(lse)])
    return tuple(traffic.flops / (2 * q * k * 16) for traffic in (forward, backward))


def test_flops_are_those_of_the_blocks_that_are_seen():
    """Causal, 3 x 3 blocks: 6 are computed where the triangle has the area of 4.5, since the 3 on the diagonal are
    computed whole: 4/3 times the formula forward, (n + 1) / n for n blocks. The backward makes 7 products a block
    instead of 5 (each of its kernels makes P again): 1.4 times that. Without a mask the formula is met."""
    for causal, seen in ((True, 6), (False, 9)):
        forward, backward = counted(48, 48, 16, 16, causal)
        assert (forward, backward) == (2 * seen, 7 * seen)
        ideal = k10.forward_cost(1, 1, 1, 48, 48, 16, causal).flops / (2 * 16 * 16 * 16)
        assert forward / ideal == pytest.approx(4 / 3 if causal else 1)
        ideal = k10.backward_cost(1, 1, 1, 48, 48, 16, causal).flops / (2 * 16 * 16 * 16)
        assert backward / ideal == pytest.approx(1.4 * (4 / 3 if causal else 1))


@pytest.mark.parametrize("T, U, seen", [(33, 33, 5), (1, 70, 5), (70, 1, 1), (64, 16, 1)])
def test_no_block_is_computed_in_vain(T, U, seen):
    """Blocks of 32 queries and 16 keys: nothing past the last key, and no block of queries that sees none."""
    assert counted(T, U, 32, 16, True) == (2 * seen, 7 * seen)


def test_each_tensor_is_read_from_memory_once():
    """What is stored is the formula, and so are the distinct bytes loaded; the backward adds delta, which it makes."""
    B, H, J, T, U, D = 1, 4, 2, 37, 41, 32
    q, k, v = qkv(H, J, T, U, D).values()
    lse, grad_lse = numbers(B, H, T), numbers(B, H, T, seed=3)
    with blocks(32, 32):
        with count_traffic() as forward:
            k10.launch_forward(q.half(), k.half(), v.half(), True, 0.2)
        halves = [tensor.half() for tensor in (q, k, v)]
        out, grad_out = numbers(B, H, T, D).half(), numbers(B, H, T, D).half()
        with count_traffic() as backward:
            k10.launch_backward(grad_out, grad_lse, *halves, out, lse, True, 0.2)
    cost, delta = k10.forward_cost(B, H, J, T, U, D), 4 * B * H * T
    assert (forward.distinct_loaded, forward.stored) == (cost.read, cost.written)
    cost = k10.backward_cost(B, H, J, T, U, D)
    assert (backward.distinct_loaded, backward.stored) == (cost.read + delta, cost.written + delta)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "heads", "places"])
def test_inputs_beyond_2_to_the_31_elements(axis):
    """Strides of 2^30 along each axis: places in memory are computed in int64, forward and backward."""
    def huge(seed):
        x = gate.huge_rows(3, 16, torch.float16, 2**30 + 8)
        x[2] = numbers(16, seed=seed)
        return x.unflatten(0, [3 if place == axis else 1 for place in range(3)])

    found = check_once(dict(zip(("q_BHTD", "k_BJUD", "v_BJUD"), map(huge, range(3)), strict=True)))
    assert found["grad_q_BHTD"].shape[axis] == 3


@contextlib.contextmanager
def only_program(index: int):
    """A launch of one program is that of number `index` of a grid that would take years to interpret."""
    with (interpreter._wrapped(interpreter._builder(), set_grid_dim=lambda original, builder, *_: original(
            builder, index + 1, 1, 1), set_grid_idx=lambda original, builder, *_: original(builder, index, 0, 0)),
          overflow_checks(), guard_bounds()):
        yield


def fits_in(last: Tensor, rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """`rows` times the shape of `last`, in memory that is only touched at the end, where `last` stands."""
    big = gate.huge_rows(rows, last.numel(), dtype or last.dtype, last.numel())
    big[-1] = last.flatten()
    return big


HEADS = 2**23 + 1  # of 16 places of 16: the last is at 2^31 elements
STRIDES = (0, 0, 16) * 3  # of q, k and v: all heads read the same one
SIZES = {"D": 16, "BLOCK_D": 16, "BLOCK_Q": 16, "BLOCK_K": 16}


def last_head() -> dict[str, Tensor]:
    """One head, its results, and gradients to arrive: what the last of HEADS heads holds."""
    q, k, v = (tensor.half() for tensor in qkv(1, 1, 16, 16, 16).values())
    out, lse = k10.launch_forward(q, k, v, False, 1.0)
    grad = numbers(1, 1, 16, 16, seed=4).half()
    gradients = k10.launch_backward(grad, torch.zeros_like(lse), q, k, v, out, lse, False, 1.0)
    return dict(zip(("q", "k", "v", "out", "lse", "grad", "dq", "dk", "dv"), (q, k, v, out, lse, grad, *gradients),
                    strict=True))


def test_outputs_of_more_than_2_to_the_31_elements():
    """The last of 8 million heads writes its output at 2^31 elements."""
    head = last_head()
    out, lse = fits_in(torch.zeros(256).half(), HEADS), torch.empty(HEADS * 16)
    with only_program(HEADS - 1):
        k10._forward_kernel[(1,)](head["q"], head["k"], head["v"], out, lse, 16, 16, HEADS, HEADS, *STRIDES,
                                  k10.LOG2E, CAUSAL=False, **SIZES)
    assert torch.equal(out[-1], head["out"].flatten()) and torch.equal(lse[-16:], head["lse"].flatten())


def test_one_head_of_more_than_2_to_the_31_elements():
    """The last block of 2^27 + 16 queries writes at 2^31 elements."""
    head, T = last_head(), HEADS * 16
    out, lse = fits_in(torch.zeros(256).half(), HEADS), torch.empty(T)
    with only_program(HEADS - 1):
        k10._forward_kernel[(1,)](head["q"][:, :, :1], head["k"], head["v"], out, lse, T, 16, 1, 1, 0, 0, 0,
                                  *STRIDES[3:], k10.LOG2E, CAUSAL=False, **SIZES)
    assert torch.equal(out[-1], head["out"][0, 0, :1].expand(16, 16).flatten())


@pytest.mark.parametrize("which", ["keys", "queries"])
def test_gradients_of_more_than_2_to_the_31_elements(which):
    """The last of 8 million heads reads its gradient and writes its own at 2^31 elements."""
    head = last_head()
    grad = fits_in(head["grad"], HEADS)
    lse, delta = torch.empty(HEADS * 16), torch.empty(HEADS * 16)  # torch.zeros would touch all of it
    lse[-16:] = head["lse"].flatten()
    delta[-16:] = (head["out"].float() * head["grad"].float()).sum(3).flatten()
    outputs = [fits_in(torch.zeros(256).half(), HEADS) for _ in range(2 if which == "keys" else 1)]
    kernel = k10_back._key_gradient_kernel if which == "keys" else k10_back._query_gradient_kernel
    with only_program(HEADS - 1):
        kernel[(1,)](head["q"], head["k"], head["v"], grad, lse, delta, *outputs, 16, 16, HEADS,
                     HEADS if which == "keys" else 1, *STRIDES, 1.0, k10.LOG2E, CAUSAL=False, **SIZES)
    for ours, name in zip(outputs, ("dk", "dv") if which == "keys" else ("dq",), strict=True):
        assert torch.equal(ours[-1], head[name].flatten())


def test_more_than_2_to_the_31_queries():
    """delta's row numbers are int64 before they are multiplied by the rows of a program."""
    rows = 2**31 + 32
    out, grad, ends, delta = (fits_in(torch.full((32,), value), rows // 32, torch.float16) for value in (2, 3, 1, 0))
    with only_program(2**26):
        k10_back._delta_kernel[(1,)](out, grad, ends, delta, rows, D=1, BLOCK_D=16, ROWS=32)
    assert (delta[-1] == 5).all()


def test_more_heads_than_the_second_axis_of_a_grid_holds():
    """CUDA's grid has 2^31 - 1 programs along its first axis, and 65,535 along the others."""
    tensors = [torch.zeros(65_536, 1, 1, 16, requires_grad=True) for _ in range(3)]
    grids: list[tuple[int, ...]] = []

    def no_program(original, executor, *args, **named):
        grids.append(tuple(executor.grid))

    with interpreter._wrapped(interpreter.triton.runtime.interpreter.GridExecutor, __call__=no_program):
        kernels.flash_attention(*tensors)[0].sum().backward()
    assert len(grids) == 4 and all(not any(size > 65_535 for size in grid[1:]) for grid in grids), grids


@pytest.mark.parametrize("match, named", [
    ("q_BHTD has shape [2, 3, 4]", {"q_BHTD": torch.ones(2, 3, 4)}),
    ("q_BHTD has shape []", {"q_BHTD": torch.ones(())}),
    ("k_BJUD has shape [1, 2, 3, 5], but [B, J, U, D] here is [1, any, any, 4]", {"k_BJUD": torch.ones(1, 2, 3, 5)}),
    ("v_BJUD has shape [1, 2, 4, 4], but the shape of k here is [1, 2, 3, 4]", {"v_BJUD": torch.ones(1, 2, 4, 4)}),
    ("3 query heads cannot share 2 key heads", {"q_BHTD": torch.ones(1, 3, 3, 4)}),
    ("2 query heads cannot share 0 key heads", dict.fromkeys(("k_BJUD", "v_BJUD"), torch.ones(1, 0, 3, 4))),
    ("A head size of 257", dict.fromkeys(("q_BHTD", "k_BJUD", "v_BJUD"), torch.ones(1, 2, 3, 257))),
    ("A head size of 0", dict.fromkeys(("q_BHTD", "k_BJUD", "v_BJUD"), torch.ones(1, 2, 3, 0))),
    ("q, k and v are torch.float32, torch.float16 and torch.float32", {"k_BJUD": torch.ones(1, 2, 3, 4).half()}),
    ("q_BHTD has dtype int64", {"q_BHTD": torch.ones(1, 2, 3, 4).long()}),
    ("k_BJUD on meta", {"k_BJUD": torch.ones(1, 2, 3, 4, device="meta")}),
    ("scale is inf", {"scale": float("inf")}),
    ("The kernel does not take q_BHTD in float64",
     dict.fromkeys(("q_BHTD", "k_BJUD", "v_BJUD"), torch.ones(1, 2, 3, 4).double()) | {"impl": "triton"}),
])
def test_bad_input_is_named_before_a_launch(match, named):
    """A sentence with what was passed, and nothing launched."""
    good = dict.fromkeys(("q_BHTD", "k_BJUD", "v_BJUD"), torch.ones(1, 2, 3, 4))
    with count_traffic() as traffic:
        gate.expect_error(match, lambda: kernels.flash_attention(**good | named))
    assert not traffic.launches


def test_opcheck():
    """Schema, fakes, dynamic shapes and autograd registration, as torch itself checks them."""
    with blocks():
        torch.library.opcheck(torch.ops.labkit.flash_attention.default, (
            *(tensor.requires_grad_() for tensor in qkv(2, 1, 5, 5, 16).values()), True, 0.25))


def test_compiled_is_equal():
    """torch.compile takes it without a graph break, with the same bits forward and backward."""
    tensors = [tensor.requires_grad_() for tensor in qkv(2, 1, 7, 7, 16).values()]

    def call(*qkv):
        out, lse = kernels.flash_attention(*qkv)
        return out.square().sum() + lse.sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with blocks():
        ours, plain = compiled(*tensors), call(*tensors)
        assert torch.equal(ours, plain)
        for one, other in zip(torch.autograd.grad(ours, tensors), torch.autograd.grad(plain, tensors), strict=True):
            assert torch.equal(one, other)
