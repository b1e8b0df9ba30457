"""The documentation: its listings run, its links lead somewhere, and nothing public is missing."""

import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

import jaxmtl
from tests.methods import sweep

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
if not NOTEBOOKS.exists():
    pytest.skip("the documentation is part of the repository alone", allow_module_level=True)
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"])
PAGES += sorted([*NOTEBOOKS.glob("*.md"), *(NOTEBOOKS / "guide").glob("*.md")])
LISTING = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.xdist_group("docs")


@pytest.fixture(scope="module")
def library_pages():
    """The extension that makes pages from the library, which needs no Sphinx."""
    sys.path.insert(0, str(NOTEBOOKS / "_ext"))
    try:
        yield importlib.import_module("library_pages")
    finally:
        sys.path.remove(str(NOTEBOOKS / "_ext"))


# --- README -----------------------------------------------------------------------------------


def test_readme_is_short():
    assert len(README.split()) <= 900
    assert "more than forty methods" in README
    assert len(jaxmtl.methods()) > 40


@pytest.mark.slow  # `.ci/newcomer` runs it in an environment of its own
def test_the_first_program_prints_what_the_readme_says(capsys):
    """Pasted as it stands, in a fresh namespace."""
    program = LISTING.findall(README)[0]
    assert len(program.splitlines()) <= 25
    exec(compile(program, "README.md", "exec"), {})
    mean, upgrad = capsys.readouterr().out.splitlines()
    numbers = [[float(x) for x in re.findall(r"\d+\.\d+", line)] for line in (mean, upgrad)]
    (start, _, high, _, end, _), (_, _, high_upgrad, _, end_upgrad, _) = numbers
    said = re.search(
        r"quiet loss from ([\d.]+) up to ([\d.]+) before it falls to ([\d.]+), and that\s+"
        r"with UPGrad it never rises and ends at (\d+\.\d+)",
        README,
    )
    found = [f"{x:.2f}" for x in (start, high, end, end_upgrad)]
    assert found == list(said.groups())
    assert high_upgrad == start


def test_frameworks_of_the_readme():
    """The few lines for NNX, Linen and Equinox, and those without the Jacobian, take a step."""
    pytest.importorskip("flax", reason="the extra `experiments` is not installed")
    eqx = pytest.importorskip("equinox", reason="the extra `experiments` is not installed")
    import jax.numpy as jnp
    import optax
    from flax import linen, nnx

    from jaxmtl.flax import TrainState

    of_nnx, of_linen, of_equinox, without = LISTING.findall(README)[1:5]
    batch = jnp.ones((5, 3))
    chain = optax.chain(jaxmtl.upgrad(), optax.sgd(0.1))
    scope = {"jax": jax, "jaxmtl": jaxmtl, "nnx": nnx, "eqx": eqx, "batch": batch}

    def losses_of(outputs):
        return jnp.mean((outputs - jnp.arange(1.0, 3.0)[None]) ** 2, axis=0)

    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    before = jnp.asarray(model.kernel[...])
    scope |= {"model": model, "losses_fn": lambda model, batch: losses_of(model(batch))}
    scope["optimizer"] = nnx.Optimizer(model, chain, wrt=nnx.Param)
    exec(of_nnx, scope)
    moved = {"nnx": float(jnp.abs(model.kernel[...] - before).max())}

    linear = linen.Dense(2)
    params = linear.init(jax.random.key(0), batch)
    scope["losses_fn"] = lambda params, batch: losses_of(linear.apply(params, batch))
    scope["state"] = TrainState.create(apply_fn=linear.apply, params=params, tx=chain)
    exec(of_linen, scope)
    difference = jax.tree.map(lambda a, b: a - b, scope["state"].params, params)
    moved["linen"] = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(difference))

    module = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    scope |= {"model": module, "losses_fn": lambda model, x: losses_of(jax.vmap(model)(x))}
    scope |= {"optimizer": chain, "opt_state": chain.init(eqx.filter(module, eqx.is_array))}
    exec(of_equinox, scope)
    moved["equinox"] = float(jnp.abs(scope["model"].weight - module.weight).max())

    scope["losses_fn"] = lambda params, batch: losses_of(linear.apply(params, batch))
    scope |= {"params": params, "mtl_state": jaxmtl.upgrad().init(params)}
    exec(without, scope)
    _, jacobian = jaxmtl.value_and_jacobian(scope["losses_fn"])(params, batch)
    update, _ = jaxmtl.upgrad().update(jacobian, jaxmtl.upgrad().init(params), params)
    agree = jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, atol=1e-5)), scope["grads"], update)
    assert all(jax.tree.leaves(agree))
    assert all(size > 1e-3 for size in moved.values()), moved


def test_what_is_said_of_the_table_of_prices():
    """README and guide give the prices that are measured in `test_docs_prices`."""
    for text in (README, (NOTEBOOKS / "guide" / "which_method.md").read_text()):
        for words in ("(1 + 2m) / 3", "1.2 + m / 3", "1.2 at 32 examples, 1.7 at 128"):
            assert words in text


def test_what_is_said_of_the_digits_is_in_the_records():
    """The closing sentence of the second command, from the records that are committed."""
    pytest.importorskip("rich", reason="the extra `experiments` is not installed")
    pytest.importorskip("matplotlib", reason="the extra `experiments` is not installed")
    from experiments.multimnist.report import conclude
    from experiments.study import read_records

    records = read_records(ROOT / "experiments" / "results" / "multimnist" / "digits.jsonl")
    said = conclude(records)
    assert said.startswith("No method differs from linear_scalarization")
    assert "by more than two of its standard errors" in said
    assert "no method differs from the mean by more than two standard errors" in README
    # One seed of a method that is far off turns the sentence.
    far = [dict(r, history=dict(r["history"])) for r in records]
    for record in far:
        if record["method"] == "mgda":
            record["history"]["test_accuracy"] = [[0.5 + record["seed"] / 100] * 2]
    assert conclude(far).startswith("Beyond two standard errors of linear_scalarization")
    assert "mgda" in conclude(far)
    assert conclude([r for r in records if r["method"] == "mgda"]) == ""


# --- pages ------------------------------------------------------------------------------------

# Each page is one program; these have tests of their own.
ELSEWHERE = ("README", "devices", "precision", "migration")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_listings_run(page):
    """The listings of a page, in their order, in one fresh namespace, with warnings as errors."""
    listings = LISTING.findall(page.read_text())
    if page.stem in ELSEWHERE or not listings:
        pytest.skip("no listings, or tested elsewhere")
    if "flax" in "".join(listings):
        pytest.importorskip("flax", reason="the extra `experiments` is not installed")
    scope = {"__name__": page.stem}
    for i, listing in enumerate(listings):
        exec(compile(listing, f"{page.name}, listing {i + 1}", "exec"), scope)


def headings(text):
    """The anchors of a page, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    plain = [re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()) for title in titles]
    return {title.replace(" ", "-") for title in plain} | set(
        re.findall(r"^\((.*)\)=$", text, re.M)
    )


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in links(page.read_text()):
        if re.match(r"https://[\w.-]+\.\w+(/[\w./?=&%#-]*)?$", link):
            continue  # well-formed; the outside is not asked
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if "generated" in path.parts:
            assert path.stem in ("api", "index") or path.stem in jaxmtl.methods(), link
            continue
        assert path.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in headings(path.read_text()), f"{page.name}: {link}"


def test_links_are_read():
    assert "guide/which_method.md" in "".join(links(README))
    assert headings("## What it costs\n(here)=\n") == {"what-it-costs", "here"}


def test_every_page_is_in_the_table_of_contents():
    index = (NOTEBOOKS / "index.md").read_text()
    named = set(re.findall(r"^(?:[\w/]+)$", index, re.M))
    pages = {f"guide/{page.stem}" for page in (NOTEBOOKS / "guide").glob("*.md")}
    pages |= {page.stem for page in NOTEBOOKS.glob("*.ipynb")}
    assert pages <= named, pages - named


def test_included_pages_exist():
    for page in (NOTEBOOKS / "guide").glob("*.md"):
        for target in re.findall(
            r"^```\{(?:include|literalinclude)\} (\S+)$", page.read_text(), re.M
        ):
            assert (page.parent / target).resolve().exists(), target


# --- pages made from the library --------------------------------------------------------------


def test_every_public_name_has_a_place(library_pages):
    """A method has a page, everything else an entry in the reference."""
    page = library_pages.api_page()
    for module in ("jaxmtl", "jaxmtl.metrics", "jaxmtl.solvers", "jaxmtl.fronts", "jaxmtl.rewards"):
        section = page.partition(f": `{module}`\n")[2].partition("\n## ")[0]
        exported = library_pages.public_names(module)
        assert exported
        for name in exported:
            in_methods = module == "jaxmtl" and name in jaxmtl.methods()
            entry = f"](methods/{name}.md)" if in_methods else f":: {name}\n"
            assert entry in section, f"{module}.{name}"
    assert set(jaxmtl.methods()) <= set(jaxmtl.__all__)
    modules = [n for n in jaxmtl.__all__ if inspect.ismodule(getattr(jaxmtl, n))]
    assert {f"jaxmtl.{name}" for name in modules} <= {name for name, _ in library_pages.MODULES}


@pytest.mark.parametrize("name", sweep(jaxmtl.methods()))
def test_every_method_has_a_page(library_pages, name):
    """With a figure, in one family."""
    bibliography = (NOTEBOOKS / "guide" / "bibliography.md").read_text()
    page = library_pages.method_page(name, bibliography)
    assert page.count("<svg") == 1
    assert "nan" not in page.partition("</svg>")[0]
    assert f".. autofunction:: {name}\n" in page
    overview = library_pages.overview()
    assert len(re.findall(rf"^{name}$", overview, re.M)) == 1


@pytest.mark.parametrize("name", [n for n, m in jaxmtl.methods().items() if n != "krum"])
def test_captions_agree_with_the_properties(library_pages, name):
    """No loss rises along the drawn step of a method that says it is non-conflicting."""
    if "non-conflicting" in jaxmtl.methods()[name].properties:
        assert "rises" not in library_pages.draw(name)


def test_equations_belong_to_methods(library_pages):
    assert set(library_pages.EQUATIONS) <= set(jaxmtl.methods())


def test_a_new_method_needs_its_module_alone(library_pages, monkeypatch):
    """The list, `make` and the page know it from its decorator."""
    import jax.numpy as jnp

    from jaxmtl import registry

    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))

    @registry.method("twice the mean", "Nobody 2099")
    def twice(*, num_tasks: int | None = None) -> jaxmtl.Aggregator:
        """Takes twice the mean."""
        return jaxmtl.from_weighting(
            lambda m, dtype: jnp.full(m, 2 / m, dtype), num_tasks=num_tasks
        )

    assert jaxmtl.methods()["twice"].needs == ()
    weighting = jaxmtl.make("twice", num_tasks=2).weighting
    assert weighting.update(jnp.eye(2), weighting.init())[0].tolist() == [1, 1]
    page = library_pages.method_page("twice", "")
    assert page.startswith("# twice\n\nTwice the mean.\n")
    assert "$$" not in page
    assert "| reference | Nobody 2099 |" in page
    assert "\ntwice\n" in library_pages.overview()


def test_the_picture_of_the_readme_is_what_its_script_makes():
    spec = importlib.util.spec_from_file_location("draw_conflict", NOTEBOOKS / "draw_conflict.py")
    script = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    try:
        spec.loader.exec_module(script)
    finally:
        sys.path[:] = path
    drawn = script.make_picture()
    committed = (NOTEBOOKS / "_static" / "conflict.svg").read_text()
    number = re.compile(r"-?\d+\.\d+")
    assert number.sub("#", drawn) == number.sub("#", committed)
    for new, old in zip(number.findall(drawn), number.findall(committed), strict=True):
        assert abs(float(new) - float(old)) < 0.2
    assert "mean: loss 1 rises, loss 2 falls; UPGrad: loss 1 falls, loss 2 falls" in drawn


# --- files of the project ---------------------------------------------------------------------


def test_project_files_agree_on_version_and_address():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    address = project["project"]["urls"]["Repository"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {jaxmtl.__version__}\n" in citation
    assert f"repository-code: {address}\n" in citation
    assert f"## {jaxmtl.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    fragments = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = README
    for part in fragments["substitutions"]:
        text = re.sub(part["pattern"], part["replacement"], text)
    for link in links(text):
        assert link.startswith("https://"), f"{link} would be broken on the package index"
    assert f"{address}/blob/main/CONTRIBUTING.md" in text


def test_the_first_command_needs_matplotlib_alone():
    """Its extra pulls no data sets and no checkpoints, and its code imports none."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert extras["quickstart"] == ["matplotlib"]
    assert 'pip install -e ".[quickstart]" && python -m experiments.quickstart' in README
    import ast

    tree = ast.parse((ROOT / "experiments" / "quickstart.py").read_text())
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    allowed = {"argparse", "collections", "pathlib", "typing"}
    assert imported - allowed == {"jax", "jaxmtl", "matplotlib", "numpy", "optax"}


def test_the_workflow_runs_what_is_run_here():
    text = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert "run: bash .ci/run" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = [c.rpartition(" ")[2] for c in project["classifiers"] if "Python :: 3." in c]
    assert re.search(r"python: \[(.*)\]", text).group(1) == ", ".join(f'"{v}"' for v in versions)


@pytest.mark.parametrize("name", jaxmtl.methods())
def test_docstrings_say_when_to_use_a_method(name):
    """And signatures print the names that users write."""
    factory = getattr(jaxmtl, name)
    before_arguments = inspect.getdoc(factory).partition("\nArgs:\n")[0]
    assert "Use it " in before_arguments
    printed = str(inspect.signature(factory))
    assert not re.search(r"\b_\w+\.|<class|jaxmtl\.\w+\.", printed), printed
    assert printed.endswith("-> jaxmtl.Aggregator")


def test_ci_walks_the_path_of_a_newcomer_and_builds_the_site():
    """`.ci/newcomer` runs README's and the guide's own words in a new environment."""
    ci, newcomer = ((ROOT / ".ci" / name).read_text() for name in ("run", "newcomer"))
    assert "\nbash .ci/newcomer &\n" in ci
    assert '\nwait "$newcomer"\n' in ci
    assert "-m sphinx -q -W notebooks " in ci
    assert "twine check --strict" in ci
    for page, words in (
        ("README.md", "python -m pip install -e .\n"),
        ("notebooks/guide/getting_started.md", "python -m pip install -e . flax\n"),
    ):
        assert page in newcomer
        assert words in (ROOT / page).read_text()


@pytest.mark.slow
def test_the_path_of_a_newcomer():
    """Within ten minutes of a quiet machine; it makes an environment of its own."""
    command = ["bash", str(ROOT / ".ci" / "newcomer")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.rstrip().endswith("a trained model with logged weights")
