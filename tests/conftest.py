"""For every test: one thread, no settings of the learner's shell, and property tests that draw the same examples."""

import contextlib
import os

for name in [name for name in os.environ if name.startswith("LABKIT_")]:
    del os.environ[name]  # a scale or results folder that someone exported must not change what the tests check
os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported

import torch  # noqa: E402

torch.set_num_threads(1)

with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("lab", deadline=None, derandomize=True)  # a busy machine must not fail a slow example
    settings.load_profile("lab")
