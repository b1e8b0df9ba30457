"""One page of what every study found, made from the committed result files alone.

    python -m experiments.report            # the page and the notes, from experiments/results
    python -m experiments.report --redraw   # every figure first

The page is ``README.md`` in the folder of results: for each claim of a paper its number, ours
with standard error, what differs from its set-up, the verdict and the command that made it.
Verdicts come from the studies, which decide them from their records by the criteria in their
``claims``. Below the prose of ``<study>/notes.md`` stand the tables that the study prints.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console

from experiments.claims import VERDICTS, Claim
from experiments.study import Study

RESULTS = Path(__file__).parent / "results"
STUDIES = (
    "toy",
    "stochastic_quadratic",
    "multimnist",
    "iwrm",
    "tabular",
    "scenes",
    "domains",
    "faces",
    "molecules",
    "metaworld",
)
MARK = "<!-- From here on printed by `python -m experiments.report` from the records. -->\n"


def study_of(name: str) -> Study:
    """Returns a study."""
    study: Study = import_module(f"experiments.{name}.__main__").study
    return study


def escape(text: str) -> str:
    """Returns text that can stand in a cell of a Markdown table."""
    return " ".join(text.replace("|", r"\|").split())


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table whose first row is the header."""
    lines = [f"| {' | '.join(map(escape, row))} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def claims_table(claims: Sequence[Claim]) -> list[str]:
    """Returns the lines of a Markdown table, one row a claim."""
    for claim in claims:
        if claim.verdict not in VERDICTS:
            raise ValueError(f"expected a verdict of {VERDICTS}, got {claim.verdict!r}; use judge")
    return markdown([("claim", "source", "paper", "here", "differs", "verdict"), *claims])


def section(name: str, folder: Path) -> tuple[list[str], Counter[str]]:
    """Returns a study's part of the page, and how often each verdict was given."""
    study = study_of(name)
    claims = study.claims(folder / name)
    commands = [f"python -m experiments.{name} {arguments}" for arguments in study.commands]
    lines = [f"## {study.summary()}", "", "```bash", *commands, "```", ""]
    lines += claims_table(claims) if claims else ["No results yet: run the command."]
    for figure in study.figures:
        if (folder / name / figure).exists():
            lines += ["", f"![{name}/{figure}]({name}/{figure})"]
    return [*lines, ""], Counter(claim.verdict for claim in claims)


def make_page(folder: Path) -> str:
    """Returns the page in Markdown."""
    parts = {name: section(name, folder) for name in STUDIES}
    counts = [
        (name, *(str(verdicts[v]) for v in VERDICTS)) for name, (_, verdicts) in parts.items()
    ]
    lines = [
        "# What reproduces",
        "",
        "Made by `python -m experiments.report` from the JSON lines in this folder. *Here* is the",
        "mean ± standard error over seeds, *differs* what is other than in the paper's set-up. A",
        "verdict is *reproduced* if every condition that the study derives from the claim holds in",
        "its records, *partly* if some do, *not* if none does; the conditions stand in the study's",
        "`claims`, what was tried in its `notes.md`. *No data*: no record decides it, mostly since",
        "what it takes is not at hand; the command that would decide it is given.",
        "",
        *markdown([("study", *VERDICTS), *counts]),
        "",
    ]
    return "\n".join([*lines, *(line for part, _ in parts.values() for line in part)])


def with_tables(page: str, tables: Iterable[tuple[str, Sequence[Sequence[str]]]]) -> str:
    """Returns notes: their prose as it is, then tables: a title, and rows under a header."""
    lines = [MARK]
    for title, rows in tables:
        lines += [f"**{title}**", "", *markdown(rows), ""]
    return page.partition(MARK)[0] + "\n".join(lines)


def make_notes(name: str, folder: Path) -> str:
    """Returns the notes of a study: their prose as it is, then its tables."""
    study = study_of(name)
    tables: list[tuple[str, Sequence[Sequence[str]]]] = []
    for command in study.commands:
        for table in study.report(folder / name, study.parse(command.split())).tables:
            tables.append((table.title, [table.header, *table.rows]))
    return with_tables((folder / name / "notes.md").read_text(), tables)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the page and the notes."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--redraw", action="store_true", help="make figures anew first")
    args = parser.parse_args(argv)
    for name in STUDIES:
        study = study_of(name)
        for command in study.commands if args.redraw else ():
            study.main([*command.split(), "--report-only", "--out", str(args.out)])
        notes = args.out / name / "notes.md"
        if notes.exists():
            notes.write_text(make_notes(name, args.out))
    args.out.mkdir(parents=True, exist_ok=True)
    page = args.out / "README.md"
    page.write_text(make_page(args.out))
    Console().print(f"{args.out} -> {page}")


if __name__ == "__main__":
    main()
