"""What a kernel is held to, whether it got there, and a reason where it did not.

    floor         floor time / measured time >= value          floor: bytes or FLOPs over the ceilings of this run
    ratio         time of a peer / time of ours >= value
    memory        peak memory of ours / a peer's <= value
    milliseconds  time of ours <= value, on the GPU alone where it was timed as it is called
"""

from typing import NamedTuple


class Target(NamedTuple):
    """One demand on one direction of an op; `arch` where it holds for one family of GPUs only."""

    kind: str
    value: float
    direction: str
    peer: str = ""
    arch: str = ""
    why: str = ""  # it may be missed by design

    def text(self) -> str:
        """Like "at least 0.85 of the floor"."""
        value = f"{self.value:.2f}".rstrip("0").rstrip(".")
        return {"floor": f"at least {value} of the floor", "ratio": f"at least {value} x as fast as {self.peer}",
                "memory": f"at most {self.value:.0%} of the memory of {self.peer}",
                "milliseconds": f"at most {1000 * self.value:.0f} us"}[self.kind]

    def judged(self, row: dict, peers: dict[str, dict]) -> dict | None:
        """{target, reached, met} for the row of ours and those of its peers; None where it was not measurable."""
        if self.arch not in ("", row["arch"]):
            return None
        reached = self._reached(row, peers)
        if reached is None:
            return None
        met = reached <= self.value if self.kind in ("memory", "milliseconds") else reached >= self.value
        return {"target": self.text(), "reached": reached, "met": met, "why": self.why}

    def _reached(self, row: dict, peers: dict[str, dict]) -> float | None:
        if self.kind == "floor":
            return row["fraction_of_floor"]
        if self.kind == "milliseconds":
            return row["device_ms"] if row["method"] == "as called" else row["time_ms"]["p50"]
        if self.kind == "ratio":
            return row["ratio_vs"].get(self.peer, {}).get("p50")
        theirs = peers.get(self.peer, {}).get("peak_bytes")
        return row["peak_bytes"] / theirs if theirs and row["peak_bytes"] is not None else None


def note(row: dict, judged: list[dict], noise: float, yardsticks: tuple[str, ...] = ()) -> str:
    """What a reader of a row has to be told: targets missed, with the reason, and peers that are faster."""
    said = []
    missed = [each for each in judged if not each["met"]]
    if missed:
        said.append("misses: " + "; ".join(f"{each['target']} ({each['why'] or reason(row)})" for each in missed))
    slower = {name: 1 / each["p50"] for name, each in row["ratio_vs"].items()
              if name not in yardsticks and each["hi"] < 1 and 1 / each["p50"] > 1 + noise}
    said += [f"slower than {name} by {times:.2f}" for name, times in sorted(slower.items(), key=lambda item: -item[1])]
    if (row["fraction_of_floor"] or 0) > 1.02:
        said.append("faster than its floor: a cache serves part of the bytes that the formula counts")
    return "; ".join(said)


def reason(row: dict) -> str:
    """Why a target is missed, from what was measured beside the time."""
    milliseconds, host = row["time_ms"]["p50"], (row["host_us"] or 0) / 1000
    if row["spills"]:
        return f"registers spill: {row['spills']} bytes"
    if row["bound"] == "launch":
        return f"launch-bound: {row['launches']} launches, {1000 * host:.0f} us of the host a call"
    if row["method"] != "graph" and host > 0.8 * milliseconds:
        return f"host-bound: the host needs {1000 * host:.0f} us to issue a call"
    return "no reason found yet"
