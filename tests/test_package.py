"""The package as a whole: layers, documentation, public names, the README."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import jaxmtl
from tests.methods import METHODS, table

ROOT = Path(__file__).parents[1]
PACKAGE = Path(jaxmtl.__file__).parent

# Each layer imports only from those before it, and never in a circle within itself.
LAYERS = (
    "solvers",
    "linalg",
    "base",
    "combinators",
    "transforms",
    "weightings",
    "balancing",
    "aggregators",
    "jacobian",
    "nested",
    "engine",
    "metrics",
    "flax",
)


def modules():
    """Returns each module's dotted name and the jaxmtl modules that it imports."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        names[".".join(("jaxmtl", *parts))] = path
    graph = {}
    for name, path in names.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    imported.add(full if full in names else node.module)
        graph[name] = {module for module in imported if module in names and module != name}
    return graph


def layer_of(module):
    parts = module.split(".")
    return len(LAYERS) if len(parts) == 1 else LAYERS.index(parts[1])


def test_imports_go_downwards():
    graph = modules()
    assert len(graph) > 20
    for module, imported in graph.items():
        for other in imported:
            assert layer_of(other) <= layer_of(module), f"{module} imports {other}, above it"


def test_imports_are_not_circular():
    graph = modules()
    state = {}

    def visit(module, path):
        assert state.get(module) != "open", f"circular: {' -> '.join([*path, module])}"
        if module in state:
            return
        state[module] = "open"
        for other in graph[module]:
            # A package's __init__ re-exports its own modules.
            if not other.startswith(module + "."):
                visit(other, [*path, module])
        state[module] = "done"

    for module in graph:
        visit(module, [])


def test_import_needs_jax_and_optax_alone():
    """No module beyond those that jax and optax load, and no warning."""
    code = (
        "import sys, jax, optax, jax.scipy.linalg\n"
        "from optax.experimental import aggregating\n"
        "import jax.extend.core\n"
        "before = {m.split('.')[0] for m in sys.modules}\n"
        "import jaxmtl\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} - before))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert result.stdout.strip() == "['jaxmtl']"


@pytest.mark.parametrize("public", jaxmtl.__all__)
def test_public_names_are_documented_and_typed(public):
    thing = getattr(jaxmtl, public)
    assert inspect.getdoc(thing)
    if inspect.isfunction(thing):
        assert ">>>" in thing.__doc__, "no example"
        signature = inspect.signature(thing)
        assert signature.return_annotation is not inspect.Signature.empty
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, parameter


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_methods_state_properties_and_source(method):
    text = getattr(jaxmtl, method.name).__doc__
    for section in ("Args:", "Returns:", "**Reference**"):
        assert section in text
    assert "**Properties**" in text or method.needs == "a rule"


def test_readme_table_is_the_conformance_table():
    assert table() in (ROOT / "README.md").read_text()


def test_ci_runs_the_readme_commands():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    command = 'pip install -q -e ".[experiments,test]" && python -m pytest -n 2 --dist loadgroup'
    assert command in ci
    assert command.replace(" -q", "") in readme
