"""What the kernels ask of memory, counted in Triton's interpreter on small tensors, over what their formula says.

    counted_ratios(["rms_norm"])  ->  {"rms_norm": {"fwd": {"counted": 180128, "formula": 180128.0, "ratio": 1.0}, ...}}

Near 1, the floors that are printed for large sizes are those of the kernels as they are. The count runs in a process of
its own, since Triton decides when it is imported whether kernels are interpreted:

    TRITON_INTERPRET=1 python -m labkit.measure.counted_bytes rms_norm cross_entropy
"""

import json
import os
import subprocess
import sys

import torch

from labkit.errors import LabError
from labkit.files import REPOSITORY
from labkit.kernels.interpreter import count_traffic
from labkit.measure.benchmarks import BACKWARD, BENCHMARKS, FORWARD, Benchmark
from labkit.measure.correctness import arriving, gradients, outputs

SECONDS = 120


def counted_ratios(ops: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """{op: {direction: {counted, formula, ratio}}} from a second process, without ops whose bytes cannot be counted.

    Raises:
        LabError: the process failed, with its last line.
    """
    countable = [op for op in ops if not BENCHMARKS[op].uncounted]
    if not countable:
        return {}
    paths = filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "labkit.measure.counted_bytes", *countable]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        raise LabError(f"Counting bytes took more than {SECONDS} s.", "Name fewer ops, or use --quick.") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LabError(f"Counting bytes failed: {said}", "Run: pytest -m interp tests/kernels, or use --quick.")
    return json.loads(done.stdout.splitlines()[-1])


def count(benchmark: Benchmark) -> dict[str, dict[str, float]]:
    """Bytes of the small sizes in fp32, in this process, which must interpret."""
    inputs = benchmark.make_inputs(torch.device("cpu"), torch.float32, benchmark.small)
    found = {}
    with torch.set_grad_enabled(bool(benchmark.wrt)), count_traffic() as traffic:
        results = outputs(benchmark.call("triton", **inputs))
    found[FORWARD] = traffic.bytes
    if BACKWARD in benchmark.costs:
        leaves, arrives = [inputs[name] for name in benchmark.wrt], arriving(tuple(x.detach() for x in results))
        with count_traffic() as traffic:
            gradients(results, leaves, arrives)
        found[BACKWARD] = traffic.bytes
    formula = {direction: benchmark.cost(direction, benchmark.small, 4).bytes for direction in found}
    return {direction: {"counted": found[direction], "formula": formula[direction],
                        "ratio": found[direction] / formula[direction]} for direction in found}


if __name__ == "__main__":
    print(json.dumps({op: count(BENCHMARKS[op]) for op in sys.argv[1:]}))
