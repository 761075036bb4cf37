"""The `labkit` command: doctor, list, run, claims, bench, handout.

A mistake of the user's ends with one sentence on stderr and exit status 1; a table also comes as --json.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from labkit.errors import LabError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
                  help="One-GPU Lab: what machine is this, which labs are there, run one, read the claims ledger.")
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Entry point of the command."""
    try:
        app()
    except LabError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # `labkit claims | head`: the reader has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_edge=False, pad_edge=False,
                  collapse_padding=True)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "op")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what machine this is, which scale the labs will choose and why, and what is missing. Exit status 0 or 1."""
    from labkit.course.machine import inspect_machine

    machine = inspect_machine()
    if as_json:
        print_json(machine.as_json())
    else:
        print_table("This machine", ["what", "is", "note"], [list(map(str, row)) for row in machine.rows()])
        print()
        print_table("What runs here", ["scale", "labs", "time on two cores", "how to choose it"],
                    [list(row.row(machine.scale)) for row in machine.runs])
        print("", *machine.problems, sep="\n")
        print("Ready." if machine.healthy else "Not ready: mend the problems above.")
    raise typer.Exit(0 if machine.healthy else 1)


@app.command("list")
def list_notebooks(as_json: Json = False) -> None:
    """List the labs: title, question, minutes at each scale, and where results are shipped."""
    from labkit.course import header as headers
    from labkit.course import record

    found = []
    for path in headers.labs():
        header = headers.header_of(headers.read_notebook(path))
        found.append({"notebook": path.name[:2], "file": path.name, **dataclasses.asdict(header),
                     "results": list(record.measured_at(path.name[:2]))})
    if as_json:
        return print_json(found)
    print_table("The labs (open one in JupyterLab with `make lab`)",
                ["", "title", "question", "minutes", "results"], [_lab_row(lab) for lab in found])


def _lab_row(lab: dict) -> list[str]:
    minutes = ", ".join(f"{scale} {value:g}" for scale, value in lab["minutes"].items() if value is not None)
    return [lab["notebook"], lab["title"], lab["question"], minutes, ", ".join(lab["results"]) or "none"]


@app.command()
def run(notebook: Annotated[str, typer.Argument(help="The lab's number, like 02.")],
        scale: Annotated[str | None, typer.Option(help="quick, desk or workstation; default: by machine.")] = None,
        in_process: Annotated[bool, typer.Option("--in-process", help="Plain Python, no Jupyter needed.")] = False,
        save: Annotated[bool, typer.Option("--save", help="Write the executed notebook back (quick scale).")] = False,
        timeout: Annotated[float | None, typer.Option(min=1, help="Seconds allowed for one cell.")] = None) -> None:
    """Run a lab without opening it and keep its results in data/results/<scale>/; nothing is kept if it fails."""
    from labkit.course.run import run_notebook
    from labkit.course.run_progress import duration
    from labkit.course.scale import choose_scale
    from labkit.files import REPOSITORY

    try:
        scale = scale or choose_scale().name
        outcome = run_notebook(notebook, scale, in_process=in_process, save=save, timeout=timeout)
    except KeyboardInterrupt:
        print("Stopped; no results were kept.", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"Notebook {outcome.notebook} ran at {outcome.scale} scale in {duration(outcome.seconds)} (min:s). Results:")
    for file in outcome.files:
        print(f"  {file.relative_to(REPOSITORY) if file.is_relative_to(REPOSITORY) else file}")


@app.command()
def claims(as_json: Json = False,
           notebook: Annotated[str | None, typer.Option(help="Only this lab, like 02.")] = None,
           verdict: Annotated[str | None, typer.Option(help="Only this verdict, like reproduced.")] = None,
           readme: Annotated[bool, typer.Option("--readme", help="Write README's scoreboard and picture.")] = False,
           ) -> None:
    """Print the claims ledger: each paper's number, ours with its interval, and the computed verdict."""
    from labkit.course import scoreboard
    from labkit.course.ledger import claims_table

    if readme:
        from labkit.course.picture import update_picture

        scoreboard.update_readme()
        update_picture()
    rows = claims_table()
    asked = {"notebook": notebook and notebook.zfill(2), "verdict": verdict}
    for key, wanted in asked.items():
        if wanted and wanted not in (known := sorted({row[key] for row in rows})):
            raise LabError(f"No claim has the {key} {wanted!r}.", f"There are: {', '.join(known)}.")
    rows = [row for row in rows if all(wanted in (None, row[key]) for key, wanted in asked.items())]
    if as_json:
        print_json(rows)
    else:
        scoreboard.print_table(rows)


@app.command()
def bench(ops: Annotated[list[str] | None, typer.Argument(help="Kernels, like rms_norm; default: all.")] = None,
          as_json: Json = False,
          out: Annotated[Path | None, typer.Option(help="Write the report here, and its picture beside it.")] = None,
          quick: Annotated[bool, typer.Option("--quick", help="No torch.compile, a fifth of the time.")] = False,
          ceilings: Annotated[bool, typer.Option("--ceilings", help="Only this machine's two ceilings.")] = False,
          ) -> None:
    """Time every kernel against its peers and its floor; without a GPU, print what is predicted.

    On a GPU the report of a full run goes to data/results/workstation/<device>/bench.json, with its picture; that of
    some kernels, or of a quick run, only where --out says.
    """
    import torch

    from labkit.measure.bench import check_ops, failures, run_bench

    chosen = check_ops(ops or [])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if ceilings:
        return _print_ceilings(device, as_json)
    from labkit.course import bench_table, record
    from labkit.course.roofline import save_picture
    from labkit.files import write_json
    from labkit.measure.not_timed import predict_bench

    if device.type == "cuda":
        if out is None and not quick and not ops:
            out = record.result_folder("workstation", record.device_name(device)) / "bench.json"
        report = run_bench(chosen, device, seconds=30.0 if quick else 150.0, quick=quick, commit=record.commit(),
                           save=lambda report: out and write_json(out, report))
    else:
        report = predict_bench(chosen, quick=quick, commit=record.commit())
        if out:
            write_json(out, report)
    if out:
        save_picture(report, out.with_suffix(".png"))
    if as_json:
        print_json(report)
    else:
        print_table(*bench_table.table_of(report))
        print(*bench_table.remarks(report, out), sep="\n")
    raise typer.Exit(1 if failures(report) else 0)


@app.command()
def handout(notebooks: Annotated[list[str] | None, typer.Argument(help="Labs, like 02; default: all.")] = None,
            out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("handout"),
            as_json: Json = False) -> None:
    """Make a learner's copy, an instructor's copy and slides of each lab, from its committed notebook."""
    from labkit.course.handout import make_handouts

    labs = make_handouts(notebooks or [], out)
    if as_json:
        return print_json(labs)
    rows = [[lab["notebook"], lab["title"], str(lab["predictions"]), str(lab["exercises"]),
             str(lab["solutions_removed"])] for lab in labs]
    print_table(f"Handouts in {out}", ["", "title", "predictions", "exercises", "solutions removed"], rows)
    print("Each lab has a .learner.ipynb, an .instructor.ipynb (not to be handed out) and a .slides.html.")


def _print_ceilings(device, as_json: bool) -> None:
    from labkit.measure.ceilings import measure_ceilings

    found = measure_ceilings(device.type)
    if as_json:
        return print_json(dataclasses.asdict(found))
    print_table(f"Ceilings of {found.device} ({found.dtype}, {found.threads} CPU threads)",
                ["what", "median", "20% to 80% of repeats", "repeats"],
                [_rate_row("copy bandwidth", found.copy, 1e9, "GB/s"),
                 _rate_row("matrix product", found.matmul, 1e9, "GFLOP/s")])
    print(f"A kernel that does fewer than {found.ridge:.0f} FLOP a byte is limited by memory here.")


def _rate_row(name: str, rate, unit: float, unit_name: str) -> list[str]:
    return [name, f"{rate.median / unit:.1f} {unit_name}", f"{rate.p20 / unit:.1f} to {rate.p80 / unit:.1f}",
            str(rate.repeats)]


if __name__ == "__main__":
    main()
