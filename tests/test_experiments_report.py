"""The page of all results is what the committed result files say."""

import re

import pytest

pytest.importorskip("flax", reason="the extra `experiments` is not installed")

from experiments import report
from experiments._runs import VERDICTS, Claim, judge


def test_the_committed_page_is_made_of_the_committed_results():
    assert (report.RESULTS / "README.md").read_text() == report.make_page(report.RESULTS)


def test_every_study_has_results_a_command_and_its_figures():
    for name in report.STUDIES:
        study = report.study_of(name)
        assert f"python -m experiments.{name}" in study.COMMAND
        assert study.claims(report.RESULTS)
        assert study.FIGURES
        for figure in study.FIGURES:
            assert (report.RESULTS / figure).stat().st_size > 10_000, figure


def test_no_results_no_claims(tmp_path):
    report.main(["--out", str(tmp_path / "new")])
    page = (tmp_path / "new" / "README.md").read_text()
    assert page.count("No results yet") == len(report.STUDIES)
    assert not re.search(r"!\[", page)


def test_a_verdict_is_judged():
    assert [judge(x) for x in ([True, True], [True, False], [False])] == list(VERDICTS)
    with pytest.raises(ValueError, match="expected a verdict of"):
        report.claims_table([Claim("a", "b", "", "c", "surely")])
    row = report.claims_table([Claim("|x| shrinks", "eq.\n1", "", "1", "not")])[-1]
    assert row == r"| \|x\| shrinks | eq. 1 |  | 1 | not |"
