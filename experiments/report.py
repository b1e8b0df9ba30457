"""One page of what every study found, made from the committed result files alone.

    python -m experiments.report            # the page, from experiments/results
    python -m experiments.report --redraw   # every table and figure first

The page is ``README.md`` in the folder of results: for each claim of a paper its number, ours
with standard error, the verdict and the command that made it. Verdicts come from the studies,
which decide them from their records by the criteria in their ``claims``.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from rich.console import Console

from experiments._runs import VERDICTS, Claim

RESULTS = Path(__file__).parent / "results"

# Each study, and the arguments of each of its parts with a table and a figure of its own.
STUDIES: dict[str, tuple[tuple[str, ...], ...]] = {
    "toy": ((),),
    "stochastic_quadratic": ((),),
    "multimnist": tuple(("--dataset", name) for name in ("digits", "mnist", "mnist_batches")),
    "iwrm": ((),),
    "tabular": ((),),
}


def study_of(name: str) -> ModuleType:
    """Return the module of a study."""
    return import_module(f"experiments.{name}")


def escape(text: str) -> str:
    """Return text that can stand in a cell of a Markdown table."""
    return " ".join(text.replace("|", r"\|").split())


def claims_table(claims: Sequence[Claim]) -> list[str]:
    """Return the lines of a Markdown table, one row a claim."""
    lines = ["| claim | source | paper | here | verdict |", "|---|---|---|---|---|"]
    for claim in claims:
        if claim.verdict not in VERDICTS:
            raise ValueError(f"expected a verdict of {VERDICTS}, got {claim.verdict!r}; use judge")
        lines.append(f"| {' | '.join(map(escape, claim))} |")
    return lines


def section(name: str, folder: Path) -> tuple[list[str], Counter[str]]:
    """Return a study's part of the page, and how often each verdict was given."""
    study = study_of(name)
    summary = (study.__doc__ or "").strip().splitlines()[0]
    claims = study.claims(folder)
    lines = [f"## {summary}", "", "```bash", study.COMMAND.strip(), "```", ""]
    lines += claims_table(claims) if claims else ["No results yet: run the command."]
    for figure in study.FIGURES:
        if (folder / figure).exists():
            lines += ["", f"![{figure}]({figure})"]
    return [*lines, ""], Counter(claim.verdict for claim in claims)


def make_page(folder: Path) -> str:
    """Return the page in Markdown."""
    parts = {name: section(name, folder) for name in STUDIES}
    lines = [
        "# What reproduces",
        "",
        "Made by `python -m experiments.report` from the JSON lines in this folder. *Here* is the",
        "mean ± standard error over seeds. A verdict is *reproduced* if every condition that the",
        "study derives from the claim holds in its records, *partly* if some do, *not* if none",
        "does; the conditions stand in the study's `claims`, what was tried in its docstring.",
        "",
        f"| study | {' | '.join(VERDICTS)} |",
        f"|---|{'---|' * len(VERDICTS)}",
    ]
    for name, (_, verdicts) in parts.items():
        lines.append(f"| {name} | {' | '.join(str(verdicts[v]) for v in VERDICTS)} |")
    lines.append("")
    for part, _ in parts.values():
        lines += part
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--redraw", action="store_true", help="make tables and figures anew first")
    args = parser.parse_args(argv)
    if args.redraw:
        for name, parts in STUDIES.items():
            for part in parts:
                study_of(name).main([*part, "--report-only", "--out", str(args.out)])
    args.out.mkdir(parents=True, exist_ok=True)
    page = args.out / "README.md"
    page.write_text(make_page(args.out))
    Console().print(f"{args.out} -> {page}")


if __name__ == "__main__":
    main()
