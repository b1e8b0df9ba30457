"""One dialect: what the linter cannot hold."""

import ast
import re
from pathlib import Path

import pytest

import jaxmtl

PACKAGE = Path(jaxmtl.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(
    path
    for folder in (PACKAGE, ROOT / "experiments")
    for path in folder.rglob("*.py")
    if folder.is_dir()
)

# Third person: "Returns the mean", as in Google's style, and not "Return the mean".
IMPERATIVE = re.compile(
    r"(Return|Make|Compute|Take|Give|Train|Read|Draw|Write|Tell|Run|Check|Find|Build|Put|Load|"
    r"Show|Choose|Decide|Add|Split|Apply|Call|Raise|Solve|Project|Save|Print|Keep)\b"
)
BRITISH = re.compile(
    r"(normal|optim|minim|maxim|regular|initial|amort|general|summar|organ|special|linear|"
    r"parallel|vector|token|serial)is(e|es|ed|er|ers|ing|ation|ations)?$|(colour|behaviour|"
    r"neighbour|centre)s?$",
)


def functions(path):
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


@pytest.mark.parametrize("folder", ["jaxmtl", "experiments"])
def test_docstrings_speak_in_the_third_person(folder):
    files = [path for path in FILES if path.relative_to(ROOT).parts[0] == folder]
    if folder == "experiments" and not files:
        pytest.skip("the sources of the experiments are not in this distribution")
    assert len(files) > 20
    for path in files:
        for node in functions(path):
            text = ast.get_docstring(node) or ""
            assert not IMPERATIVE.match(text), f"{path.name}: {node.name}: {text.splitlines()[0]}"


def test_names_are_spelled_as_in_optax():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.arg):
                names = [node.arg]
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names = [node.id]
            for name in names:
                for word in name.lower().split("_"):
                    assert not BRITISH.fullmatch(word), f"{path.name}: {name}"


def test_the_patterns_find_what_they_are_for():
    assert IMPERATIVE.match("Return the mean.")
    assert not IMPERATIVE.match("Returns the mean.")
    assert BRITISH.fullmatch("normalise")
    assert BRITISH.fullmatch("neighbours")
    assert not BRITISH.fullmatch("normalize")
