"""Compile a kernel from its text, in a process of its own: for a notebook, which runs kernels in the interpreter.

Triton decides when a kernel is defined whether it is to be interpreted or compiled, and a process that interprets
cannot compile. So the text goes to a second process without TRITON_INTERPRET, and readings and texts come back:

    made = compile_source(source_of(my_kernel), "my_kernel", {"X": "*bf16", "n": "i32"}, {"BLOCK": 1024}, arch=120,
                          divisible=("X", "n"))
    made.reading.registers, made.ptx, made.sass

A kernel that does not compile is a LabError of one sentence, with the compiler's message and the line of the text.
"""

import contextlib
import importlib.util
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from labkit.errors import LabError
from labkit.files import REPOSITORY
from labkit.kernels import machine_code
from labkit.kernels.machine_code import Compiled, Reading

HEADER = "import triton, triton.language as tl\n"
SECONDS = 120  # a variant: a kernel of ours takes 1 s, a sort of 1,024 numbers 26 s
NO_LINE = "Try smaller blocks, fewer stages or more warps."
# `import labkit.kernels` imports torch, which takes 3 s, where a compile takes 0.2 s: a bare package spares that.
BOOT = f"""
import sys, types
sys.modules["labkit.kernels"] = types.ModuleType("labkit.kernels")
sys.modules["labkit.kernels"].__path__ = [{str(Path(__file__).parent)!r}]
from labkit.kernels.compiler_process import child
child()
"""


def compile_source(source: str, kernel: str, signature: dict[str, str], constexprs: dict[str, Any], *, arch: int = 90,
                   num_warps: int = 4, num_stages: int = 3, divisible: tuple[str, ...] = ()) -> Compiled:
    """Compile the kernel of that name in `source`, in a new process (1 to 2 s). See compile_variants."""
    settings = {"num_warps": num_warps, "num_stages": num_stages}
    return compile_variants(source, kernel, signature, [constexprs | settings], arch=arch, divisible=divisible)[0]


def compile_variants(source: str, kernel: str, signature: dict[str, str], variants: list[dict[str, Any]], *,
                     arch: int = 90, divisible: tuple[str, ...] = ()) -> list[Compiled]:
    """Compile one kernel with several settings, in one new process.

    Args:
        source: Python text with the kernel, its @triton.jit and what it calls; `triton` and `tl` are there. From
            functions: source_of(kernel, helper).
        signature: a type for each argument that is not a constexpr: "*bf16", "*fp32", "*i64", "i32", "fp32".
        variants: constexprs and, where they differ from 4 and 3, num_warps and num_stages.
        divisible: arguments that are multiples of 16 (a pointer's address, a length). A launch finds that out from
            the values; without it there are no 16-byte loads.
    Raises:
        LabError: with the compiler's last line and the line of `source`, if it does not compile.
    """
    machine_code.demand_triton()
    task = dict(source=textwrap.dedent(source), kernel=kernel, signature=signature, variants=variants, arch=arch,
                divisible=divisible)
    status, output, log = _in_a_process(task, SECONDS * len(variants))
    if status:
        raise LabError(f"The compiler broke off on {kernel} (status {status}): {_last_line(log)}", NO_LINE)
    answer = json.loads(output.splitlines()[-1])
    if "problem" in answer:
        raise LabError(answer["problem"], answer["fix"])
    return [Compiled(Reading(**each["reading"]), each["ptx"], each["sass"]) for each in answer["compiled"]]


def source_of(*kernels: Any) -> str:
    """The text of kernels and functions, one after the other, whether they are to be interpreted or compiled."""
    return "\n\n".join(textwrap.dedent(inspect.getsource(getattr(kernel, "fn", kernel))) for kernel in kernels)


def _in_a_process(task: dict[str, Any], seconds: float) -> tuple[int, str, str]:
    """Run `child` on `task` in a process that does not interpret and leaves no files: status, stdout, stderr."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="labkit-compile-") as folder:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        # in a process group of its own, so that an assembler that does not end can be ended with it
        child = subprocess.Popen([sys.executable, "-P", "-c", BOOT], **pipes, text=True, process_group=0,
                                 env=environment | {"TMPDIR": folder})
        try:
            output, log = child.communicate(json.dumps(task), timeout=seconds)
        except BaseException as error:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise LabError(f"{task['kernel']} was not compiled within {seconds} seconds.", NO_LINE) from None
            raise
    return child.returncode, output, log


def child() -> None:
    """Read a task from stdin, compile, and print the answer as the last line of stdout."""
    task = json.load(sys.stdin)
    path = Path(tempfile.gettempdir()) / "kernel_source.py"
    path.write_text(HEADER + task["source"], encoding="utf-8")  # a file, since the JIT reads a function's text
    try:
        answer = {"compiled": _compile_task(task, path)}
    except LabError as error:
        answer = {"problem": error.problem, "fix": error.fix}
    print("\n" + json.dumps(answer))


def _compile_task(task: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    spec = importlib.util.spec_from_file_location("kernel_source", path)
    module = importlib.util.module_from_spec(spec)
    with _explained(task, {}):
        spec.loader.exec_module(module)
    kernel = getattr(module, task["kernel"], None)
    if not hasattr(kernel, "arg_names"):
        raise LabError(f"The source has no kernel named {task['kernel']}.", "Give its name, and keep its @triton.jit.")
    done = []
    for variant in task["variants"]:
        with _explained(task, variant):
            compiled = _compile_variant(kernel, task, variant)
        done.append(compiled._asdict() | {"reading": compiled.reading.as_dict()})
    return done


def _compile_variant(kernel: Any, task: dict[str, Any], variant: dict[str, Any]) -> Compiled:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    options = {name: variant.get(name, default) for name, default in (("num_warps", 4), ("num_stages", 3))}
    constexprs = {name: value for name, value in variant.items() if name not in options}
    signature = task["signature"] | dict.fromkeys(constexprs, "constexpr")
    if sorted(signature) != sorted(kernel.arg_names):
        raise LabError(f"Types were given for {', '.join(signature)}, but {task['kernel']} takes "
                       f"{', '.join(kernel.arg_names)}.", "Give each argument a type, or a value as a constexpr.")
    divisible = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in task["divisible"]}
    source = ASTSource(fn=kernel, signature={name: signature[name] for name in kernel.arg_names},
                       constexprs=constexprs, attrs=divisible)
    start = machine_code.processor_seconds()
    with machine_code.fresh_compile() as log:
        compiled = triton_compile(source, target=GPUTarget("cuda", task["arch"], 32), options=options)
    return machine_code.compiled_from(compiled, log.getvalue(), machine_code.processor_seconds() - start)


@contextlib.contextmanager
def _explained(task: dict[str, Any], variant: dict[str, Any]) -> Iterator[None]:
    """Turn whatever the compiler raises into one sentence: its last line, and the line of the source."""
    try:
        yield
    except LabError:
        raise
    except Exception as error:
        using = ", ".join(f"{name}={value}" for name, value in variant.items())
        problem = f"{task['kernel']} does not compile for sm_{task['arch']}" + (f" with {using}" if using else "")
        line, message = _where(error, task["source"])
        if line is None:
            raise LabError(f"{problem}: {message}", NO_LINE) from error
        text = task["source"].splitlines()[line - 1].strip()
        raise LabError(f"{problem}: line {line}: {message}", f"Look at that line: {text}") from error


def _where(error: BaseException, source: str) -> tuple[int | None, str]:
    """Line of `source` and the compiler's last word; a call inside a call is a chain of errors, outermost first."""
    if isinstance(error, SyntaxError):
        return error.lineno - HEADER.count("\n"), error.msg
    frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if "kernel_source" in frame.filename]
    line = frames[-1] - HEADER.count("\n") if frames else None
    while True:
        function, node = getattr(error, "src", None), getattr(error, "node", None)
        if function and function in source and hasattr(node, "lineno"):
            line = source.count("\n", 0, source.index(function)) + node.lineno
        if error.__cause__ is None:
            return line, _last_line(getattr(error, "error_message", None) or str(error))
        error = error.__cause__


def _last_line(text: str) -> str:
    """The first line that names an error (the assembler sums up after it), or else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    errors = [line for line in lines if re.search(r"\berror *:|\bfatal *:", line, re.IGNORECASE)]
    return (errors or lines)[0 if errors else -1]
