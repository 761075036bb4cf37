"""For every test: one thread, no settings of the learner's shell, and property tests that draw the same examples."""

import contextlib
import os
import re
import signal

for name in [name for name in os.environ if name.startswith("LABKIT_")]:
    del os.environ[name]  # a scale or results folder that someone exported must not change what the tests check
os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported

import pytest  # noqa: E402
import torch  # noqa: E402

# A shell starts background jobs with the interrupt ignored, and children inherit that: tests of Ctrl-C would fail.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)


def pytest_configure(config):
    """`-m interp` and `-m mutations` run kernels in Triton's interpreter, which Triton decides when it is imported."""
    wanted = set(re.findall(r"(?<!\bnot )\b(interp|mutations|compile|gpu)\b", config.option.markexpr or ""))
    if wanted & {"interp", "mutations"}:
        if wanted & {"compile", "gpu"}:
            raise pytest.UsageError("Interpreted and compiled kernels need two processes: run -m interp on its own.")
        os.environ["TRITON_INTERPRET"] = "1"


with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("lab", deadline=None, derandomize=True)  # a busy machine must not fail a slow example
    settings.load_profile("lab")
