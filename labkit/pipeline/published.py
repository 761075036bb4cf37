"""The published simulation of RoundPipe as data: inputs, stage layouts, and what its log says.

8 workers, 16 micro-batches (RoundPipe in two rounds of 8), five models. Times are ms of one micro-batch.
Source: ITcarrot/RoundPipe-artifact, pp-simulate/run.sh and pp-simulate/log at commit e44270a, beside arXiv 2604.27085.

`settings` turns a row into arguments of `simulate`. With convention="log" all 25 ratios come out to the four decimals
that are printed. Three of the log's habits are choices, and one is a slip:
- a stage without layers counts in no makespan (keep_empty): 235B interleaved and looped, one hop;
- only RoundPipe recomputes before its gradient arrives, the bound ones wait: recompute="all" lets all, "none" none;
- rounds have 8 micro-batches, the least that the formula allows;
- the head's forward, in RoundPipe's fused stage, counts as recompute and so runs before its input is there. That
  flatters 20B and 32B. convention="causal" takes it back.
"""

from dataclasses import dataclass

from labkit.errors import LabError
from labkit.pipeline.partition import Layers, Partition, bound_times, with_head

WORKERS, MICRO_BATCHES = 8, 16
SCHEDULES = ("gpipe", "1f1b", "interleaved", "looped", "roundpipe")
CONVENTIONS = ("log", "causal")


@dataclass(frozen=True)
class PublishedModel:
    """One row of run.sh: times of a decoder layer and of the head, and the layouts. Sizes count decoder layers."""

    name: str
    layers: int
    forward_ms: float
    backward_ms: float  # without recompute
    head_forward_ms: float
    head_backward_ms: float
    hop_ms: float
    one_stage: tuple[int, ...]  # gpipe and 1f1b
    many_stages: tuple[int, ...]  # interleaved and looped
    round_forward: tuple[int, ...]
    round_backward: tuple[int, ...]  # in the order of execution, the fused stage first: the head alone

    @property
    def costs(self) -> Layers:
        """Decoder layers and the head, with recompute (of the head: its one forward) in the backward."""
        return with_head(self.layers, self.forward_ms, self.backward_ms, self.head_forward_ms, self.head_backward_ms)

    @property
    def partition(self) -> Partition:
        """RoundPipe's layout, the head counted as a layer of the fused stage."""
        return Partition(self.round_forward, (self.round_backward[0] + 1, *self.round_backward[1:]))


MODELS = (
    PublishedModel("Qwen3-1.7B", 28, 7.429, 15.831, 22.0655, 43.707, 1.6, (3, 3, 4, 4, 4, 4, 4, 2),
                   (*[1] * 18, *[2] * 5, 0), (7,) * 4, (0, *[3] * 8, 2, 2)),
    PublishedModel("Llama-3.1-8B", 32, 18.50370313, 41.20659375, 37.2255, 74.501, 3.2, (4,) * 8,
                   (1,) * 32, (5, 5, 5, 5, 6, 6), (0, *[2] * 16)),
    PublishedModel("GPT-OSS-20B", 24, 21.6445625, 81.780875, 44.2925, 86.264, 2.25, (3,) * 8,
                   (1,) * 24, (4, 5, 5, 5, 5), (0, *[1] * 24)),
    PublishedModel("Qwen3-32B", 64, 40.5610625, 91.17429688, 54.928, 108.294, 4.0, (8,) * 8,
                   (1,) * 64, (2, 2, *[3] * 20), (0, *[1] * 64)),
    PublishedModel("Qwen3-235B", 94, 43.016, 58.376, 42.444, 43.294, 3.2, (11, *[12] * 6, 11),
                   (0, *[1] * 94, 0), (2,) * 47, (0, *[1] * 94)),
)

# Percent of all workers' time, as printed: bubble, fill, switch, intra, drain; models in the order above.
LOG = {
    "gpipe": ((36.1346, 3.3668, 19.4452, 3.0110, 10.3115), (42.0793, 2.9934, 18.8715, 10.8309, 9.3834),
              (41.7271, 2.1873, 18.8327, 10.5320, 10.1751), (34.8841, 3.3451, 16.6309, 4.1355, 10.7727),
              (31.1805, 4.4844, 15.4110, 0.4789, 10.8062)),
    "1f1b": ((35.1906, 3.4166, 12.2226, 9.2722, 10.2792), (42.0793, 2.9934, 10.5903, 19.1121, 9.3834),
             (41.7271, 2.1873, 11.3110, 18.0538, 10.1751), (34.8841, 3.3451, 11.2290, 9.5374, 10.7727),
             (31.2119, 4.4824, 10.7441, 5.4585, 10.5270)),
    "interleaved": ((27.7520, 1.2340, 7.3967, 15.7235, 3.3978), (30.6407, 1.0076, 4.5255, 22.1871, 2.9205),
                    (30.9415, 0.9219, 4.9852, 20.9570, 4.0773), (15.1473, 0.5913, 2.7068, 10.0480, 1.8012),
                    (5.9640, 0.5678, 1.6915, 2.4447, 1.2600)),
    "looped": ((25.0131, 1.2808, 14.6890, 3.5353, 5.5080), (29.1982, 1.0285, 11.9488, 13.2396, 2.9813),
               (30.3890, 0.9293, 12.7685, 12.5812, 4.1099), (13.6811, 0.6015, 5.7652, 5.4820, 1.8323),
               (4.3937, 0.5773, 1.8106, 0.0376, 1.9683)),
    "roundpipe": ((19.0676, 7.5105, 0.0000, 4.0495, 7.5075), (14.2839, 5.4921, 0.0000, 1.2910, 7.5008),
                  (13.9827, 4.7780, 0.1253, 3.1768, 5.9025), (6.6661, 1.5596, 0.0005, 2.6495, 2.4565),
                  (3.2915, 1.1055, 0.0000, 0.9821, 1.2039)),
}


def settings(model: PublishedModel, schedule: str, *, convention: str = "log", recompute: str = "roundpipe") -> dict:
    """Arguments of `simulate` for one cell of the table.

    Args:
        schedule: any name that `simulate` knows; zb_h1 and roundpipe_async, which the log lacks, take the layouts of
            1f1b and roundpipe.
        convention: "log", or "causal", where nothing starts before its input and an empty stage counts as well.
        recompute: which schedules recompute before their gradient arrives: "roundpipe" as in the log, "all" or "none".
            What remains of a backward, zb_h1 halves.
    Raises:
        LabError: an unknown convention or recompute.
    """
    if convention not in CONVENTIONS or recompute not in ("roundpipe", "all", "none"):
        raise LabError(f"There is no convention {convention!r} with recompute {recompute!r}.",
                       f"Choose one of {', '.join(CONVENTIONS)}, and roundpipe, all or none.")
    early = recompute == "all" or (recompute == "roundpipe" and schedule.startswith("roundpipe"))
    times = round_times(model, convention) if schedule.startswith("roundpipe") else published_bound(model, schedule)
    return {"workers": WORKERS, "micro_batches": MICRO_BATCHES, "hop_ms": model.hop_ms, "stage_forward_ms": times[0],
            "stage_backward_ms": times[1], "stage_recompute_ms": times[2] if early else None,
            "keep_empty": convention != "log"}


def published_bound(model: PublishedModel, schedule: str) -> tuple[list[float], list[float], list[float]]:
    """(forward, backward, recompute) of each stage; the head joins the last."""
    sizes = model.many_stages if schedule in ("interleaved", "looped") else model.one_stage
    return bound_times(model.costs, (*sizes[:-1], sizes[-1] + 1))


def round_times(model: PublishedModel, convention: str) -> tuple[list[float], list[float], list[float]]:
    """The same for RoundPipe; the log lets the head's forward in the fused stage run early as well."""
    recompute = model.partition.recompute(model.costs)
    if convention == "log":
        recompute[0] = model.head_forward_ms
    return *model.partition.times(model.costs), recompute
