"""The layouts over which a schedule is tuned: all layers once, and no layout outside the search is better.

Judged by a brute force over every way to cut, and by counting.
"""

from itertools import combinations, pairwise

import pytest
from pipeline_faults import plant

from labkit.errors import LabError
from labkit.pipeline import bound_times, simulate, with_head
from labkit.pipeline.published import MODELS
from labkit.pipeline.tuned import layouts, partitions, tuned


def every_cut(layers, stages):
    """All ways to cut `layers` into `stages` that are not empty."""
    for inner in combinations(range(1, layers), stages - 1):
        yield tuple(b - a for a, b in pairwise((0, *inner, layers)))


@pytest.mark.parametrize(("count", "workers", "stages"),
                         [(12, 4, (1,)), (24, 4, (2, 3, 6)), (7, 3, (1, 2)), (5, 1, (1,))])
def test_a_layout_holds_every_layer_once_and_the_head_last(count, workers, stages):
    whole(count, workers, stages)


def whole(count, workers, stages):
    found = list(layouts(count, workers, stages))
    assert found and len(found) == len(set(found))
    for sizes in found:
        assert sum(sizes) == count + 1 and len(sizes) in [workers * v for v in stages] and min(sizes) >= 1
        assert max(sizes[:-1], default=1) - min(sizes[:-1], default=1) <= 1


def test_what_does_not_fit_is_left_out():
    left_out()


def left_out():
    assert list(layouts(3, 4, (1, 2))) == [(1, 1, 1, 1)]
    assert list(layouts(2, 4, (1,))) == []


def best_of_all(head):
    """Among all ways to cut ten layers and a head into three stages, none is shorter."""
    layers = with_head(10, 1.0, 2.0, head, 2 * head)
    times = [bound_times(layers, sizes) for sizes in every_cut(11, 3)]
    runs = [simulate("1f1b", workers=3, micro_batches=6, stage_forward_ms=f, stage_backward_ms=b,
                     stage_recompute_ms=r).makespan for f, b, r in times]
    assert tuned("1f1b", layers, workers=3, micro_batches=6)[1].makespan == min(runs)


@pytest.mark.parametrize("head", [0.5, 2.0, 4.0])
def test_the_search_finds_the_best_cut_of_1f1b(head):
    best_of_all(head)


def best_of_partitions():
    """Four partitions, of which none alone is best everywhere."""
    winners = []
    for layers, asked in ((with_head(24, 1.0, 2.0, 6.0, 12.0), {"workers": 4, "micro_batches": 8}),
                          *((model.costs, {"workers": 8, "micro_batches": 16}) for model in MODELS[:3])):
        runs = {}
        for name, cut in partitions(layers, **asked).items():
            forward, backward = cut.times(layers)
            runs[name] = simulate("roundpipe", stage_forward_ms=forward, stage_backward_ms=backward,
                                  stage_recompute_ms=cut.recompute(layers), **asked).makespan
        best = min(runs.values())
        layout, timeline = tuned("roundpipe", layers, **asked)
        assert timeline.makespan == best < max(runs.values())
        assert runs[next(name for name, cut in partitions(layers, **asked).items() if cut == layout)] == best
        winners.append({name for name, makespan in runs.items() if makespan == best})
    assert winners[1] == {"exact, paper's cost"} and winners[3] == {"library"}


def test_roundpipe_takes_the_best_of_its_partitions():
    best_of_partitions()


def test_settings_reach_the_simulation():
    layers = with_head(8, 1.0, 2.0, 1.0, 2.0)
    plain, far = (tuned("looped", layers, workers=2, micro_batches=4, hop_ms=hop)[1] for hop in (0.0, 5.0))
    twice = tuned("roundpipe_async", layers, workers=2, micro_batches=4, iterations=2)[1]
    assert far.makespan > plain.makespan
    assert {event.iteration for event in twice.events} == {0, 1} and twice.asynchronous


@pytest.mark.parametrize("asked", [("spiral", 8, 4), ("interleaved", 3, 4)])
def test_bad_input_gets_a_sentence(asked):
    schedule, count, workers = asked
    with pytest.raises(LabError):
        tuned(schedule, with_head(count, 1.0, 2.0, 1.0, 2.0), workers=workers, micro_batches=4)


@pytest.mark.parametrize(("check", "place", "old", "new"), [
    (lambda: whole(24, 4, (2, 3)), "tuned.layouts", "last + 1)", "last)"),
    (lambda: whole(7, 3, (1, 2)), "tuned.layouts", "< (count - last) % rest", "<= (count - last) % rest"),
    (lambda: whole(5, 1, (1,)), "tuned.layouts", "else [count]", "else [0]"),
    (left_out, "tuned.layouts", "count - last >= rest", "count - last >= 0"),
    (lambda: best_of_all(0.5), "tuned.layouts", "range(count // (rest + 1) + 1)", "range(1)"),
    (lambda: best_of_all(2.0), "tuned.tuned", "return min(", "return max("),
    (best_of_partitions, "tuned.tuned", "return min(", "return max("),
    (best_of_partitions, "tuned.partitions", '"library": library_partition(layers, workers=workers),', ""),
    (best_of_partitions, "tuned.partitions", '"exact, paper\'s cost": exact_partition(layers, paper),', ""),
])
def test_a_planted_fault_is_noticed(monkeypatch, check, place, old, new):
    check()
    plant(monkeypatch, place, old, new, globals())
    with pytest.raises((AssertionError, ValueError, LabError, ZeroDivisionError)):
        check()
