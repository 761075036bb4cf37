"""Gate (b): every kernel of the course as it is launched in training, on meta tensors, which have a size and no memory.

A case is a launch in bf16 at a real size. To add one, write what launches it:

    k1 = importlib.import_module("labkit.kernels.rms_norm")
    CASES["rms_norm forward"] = Case(lambda: k1.launch_forward(bf16(N, D), bf16(D), 1e-6))

and keep what the compiler makes of it (data/results/compile/<triton version>.json):

    python -m tests.kernels.compile_cases
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from labkit.files import write_json
from labkit.kernels.machine_code import SHIPPED, Reading, readings_of

ARCHES = (90, 120)
N, V, S = 8192, 151_936, 8  # tokens, a vocabulary of today, ids a bag


class Case(NamedTuple):
    """A launch, and what its machine code has to show. It may launch several kernels."""

    launch: Callable[[], object]
    memory_bound: bool = True  # a 16-byte load in each kernel
    has_dot: bool = False  # tensor-core instructions in each kernel
    apart: tuple[str, ...] = ()  # kernels that both do not hold for; say why beside the case


def bf16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def fp32(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


CASES: dict[str, Case] = {}

k2 = importlib.import_module("labkit.kernels.cross_entropy")
for name, bag in (("cross_entropy", 1), ("cross_entropy bag", S)):
    CASES[f"{name} forward"] = Case(lambda bag=bag: k2.launch_forward(bf16(N, V), ids(N, bag), fp32(N, bag), 1e-4))
    CASES[f"{name} backward"] = Case(lambda bag=bag: k2.launch_backward(
        fp32(N), fp32(N), bf16(N, V), ids(N, bag), fp32(N, bag), fp32(N), 1e-4, bf16(N, V)))

k3 = importlib.import_module("labkit.kernels.linear_cross_entropy")
CASES["linear_cross_entropy scale"] = Case(lambda: k3.launch_scale(bf16(V, 4096), fp32()))  # the head's gradient

k4 = importlib.import_module("labkit.kernels.token_logprob")
CASES["token_logprob forward"] = Case(lambda: k4.launch_forward(bf16(N, V), ids(N), 0.7, -100))
CASES["token_logprob backward"] = Case(lambda: k4.launch_backward(
    bf16(N, V), ids(N), fp32(N), fp32(N), fp32(N), fp32(N), fp32(N), 0.7, -100))

k6 = importlib.import_module("labkit.kernels.topk_kl")
K, H = 64, 4096  # tokens of a set, width
SET = ("_set_kernel", "_scatter_kernel")  # they take K scattered values of a row: nothing there lies side by side
for mode, direction in (("renorm", "reverse"), ("tail", "forward"), ("none", "reverse")):
    CASES[f"topk_kl {mode} {direction} forward"] = Case(lambda mode=mode, direction=direction: k6.launch_forward(
        bf16(N, V), ids(N, K), fp32(N, K), mode, direction, 1.0, False), apart=SET)  # the lse is K4's case
CASES["topk_kl dense backward"] = Case(lambda: k6.launch_scatter(
    fp32(N), ids(N, K), fp32(N, K), k6.launch_fill(fp32(N), bf16(N, V), fp32(N), fp32(N), 1.0)), apart=SET)

k7 = importlib.import_module("labkit.kernels.sparse_head_topk_kl")
for k in (8, K, 512):
    CASES[f"sparse_head_topk_kl K={k} forward"] = Case(lambda k=k: k7.launch_forward(
        bf16(N, H), bf16(V, H), ids(N, k), fp32(N, k), "reverse", 1.0), apart=SET)
CASES["sparse_head_topk_kl hidden backward"] = Case(lambda: k7.launch_hidden_gradient(
    fp32(N), fp32(N, K), ids(N, K), bf16(V, H), torch.bfloat16))

k1 = importlib.import_module("labkit.kernels.rms_norm")
for width in (256, H, 8192):
    for name, extra in (("rms_norm", None), ("rms_norm residual", bf16(N, width))):
        CASES[f"{name} D={width} forward"] = Case(lambda width=width, extra=extra: k1.launch_forward(
            bf16(N, width), bf16(width), extra, 1e-5))
        CASES[f"{name} D={width} backward"] = Case(lambda width=width, extra=extra: k1.launch_backward(
            bf16(N, width), extra, bf16(N, width), bf16(width), fp32(N)))

qk = importlib.import_module("labkit.kernels.qk_norm")
HEADS, KEY_HEADS, T = 32, 8, 8192
for size in (64, 128):
    CASES[f"qk_norm D={size} forward"] = Case(lambda size=size: qk.launch_forward(
        bf16(N, HEADS, size), bf16(N, KEY_HEADS, size), bf16(size), bf16(size), 1e-5))
    CASES[f"qk_norm D={size} backward"] = Case(lambda size=size: k1.launch_backward(
        bf16(N, HEADS, size), None, bf16(N, HEADS, size), bf16(size), fp32(N * HEADS)))

k10 = importlib.import_module("labkit.kernels.flash_attention")
for size in (64, 96, 128, 256):
    q, k = bf16(1, HEADS, T, size), bf16(1, KEY_HEADS, T, size)
    # _delta_kernel has no product. At 256 the backward's blocks are 32 queries wide, too few for Hopper's 64-row HGMMA:
    # there the queries' gradient is made with HMMA alone.
    apart = ("_delta_kernel", "_query_gradient_kernel") if size == 256 else ("_delta_kernel",)
    CASES[f"flash_attention D={size} forward"] = Case(
        lambda q=q, k=k: k10.launch_forward(q, k, k, True, 0.1), has_dot=True)
    CASES[f"flash_attention D={size} backward"] = Case(lambda q=q, k=k: k10.launch_backward(
        q, fp32(1, HEADS, T), q, k, k, q, fp32(1, HEADS, T), True, 0.1), has_dot=True, apart=apart)

k5 = importlib.import_module("labkit.kernels.holder_kernels")
B, M = 64, 131_072  # sequences and their tokens
for level in ("sequence", "token"):
    for form, bounds, each in (("packed", ids(B + 1), None), ("padded, a p each", None, fp32(B))):
        # launch-bound, and packed sequences begin anywhere, which rules out 16-byte loads
        setting = (torch.empty(M, dtype=torch.bool, device="meta"), fp32(B), bounds, M // B, 0.5, each, -0.2, 0.2,
                   level == "token")
        CASES[f"holder_objective {level} {form} forward"] = Case(lambda setting=setting: k5.launch_forward(
            fp32(M), fp32(M), *setting), memory_bound=False)
        CASES[f"holder_objective {level} {form} backward"] = Case(lambda setting=setting: k5.launch_backward(
            fp32(), fp32(6, B), fp32(M), fp32(M), *setting), memory_bound=False)

k8 = importlib.import_module("labkit.kernels.bag_embedding")
R, D = 4096, 4096  # bags, width
CASES["bag_embedding forward"] = Case(lambda: k8.launch_forward(ids(R, S), bf16(V, D), -100))
CASES["bag_embedding backward"] = Case(lambda: k8.launch_backward(bf16(R, D), ids(R, S), V, -100))

# 16 heads at 131,072 positions, p = 4, L = 3: 40,960 pooled entries, of all 12,288 chosen
TOKENS, POOLED, CHOSEN = (1, 131_072, 16, 128), (1, 40_960, 16, 128), (1, 16, 12_288, 128)
k9 = importlib.import_module("labkit.kernels.lighthouse_pool_kernels")
base, coarse, rows = (bf16(*shape) for shape in (TOKENS, POOLED, CHOSEN))
CASES["pyramid_pool forward"] = Case(lambda: k9.launch_forward(base, base, base, 4, 3))
CASES["pyramid_pool p=2 L=5 forward"] = Case(lambda: k9.launch_forward(base, base, base, 2, 5))
CASES["pyramid_pool backward"] = Case(lambda: k9.launch_backward((coarse,) * 3, TOKENS[1], 4, 3))
gather = importlib.import_module("labkit.kernels.lighthouse_gather")
inverse = ids(1, 16, TOKENS[1] + POOLED[1])
CASES["gather_select forward"] = Case(lambda: gather.launch_forward(*(base,) * 3, *(coarse,) * 3, ids(*CHOSEN[:3])))
CASES["gather_select backward"] = Case(lambda: gather.launch_backward((rows,) * 3, inverse, TOKENS[1], 16))
CASES["gather_select 4 key heads backward"] = Case(lambda: gather.launch_backward((rows,) * 3, inverse, TOKENS[1], 4))
unselect = importlib.import_module("labkit.kernels.lighthouse_unselect")
CASES["unselect forward"] = Case(lambda: unselect.launch_forward(rows, inverse, TOKENS[1], 4, 3))
CASES["unselect backward"] = Case(lambda: unselect.launch_backward(base, ids(*CHOSEN[:3]), 4, 3))


def kept(readings: list[Reading]) -> list[dict]:
    """What of them is kept: all but the seconds, which differ from run to run."""
    return [{name: value for name, value in reading.as_dict().items() if name != "seconds"} for reading in readings]


def main() -> None:
    """Compile all cases and write the whole file."""
    table = {name: {f"sm_{arch}": kept(readings_of(case.launch, arch)) for arch in ARCHES}
             for name, case in sorted(CASES.items())}
    path = SHIPPED / f"{importlib.metadata.version('triton')}.json"
    write_json(path, table)
    print(f"{len(table)} cases written to {path}")


if __name__ == "__main__":
    main()
