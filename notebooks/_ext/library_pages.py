"""Pages made from the library: one for each method, their overview, and the API reference.

Sphinx calls `make_pages` before it reads the sources; the pages lie in ``generated/``, which git
ignores. Everything comes from `jaxmtl.methods`, from docstrings and from ``equations.py``.
"""

import importlib
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from arrows import Arrow, picture
from equations import EQUATIONS

import jaxmtl

# Three conflicting gradients of two parameters: every pair of the long one conflicts.
GRADIENTS = np.array([[-1.6, -0.5], [0.9, -0.8], [0.1, -1.2]])
LOSSES = np.array([2.0, 1.0, 1.5])
STEPS = 10  # rules with a state are shown after that many steps on the same gradients

# By what a method needs, so that a new one finds its place by itself.
FAMILIES = {
    "gramian": ("Weights from the Gramian", "They read the inner products of the gradients."),
    "losses": ("Loss balancing", "They read the losses: the price of one gradient."),
    "both": ("Gramian and losses", "They read the inner products and the losses."),
    "coordinates": ("Coordinates", "They read the gradients themselves, and need the Jacobian."),
    "batches": ("Independent batches", "They read the products of gradients of two batches."),
    "fixed": ("Fixed and random weights", "They read nothing: the baselines."),
    "combinators": ("Combinators", "An aggregator in, an aggregator out."),
}

MODULES = (
    ("jaxmtl", "The package"),
    ("jaxmtl.metrics", "Metrics"),
    ("jaxmtl.solvers", "Solvers"),
    ("jaxmtl.fronts", "Pareto fronts"),
    ("jaxmtl.rewards", "Rewards"),
    ("jaxmtl.flax", "Flax"),
)


def family(method: jaxmtl.registry.Method) -> str:
    """Returns the family of a method, from what it needs."""
    needs = set(method.needs)
    if "rule" in needs:
        return "combinators"
    if "jacobian" in needs:
        return "coordinates"
    if "cross_gramian" in needs:
        return "batches"
    if "gramian" in needs:
        return "both" if "losses" in needs else "gramian"
    return "losses" if needs else "fixed"


_OF_ROUTE = "(1 + 2m)/3 gradients with the Jacobian, about 1 + 1.25 m without; one with `encoder=`"
PRICES = {
    "fixed": "one gradient, whatever m is",
    "losses": "one gradient, whatever m is",
    "gramian": _OF_ROUTE,
    "both": _OF_ROUTE,
    "coordinates": "(1 + 2m)/3 gradients, and the memory of m of them",
    "batches": "the Jacobians or Gramians of two or three batches",
    "combinators": "that of the rule inside",
}


def make_method(name: str, num_tasks: int) -> jaxmtl.Aggregator:
    """Returns a method with its defaults, and the library's own example where there are none."""
    needed = jaxmtl.registry._ENTRIES[name].example()
    # Three gradients, of which none is Byzantine: the rule needs m >= f + 3.
    needed |= {"num_byzantine": 0} if name == "krum" else {}
    return jaxmtl.make(name, num_tasks=num_tasks, **needed)


def update_of(name: str) -> np.ndarray:
    """Returns a method's update on the three gradients, after some steps on the same."""
    aggregator, params = make_method(name, len(GRADIENTS)), jnp.zeros(2)
    jacobian, losses = jnp.asarray(GRADIENTS, jnp.float32), jnp.asarray(LOSSES, jnp.float32)
    known = {
        "losses": losses,
        "previous_batch_losses": losses * jnp.array([0.9, 1.0, 1.1]),
        "cross_gramian": jaxmtl.gramian(jacobian),
    }
    # An input of its own that a new rule needs must be added above.
    inputs = {key: known[key] for key in aggregator.rule.needs - {"gramian", "jacobian"}}

    def step(state: object, _: None) -> tuple[object, jax.Array]:
        update, state = aggregator.update(jacobian, state, params, **inputs)
        return state, update

    updates = jax.lax.scan(step, aggregator.init(params), length=STEPS)[1]
    return np.asarray(updates[-1])


def draw(name: str) -> str:
    """Returns the figure of a method and a sentence on it."""
    update = update_of(name)
    changes = GRADIENTS @ update
    longest, length = np.linalg.norm(GRADIENTS, axis=1).max(), np.linalg.norm(update)
    # Lengths differ by what papers define (a sum, a mean): the arrow shows at most the longest.
    shown = update * min(1.0, longest / max(length, 1e-12))
    arrows = [Arrow(-g, f"task{i + 1}", f"−g{'₁₂₃'[i]}") for i, g in enumerate(GRADIENTS)]
    svg = picture([([*arrows, Arrow(-shown, "update", "")], "")], GRADIENTS)
    falls = [
        f"loss {i + 1} {'falls' if c > 1e-6 else 'rises' if c < -1e-6 else 'stays'}"
        for i, c in enumerate(changes)
    ]
    method = jaxmtl.methods()[name]
    note = " One draw of many." if "random" in method.properties else ""
    return (
        f"{svg}\n*Thick: its step on three conflicting gradients, of length {length:.2f}: "
        f"{', '.join(falls)}, to first order. Grey: the steps that make no loss worse.{note}*"
    )


def _reference(reference: str, bibliography: str) -> str:
    key = re.sub(r" \(.*\)", "", reference)
    anchor = re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")
    return (
        f"[{reference}](../../guide/bibliography.md#{anchor})"
        if f"({anchor})=" in bibliography
        else reference
    )


def method_page(name: str, bibliography: str) -> str:
    """Returns the page of a method; typeset equation and link to the paper where they are known."""
    method = jaxmtl.methods()[name]
    words = {"gramian": "the Gramian", "jacobian": "the Jacobian", "rule": "a rule with weights"}
    needs = ", ".join(words.get(n, f"`{n}`") for n in method.needs) or "nothing"
    extra = ", ".join(f"`{a}`" for a in method.accepts) or "nothing"
    equation = f"\n$$\n{EQUATIONS[name]}\n$$\n" if name in EQUATIONS else ""
    logs = "`mtl_weights`" if method.logs_weights else "no weights"
    return f"""# {name}

{method.update[0].upper()}{method.update[1:]}.
{equation}
{draw(name)}

| | |
|---|---|
| needs | {needs}; takes {extra} where given |
| price | {PRICES[family(method)]} |
| properties | {", ".join(method.properties) or "none of the listed"} |
| without the Jacobian | {"yes" if method.has_weighting else "no"} |
| logs, given `num_tasks` | {logs} |
| reference | {_reference(method.reference, bibliography)} |

```{{eval-rst}}
.. currentmodule:: jaxmtl

.. autofunction:: {name}
```
"""


def overview() -> str:
    """Returns the page that lists the families, with the table of contents."""
    lines = [
        "# Methods, one by one\n",
        "By what they read. The symbols of the equations: $g_i$ the "
        "gradients, $G$ their Gramian, $\\ell_i$ the losses, $w$ the weights, $u$ the update, "
        "$\\Delta$ the simplex, $p$ the preference ($1/m$ by default).\n",
    ]
    for key, (title, text) in FAMILIES.items():
        names = [n for n, m in jaxmtl.methods().items() if family(m) == key]
        if names:
            entries = "\n".join(names)
            lines.append(
                f"## {title}\n\n{text}\n\n```{{toctree}}\n:maxdepth: 1\n\n{entries}\n```\n"
            )
    return "\n".join(lines)


def public_names(module: str) -> list[str]:
    """Returns the names that a module of the library makes public."""
    found = importlib.import_module(module)
    if hasattr(found, "__all__"):
        return [n for n in found.__all__ if not inspect.ismodule(getattr(found, n))]
    return [
        name
        for name, thing in vars(found).items()
        if getattr(thing, "__module__", "") == module
        and not name.startswith("_")
        and (inspect.isfunction(thing) or inspect.isclass(thing))
    ]


def api_page() -> str:
    """Returns the API reference: every public name; methods by a link to their own page."""
    methods = jaxmtl.methods()
    lines = ["# API reference\n"]
    for module, title in MODULES:
        if importlib.util.find_spec(module) is None:
            continue
        names = public_names(module)
        lines.append(f"## {title}: `{module}`\n")
        if module == "jaxmtl":
            lines.append("Methods have pages of their own:\n")
            lines += [
                f"* [`{n}`](methods/{n}.md): {methods[n].update}" for n in names if n in methods
            ]
            lines.append("")
            names = [n for n in names if n not in methods]
        lines.append("```{eval-rst}\n" + f".. currentmodule:: {module}\n")
        for name in names:
            thing = getattr(importlib.import_module(module), name)
            kind = "autoclass" if inspect.isclass(thing) else "autofunction"
            lines.append(f".. {kind}:: {name}")
            if kind == "autoclass" and module == "jaxmtl.flax":
                lines.append("   :members: apply_gradients")
            lines.append("")
        lines.append("```\n")
    return "\n".join(lines)


def write_pages(folder: Path, bibliography: str) -> list[Path]:
    """Writes all pages, leaves unchanged ones alone, and returns their paths."""
    pages = {"api.md": api_page(), "methods/index.md": overview()}
    pages |= {f"methods/{name}.md": method_page(name, bibliography) for name in jaxmtl.methods()}
    (folder / "methods").mkdir(parents=True, exist_ok=True)
    for old in folder.rglob("*.md"):
        if str(old.relative_to(folder)) not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    return [folder / name for name in pages]


def make_pages(app) -> None:
    """Writes the pages before Sphinx reads the sources."""
    source = Path(app.srcdir)
    write_pages(source / "generated", (source / "guide" / "bibliography.md").read_text())


def escape_stars(app, what, name, obj, options, lines) -> None:
    """Keeps the star of a shape, (m, *leaf.shape), from opening an emphasis."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = line.split("``")  # literals are the odd ones
            parts[::2] = [re.sub(r"(?<=, )\*(?=\w)", r"\\*", part) for part in parts[::2]]
            lines[i] = "``".join(parts)


def setup(app) -> dict[str, bool]:
    """Registers the extension."""
    app.connect("builder-inited", make_pages)
    app.connect("autodoc-process-docstring", escape_stars, priority=900)  # after napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
