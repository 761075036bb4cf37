"""Models, objectives and trainers run on the kernels by default where kernels run, and train as on the references."""

import numpy as np
import pytest
import torch

from labkit.kernels import dispatch
from labkit.kernels.interpreter import count_traffic
from labkit.models import GPT, GPTConfig
from labkit.trainers.loop import TrainSettings
from labkit.trainers.pretrain import pretrain
from labkit.trainers.superposition import Superposition, pretrain_superposed

pytestmark = pytest.mark.interp

CONFIG = GPTConfig(vocab_size=61, context=8, width=24, layers=1, heads=2, kv_heads=1, qk_norm=True)
SETTINGS = TrainSettings(steps=4, learning_rate=3e-3, batch=2, context=8, warmup=1)
TEXT_M = torch.randint(61, (400,), generator=torch.Generator().manual_seed(0))


def pretrain_on_bags(model, text_M, settings):
    return pretrain_superposed(model, text_M, settings, Superposition(2, 0.5))


@pytest.mark.parametrize("train", [pretrain, pretrain_on_bags])
def test_kernels_and_references_give_the_same_training_curve(train, monkeypatch):
    """Loss and gradient norm of every step agree to fp32's rounding, and so do the weights; kernels did run."""
    runs = {}
    for name in ("kernels", "references"):
        if name == "references":
            monkeypatch.setattr(dispatch, "can_launch", lambda tensor: (False, "switched off by this test"))
        model = GPT(CONFIG)
        with np.errstate(all="ignore"), count_traffic() as traffic:
            history = train(model, TEXT_M, SETTINGS).train
        runs[name] = history, [p.detach() for p in model.parameters()]
        assert (traffic.launches > 0) == (name == "kernels")
    for column in ("loss", "gradient_norm"):
        ours, exact = (torch.tensor(run[0][column]) for run in runs.values())
        torch.testing.assert_close(ours, exact, rtol=2e-5, atol=1e-6)
    for ours, exact in zip(runs["kernels"][1], runs["references"][1], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-5)  # AdamW divides small gradients by their own size
