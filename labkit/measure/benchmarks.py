"""The catalogue of benchmarks: of each public kernel its sizes, inputs, call, cost, and the target it is held to.

Sizes are those of a model with a vocabulary of 152k and width 4096, in bf16; `small` ones fit a CPU and the
interpreter, and are for tests and for counting bytes. `call` takes what `inputs` makes, by name, and gives what is
differentiated; labkit's own takes `impl` as well, so that the same line is kernel and reference.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from labkit import kernels
from labkit.kernels.cost import Cost
from labkit.measure import bench_inputs as draw
from labkit.measure import bench_lighthouse as long
from labkit.measure.targets import Target

FORWARD, BACKWARD, BOTH = "fwd", "bwd", "fwd+bwd"
N, V, H, K = 8192, 151_936, 4096, 64


@dataclass(frozen=True)
class Benchmark:
    """One op: see the file's docstring."""

    op: str
    sizes: dict[str, int]
    small: dict[str, int]
    inputs: Callable[..., dict[str, Tensor]]  # (generator, dtype, **sizes)
    call: Callable[..., Any]  # (impl, **inputs) -> a tensor or a tuple of tensors
    costs: dict[str, Callable[..., Cost]]  # direction -> (element, **sizes)
    wrt: tuple[str, ...] = ()
    rows: dict[str, int] = field(default_factory=dict)  # inputs that belong to a row of the result, and in which dim
    check_rows: int | None = 64  # rows whose result is compared; None compares the whole
    tolerance: float = 4e-3  # norm of the error over norm of the result, in bf16
    targets: tuple[Target, ...] = ()
    cases: tuple[str, ...] = ()  # names in tests/kernels/compile_cases, which end in "forward" or "backward"
    as_called: bool = False  # so small that the launches decide: timed as a program sees it
    uncounted: str = ""  # why the interpreter cannot count its bytes
    count_notes: dict[str, str] = field(default_factory=dict)  # direction -> why the count is not the formula

    @property
    def directions(self) -> tuple[str, ...]:
        """Those that are timed."""
        return tuple(d for d in (FORWARD, BOTH) if d in self.costs or (d == BOTH and BACKWARD in self.costs))

    def cost(self, direction: str, sizes: dict[str, int], element: int) -> Cost:
        """Bytes and FLOPs of a direction; forward and backward together where no own formula is given."""
        if direction == BOTH and BOTH not in self.costs:
            return self.cost(FORWARD, sizes, element).plus(self.cost(BACKWARD, sizes, element))
        return self.costs[direction](element, **sizes)

    def make_inputs(self, device: torch.device, dtype: torch.dtype, sizes: dict[str, int], seed: int = 0) -> dict:
        """The inputs by name; those that get a gradient require one."""
        generator = torch.Generator(device).manual_seed(seed)
        inputs = self.inputs(generator, dtype, **sizes)
        return {name: tensor.requires_grad_(name in self.wrt) for name, tensor in inputs.items()}


def _module(name: str) -> Any:
    return importlib.import_module(f"labkit.kernels.{name}")  # kernels.<name> is the function


def _costs(name: str, forward: Callable[..., dict], backward: Callable[..., dict] | None = None) -> dict:
    """The op's own cost functions, called with what `forward` and `backward` make of the sizes."""
    made = {FORWARD: lambda e, **sizes: _module(name).forward_cost(**forward(**sizes), element=e)}
    if backward:
        made[BACKWARD] = lambda e, **sizes: _module(name).backward_cost(**backward(**sizes), element=e)
    return made


def _same(**sizes: int) -> dict[str, int]:
    return sizes


def _rms_norm(g, dtype, N, D):
    return {"x": draw.normal(g, N, D, dtype=dtype), "weight_D": 1 + draw.normal(g, D, dtype=dtype, scale=0.1)}


def _qk_norm(g, dtype, N, Hq, Hk, D):
    return {"q_NHD": draw.normal(g, N, Hq, D, dtype=dtype), "k_NHD": draw.normal(g, N, Hk, D, dtype=dtype),
            "weight_q_D": 1 + draw.normal(g, D, dtype=dtype, scale=0.1),
            "weight_k_D": 1 + draw.normal(g, D, dtype=dtype, scale=0.1)}


def _logits(second: str):
    return lambda g, dtype, N, V: dict(zip(("logits_NV", second), draw.training_logits(g, N, V, dtype), strict=True))


def _head(last: str):
    return lambda g, dtype, N, V, H: dict(zip(("hidden_NH", "weight_VH", last),
                                              draw.hidden_and_head(g, N, V, H, dtype), strict=True))


def _holder(g, dtype, B, T):
    """Padded answers of T/4 to T tokens; log-probabilities in fp32, as scoring gives them."""
    old_BT = -draw.normal(g, B, T).abs()
    length_B = torch.randint(T // 4, T + 1, (B,), generator=g, device=g.device)
    return {"logp": old_BT + draw.log_ratios(g, B, T), "old_logp": old_BT, "advantage_B": draw.normal(g, B),
            "mask": torch.arange(T, device=g.device) < length_B[:, None]}


def _topk(g, dtype, N, V, K):
    logits_NV = draw.training_logits(g, N, V, dtype)[0]
    ids_NK, logp_NK = draw.teacher_sets(g, list(logits_NV.split(draw.CHUNK)), K)
    return {"student_logits_NV": logits_NV, "teacher_ids_NK": ids_NK, "teacher_logp_NK": logp_NK}


def _sparse_head(g, dtype, N, V, H, K):
    hidden_NH, weight_VH, _ = draw.hidden_and_head(g, N, V, H, dtype)
    chunks = [lambda rows=rows: rows @ weight_VH.T for rows in hidden_NH.split(draw.CHUNK)]
    ids_NK, logp_NK = draw.teacher_sets(g, chunks, K)
    return {"hidden_NH": hidden_NH, "weight_VH": weight_VH, "teacher_ids_NK": ids_NK, "teacher_logp_NK": logp_NK}


def _bags(g, dtype, R, S, D, V):
    return {"ids": draw.zipf_ids(g, V, R, S), "weight_VD": draw.normal(g, V, D, dtype=dtype)}


def _attention(g, dtype, B, H, T, D):
    return {name: draw.normal(g, B, H, T, D, dtype=dtype) for name in ("q_BHTD", "k_BJUD", "v_BJUD")}


def _both_ways(case: str) -> tuple[str, str]:
    return f"{case} forward", f"{case} backward"


def _scoring_cost(e: int, N: int, V: int, H: int) -> Cost:
    """The product (head once for each 2,048 rows, logits out) and K4's pass over the logits."""
    product = Cost(N * H * e + -(-N // 2048) * V * H * e, N * V * e, 2.0 * N * V * H)
    return product.plus(_module("token_logprob").forward_cost(N, V, element=e))


def _lce_cost(e: int, N: int, V: int, H: int) -> Cost:
    chunk = min(N, 2560)
    return _module("linear_cross_entropy").forward_backward_cost(N, V, H, chunk, element=e)


def _attention_sizes(B: int, H: int, T: int, D: int) -> dict[str, int]:
    return {"B": B, "H": H, "J": H, "T": T, "U": T, "D": D}


WALKS = ("the formula counts each tensor once; a walk reads keys and values again for every block of queries, mostly "
         "from the cache")
SUMS = ("the head's gradient, 4 V H summed in fp32 and 2 V H returned, is already 6 H / 14 N of what eager holds, a "
        "fifth at this size; the share falls as N grows")
PRODUCTS = "its products are torch's own, which the interpreter does not see"
HEAD = {"N": N, "V": V, "H": H}
SMALL_HEAD = {"N": 32, "V": 1003, "H": 64}

BENCHMARKS = {benchmark.op: benchmark for benchmark in (
    Benchmark("rms_norm", {"N": N, "D": 4096}, {"N": 37, "D": 300}, _rms_norm,
              lambda impl, x, weight_D: kernels.rms_norm(x, weight_D, impl=impl), _costs("rms_norm", _same, _same),
              ("x", "weight_D"), {"x": 0}, targets=(Target("floor", 0.85, FORWARD), Target("floor", 0.85, BOTH)),
              cases=_both_ways("rms_norm D=4096")),
    Benchmark("qk_norm", {"N": N, "Hq": 32, "Hk": 8, "D": 128}, {"N": 20, "Hq": 4, "Hk": 2, "D": 64}, _qk_norm,
              lambda impl, q_NHD, k_NHD, weight_q_D, weight_k_D: kernels.qk_norm(
                  q_NHD, k_NHD, weight_q_D, weight_k_D, impl=impl),
              _costs("qk_norm", _same, _same), ("q_NHD", "k_NHD", "weight_q_D", "weight_k_D"),
              {"q_NHD": 0, "k_NHD": 0}, targets=(Target("floor", 0.85, FORWARD),), cases=_both_ways("qk_norm D=128")),
    Benchmark("cross_entropy", {"N": N, "V": V}, {"N": 12, "V": 5003}, _logits("target"),
              lambda impl, logits_NV, target: kernels.cross_entropy(logits_NV, target, impl=impl)[0],
              _costs("cross_entropy", _same, _same), ("logits_NV",), {"logits_NV": 0, "target": 0},
              targets=(Target("floor", 0.85, FORWARD), Target("floor", 0.85, BOTH)),
              cases=_both_ways("cross_entropy")),
    Benchmark("linear_cross_entropy", HEAD, SMALL_HEAD, _head("target"),
              lambda impl, hidden_NH, weight_VH, target: kernels.linear_cross_entropy(
                  hidden_NH, weight_VH, target, impl=impl), {BOTH: _lce_cost}, ("hidden_NH", "weight_VH"),
              {"hidden_NH": 0, "target": 0}, uncounted=PRODUCTS,
              targets=(Target("floor", 0.80, BOTH), Target("memory", 0.15, BOTH, "eager", why=SUMS)),
              cases=_both_ways("cross_entropy")),
    Benchmark("token_logprob", {"N": N, "V": V}, {"N": 12, "V": 5003}, _logits("ids_N"),
              lambda impl, logits_NV, ids_N: kernels.token_logprob(logits_NV, ids_N, impl=impl)[0],
              _costs("token_logprob", _same, _same), ("logits_NV",), {"logits_NV": 0, "ids_N": 0},
              targets=(Target("floor", 0.90, FORWARD),), cases=_both_ways("token_logprob")),
    Benchmark("linear_token_logprob", HEAD, SMALL_HEAD, _head("ids_N"),
              lambda impl, hidden_NH, weight_VH, ids_N: kernels.linear_token_logprob(
                  hidden_NH, weight_VH, ids_N, impl=impl)[0], {FORWARD: _scoring_cost}, (),
              {"hidden_NH": 0, "ids_N": 0}, uncounted=PRODUCTS, targets=(Target("floor", 0.80, FORWARD),),
              tolerance=1e-2,  # its logits are rounded to bf16
              cases=("token_logprob forward",)),
    Benchmark("holder_objective", {"B": 256, "T": 1024}, {"B": 8, "T": 300}, _holder,
              lambda impl, logp, old_logp, advantage_B, mask: kernels.holder_objective(
                  logp, old_logp, advantage_B, None, 0.5, mask=mask, impl=impl)[0],
              {FORWARD: lambda e, B, T: _module("holder_objective").forward_cost(B * T, B, element=4, mask=True),
               BACKWARD: lambda e, B, T: _module("holder_objective").backward_cost(B * T, B, element=4, mask=True)},
              ("logp",), check_rows=None, as_called=True,
              targets=(Target("ratio", 5.0, BOTH, "official form"), Target("milliseconds", 0.010, FORWARD)),
              cases=_both_ways("holder_objective sequence padded, a p each")),
    Benchmark("topk_kl", {"N": N, "V": V, "K": K}, {"N": 8, "V": 5003, "K": 16}, _topk,
              lambda impl, **x: kernels.topk_kl(**x, mass=False, impl=impl)[0],
              _costs("topk_kl", lambda **sizes: sizes | {"mass": False}, _same), ("student_logits_NV",),
              {"student_logits_NV": 0, "teacher_ids_NK": 0, "teacher_logp_NK": 0},
              targets=(Target("ratio", 1 / 1.2, BOTH, "zero fill"),),
              cases=("topk_kl renorm reverse forward", "topk_kl dense backward"),
              count_notes={BACKWARD: "the fill with zeros is torch's, which the interpreter does not see"}),
    Benchmark("topk_kl_gradient", {"N": N, "V": V, "K": K}, {"N": 8, "V": 5003, "K": 16}, _topk,
              lambda impl, **x: kernels.topk_kl_gradient(**x, impl=impl)[1],
              {FORWARD: lambda e, **sizes: _module("topk_kl").forward_cost(**sizes, mass=False, element=e)}, (),
              {"student_logits_NV": 0, "teacher_ids_NK": 0, "teacher_logp_NK": 0},
              targets=(Target("milliseconds", 0.020, FORWARD),), cases=("topk_kl renorm reverse forward",)),
    Benchmark("sparse_head_topk_kl", {**HEAD, "K": K}, {"N": 24, "V": 503, "H": 96, "K": 16}, _sparse_head,
              lambda impl, **x: kernels.sparse_head_topk_kl(**x, impl=impl),
              _costs("sparse_head_topk_kl", _same, _same), ("hidden_NH", "weight_VH"),
              {"hidden_NH": 0, "teacher_ids_NK": 0, "teacher_logp_NK": 0},
              targets=(Target("ratio", 5.0, BOTH, "dense head + topk_kl"), Target("floor", 0.6, BOTH)),
              cases=("sparse_head_topk_kl K=64 forward", "sparse_head_topk_kl hidden backward",
                     "bag_embedding backward")),
    Benchmark("bag_embedding", {"R": 4096, "S": 8, "D": 4096, "V": V}, {"R": 40, "S": 6, "D": 130, "V": 101}, _bags,
              lambda impl, ids, weight_VD: kernels.bag_embedding(ids, weight_VD, impl=impl),
              _costs("bag_embedding", lambda R, S, D, V: {"R": R, "S": S, "D": D}, _same), ("weight_VD",), {"ids": 0},
              targets=(Target("floor", 0.85, FORWARD), Target("ratio", 2.0, BOTH, "F.embedding_bag")),
              cases=_both_ways("bag_embedding")),
    Benchmark("flash_attention", {"B": 1, "H": 32, "T": 8192, "D": 128}, {"B": 1, "H": 2, "T": 150, "D": 64},
              _attention, lambda impl, **x: kernels.flash_attention(**x, impl=impl)[0],
              _costs("flash_attention", lambda **s: _attention_sizes(**s), lambda **s: _attention_sizes(**s)),
              ("q_BHTD", "k_BJUD", "v_BJUD"), {"q_BHTD": 1, "k_BJUD": 1, "v_BJUD": 1}, check_rows=2, tolerance=1e-2,
              targets=(Target("ratio", 0.9, FORWARD, "SDPA, flash", arch="sm_120"),
                       Target("ratio", 0.75, FORWARD, "SDPA, cuDNN", arch="sm_90"), Target("floor", 0.55, FORWARD)),
              cases=_both_ways("flash_attention D=128"), count_notes=dict.fromkeys((FORWARD, BACKWARD), WALKS)),
    Benchmark("pyramid_pool", long.SIZES, long.SMALL, long.heads, long.pool,
              _costs("lighthouse_pool", long.POOL_COST, long.POOL_COST), ("q_BTHK", "k_BTHK", "v_BTHK"),
              check_rows=None, cases=_both_ways("pyramid_pool"),
              targets=(Target("floor", 0.85, FORWARD), Target("ratio", 2.0, BOTH, "level after level"))),
    Benchmark("gather_select", long.SIZES, long.SMALL, long.chosen, long.gather,
              _costs("lighthouse_gather", long.GATHER_COST, long.GATHER_BACKWARD_COST),
              ("q_BTHK", "k_BTHK", "v_BTHK", "q_BMHK", "k_BMHK", "v_BMHK"),
              check_rows=None, cases=_both_ways("gather_select"),
              targets=(Target("floor", 0.7, FORWARD), Target("ratio", 2.0, BOTH, "cat and three gathers"))),
    Benchmark("unselect", long.SIZES, long.SMALL, long.attended, long.unselect,
              _costs("lighthouse_unselect", long.UNSELECT_COST, long.UNSELECT_COST), ("out_BHSK",),
              check_rows=None, cases=_both_ways("unselect"),
              targets=(Target("floor", 0.7, FORWARD), Target("ratio", 2.0, BOTH, "zeros and scatter_add"))),
)}
