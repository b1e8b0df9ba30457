"""The package as a whole: layers, documentation, public names, the table of methods."""

import ast
import inspect
import os
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
    "types",
    "compiled",
    "linalg",
    "solvers",
    "checks",
    "keywords",
    "names",
    "tasks",
    "learned",
    "registry",
    "base",
    "transforms",
    "rules",
    "combinators",
    "arguments",
    "separate",
    "engine",
    "jacobian",
    "nested",
    "metrics",
    "loop",
    "fronts",
    "rewards",
    "gauss_newton",
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


def test_import_starts_no_backend():
    """No array is made at import: with a platform that does not exist, the first one fails."""
    code = (
        "import importlib.util, jaxmtl\n"
        "if importlib.util.find_spec('flax'):\n"
        "    import jaxmtl.flax\n"
        "try:\n"
        "    jaxmtl.upgrad(preference=[1.0, 1.0])\n"
        "except RuntimeError as error:\n"
        "    assert 'nowhere' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('a backend that does not exist was used')"
    )
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        check=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "nowhere"},
    )


def test_no_private_interface_of_jax_or_optax():
    private = ("jax._src", "jax.core", "jaxlib", "optax._src", "flax.core")
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "experiments").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            for name in names:
                assert not f"{name}.".startswith(tuple(f"{p}." for p in private)), (path, name)


def public_things():
    """Returns everything public by name: what the package, its modules and flax export."""

    def own(module):
        """Returns the public names that a module defines itself."""
        members = [name for name in vars(module) if not name.startswith("_")]
        return [n for n in members if getattr(vars(module)[n], "__module__", "") == module.__name__]

    exported = (
        (jaxmtl, jaxmtl.__all__),
        (jaxmtl.solvers, jaxmtl.solvers.__all__),
        (jaxmtl.metrics, own(jaxmtl.metrics)),
        (jaxmtl.fronts, own(jaxmtl.fronts)),
        (jaxmtl.rewards, own(jaxmtl.rewards)),
    )
    things = {f"{m.__name__}.{name}": getattr(m, name) for m, names in exported for name in names}
    things["jaxmtl.flax.TrainState"] = None  # imported in the test, as flax may be missing
    return [pytest.param(x, id=name) for name, x in things.items() if not inspect.ismodule(x)]


def documented(function, *, skip=()):
    """Checks that all arguments and the result are described, and typed."""
    text, signature = inspect.getdoc(function), inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name not in skip]
    described = text.partition("Args:")[2]
    for parameter in parameters:
        stars = "*" * (2 * (parameter.kind is parameter.VAR_KEYWORD))
        stars += "*" * (parameter.kind is parameter.VAR_POSITIONAL)
        assert f"\n  {stars}{parameter.name}: " in described, f"{parameter} has no line in Args"
        assert parameter.annotation is not inspect.Parameter.empty, parameter
    assert signature.return_annotation is not inspect.Signature.empty
    assert "Returns:" in text


@pytest.mark.parametrize("thing", public_things())
def test_public_names_are_documented_and_typed(thing):
    if thing is None:
        thing = pytest.importorskip("jaxmtl.flax").TrainState
        documented(thing.apply_gradients, skip=("self",))
    if inspect.isfunction(thing):
        documented(thing)
        assert ">>>" in thing.__doc__, "no example"
        return
    text = inspect.getdoc(thing)
    assert "Attributes:" in text
    own = [name for name in getattr(thing, "__annotations__", {}) if not name.startswith("_")]
    assert own, "a class without attributes"
    for name in own:
        assert f"\n  {name}: " in text, f"{name} has no line in Attributes"


def test_documented_refuses_what_is_not():
    def bad(first: int, second: int) -> int:
        """Does it.

        Args:
          first: Described.

        Returns:
          Their sum.
        """
        return first + second

    with pytest.raises(AssertionError, match="second: int has no line"):
        documented(bad)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_methods_state_properties_and_source(method):
    text = getattr(jaxmtl, method.name).__doc__
    for section in ("Args:", "Returns:", "**Reference**"):
        assert section in text
    assert "**Properties**" in text or method.needs == "a rule"


def test_the_table_of_methods_is_the_conformance_table():
    assert table() in (ROOT / "notebooks" / "guide" / "methods.md").read_text()


def test_ci_runs_the_commands_of_contributing():
    text, ci = (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / ".ci" / "run").read_text()
    command = 'pip install -q -e ".[experiments,test]" && python -m pytest -n 2 --dist loadgroup'
    assert command in ci
    assert command.replace(" -q", "") in text
