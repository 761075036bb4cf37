"""Pipeline schedules in real processes: gradients of one process, dependencies kept, and nothing left behind.

What a worker does is first run in threads of the test, where the source can be altered: shared memory that is NaN at
the start shows whatever is read before it is written, and every operation must begin after what it needs has ended.
Then come real processes: all schedules, torch's own as the peer, and all ways to end them.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from pipeline_faults import plant

from labkit.errors import LabError
from labkit.pipeline import PEERS, SCHEDULES, Blocks, Partition, PipelineProcesses, Sleep, simulate
from labkit.pipeline import worker as worker_process
from labkit.pipeline import worker_schedule as executor
from labkit.pipeline.processes import Run
from labkit.pipeline.processes_job import make_job, measured_costs
from labkit.pipeline.schedules import Op
from labkit.pipeline.timeline import Event, Timeline

SMALL = Blocks(layers=4, width=8, tokens=5, batch=2, vocabulary=11)
SHORT = Sleep(0.4, 0.8, 0.4, 0.8)
LONG = dict(sleep_ms=Sleep(4.0, 8.0, 4.0, 8.0))  # where a fault is a matter of time, also on a busy machine
FP32 = 1e-6
SPREAD = dict(workers=3, stage_layers=Partition((2, 2), (1, 3, 1)))  # the last worker waits for a gradient
CHAIN = {"roundpipe": dict(workers=2, iterations=3), "roundpipe_async": dict(workers=2, iterations=3),
         "1f1b": dict(workers=2, iterations=2)}
ODD = {  # sizes that are not the usual ones
    "one worker": ("gpipe", dict(workers=1, micro_batches=1)),
    "fewer micro-batches than workers": ("1f1b", dict(workers=3, micro_batches=2)),
    "an empty stage": ("gpipe", dict(workers=3, stage_layers=(0, 3, 2))),
    "an empty stage between, split backward": ("zb_h1", dict(workers=3, stage_layers=(2, 0, 3))),
    "the head alone": ("interleaved", dict(workers=2, stage_layers=(2, 1, 1, 1))),
    "everything fused": ("roundpipe", dict(workers=2, stage_layers=Partition((), (5,)))),
    "unequal rounds": ("roundpipe", dict(workers=2, round_size=3)),
    "stages that overlap": ("roundpipe", dict(workers=3, stage_layers=Partition((3, 1), (1, 2, 2)))),
    "early recompute of a bound schedule": ("1f1b", dict(workers=2, recompute="all")),
    "no early recompute": ("roundpipe", dict(workers=2, recompute="none")),
}


class Bell(threading.Semaphore):
    """Who waits in vain fails."""

    patience_s = 20.0

    def acquire(self):
        if not super().acquire(timeout=self.patience_s):
            raise AssertionError("nobody rings")


def in_threads(schedule, *, workers=2, micro_batches=4, blocks=SMALL, sleep_ms=SHORT, **choices):
    """(job, events, gradients) of one repeat, each worker a thread."""
    job = make_job(schedule, workers, blocks, micro_batches, sleep_ms=sleep_ms, **choices)
    store = executor.Store.make(blocks, micro_batches * choices.get("iterations", 1), workers)
    store.hidden.fill_(torch.nan)
    store.gradient.fill_(torch.nan)
    bells = [Bell(0) for _ in range(workers)]
    models, events, errors = [blocks.model() for _ in range(workers)], [], []

    def work(worker):
        try:
            events.extend(executor.Executor(blocks, models[worker], store, bells, worker, job).repeat())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise AssertionError("a worker failed") from errors[0]
    shares = [dict(model.named_parameters()) for model in models]
    gradients = {name: sum(share[name].grad for share in shares if share[name].grad is not None) for name in shares[0]}
    return job, events, {name: value / choices.get("iterations", 1) for name, value in gradients.items()}


def check_gradients(gradients, micro_batches=4, blocks=SMALL):
    for name, expected in blocks.gradients(micro_batches).items():
        assert expected.abs().max() > 100 * FP32, name  # else anything would agree
        assert (gradients[name] - expected).abs().max() <= FP32, name


def check_events(job, events):
    """Each operation once, none before what it needs, none shorter than its sleep, none on a busy worker."""
    ran = {(event.kind, event.stage, event.micro_batch, event.iteration): event for event in events}
    assert len(ran) == len(events) == sum(map(len, job.plan.orders))
    for worker, order in enumerate(job.plan.orders):
        free = 0.0
        for op in order:
            event, (total, _) = ran[op], job.costs.of(op)
            assert event.worker == worker and event.start >= free and event.end - event.start >= total / 1000 - 1e-9
            for need, gradient in job.plan.needs(op):
                late = event.recompute_ms if gradient and job.early and op.kind == "B" else 0.0
                assert event.start + late >= ran[need].end - 1e-9, (op, need)
            free = event.end


def run_and_check(schedule, **choices):
    job, events, gradients = in_threads(schedule, **choices)
    check_events(job, events)
    check_gradients(gradients, job.micro_batches * job.iterations)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_schedule_makes_the_gradients_of_one_process(schedule):
    """Three workers, and a chain where it means something."""
    run_and_check(schedule, workers=3, micro_batches=6 if schedule == "interleaved" else 4,
                  stage_layers=Partition((2, 2), (1, 1, 3)) if schedule.startswith("round") else None)
    if schedule in CHAIN:
        run_and_check(schedule, **CHAIN[schedule])


@pytest.mark.parametrize("name", ODD)
def test_odd_sizes(name):
    run_and_check(ODD[name][0], **ODD[name][1])


FAULTS = {
    "a micro-batch counts whole": ("worker_schedule.Executor.loss", "self.job.micro_batches)", "1)", "gpipe", {}),
    "another boundary is read": ("worker_schedule.Executor.input", "boundary - 1", "boundary - 2", "gpipe", {}),
    "the wrong gradient is read": ("worker_schedule.Executor.output_gradient", "units.stop - 1", "units.start", "gpipe",
                                   {}),
    "a gradient is written elsewhere": ("worker_schedule.Executor.backward", "slot, units.start, dx",
                                        "slot, units.stop, dx", "1f1b", {}),
    "nobody waits for gradients": ("worker_schedule.Executor.operate", "if not (early and late)", "if not late",
                                   "1f1b", LONG),
    "a fused stage begins early": ("worker_schedule.Executor.operate", 'early and op.kind == "B"', "early",
                                   "roundpipe", dict(SPREAD, **LONG)),
    "a recompute is never followed by its gradient": ("worker_schedule.Executor.operate", "if early and late",
                                                      "if False", "roundpipe", dict(SPREAD, **LONG)),
    "waiting counts as work": ("worker_schedule.Executor.operate", "start += time.perf_counter() - rebuilt", "pass",
                               "roundpipe", dict(SPREAD, **LONG)),
    "nothing sleeps": ("worker_schedule.rest", "if left > 0", "if left > 60", "gpipe", LONG),
    "nobody is told": ("worker_schedule.Executor.tell", "= 1", "= 0", "gpipe", {}),
    "nobody is woken": ("processes_job.Job.readers", "|= {worker}", "|= set()", "gpipe", {}),
    "the own flag alone": ("processes_job.Job.places", "(flag, worker)", "(0, worker)", "gpipe", {}),
    "iterations share a slot": ("worker_schedule.Executor.slot", "op.iteration * self.job.micro_batches + ", "",
                                "roundpipe_async", dict(iterations=3)),
    "no embedding in the first stage": ("processes_model.unit_parameters", "start == 0 and end", "False", "zb_h1", {}),
    "no head in the last": ("processes_model.unit_parameters", "len(model.blocks) + 1", "0", "zb_h1", {}),
    "the head's weights are forgotten": ("worker_schedule.Executor.weights", "in units:", "in ():", "zb_h1", {}),
    "a block is left out": ("processes_model.through", "[start:end]", "[start:end - 1]", "gpipe", {}),
    "boundaries inside a stage are not kept": ("worker_schedule.Executor.forward", "unit + 1 in self.inputs",
                                               "unit + 1 == units.stop", "roundpipe",
                                               dict(stage_layers=Partition((4,), (1, 1, 3)))),
    "backward stages from the front": ("processes_job.stage_ranges", "range(units - each.stop, units - each.start)",
                                       "range(each.start, each.stop)", "roundpipe", {}),
    "the fused stage has no loss": ("worker_schedule.Executor.rebuild", 'op.kind == "FB"', "False", "roundpipe", {}),
}


HANGS = ("nobody is told", "nobody is woken", "backward stages from the front", "the fused stage has no loss")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, monkeypatch):
    place, old, new, schedule, choices = FAULTS[fault]
    if fault in HANGS:
        monkeypatch.setattr(Bell, "patience_s", 0.3)
    plant(monkeypatch, place, old, new, globals())
    with pytest.raises((AssertionError, LabError, RuntimeError, IndexError)):
        run_and_check(schedule, **choices)


@pytest.fixture(scope="module")
def processes():
    with PipelineProcesses(3, replace(SMALL, layers=5), time_out_s=30) as started:
        yield started


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_real_processes_agree_with_one_and_keep_the_schedule(schedule, processes):
    """Operations last at least what the simulation gives them and wait for the same data, so no run can be shorter."""
    choices = dict(micro_batches=3, iterations=3) if schedule == "roundpipe_async" else dict(micro_batches=6)
    run = processes.run(schedule, sleep_ms=Sleep(1.0, 2.0, 1.5, 2.5), repeats=2, **choices)
    assert run.gradient_error <= FP32 and max(each.abs().max() for each in run.gradients.values()) > 1e-3
    assert len(run.makespans_ms) == len(run.timelines) == 2
    for timeline, deviation in zip(run.timelines, run.deviations, strict=True):
        assert len(timeline.events) == len(run.simulated.events)
        assert timeline.events[0].start == 0.0 and timeline.makespan >= run.simulated.makespan - 0.01
        assert run.resimulated.makespan >= run.simulated.makespan - 0.01
        assert deviation == pytest.approx(timeline.makespan / run.simulated.makespan - 1)


@pytest.mark.parametrize("schedule", PEERS)
def test_the_peer_agrees_with_one_process(schedule, processes):
    """torch.distributed.pipelining over gloo: the same gradients, as many operations, none shorter than its sleep."""
    sleep = Sleep(1.0, 2.0, 1.5, 2.5)
    peer = processes.peer(schedule, micro_batches=6, sleep_ms=sleep, repeats=1)
    ours = processes.run(schedule, micro_batches=6, sleep_ms=sleep, repeats=1, recompute="none")
    assert peer.gradient_error <= FP32 and ours.gradient_error <= FP32
    assert peer.simulated.makespan == ours.simulated.makespan <= peer.timelines[0].makespan + 0.01
    counts = [sorted(event[:4] for event in run.timelines[0].events) for run in (peer, ours)]
    assert counts[0] == counts[1]
    costs = make_job(schedule, 3, processes.blocks, 6, sleep_ms=sleep, recompute="none").costs
    for event in peer.timelines[0].events:
        assert event.end - event.start >= costs.of(Op(*event[1:5]))[0] - 1e-6


def test_without_sleeps_the_simulation_takes_the_measured_times(processes):
    """Medians of each stage, so a run that the simulator describes exactly comes back as it was."""
    run = processes.run("1f1b", micro_batches=4, repeats=2)
    assert run.simulated is run.resimulated and run.simulated.makespan > 0 and run.gradient_error <= FP32
    given = dict(workers=3, micro_batches=4, stage_forward_ms=[1.0, 2.0, 1.5], stage_backward_ms=[5.0, 4.0, 3.5])
    for schedule, split in (("1f1b", {}), ("zb_h1", dict(stage_weight_ms=[2.0, 1.0, 1.5]))):
        known = simulate(schedule, **given, **split)
        outlier = known.events[-1]._replace(end=known.events[-1].end + 50)  # one slow operation moves no median
        job = make_job(schedule, 3, SMALL, 4)
        costs = measured_costs([known, known, Timeline(3, (*known.events[:-1], outlier))], job)
        assert costs.forward_ms == pytest.approx(given["stage_forward_ms"])
        assert costs.backward_ms == pytest.approx(given["stage_backward_ms"])
        assert costs.weight_ms == pytest.approx(split.get("stage_weight_ms", [0.0] * 3))


def test_settings_that_do_not_fit_are_refused_and_end_nothing(processes):
    with pytest.raises(LabError, match="There is no schedule"):
        processes.run("gpip")
    with pytest.raises(LabError, match="no peer"):
        processes.peer("roundpipe")
    with pytest.raises(LabError, match="slots"):
        processes.run("gpipe", micro_batches=65)
    with pytest.raises(LabError, match="in 60 stages don't fit"):
        processes.run("looped", micro_batches=64, stage_layers=(1,) * 6 + (0,) * 54)
    with pytest.raises(LabError, match="cannot have the stages"):
        processes.run("gpipe", stage_layers=(2, 2, 3))
    with pytest.raises(LabError, match="cannot have the stages"):
        processes.run("roundpipe", stage_layers=(2, 2, 2))
    with pytest.raises(LabError, match="cannot have the stages"):
        processes.run("roundpipe", stage_layers=Partition((3, 3), (0, 3, 3)))
    with pytest.raises(LabError, match="No repeat"):
        processes.run("gpipe", repeats=0)
    with pytest.raises(LabError, match="too few"):
        make_job("gpipe", 6, SMALL, 4)
    with pytest.raises(LabError, match="do nothing"):
        PipelineProcesses(0)
    assert processes.run("gpipe", micro_batches=2, repeats=1).gradient_error <= FP32


def test_an_interrupt_that_is_meant_for_the_caller_ends_no_worker(processes):
    """Jupyter sends it to the whole group."""
    for process in processes.processes:
        os.kill(process.pid, signal.SIGINT)
    time.sleep(0.1)
    assert processes.run("gpipe", micro_batches=2, repeats=1).gradient_error <= FP32


def test_deviations_are_relative():
    timeline = Timeline(1, (Event(0, "F", 0, 0, 0, 0.0, 3.0, 0.0),))
    shorter = Timeline(1, (Event(0, "F", 0, 0, 0, 0.0, 2.0, 0.0),))
    assert Run("gpipe", (timeline,), shorter, shorter, {}, 0.0).deviations == [0.5]


def alive(pid):
    """Whether a process still runs; one that has ended and waits to be asked for does not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def gone(pids, folders=(), seconds=5.0):
    """Wait until none of them runs and no folder is left: the last worker removes its folder while it ends."""
    def left():
        return any(map(alive, pids)) or any(map(os.path.exists, folders))

    deadline = time.monotonic() + seconds
    while left() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not left()


def interrupt_group(pids):
    """What Jupyter does: the signal goes to all processes of the group."""
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


ENDS = {
    "killed": (lambda pids: os.kill(pids[1], signal.SIGKILL), LabError, "Worker 1 .* killed by SIGKILL in gpipe"),
    "stopped": (lambda pids: os.kill(pids[1], signal.SIGSTOP), LabError, "have not answered for 2 s"),
    "interrupted": (interrupt_group, KeyboardInterrupt, None),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_run_that_is_cut_short_says_why_and_leaves_nothing(end):
    """A run of a minute, cut after a moment: the error within seconds, no process and no folder behind it."""
    act, error, words = ENDS[end]
    processes = PipelineProcesses(2, SMALL, time_out_s=2 if end == "stopped" else 90)
    pids = [process.pid for process in processes.processes]
    start, timer = time.monotonic(), threading.Timer(0.3, act, [pids])
    timer.start()
    with pytest.raises(error, match=words):
        processes.run("gpipe", micro_batches=4, sleep_ms=Sleep(2000.0, 4000.0), repeats=1)
    assert time.monotonic() - start < 5 and gone(pids) and not os.path.exists(processes.folder)
    with pytest.raises(LabError, match="have ended"):
        processes.run("gpipe")
    processes.close()


def test_a_worker_that_died_between_runs_is_named():
    with PipelineProcesses(2, SMALL, time_out_s=30) as processes:
        pid = processes.processes[0].pid
        os.kill(pid, signal.SIGKILL)
        assert gone([pid])
        with pytest.raises(LabError, match="Worker 0 .* killed by SIGKILL"):
            processes.run("gpipe")


def test_an_error_in_a_worker_reaches_the_caller():
    """With the worker's own traceback; the others have ended as well."""
    processes = PipelineProcesses(2, SMALL, time_out_s=30)
    pids = [process.pid for process in processes.processes]
    with pytest.raises(RuntimeError, match="(?s)Worker . failed in nonsense.*nothing_of_that_name"), \
            processes.ended_by_errors():
        processes.ask("nothing_of_that_name", during="nonsense")
    assert gone(pids)


def test_processes_that_nobody_holds_end():
    """The block is left, or the name is given to something else."""
    with PipelineProcesses(2, SMALL) as processes:
        pids = [process.pid for process in processes.processes]
    assert gone(pids) and not os.path.exists(processes.folder)
    processes = PipelineProcesses(2, SMALL)
    pids, folder = [process.pid for process in processes.processes], processes.folder
    del processes
    assert gone(pids) and not os.path.exists(folder)


LEFT_ALONE = """
from labkit.pipeline import Blocks, PipelineProcesses, Sleep
if __name__ == "__main__":
    small = Blocks(layers=4, width=8, tokens=5)
    idle, busy = (PipelineProcesses(2, small) for _ in range(2))
    print(*[process.pid for each in (idle, busy) for process in each.processes], idle.folder, busy.folder, flush=True)
    busy.run("gpipe", sleep_ms=Sleep(500.0, 500.0))
"""


def test_no_worker_outlives_a_killed_caller(tmp_path):
    """kill -9 leaves no chance to clean up: idle workers and busy ones end by themselves."""
    script = tmp_path / "left_alone.py"
    script.write_text(LEFT_ALONE)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as caller:
        *pids, idle, busy = caller.stdout.readline().split()
        pids = [int(pid) for pid in pids]
        time.sleep(0.3)
        assert len(pids) == 4 and all(map(alive, pids))
        caller.kill()
    assert gone(pids, folders=(idle, busy))


def test_a_worker_whose_caller_hangs_up_takes_the_folder_with_it(tmp_path, monkeypatch):
    """Its thread that watches the caller may not get so far: an idle worker hears of the end first."""
    for name in ("end_with_parent", "prepare_worker", "Worker"):
        monkeypatch.setattr(worker_process, name, lambda *_: None)
    monkeypatch.setattr(worker_process.signal, "signal", lambda *_: None)
    here, there = multiprocessing.Pipe()
    here.close()
    (folder := tmp_path / "meetings").mkdir()
    worker_process.serve(there, str(folder))
    assert not folder.exists()


FAULTS_HERE = {  # on the side that asks
    "the mean of iterations is their sum": ("processes.PipelineProcesses.measure", "/ job.iterations", "/ 1"),
    "the clock starts elsewhere": ("processes.PipelineProcesses.repeat", "(event.start - zero)", "event.start"),
    "weights belong to no stage": ("processes_job.measured_costs", "+ weight[s]", ""),
    "the slowest counts": ("processes_job.measured_costs", "statistics.median", "max"),
}


@pytest.mark.parametrize("fault", FAULTS_HERE)
def test_a_fault_of_the_caller_is_noticed(fault, processes, monkeypatch):
    plant(monkeypatch, *FAULTS_HERE[fault], globals())
    with pytest.raises((AssertionError, LabError)):
        test_real_processes_agree_with_one_and_keep_the_schedule("roundpipe_async", processes)
        test_without_sleeps_the_simulation_takes_the_measured_times(processes)
