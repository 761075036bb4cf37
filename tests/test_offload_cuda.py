"""The offload engine's CUDA path: over a fake of streams and events that detects races, and on a GPU if there is one.

The fake runs everything at once, so values are always right; what it proves is that each wait is there. So every wait
and every `record_stream` is taken out once, and the detector must see it.
"""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import Detector, FakeMachine
from planted import altered
from test_offload import adam, assert_trained, batches, by_hand, cross_entropy, engine_of, stages_of
from torch import nn

from labkit.errors import LabError
from labkit.models import GPT, GPTConfig
from labkit.objectives import next_token_loss
from labkit.pipeline import offload, offload_lanes, offload_machines, offload_pass, offload_peer
from labkit.pipeline.offload import OffloadEngine
from labkit.pipeline.offload_host import HostStage
from labkit.pipeline.offload_lanes import StreamLane
from labkit.pipeline.offload_machines import CudaMachine
from labkit.pipeline.offload_memory import longest_sequence
from labkit.pipeline.offload_peer import RoundPipePeer
from labkit.pipeline.offload_stages import gpt_stages


def faked(count, staleness=0, prefetch=True, steps=3, machine=None):
    """(losses, weights), races."""
    machine = machine or FakeMachine(chunk_bytes=300)
    stages = stages_of(4)
    with Detector(machine.cuda):
        engine = engine_of(stages, device=machine, staleness=staleness, prefetch=prefetch)
        losses = [engine.step(batches(count, seed)) for seed in range(steps)]
        engine.finish()
        report = engine.report
        engine.close()
        trained = losses, [each.detach().clone() for each in nn.ModuleList(stages).parameters()]
    return trained, machine.cuda.races, report


@pytest.mark.parametrize("staleness, prefetch", [(0, True), (1, True), (1, False)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_streams_train_as_threads_do_without_a_race(count, staleness, prefetch):
    trained, races, report = faked(count, staleness, prefetch)
    assert not races, "\n".join(races[:5])
    assert_trained(trained, by_hand(stages_of(4), cross_entropy, [batches(count, seed) for seed in range(3)],
                                    staleness))
    assert report.peak_device_bytes == 250 and report.compute_ms > 0
    kinds = {event.kind for event in report.timeline.events}
    assert kinds == {"F", "FB", "B", "upload", "reupload", "download", "activation up", "activation down", "P-copy",
                     "G-copy", "step"}


FAULTS = [  # owner, method, its module, the old text, the new one, micro-batches, staleness
    (StreamLane, "submit", offload_lanes, "self.stream.wait_event(mark.end)", "pass", 2, 0),
    (StreamLane, "submit", offload_lanes, "            mark.result()\n", "            pass\n", 2, 1),
    (OffloadEngine, "upload", offload, "self.machine.lend(block, self.lanes[COMPUTE])", "pass", 1, 0),
    (OffloadEngine, "upload", offload, "self.p_copied[visit.stage])\n", "[])\n", 1, 0),
    (OffloadEngine, "collect", offload, "[downloaded, *self.updated]", "[*self.updated]", 1, 0),
    (OffloadEngine, "_p_copy", offload, "[*self.uploads[stage], *self.updated]", "[*self.updated]", 1, 1),
    (offload_pass.Pass, "take_gradient", offload_pass, "[mark, *self.engine.g_copied[stage]]",
     "self.engine.g_copied[stage]", 1, 0),
    (offload_pass.Pass, "take_gradient", offload_pass, "[mark, *self.engine.g_copied[stage]]", "[mark]", 1, 1),
    (offload_pass.Pass, "take_gradient", offload_pass, "self.machine.lend(gradient, self.lanes[GRADIENTS])", "pass",
     1, 0),
    (offload_pass.Pass, "take_away", offload_pass, "label, work, [mark])", "label, work, [])", 3, 0),
    (offload_pass.Pass, "take_away", offload_pass, "self.machine.lend(tensor, self.lanes[ACTIVATIONS])", "pass", 3, 0),
    (offload_pass.Pass, "bring", offload_pass, "self.machine.lend(tensor, self.lanes[COMPUTE])", "pass", 3, 0),
    (offload_pass.Pass, "run", offload_pass, "[self.weights[number].mark, *inputs]", "inputs", 1, 0),
    (offload_pass.Pass, "run", offload_pass, "[self.weights[number].mark, *inputs]", "[self.weights[number].mark]",
     3, 0),
]


@pytest.mark.parametrize("owner, name, module, old, new, count, staleness", FAULTS,
                         ids=[f"{fault[1]}: {fault[3].strip()[:40]}" for fault in FAULTS])
def test_every_missing_wait_is_a_race(owner, name, module, old, new, count, staleness, monkeypatch):
    monkeypatch.setattr(owner, name, altered(getattr(owner, name), name, old, new, vars(module)))
    assert faked(count, staleness)[1]


def test_a_cuda_machine_asks_for_what_it_should(monkeypatch):
    """Pinned host memory, asynchronous copies, record_stream, the device's random state: the four calls themselves."""
    asked = []
    machine = FakeMachine()
    empty = lambda shape, dtype, **more: asked.append(more) or torch.zeros(shape, dtype=dtype)  # noqa: E731
    monkeypatch.setattr(offload_machines.torch, "empty", empty)
    CudaMachine.host_empty(machine, (2,), torch.float32)
    machine.device_empty((2,), torch.float32)
    assert asked == [{"pin_memory": True}, {"device": machine.device}]

    class Tensor:
        nbytes = 8

        def copy_(self, source, non_blocking=False):
            asked.append(non_blocking)

        def record_stream(self, stream):
            asked.append(stream)

    machine.copy(Tensor(), Tensor(), "up")
    lane = machine.lane(1)
    CudaMachine.lend(machine, Tensor(), lane)
    assert asked[2:] == [True, lane.stream]
    machine.set_random_state((torch.get_rng_state(), torch.ones(1)))
    assert machine.random_state()[1] == 1


# ---- the peer


class FakeRoundPipe:
    """What labkit uses of the package, for one layer and at once."""

    def __init__(self, model, optim_dtype):
        self.model, self.asked = model, []

    def optim_parameters(self):
        return self.model.parameters()

    def forward_backward(self, input_args, label, loss_fn, run_config):
        inputs, named = run_config["split_input"](input_args, {}, run_config["num_microbatch"])
        labels = run_config["split_label"](label, run_config["num_microbatch"])
        losses = [loss_fn(self.model(*args, **more), target)
                  for args, more, target in zip(inputs, named, labels, strict=True)]
        sum(losses).backward()
        return sum(losses).detach()

    def step(self, step_fn, is_async):
        self.asked.append(is_async)
        step_fn()

    def synchronize(self):
        self.asked.append("synchronize")


def test_the_peer_is_found_or_says_why_not(monkeypatch):
    if not torch.cuda.is_available():
        assert "needs a GPU" in offload_peer.roundpipe_problem()
        with pytest.raises(LabError, match="needs a GPU"):
            RoundPipePeer(stages_of(), cross_entropy, optimizer=adam)
    monkeypatch.setattr(offload_peer.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(offload_peer.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in offload_peer.roundpipe_problem()
    monkeypatch.setattr(offload_peer.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "roundpipe", None)  # its import now fails
    assert "cannot be imported" in offload_peer.roundpipe_problem()


def test_the_peer_is_called_as_its_package_wants_it(monkeypatch):
    package = SimpleNamespace(RoundPipe=FakeRoundPipe, RoundPipeRunConfig=dict)
    monkeypatch.setattr(offload_peer, "roundpipe_problem", lambda: None)
    monkeypatch.setitem(sys.modules, "roundpipe", package)
    stages, data = stages_of(), [batches(3, seed) for seed in range(3)]
    peer = RoundPipePeer(stages, cross_entropy, optimizer=adam, staleness=1)
    losses = [peer.step(each) for each in data]
    peer.finish()
    assert_trained((losses, [each.detach() for each in nn.ModuleList(stages).parameters()]),
                   by_hand(stages_of(), cross_entropy, data, 0))
    assert peer.model.asked == [True, True, True, "synchronize"]


# ---- on a GPU

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_gpu(function):
    for mark in gpu:
        function = mark(function)
    return function


def decoder(width=256, layers=6, tokens=256):
    model = GPT(GPTConfig(vocab_size=512, context=tokens, width=width, layers=layers, heads=4))
    return model, gpt_stages(model, [1] * layers)


def windows(count, tokens=256, seed=0):
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(512, (2, tokens + 1), generator=g) for _ in range(count)]
    return [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in drawn]


@on_gpu
@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_on_a_gpu_updates_are_those_of_plain_training(count, staleness):
    torch.backends.cuda.matmul.allow_tf32 = False
    model, stages = decoder()
    plain, sgd = copy.deepcopy(model).cuda(), lambda weights: torch.optim.SGD(weights, lr=0.1)
    engine = OffloadEngine(stages, next_token_loss, optimizer=sgd, device="cuda", staleness=staleness)
    versions, newest = [], [each.detach().clone() for each in plain.parameters()]
    for step in range(5):
        versions.append(newest)
        for weight, late in zip(plain.parameters(), versions[max(0, step - staleness)], strict=True):
            weight.data.copy_(late)
        data = windows(count, seed=step)
        loss = sum(next_token_loss(plain(x.cuda()), y.cuda()) for x, y in data) / count
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        newest = [weight - 0.1 * g for weight, g in zip(versions[-1], gradients, strict=True)]
        assert engine.step(data) == pytest.approx(loss.item(), rel=1e-4)
    engine.finish()
    torch.testing.assert_close([each.detach() for each in model.parameters()], [each.cpu() for each in newest],
                               rtol=1e-4, atol=1e-5)


@on_gpu
def test_on_a_gpu_dropout_draws_the_same_again():
    """A stage of dropout and a weight: gradient and loss agree only if the recompute drops the same."""
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4096))

        def forward(self, x):
            return F.dropout(x * self.weight)

    engine = OffloadEngine([Masked(), nn.Linear(4096, 1)], lambda y, target: y.sum(), device="cuda",
                           optimizer=lambda weights: torch.optim.SGD(weights, lr=0.0))
    engine.host.step = lambda: None
    nn.init.ones_(engine.host.stages[1].master["stage.weight"])
    nn.init.zeros_(engine.host.stages[1].master["stage.bias"])
    loss = engine.step([(torch.ones(1, 4096), torch.zeros(1))])
    engine.finish()
    assert sum(each.grad.sum() for each in list(engine.host.copies.values())[:1]).item() == pytest.approx(loss)


@on_gpu
def test_on_a_gpu_prefetch_hides_copies_and_two_stages_suffice():
    def report(layers, prefetch=True):
        _, stages = decoder(width=1024, layers=layers, tokens=512)
        engine = OffloadEngine(stages, next_token_loss, optimizer=adam, device="cuda", prefetch=prefetch)
        data = windows(4, 512)
        engine.step(data)
        engine.forget()
        engine.step(data)
        engine.finish()
        return engine.report

    ahead, blocking = report(8), report(8, prefetch=False)
    assert blocking.exposed_copy_ms > 0.9 * blocking.copy_ms
    assert ahead.exposed_copy_ms < 0.6 * blocking.exposed_copy_ms
    stage_bytes = HostStage(decoder(width=1024, layers=8, tokens=512)[1][1], CudaMachine(torch.device("cuda", 0))
                            ).block.nbytes
    assert report(12).peak_device_bytes < ahead.peak_device_bytes + stage_bytes


@on_gpu
@pytest.mark.skipif(offload_peer.roundpipe_problem() is not None, reason="roundpipe cannot run here")
@pytest.mark.parametrize("staleness", [0, 1])
def test_on_a_gpu_the_peer_makes_the_same_updates(staleness):
    sgd, losses = lambda weights: torch.optim.SGD(weights, lr=0.1), []
    for engine in (OffloadEngine, RoundPipePeer):
        more = {"device": "cuda"} if engine is OffloadEngine else {}
        trainer = engine(decoder()[1], next_token_loss, optimizer=sgd, staleness=staleness, **more)
        losses.append([trainer.step(windows(2, seed=step)) for step in range(5)])
        trainer.finish()
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@on_gpu
def test_on_a_gpu_offload_trains_longer_sequences():
    def make(tokens):
        _, stages = decoder(layers=12, tokens=tokens)
        return stages, next_token_loss, windows(1, tokens)

    plain, offloaded = (longest_sequence(make, 3e8, method=method, device="cuda", grain=256, most=65536).tokens
                        for method in ("plain", "offload"))
    assert plain < offloaded
