"""K4, gate (a): log-probability, entropy and log-sum-exp of the interpreted kernels against float64 and torch."""

import importlib

import gate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_rows import VIEWS, rows
from torch import Tensor
from torch.library import opcheck

from labkit import kernels
from labkit.kernels.configs import forced
from labkit.kernels.interpreter import count_traffic, guard_bounds, overflow_checks

pytestmark = pytest.mark.interp

k4 = importlib.import_module("labkit.kernels.token_logprob")
INF = float("inf")
FLOATS = [torch.float32, torch.float16]


def ids(N: int, V: int, seed: int = 1) -> Tensor:
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))


def check(logits_NV: Tensor, ids_N: Tensor, wrt=("logits_NV",), options: dict | None = None,
          **named) -> dict[str, Tensor]:
    """The whole gate in blocks of 64: out0 logp, out1 entropy, out2 lse, upstream gradients at all three."""
    with forced("token_logprob", BLOCK_V=64):
        return gate.check(kernels.token_logprob, {"logits_NV": logits_NV, "ids_N": ids_N}, options, wrt, **named)


# ---- shapes and layouts


@pytest.mark.parametrize("dtype", FLOATS, ids=["fp32", "fp16"])
@pytest.mark.parametrize("N, V", [(1, 2), (1, 127), (7, 31), (3, 64), (3, 65), (2, 257)])
def test_odd_shapes(N, V, dtype):
    """Primes, one past a power of two, one row: one to five blocks of 64 give what float64 gives."""
    check(rows(N, V), ids(N, V), dtype=dtype)


def test_a_vocabulary_of_one():
    """The only token has probability 1: logp and entropy are 0 exactly, and only lse has a gradient."""
    result = check(rows(2, 1), torch.zeros(2, dtype=torch.int64))
    assert (result["out0"] == 0).all() and (result["out1"] == 0).all()


def test_no_rows():
    """An empty batch has empty results and an empty gradient."""
    check(rows(0, 7), ids(0, 7))
    assert [x.shape for x in kernels.linear_token_logprob(rows(0, 5), rows(7, 5), ids(0, 7))] == [(0,)] * 3


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_the_logits(view):
    """Strides of the logits and of the ids change nothing."""
    check(VIEWS[view](), ids(4, 75)[::2])


@pytest.mark.parametrize("used", [0, 1, 2], ids=["logp", "entropy", "lse"])
def test_each_gradient_alone(used):
    """Only one of the three outputs is used, through a sum: its gradient arrives expanded, the others as zeros."""
    ours_NV, exact_NV = rows(2, 70).requires_grad_(), rows(2, 70).double().requires_grad_()
    for logits_NV, impl in ((ours_NV, "triton"), (exact_NV, "reference")):
        kernels.token_logprob(logits_NV, ids(2, 70), temperature=0.7, impl=impl)[used].sum().backward()
    gate.close(ours_NV.grad, exact_NV.grad)


def test_int32_ids():
    """int32 ids are taken as they are."""
    check(rows(3, 70), ids(3, 70).int())


# ---- against torch


def by_torch(logits_NV, ids_N, temperature=1.0):
    """torch.distributions.Categorical."""
    x_NV = logits_NV / temperature
    of = torch.distributions.Categorical(logits=x_NV)
    return of.log_prob(ids_N), of.entropy(), x_NV.logsumexp(1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_equals_torch_distributions(temperature):
    """Categorical(logits / temperature) in float64: log_prob, entropy and their gradients."""
    check(rows(3, 70), ids(3, 70), options={"temperature": temperature}, exact=by_torch)


@pytest.mark.parametrize("chunk", [1, 3, 5, 2048])
def test_from_hidden_states(chunk):
    """linear_token_logprob is token_logprob of the product, for any chunk: one row, a last one that is shorter, all."""
    hidden_NH, weight_VH, ids_N = rows(5, 8), rows(70, 8).requires_grad_(), ids(5, 70)
    ids_N[3] = -100
    ours = kernels.linear_token_logprob(hidden_NH, weight_VH, ids_N, temperature=0.7, chunk=chunk)
    exact = kernels.token_logprob((hidden_NH @ weight_VH.T).double(), ids_N, temperature=0.7, impl="reference")
    for column, expected in zip(ours, exact, strict=True):
        assert not column.requires_grad
        gate.close(column, expected)


# ---- hard values


@pytest.mark.parametrize("temperature, factor", [(0.1, 10), (0.01, 100), (1e-4, 1)])
def test_a_small_temperature(temperature, factor):
    """The distribution becomes a point: finite results and gradients, an entropy that goes to 0.

    An lse of 100 or 1000 is known to 4e-6 or 3e-5, and so are the probabilities in the backward.
    """
    result = check(rows(3, 70), ids(3, 70), options={"temperature": temperature},
                   factor={"grad_logits_NV": factor}, scale={"out1": 1.0})
    assert all(x.isfinite().all() for x in result.values())
    assert (result["out1"] >= -1e-6).all() and (temperature > 1e-3 or (result["out1"] < 1e-6).all())


def test_forbidden_tokens():
    """-inf entries have probability 0 and add 0 to the entropy, also where they fill the first blocks or are asked."""
    logits_NV = rows(4, 140)
    logits_NV[0, :130] = -INF
    logits_NV[1, 64:] = -INF
    logits_NV[2, 7] = -INF
    logits_NV[3, 1:] = -INF
    result = check(logits_NV, torch.tensor([135, 3, 7, 0]), scale={"out1": 1.0})
    assert result["out0"].isfinite().tolist() == [True, True, False, True] and result["out0"][2] == -INF
    assert result["out0"][3] == result["out1"][3] == 0 and result["grad_logits_NV"].isfinite().all()


@pytest.mark.parametrize("place", [3, 100])
def test_plus_inf(place):
    """A +inf logit: lse is inf, every other token has logp -inf, and the entropy is no number; in its row only."""
    logits_NV = rows(3, 200)
    logits_NV[1, place] = INF
    result = check(logits_NV, torch.tensor([1, 2, 199]), wrt=())
    assert result["out2"][1] == INF and result["out0"][1] == -INF and result["out1"].isnan().tolist() == [0, 1, 0]


def test_a_row_of_minus_inf():
    """Where every token is forbidden, lse = -inf and the rest is NaN; neighbours are untouched."""
    logits_NV = rows(3, 130)
    logits_NV[1] = -INF
    result = check(logits_NV, torch.tensor([1, 2, 3]), wrt=())
    assert result["out2"][1] == -INF and result["out0"].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("ignore_index", [-100, 5])
def test_masked_tokens(ignore_index):
    """A masked token has three zeros and a zero gradient, whatever stands in its row."""
    logits_NV, ids_N = rows(5, 70), torch.tensor([1, ignore_index, ignore_index, ignore_index, 3])
    logits_NV[1] += 200  # exp of it without its lse would overflow
    check(logits_NV, ids_N, options={"ignore_index": ignore_index})
    logits_NV[1], logits_NV[2, 3], logits_NV[3, 4] = -INF, INF, float("nan")
    logits_NV.requires_grad_()
    out = kernels.token_logprob(logits_NV, ids_N, ignore_index=ignore_index)
    sum(column.sum() for column in out).backward()
    assert all((column[1:4] == 0).all() for column in out) and (logits_NV.grad[1:4] == 0).all()
    assert logits_NV.grad.isfinite().all()


def test_an_offset_of_a_thousand():
    """A common offset costs logp and entropy nothing. The gradient sees an fp32 lse, whose grain there is 6e-5."""
    check(rows(3, 200) + 1000, ids(3, 200), factor={"grad_logits_NV": 30})


def test_blocks_that_fall_and_rise():
    """The maximum moves by 128 from block to block, up and down: both sums follow it."""
    fall_V = torch.linspace(200, -200, 200)
    check(torch.stack([fall_V, -fall_V, fall_V.abs()]), torch.tensor([0, 0, 3]), factor={"grad_logits_NV": 8})


# ---- size, traffic, bad input


def test_rows_beyond_two_to_the_31():
    """Row offsets are int64, in the forward and in the backward."""
    small_NV, ids_N, found = rows(3, 70).half(), ids(3, 70), []
    for logits_NV in (gate.huge_rows(3, 70, torch.float16, 2**30 + 8).copy_(small_NV), small_NV):
        with np.errstate(all="ignore"), guard_bounds(), overflow_checks():
            logp_N, entropy_N, _ = kernels.token_logprob(logits_NV.requires_grad_(), ids_N)
            found.append((logp_N, entropy_N, torch.autograd.grad((logp_N + entropy_N).sum(), logits_NV)[0]))
    assert all(torch.equal(huge, small) for huge, small in zip(*found, strict=True))


@pytest.mark.parametrize("N, V", [(2, 5000), (3, 300)])
def test_traffic(N, V):
    """Each direction requests the bytes of its formula."""
    logits_NV, ids_N = rows(N, V).half(), ids(N, V)
    logp_N, entropy_N, lse_N = k4.launch_forward(logits_NV, ids_N, 1.0, -100)
    gate.check_traffic(lambda: k4.launch_forward(logits_NV, ids_N, 1.0, -100), k4.forward_cost(N, V))
    gate.check_traffic(lambda: k4.launch_backward(logits_NV, ids_N, entropy_N, lse_N, *[logp_N] * 3, 1.0, -100),
                       k4.backward_cost(N, V))


def test_from_hidden_states_one_chunk_of_logits_exists():
    """The largest tensor that is allocated has chunk * V elements."""
    hidden_NH, weight_VH, ids_N = rows(24, 8), rows(70, 8), ids(24, 70)
    with gate.largest_allocation() as largest:
        kernels.linear_token_logprob(hidden_NH, weight_VH, ids_N, chunk=4)
    assert largest() == 4 * 70 * 4


@pytest.mark.parametrize("bad", [-5, 70])
def test_a_bad_id_on_a_gpu_makes_its_row_nan(bad):
    """Where ids are not looked at, one outside [0, V) reads nothing and cannot go unnoticed."""
    with np.errstate(all="ignore"), guard_bounds():
        logp_N, entropy_N, _ = k4.launch_forward(gate.guarded(rows(3, 70)), torch.tensor([1, bad, 4]), 1.0, -100)
    assert logp_N.isnan().tolist() == [False, True, False] and entropy_N.isfinite().all()


BAD = {
    "logits of one dimension": (dict(logits_NV=rows(3, 7)[0]), "Reshape logits_NV"),
    "whole numbers as logits": (dict(logits_NV=torch.ones(3, 7, dtype=torch.int64)), "logits_NV.float()"),
    "float64 in a kernel": (dict(logits_NV=rows(3, 7).double(), impl="triton"), 'impl="reference"'),
    "no vocabulary": (dict(logits_NV=rows(3, 0)), "V of 1 or more"),
    "bags": (dict(ids_N=ids(3, 7)[:, None]), "Reshape ids_N"),
    "a row too few": (dict(ids_N=ids(2, 7)), "Reshape ids_N"),
    "ids that are floats": (dict(ids_N=torch.ones(3)), "ids_N.long()"),
    "an id past the end": (dict(ids_N=torch.tensor([1, 7, 0])), "ids go from 0 to 6, or -100 for none"),
    "two devices": (dict(ids_N=ids(3, 7).to("meta")), "one device with .to(device)"),
    "temperature 0": (dict(temperature=0.0), "Use a small one such as 0.01"),
    "temperature below 0": (dict(temperature=-1.0), "Use a small one such as 0.01"),
    "temperature nan": (dict(temperature=float("nan")), "Give temperature a finite value"),
    "an unknown impl": (dict(impl="cuda"), 'impl="auto", "triton" or "reference"'),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    """Each is refused with a sentence that names the fix, and nothing is launched."""
    given_, fix = BAD[name]
    good = dict(logits_NV=rows(3, 7), ids_N=ids(3, 7))
    with count_traffic() as traffic:
        gate.expect_error(fix, lambda: kernels.token_logprob(**(good | given_)))
    assert not traffic.launches


BAD_LINEAR = {
    "hidden of one dimension": (dict(hidden_NH=rows(3, 5)[0]), "Reshape hidden_NH"),
    "a head of another width": (dict(weight_VH=rows(7, 4)), "Reshape weight_VH"),
    "a row too few": (dict(ids_N=ids(2, 7)), "Reshape ids_N"),
    "two dtypes": (dict(hidden_NH=rows(3, 5).half()), "Give both one dtype"),
    "two devices": (dict(weight_VH=rows(7, 5).to("meta")), "one device with .to(device)"),
    "a chunk of 0": (dict(chunk=0), "Use a chunk of 1 or more"),
}


@pytest.mark.parametrize("name", BAD_LINEAR)
def test_bad_input_from_hidden_states(name):
    """The same for linear_token_logprob."""
    given_, fix = BAD_LINEAR[name]
    good = dict(hidden_NH=rows(3, 5), weight_VH=rows(7, 5), ids_N=ids(3, 7))
    gate.expect_error(fix, lambda: kernels.linear_token_logprob(**(good | given_)))


# ---- torch.library, torch.compile


def test_opcheck():
    """Schema, fake, autograd registration and AOT dispatch agree with what the op does."""
    opcheck(k4._op, (rows(3, 7).requires_grad_(), ids(3, 7), 0.7, -100))


def test_compiled_without_a_graph_break():
    """torch.compile(fullgraph=True) gives the bits of eager mode, results and gradient."""
    def loss_of(x_NV, ids_N):
        logp_N, entropy_N, lse_N = kernels.token_logprob(2 * x_NV, ids_N, temperature=0.7)
        return (logp_N * entropy_N + lse_N).sum()

    x_NV, ids_N = rows(3, 7).requires_grad_(), ids(3, 7)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    ours, plain = (fn(x_NV, ids_N) for fn in (compiled, loss_of))
    assert torch.equal(ours, plain)
    assert torch.equal(*(torch.autograd.grad(loss, x_NV)[0] for loss in (ours, plain)))


# ---- properties

EXAMPLES = settings(max_examples=8)


@EXAMPLES
@given(V=st.integers(1, 24), seed=st.integers(0, 2**16))
def test_probabilities_sum_to_one_and_entropy_is_bounded(V, seed):
    """sum exp(logp) over the vocabulary is 1; entropy lies in [0, log V]; every gradient but that of lse sums to 0."""
    logits_NV = rows(1, V, seed).requires_grad_()
    with forced("token_logprob", BLOCK_V=8):
        logp_V, entropy_V, _ = kernels.token_logprob(logits_NV.expand(V, V), torch.arange(V))
        logp_N, entropy_N, lse_N = kernels.token_logprob(logits_NV, torch.zeros(1, dtype=torch.int64))
    assert abs(logp_V.exp().sum() - 1) < 1e-5
    assert -1e-6 < entropy_V[0] < torch.log(torch.tensor(float(V))) + 1e-6
    for column, total in ((logp_N, 0), (entropy_N, 0), (lse_N, 1)):
        gradient_NV, = torch.autograd.grad(column, logits_NV, retain_graph=True)
        assert abs(gradient_NV.sum() - total) < 2e-6
