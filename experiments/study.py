"""What every study shares: its command line, its results files, progress, resuming and checks.

A study is a package ``experiments.<name>`` whose ``__main__`` holds a ``study``. A *part* of it is
the runs whose records share a file, ``<out>/<name>/<part>.jsonl``, one JSON line a record; tables
and figures are made from these files alone.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import rich.table
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

import jaxmtl
from experiments.claims import Claim

Record = dict[str, Any]
Say = Callable[..., None]  # (message, steps of the bar = 1)


def environment() -> Record:
    """Returns versions of what computes, and the kind of device."""
    device = jax.devices()[0]
    versions = {name: metadata.version(name) for name in ("jax", "optax", "flax")}
    return {
        "versions": versions | {"jaxmtl": jaxmtl.__version__},
        "device": f"{device.platform}: {device.device_kind}",
    }


def config_of(options: Any) -> Record:
    """Returns a dataclass as a results file holds it: tuples become lists."""
    config: Record = json.loads(json.dumps(asdict(options)))
    return config


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Appends one JSON line per record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(record, sort_keys=True) + "\n" for record in records)


def read_records(path: Path) -> list[Record]:
    """Returns the records of a results file, an empty list where there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


class Results:
    """A results file: what it holds, and what a run adds."""

    def __init__(self, path: Path):
        """Reads what the file holds."""
        self.path, self.records = path, read_records(path)

    def add(self, records: Iterable[Record]) -> None:
        """Appends records, with the versions that made them."""
        new = [record | environment() for record in records]
        append_records(self.path, new)
        self.records += new


class Job(NamedTuple):
    """Work whose records are written together."""

    label: str
    run: Callable[[Say], Iterable[Record]]  # calls ``say`` after each step
    steps: int = 1


class Part(NamedTuple):
    """The runs whose records share a file."""

    name: str
    jobs: Callable[[Results], Iterable[Job]]  # what the file does not hold yet
    configs: Sequence[Record] | None = None  # the options under which its records may be made


class Preset(NamedTuple):
    """What a part runs by default: the same methods and seeds under each of several options."""

    options: tuple[Any, ...]
    methods: tuple[str, ...]
    seeds: int


class Table(NamedTuple):
    """What a study shows in rows."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1  # leading columns that hold names

    def show(self, console: Console) -> None:
        """Prints it, with a line wherever the first of several names changes."""
        table = rich.table.Table(title=self.title)
        for i, header in enumerate(self.header):
            name = i < self.names
            table.add_column(header, no_wrap=name, justify="left" if name else "right")
        for row, after in zip(self.rows, [*self.rows[1:], None], strict=True):
            line = self.names > 1 and after is not None and after[0] != row[0]
            table.add_row(*row, end_section=line)
        console.print(table)


class Report(NamedTuple):
    """What a study shows of its results."""

    tables: Sequence[Table]
    figures: Mapping[str, Callable[[Path], None]]  # by file name, how to draw it
    conclusion: str = ""  # the sentence that the numbers allow


@dataclass(frozen=True)
class Study:
    """A study of methods.

    Attributes:
      name: Its package in ``experiments``, and the folder of its results.
      commands: Arguments with which its committed results were made.
      methods: What ``--methods`` can name.
      figures: The files that it draws.
      plan: From the command line to the parts to run.
      report: From the folder of its results and the command line to tables and figures.
      claims: From that folder to what its papers say beside what the records say.
      options: Further options of the command line, as keywords of ``add_argument``.
    """

    name: str
    commands: tuple[str, ...]
    methods: Sequence[str]
    figures: Sequence[str]
    plan: Callable[[argparse.Namespace], Iterable[Part]]
    report: Callable[[Path, argparse.Namespace], Report]
    claims: Callable[[Path], list[Claim]]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def summary(self) -> str:
        """Returns the first line of the package's docstring."""
        return str(import_module(f"experiments.{self.name}").__doc__).splitlines()[0]

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Returns the command line."""
        command = f"python -m experiments.{self.name}"
        parser = argparse.ArgumentParser(prog=command, description=self.summary())
        add = parser.add_argument
        add("--out", type=Path, default=Path("results"), help="results go to a folder in it")
        add("--methods", "--rules", nargs="+", choices=self.methods, metavar="METHOD")
        add("--seeds", type=int, help="how many; by default those of each part")
        add("--resume", action="store_true", help="keep what the results files hold already")
        add("--report-only", action="store_true", help="tables and figures of existing results")
        add("--smoke", action="store_true", help="a few steps of a few methods, in seconds")
        for flag, keywords in self.options.items():
            add(flag, **keywords)
        return parser.parse_args(argv)

    def main(self, argv: Sequence[str] | None = None) -> None:
        """Runs what the command line asks for, then reports."""
        args = self.parse(argv)
        console = Console()
        if not console.is_terminal:
            console.width = 130  # tables are not folded in a log file or a pipe
        folder = args.out / self.name
        for part in () if args.report_only else self.plan(args):
            path = folder / f"{part.name}.jsonl"
            if not args.resume:
                path.unlink(missing_ok=True)
            fill(Results(path), part, console)
        tables, figures, conclusion = self.report(folder, args)
        if not tables:
            raise SystemExit(
                f"expected results in {folder}, got none; run without --report-only first"
            )
        for table in tables:
            table.show(console)
        for claim in self.claims(folder):
            console.print(f"{claim.verdict:<11} {claim.claim} ({claim.source}): {claim.ours}")
        for name, draw in figures.items():
            draw(folder / name)
            console.print(f"-> {folder / name}")
        if conclusion:
            console.print(conclusion)


def fill(results: Results, part: Part, console: Console) -> None:
    """Runs the jobs of a part that its file does not hold yet."""
    configs = [record["config"] for record in results.records if "config" in record]
    if part.configs is not None and any(config not in part.configs for config in configs):
        raise SystemExit(
            f"expected the options of {results.path}, got {part.configs}; drop --resume"
        )
    jobs, done = list(part.jobs(results)), 0
    console.print(f"{len(jobs)} jobs to do; records go to {results.path}")
    columns = SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task("", total=sum(job.steps for job in jobs))

        def say(message: str, steps: int = 1) -> None:
            bars.advance(bar, steps)
            if not console.is_terminal:  # a log file shows no bar
                console.print(message)

        for job in jobs:
            bars.update(bar, description=job.label)
            results.add(job.run(say))
            done += job.steps
            bars.update(bar, completed=done)
