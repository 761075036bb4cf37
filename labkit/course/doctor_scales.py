"""What runs on this machine: for each scale the labs that fit its memory, their minutes, and how to choose it.

Minutes and GB are those of the labs' headers, which a run measures (header.py). A lab fits if its peak leaves room for
the system and JupyterLab in the memory, or for the CUDA context on the GPU.
"""

from dataclasses import dataclass, field

from labkit.course import header
from labkit.course.scale import SCALES
from labkit.errors import LabError

SPARE_GB = 1.0  # the system, JupyterLab and a browser tab; on a GPU the CUDA context and the desktop


@dataclass(frozen=True)
class Forecast:
    """One scale on this machine. `too_large`: lab → GB; `minutes`: lab → minutes, measured ones only."""

    scale: str
    fitting: tuple[str, ...]
    too_large: dict[str, float] = field(default_factory=dict)
    minutes: dict[str, float] = field(default_factory=dict)
    why_not: str = ""

    def row(self, chosen: str) -> tuple[str, str, str, str]:
        """(scale, labs, minutes, how to choose it)."""
        how = "chosen here" if self.scale == chosen else f"LABKIT_SCALE={self.scale}"
        return self.scale, self.labs(), self.duration(), self.why_not or how

    def labs(self) -> str:
        """Which labs fit, and what the others need."""
        if self.why_not:
            return "none"
        if not self.too_large:
            return f"all {len(self.fitting)}"
        return f"{len(self.fitting)}; not " + ", ".join(f"{lab} ({gb:g} GB)" for lab, gb in self.too_large.items())

    def duration(self) -> str:
        """Minutes a lab, and together, of the labs that fit and were measured (on two cores)."""
        times = [self.minutes[lab] for lab in self.fitting if lab in self.minutes]
        if self.why_not or not times:
            return "" if self.why_not else "not measured yet"
        total = f"{sum(times):.2g} min" if sum(times) < 90 else f"{sum(times) / 60:.1f} h"
        each = f"{min(times):g} to {max(times):g}" if min(times) < max(times) else f"{times[0]:g}"
        return f"{each} min a lab, {total} together"


def forecast(memory: float | None, gpu_gb: float | None, no_gpu: str) -> tuple[Forecast, ...]:
    """The three scales: `memory` serves the CPU's two, `gpu_gb` the workstation's, unless `no_gpu` says why not."""
    labs = _headers()
    rooms = {"quick": memory, "desk": memory, "workstation": gpu_gb}
    return tuple(Forecast(scale, (), why_not=no_gpu) if scale == "workstation" and no_gpu
                 else _fit(labs, scale, rooms[scale]) for scale in SCALES)


def _fit(labs: dict[str, header.Header], scale: str, room: float | None) -> Forecast:
    needs = {lab: head.gigabytes.get(scale) for lab, head in labs.items()}
    too_large = {lab: gb for lab, gb in needs.items() if gb is not None and room is not None and gb + SPARE_GB > room}
    minutes = {lab: head.minutes[scale] for lab, head in labs.items() if head.minutes.get(scale) is not None}
    return Forecast(scale, tuple(lab for lab in labs if lab not in too_large), too_large, minutes)


def _headers() -> dict[str, header.Header]:
    """The header of each lab that can be read: a torn notebook must not silence the doctor."""
    found = {}
    for path in header.labs():
        try:
            found[path.name[:2]] = header.header_of(header.read_notebook(path))
        except LabError:
            continue
    return found
