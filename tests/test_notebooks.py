"""The notebooks run from a fresh kernel, and say what their committed outputs say."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the extra `test` is not installed")
nbclient = pytest.importorskip("nbclient", reason="the extra `test` is not installed")
pytest.importorskip("sklearn", reason="the extra `experiments` is not installed")

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = (
    *("quickstart", "rules_tour", "instance_wise", "balancing"),
    *("flax", "choosing", "pareto_front", "physics"),
)
QUICK = ("quickstart",)  # the first that a reader opens; the others take a minute
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
pytestmark = pytest.mark.xdist_group("notebooks")


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cells):
    """Everything that the cells print, one string per cell: how it is cut up varies."""
    return [
        "".join(out.text for out in cell.outputs if out.output_type == "stream") for cell in cells
    ]


def agree(text, committed):
    """Words agree, numbers agree to two units of the last printed digit or to two per cent."""
    if NUMBER.sub("#", text) != NUMBER.sub("#", committed):
        return False
    for new, old in zip(NUMBER.findall(text), NUMBER.findall(committed), strict=True):
        digits = len(old.partition(".")[2])
        if abs(float(new) - float(old)) > max(
            2 * 10.0**-digits * bool(digits), 0.02 * abs(float(old))
        ):
            return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_committed_notebook(name):
    notebook = read(name)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert len(cells) <= 15
    assert len(notebook.cells) - len(cells) >= 5  # prose in between
    assert any("image/png" in out.get("data", {}) for cell in cells for out in cell.outputs)
    assert any(texts(cells))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not cell.metadata
        assert {out.output_type for out in cell.outputs} <= {"stream", "display_data"}
        assert all(out.name == "stdout" for out in cell.outputs if out.output_type == "stream")
    imports = any("from experiments" in cell.source for cell in cells)
    prose = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    assert not imports or "run\nthis notebook from a clone" in prose
    assert not re.search(r"Warning|Traceback|/home/|/work/|/tmp/|/usr/", "".join(texts(cells)))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in NAMES]
)
def test_execution_repeats_the_committed_text(name):
    committed = texts(code_cells(read(name)))
    fresh = read(name)
    for cell in code_cells(fresh):
        cell.outputs, cell.execution_count = [], None
    client = nbclient.NotebookClient(
        fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()  # raises at the first cell that does
    for i, (new, old) in enumerate(zip(texts(code_cells(fresh)), committed, strict=True)):
        assert agree(new, old), f"code cell {i + 1} printed\n{new}\ninstead of\n{old}"


def test_comparison_sees_other_words_and_other_numbers():
    assert agree("loss 1.24, at 3", "loss 1.25, at 3")
    assert not agree("loss 1.24, at 3", "loss 1.35, at 3")
    assert not agree("loss 1.25, at 4", "loss 1.25, at 3")
    assert not agree("lost 1.25, at 3", "loss 1.25, at 3")
