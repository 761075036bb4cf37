"""Gate (c), as functions of a device: what has to hold on a GPU, and can be tried on a CPU in the interpreter.

    TRITON_INTERPRET=1 PYTHONPATH=. python tests/kernels/gpu_cases.py

Inputs come from the catalogue of benchmarks, so a kernel that is benchmarked is also tested. Sizes here are odd: not a
multiple of a block, and large enough for many programs; a dry run uses the catalogue's small ones.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from labkit import kernels
from labkit.measure.benchmarks import BENCHMARKS, Benchmark
from labkit.measure.correctness import arriving, gradients, largest_error, outputs, relative_error
from labkit.measure.launches import peak_bytes
from labkit.models import GPT, GPTConfig
from labkit.trainers.loop import TrainSettings
from labkit.trainers.pretrain import pretrain

SIZES = {
    "rms_norm": {"N": 1031, "D": 4095}, "qk_norm": {"N": 517, "Hq": 8, "Hk": 2, "D": 128},
    "cross_entropy": {"N": 257, "V": 50_257}, "linear_cross_entropy": {"N": 301, "V": 5003, "H": 512},
    "token_logprob": {"N": 257, "V": 50_257}, "linear_token_logprob": {"N": 301, "V": 5003, "H": 512},
    "holder_objective": {"B": 33, "T": 1500}, "topk_kl": {"N": 129, "V": 50_257, "K": 50},
    "topk_kl_gradient": {"N": 129, "V": 50_257, "K": 50},
    "sparse_head_topk_kl": {"N": 129, "V": 5003, "H": 1000, "K": 50},
    "bag_embedding": {"R": 301, "S": 7, "D": 1000, "V": 5003}, "flash_attention": {"B": 2, "H": 3, "T": 517, "D": 96},
    **{op: {"B": 2, "T": 4099, "H": 6, "J": 2, "K": 96, "budget": 128}
       for op in ("pyramid_pool", "gather_select", "unselect")},
}
PAST_INT32 = {"N": 14_208, "V": 151_936}  # 2^31 elements and 11 million more
# Their docstrings promise equal bits in two runs. The others use torch's own products or atomics, which do not.
REPEATABLE = ("rms_norm", "qk_norm", "cross_entropy", "token_logprob", "topk_kl", "sparse_head_topk_kl",
              "bag_embedding", "flash_attention", "holder_objective", "pyramid_pool", "gather_select", "unselect")
CHUNK, HEAD_SIZES = 2560, {"N": 16_384, "V": 32_000, "H": 1024}  # of the memory test; eager takes about 7 GB


def inputs_of(op: str, device: torch.device, sizes: dict[str, int] | None = None,
              dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return BENCHMARKS[op].make_inputs(device, dtype, sizes or SIZES[op])


def error(op: str, inputs: dict[str, Tensor]) -> float:
    """Of results and gradients, all rows, against float64 on the same values."""
    return largest_error(dataclasses.replace(BENCHMARKS[op], check_rows=None), inputs, torch.float64)


def step(op: str, inputs: dict[str, Tensor], call: Callable | None = None,
         arrives: tuple[Tensor, ...] | None = None) -> list[Tensor]:
    """Results and, where there are some, gradients. `arrives` spares drawing random numbers: no graph captures that."""
    benchmark: Benchmark = BENCHMARKS[op]
    call = call or (lambda **x: benchmark.call("auto", **x))
    with torch.set_grad_enabled(bool(benchmark.wrt)):
        results = outputs(call(**inputs))
    if not benchmark.wrt:
        return [*results]
    arrives = arrives or arriving(tuple(each.detach() for each in results))
    leaves = [inputs[name] for name in benchmark.wrt]
    return [*(each.detach() for each in results), *gradients(results, leaves, arrives)]


def repeats(op: str, inputs: dict[str, Tensor]) -> bool:
    """Whether two runs give the same bits."""
    return all(torch.equal(a, b) for a, b in zip(step(op, inputs), step(op, inputs), strict=True))


def compiled_error(op: str, inputs: dict[str, Tensor], backend: str = "inductor") -> float:
    """The op inside torch.compile(fullgraph=True), which refuses a graph break, against the op alone."""
    torch._dynamo.reset()  # all ops go through this one lambda, and Dynamo gives up after eight versions of a function
    call = torch.compile(lambda **x: BENCHMARKS[op].call("auto", **x), fullgraph=True, dynamic=False, backend=backend)
    return max(relative_error(a, b) for a, b in zip(step(op, inputs, call), step(op, inputs), strict=True))


def captured_error(op: str, inputs: dict[str, Tensor]) -> float:
    """A CUDA graph of the op, replayed on other values than it was captured with, against the op alone."""
    benchmark, side = BENCHMARKS[op], torch.cuda.Stream()
    with torch.no_grad():
        arrives = arriving(outputs(benchmark.call("auto", **inputs)))
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(op, inputs, arrives=arrives)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        found = step(op, inputs, arrives=arrives)
    fresh = benchmark.make_inputs(found[0].device, torch.bfloat16, SIZES[op], seed=1)
    with torch.no_grad():
        for name, tensor in inputs.items():
            tensor.copy_(fresh[name])
    graph.replay()
    return max(relative_error(a, b) for a, b in zip(found, step(op, fresh, arrives=arrives), strict=True))


def head_peaks(device: torch.device) -> tuple[int, int]:
    """Peak bytes of linear_cross_entropy and of eager torch, forward and backward."""
    inputs = inputs_of("linear_cross_entropy", device, HEAD_SIZES)
    leaves = [inputs["hidden_NH"], inputs["weight_VH"]]

    def eager() -> object:
        logits_NV = inputs["hidden_NH"] @ inputs["weight_VH"].T
        return torch.autograd.grad(torch.nn.functional.cross_entropy(logits_NV.float(), inputs["target"]), leaves)

    def ours() -> object:
        return torch.autograd.grad(kernels.linear_cross_entropy(**inputs, chunk=CHUNK), leaves)

    peaks = []
    for call in (ours, eager):
        call()
        peaks.append(peak_bytes(call, device))
    return peaks[0], peaks[1]


@contextlib.contextmanager
def references_only() -> Iterator[None]:
    """Inside, models and objectives compute as where there is no Triton."""
    with mock.patch("labkit.kernels.dispatch.can_launch", lambda tensor: (False, "a test asked for the reference")):
        yield


def training_curve(device: torch.device, steps: int = 30) -> list[float]:
    """Losses of a tiny decoder with QK-norm on a text with a pattern, in fp32."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=97, context=32, width=64, layers=2, heads=4, qk_norm=True)).to(device)
    tokens_M = torch.arange(5000) ** 2 % 97
    settings = TrainSettings(steps=steps, learning_rate=1e-3, batch=8, context=32, warmup=min(5, steps))
    return pretrain(model, tokens_M, settings).train["loss"]


def dry_run() -> None:
    """What of this can run on a CPU in the interpreter, at the catalogue's small sizes in fp32."""
    device = torch.device("cpu")
    for op, benchmark in BENCHMARKS.items():
        inputs = inputs_of(op, device, benchmark.small, torch.float32)
        print(f"{op}: error {error(op, inputs):.1e}, repeats {repeats(op, inputs)}, "
              f"compiled error {compiled_error(op, inputs, 'aot_eager'):.1e}")
    kernel = training_curve(device, 2)
    with references_only():
        reference = training_curve(device, 2)
    print("training", kernel, reference)


if __name__ == "__main__":
    dry_run()
