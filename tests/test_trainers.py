"""The loop trains, resumes bit for bit, survives a kill, and refuses what cannot work."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from labkit.errors import LabError
from labkit.measure import memory
from labkit.measure.flops import forward_flops, training_flops
from labkit.models import GPT, GPTConfig, generate
from labkit.trainers import (
    Example,
    Superposition,
    TrainSettings,
    held_out_loss,
    loop,
    pretrain,
    pretrain_superposed,
    run_all,
    sft,
    train,
)
from labkit.trainers.checkpoint import load_model, save_model
from labkit.trainers.schedule import learning_rate_factor
from labkit.trainers.sft import answer_loss, pad_examples

CONFIG = GPTConfig(vocab_size=31, context=16, width=16, layers=2, heads=2, tied=False)
SETTINGS = TrainSettings(steps=12, learning_rate=1e-2, batch=4, context=16, warmup=3, evaluate_every=5,
                         checkpoint_every=3)
TEXT = torch.arange(4000) * 7 % 31  # every token follows from the one before
METHOD = Superposition(4, 0.5, redraw_vocabulary=True)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_learns_a_rule():
    """A text in which every token follows from the last is learned to almost no loss; an untrained model has ln V."""
    model = GPT(CONFIG)
    history = pretrain(model, TEXT, dataclasses.replace(SETTINGS, steps=150), held_out_M=TEXT)
    assert history.evaluations["loss"][0] == pytest.approx(3.43, abs=0.15) and history.final_loss < 0.05
    assert history.train["step"] == list(range(150)) and history.evaluations["step"] == [*range(0, 150, 5), 150]


@pytest.mark.parametrize("stop", [5, 6, 9])
def test_resumed_equals_unbroken_bitwise(tmp_path, monkeypatch, stop):
    """Break off before, at and after the switch and continue from the file: weights and history have the same bits."""
    unbroken, path = GPT(CONFIG), tmp_path / "run.safetensors"
    whole = pretrain_superposed(unbroken, TEXT, SETTINGS, METHOD, held_out_M=TEXT)
    step_as_it_is = loop.train_step

    def break_off(model, optimizer, loss_at, step, settings):
        if step == stop:
            raise KeyboardInterrupt
        return step_as_it_is(model, optimizer, loss_at, step, settings)

    monkeypatch.setattr(loop, "train_step", break_off)
    with pytest.raises(KeyboardInterrupt):
        pretrain_superposed(GPT(CONFIG), TEXT, SETTINGS, METHOD, held_out_M=TEXT, checkpoint=path)
    monkeypatch.setattr(loop, "train_step", step_as_it_is)
    resumed = GPT(CONFIG, seed=99)  # other weights: all must come from the file
    history = pretrain_superposed(resumed, TEXT, SETTINGS, METHOD, held_out_M=TEXT, checkpoint=path)
    assert torch.equal(weights(resumed), weights(unbroken))
    assert history.train == whole.train and history.evaluations == whole.evaluations


LONG = dataclasses.replace(SETTINGS, steps=1000, checkpoint_every=1)
PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from test_trainers import CONFIG, LONG, METHOD, TEXT
from labkit.models import GPT
from labkit.trainers import pretrain_superposed
pretrain_superposed(GPT(CONFIG), TEXT, LONG, METHOD, checkpoint=sys.argv[1])
"""


def test_killed_and_resumed_gives_the_same_weights(tmp_path):
    """SIGKILL at a random moment, perhaps while a checkpoint is being written, then finish: the final weights are those
    of a run that was never disturbed."""
    path = tmp_path / "run.safetensors"
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": folders}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, path], env=environment)
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0.0, 0.3))
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL, "the run ended before it was killed: give it more steps"
    resumed, undisturbed = GPT(CONFIG, seed=99), GPT(CONFIG)
    history = pretrain_superposed(resumed, TEXT, LONG, METHOD, checkpoint=path)
    whole = pretrain_superposed(undisturbed, TEXT, LONG, METHOD)
    assert torch.equal(weights(resumed), weights(undisturbed)) and history.train == whole.train


def test_a_checkpoint_belongs_to_one_run(tmp_path):
    """Another method, another shape or another text is refused, though the settings are equal."""
    path = tmp_path / "run.safetensors"
    pretrain_superposed(GPT(CONFIG), TEXT, SETTINGS, METHOD, checkpoint=path)
    wider = dataclasses.replace(CONFIG, width=32)
    for model, text, method in ((GPT(CONFIG), TEXT, Superposition(2, 0.5)), (GPT(wider), TEXT, METHOD),
                                (GPT(CONFIG), TEXT.flip(0)[:-1], METHOD)):
        with pytest.raises(LabError, match="another run"):
            pretrain_superposed(model, text, SETTINGS, method, checkpoint=path)
    pretrain_superposed(GPT(CONFIG), TEXT, SETTINGS, METHOD, checkpoint=path)
    path = tmp_path / "sft.safetensors"
    sft(GPT(CONFIG), [Example([1], [2])], SETTINGS, checkpoint=path)
    with pytest.raises(LabError, match="another run"):
        sft(GPT(CONFIG), [Example([1], [3])], SETTINGS, checkpoint=path)


def test_bf16_products_train_too():
    """Products in bfloat16 under autocast learn the rule as well, with QK-norm, and the weights stay in float32."""
    model = GPT(dataclasses.replace(CONFIG, qk_norm=True))
    history = pretrain(model, TEXT, dataclasses.replace(SETTINGS, steps=150, precision="bf16"), held_out_M=TEXT)
    assert history.final_loss < 0.1 and all(p.dtype == torch.float32 for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        new = generate(model, TEXT[None, :4], max_new_tokens=8, temperature=0)
    assert torch.equal(new.tokens_BT[0], TEXT[4:12])


def test_damaged_or_foreign_checkpoints_are_refused(tmp_path):
    """A cut file, and one of other settings, are refused in a sentence that names the file; the file stays."""
    path = tmp_path / "run.safetensors"
    pretrain(GPT(CONFIG), TEXT, SETTINGS, checkpoint=path)
    with pytest.raises(LabError, match="another run"):
        pretrain(GPT(CONFIG), TEXT, dataclasses.replace(SETTINGS, learning_rate=1e-3), checkpoint=path)
    whole = path.read_bytes()
    for size in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(LabError, match="damaged"):
            pretrain(GPT(CONFIG), TEXT, SETTINGS, checkpoint=path)
        assert path.stat().st_size == size


def test_equal_flops_and_tokens_read():
    """Both phases have the same number of positions; the text read is T * B * N * (1 + r (S - 1))."""
    settings = dataclasses.replace(SETTINGS, steps=1000)
    positions = 4 * 16 * 1000
    assert Superposition(6, 0.3).tokens_read(settings) == round(positions * (1 + 0.3 * 5))
    assert Superposition(6, 0.3, read=False).tokens_read(settings) == positions
    with pytest.raises(LabError):
        Superposition(0, 0.3)
    with pytest.raises(LabError):
        Superposition(4, 1.3)


@pytest.mark.parametrize("kv_heads, tied", [(2, True), (1, False)])
def test_flops_formula_equals_the_counter(kv_heads, tied):
    """The formula agrees with PyTorch's own counter of executed products, forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = GPTConfig(vocab_size=31, context=16, width=16, layers=2, heads=2, kv_heads=kv_heads, tied=tied)
    model, tokens = GPT(config), torch.zeros(3, 16, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        loss = model(tokens).square().mean()
    assert forward.get_total_flops() == forward_flops(config, 48, 16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as both:
        model(tokens).square().mean().backward()
    assert both.get_total_flops() == training_flops(config, 48, 16)
    assert loss.isfinite()


@pytest.mark.parametrize("kind, expected", [
    ("wsd", [0.25, 1.0, 1.0, 1.0, 0.05]), ("cosine", [0.25, 1.0, 0.988, 0.579, 0.1]), ("constant", [0.25, 1, 1, 1, 1])])
def test_schedules(kind, expected):
    """Values at the start, the end of warm-up, a tenth, the middle and the last of 100 steps."""
    seen = [learning_rate_factor(step, 100, warmup=4, kind=kind, decay=0.2) for step in (0, 3, 11, 50, 99)]
    assert seen == pytest.approx(expected, abs=0.003)
    with pytest.raises(LabError, match="no schedule"):
        TrainSettings(steps=100, learning_rate=1e-3, schedule="linear")


def test_sft_learns_answers_only():
    """The loss is the mean surprise of the answers' tokens, by hand; with `on_prompts` the prompts' count too."""
    examples = [Example([1, 2, 3], [4, 5]), Example([6], [7, 8, 9])]
    tokens, answers = pad_examples(examples)
    assert tokens.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]
    assert answers.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 0]]
    model = GPT(CONFIG)
    logprob = model(tokens[:, :-1]).log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    places = [(0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]
    by_hand = -torch.stack([logprob[place] for place in places]).mean()
    torch.testing.assert_close(answer_loss(model, examples), by_hand)
    with_prompts = -torch.stack([logprob[place] for place in [*places, (0, 0), (0, 1)]]).mean()
    torch.testing.assert_close(answer_loss(model, examples, on_prompts=True), with_prompts)
    assert abs(with_prompts - by_hand) > 1e-3
    history = sft(model, examples, dataclasses.replace(SETTINGS, steps=80), held_out=examples)
    assert history.final_loss < 0.05
    with pytest.raises(LabError, match="Example 0 has 17"):
        sft(model, [Example(range(17), [1])], SETTINGS)
    with pytest.raises(LabError, match="Example 0 has 0 prompt"):
        sft(model, [Example([], [1])], SETTINGS)
    with pytest.raises(LabError, match="nothing to learn"):
        sft(model, [], SETTINGS)


def test_diverging_run_is_stopped_with_a_sentence():
    """A loss that is not finite ends the run with the step's number, and no weights are claimed to be trained."""
    with pytest.raises(LabError, match="stopped being finite at step 7"):
        train(GPT(CONFIG), lambda m, s: m(TEXT[None, :8]).mean() * (float("nan") if s == 7 else 1.0), SETTINGS)


def test_order_and_workers_change_nothing():
    """Runs side by side give the results of runs one after the other, in the order asked; an error is raised."""
    runs = {seed: lambda seed=seed: pretrain(GPT(CONFIG, seed=seed), TEXT, SETTINGS, held_out_M=TEXT).final_loss
            for seed in range(4)}
    cpu = torch.device("cpu")
    side_by_side = run_all(runs, cpu, workers=3)
    assert list(side_by_side) == [0, 1, 2, 3] and side_by_side == run_all(runs, cpu, workers=1)

    def fails():
        raise ValueError("this one")

    for workers in (1, 2):
        with pytest.raises(ValueError, match="this one"):
            run_all({0: fails, 1: runs[1]}, cpu, workers=workers)


def test_a_sentence_for_the_learner_arrives_from_a_worker_process():
    """Without LabError's own pickling the learner would read of a missing argument `fix` instead of the sentence."""
    def fails():
        raise LabError("Too few steps.", "Use more.")

    for workers in (1, 2):
        with pytest.raises(LabError, match=r"^Too few steps\. Use more\.$") as caught:
            run_all({0: fails, 1: fails}, torch.device("cpu"), workers=workers)
        assert (caught.value.problem, caught.value.fix) == ("Too few steps.", "Use more.")


def test_workers_return_models_and_a_killed_one_is_named():
    """Models cross the border between processes unchanged; a worker that dies is a sentence, not a hanging sweep."""
    cpu, seeds = torch.device("cpu"), (3, 4)
    models = run_all({seed: lambda seed=seed: GPT(CONFIG, seed=seed) for seed in seeds}, cpu, workers=2)
    assert all(torch.equal(weights(models[seed]), weights(GPT(CONFIG, seed=seed))) for seed in seeds)
    with pytest.raises(LabError, match="was killed"):
        run_all({seed: lambda: os.kill(os.getpid(), signal.SIGKILL) for seed in seeds}, cpu, workers=2)
    assert run_all({seed: lambda seed=seed: seed for seed in seeds}, cpu, workers=2) == {3: 3, 4: 4}  # after all that


def test_what_cannot_be_sent_to_a_worker_is_named():
    """A run that holds a lock (an open file, a widget) is a sentence that names it, and the sweep still ends."""
    lock = threading.Lock()
    with pytest.raises(LabError, match="another process: TypeError: cannot pickle '_thread.lock'"):
        run_all({seed: lambda: lock for seed in (0, 1)}, torch.device("cpu"), workers=2)


def test_memory_of_the_largest_worker_counts(monkeypatch):
    """A worker that holds 1 GB raises the peak by at least that, though this process never held it."""
    monkeypatch.setattr(memory, "_workers", [0.0])
    cpu, before = torch.device("cpu"), memory.peak_gigabytes(torch.device("cpu"))
    run_all({seed: lambda: float(torch.ones(250_000_000).sum()) for seed in (0, 1)}, cpu, workers=2)
    assert before + 1 < memory.peak_gigabytes(cpu) < before + 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_workers_end_with_the_process_that_started_them(tmp_path):
    """A sweep whose process is killed leaves no worker behind: the pids they wrote are gone a moment later."""
    program = f"""
import os, pathlib, time, torch
from labkit.trainers import run_all
def run(seed):
    pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch()
    time.sleep(60)
run_all({{seed: lambda seed=seed: run(seed) for seed in range(2)}}, torch.device("cpu"), workers=2)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parent.parent)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)


def is_running(pid):
    """Whether a process exists and is no zombie that waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_saved_model_is_the_model(tmp_path):
    """Weights, shape and notes come back; a file without a shape, or none at all, is refused."""
    model, path = GPT(CONFIG), tmp_path / "model.safetensors"
    save_model(path, model, seed="0")
    again = load_model(path)
    assert again.config == CONFIG and torch.equal(weights(model), weights(again))
    assert held_out_loss(again, TEXT, context=16) == held_out_loss(model, TEXT, context=16)
    with pytest.raises(LabError, match="missing"):
        load_model(tmp_path / "none.safetensors")
    save_file(model.state_dict(), path)
    with pytest.raises(LabError, match="does not say which model"):
        load_model(path)
    wider = dataclasses.asdict(dataclasses.replace(CONFIG, width=32))
    save_file(model.state_dict(), path, {"config": json.dumps(wider)})
    with pytest.raises(LabError, match="do not fit the shape"):
        load_model(path)
