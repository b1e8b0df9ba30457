"""The page of all results is what the committed result files say."""

import json
import math
import re

import pytest

pytest.importorskip("flax", reason="the extra `experiments` is not installed")

from experiments import report
from experiments.claims import NO_DATA, VERDICTS, Claim, judge


def test_the_committed_page_is_made_of_the_committed_results():
    assert (report.RESULTS / "README.md").read_text() == report.make_page(report.RESULTS)


def test_every_study_has_results_a_command_and_its_figures():
    for name in report.STUDIES:
        study, folder = report.study_of(name), report.RESULTS / name
        assert study.name == name
        assert all(study.parse(command.split()) for command in study.commands)
        assert study.claims(folder)
        assert study.figures
        for figure in study.figures:
            if name in ("iwrm", "domains") and not (folder / figure).with_suffix(".jsonl").exists():
                continue  # a data set that was not at hand
            assert (folder / figure).stat().st_size > 10_000, figure


@pytest.mark.parametrize("name", report.STUDIES)
def test_notes_end_with_the_tables_and_say_no_number_that_is_not_in_them(name):
    text = (report.RESULTS / name / "notes.md").read_text()
    assert text == report.make_notes(name, report.RESULTS)
    prose, _, printed = text.partition(report.MARK)
    claims = report.study_of(name).claims(report.RESULTS / name)
    printed += "\n".join(" ".join(claim) for claim in claims)
    numbers = set(re.findall(r"[+-]?\d+\.\d+", prose.partition("## Found")[2]))
    assert len(numbers) > 2
    for number in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", printed), number


@pytest.mark.parametrize("name", report.STUDIES)
def test_claims_say_what_differs_and_commands_of_undecided_ones_are_understood(name):
    study = report.study_of(name)
    for claim in study.claims(report.RESULTS / name):
        assert claim.differs or claim.verdict == NO_DATA, claim.claim
        if claim.verdict != NO_DATA:
            continue
        text = claim.ours.partition("`")[2].removesuffix("`")
        # Loops in the shell: the commands for their first value.
        for quoted, word, body in re.findall(
            r"for x in (?:'(.*?)'|(\S+)).*?; do (.*?); done", text
        ):
            text += "; " + body.replace("$x", quoted or word)
        commands = re.findall(r"python -m experiments\.(\w+) ([^;$]*)(?:;|$)", text)
        assert commands, claim.ours
        for package, arguments in commands:
            assert package == name
            study.parse(arguments.split())


def test_records_are_json_as_the_standard_has_it():
    """Python writes Infinity and NaN as well, which other readers refuse."""
    for path in sorted(report.RESULTS.rglob("*.jsonl")):
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=lambda name, path=path: pytest.fail(f"{path}: {name}"))


def test_a_ratio_that_is_no_number_is_infinite_in_the_tables():
    from experiments.scenes.report import over_training

    history = [{"balanced": {"norm_ratio": 2.0}}, {"balanced": {"norm_ratio": None}}, {}]
    assert over_training({"history": history}, "balanced", "norm_ratio") == [2.0, math.inf]


def test_no_results_no_claims(tmp_path):
    report.main(["--out", str(tmp_path / "new")])
    page = (tmp_path / "new" / "README.md").read_text()
    claims = [report.study_of(name).claims(tmp_path / "new" / name) for name in report.STUDIES]
    assert page.count("No results yet") == claims.count([]) > 3
    # Some say what would decide a claim before there is any record.
    assert {claim.verdict for made in claims for claim in made} <= {NO_DATA}
    assert not re.search(r"!\[", page)


def test_a_verdict_is_judged():
    judged = [judge(x) for x in ([True, True], [True, False], [False])]
    assert [*judged, NO_DATA] == list(VERDICTS)
    with pytest.raises(ValueError, match="expected a verdict of"):
        report.claims_table([Claim("a", "b", "", "c", "", "surely")])
    row = report.claims_table([Claim("|x| shrinks", "eq.\n1", "", "1", "1 seed", "not")])[-1]
    assert row == r"| \|x\| shrinks | eq. 1 |  | 1 | 1 seed | not |"
