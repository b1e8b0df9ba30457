"""The conformance table: one row per public method, with what the tests must know of it.

Its needs, properties and reference come from the library (`jaxmtl.methods`); the table of the
documentation is printed from them by ``python -m tests.methods``.
"""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import pytest

import jaxmtl

DESCRIPTIONS = jaxmtl.methods()


@dataclass(frozen=True)
class Method:
    """A method and what is claimed of it beyond its description."""

    name: str
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    degree: float | None = 1.0  # of homogeneity; None: not homogeneous
    stateful: bool = False  # state that depends on the gradients seen
    min_tasks: int = 1
    solver: bool = False  # iterates, so that float32 is tested as well
    equivariant: bool = True

    def make(self, m: int):
        """The method for m tasks."""
        return jaxmtl.make(self.name, num_tasks=m, **self.hyperparameters)

    @property
    def describe(self):
        return DESCRIPTIONS[self.name]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Keyword inputs of update that the method cannot do without."""
        rule = self.make(max(3, self.min_tasks)).rule
        return tuple(sorted(rule.needs - {"gramian", "jacobian"}))

    @property
    def needs(self) -> str:
        """What the table says it needs."""
        words = {"gramian": "Gramian", "jacobian": "coordinates", "rule": "a rule"}
        return ", ".join(words.get(n, f"`{n}`") for n in self.describe.needs) or "nothing"

    @property
    def weighted(self) -> bool:
        return self.describe.has_weighting

    @property
    def logs(self) -> bool:
        return self.weighted and self.describe.logs_weights

    def __getattr__(self, name: str) -> bool:
        if name not in ("non_conflicting", "linear_under_scaling", "scale_free", "random"):
            raise AttributeError(name)
        words = "non-conflicting" if name == "non_conflicting" else name.replace("_", " ")
        return words in [p.replace("scale-free", "scale free") for p in self.describe.properties]


METHODS = (
    Method("linear_scalarization"),
    Method("rgw"),
    Method("mgda", solver=True),
    Method("upgrad", solver=True),
    Method("dual_proj", solver=True),
    Method("pcgrad"),
    Method("pcd", degree=None, stateful=True, solver=True, equivariant=False),
    Method("gradvac", stateful=True),
    Method("cagrad", solver=True),
    Method("conic_grad", solver=True),
    Method("dcgd"),
    Method("dibs_mtl", degree=0.0),
    Method("imtl_g"),
    Method("nash_mtl", degree=0.0, solver=True),
    Method("fairgrad", {"alpha": 2.0}, degree=-1 / 3, solver=True),
    Method("aligned_mtl"),
    Method("config"),
    Method("krum", min_tasks=5),  # at m = f + 3 the nearest two always tie
    Method("graddrop"),
    Method("trimmed_mean", min_tasks=3),
    Method("bloop", stateful=True, equivariant=False),
    Method("sdmgrad", degree=None, stateful=True),
    Method("modo", degree=None, stateful=True),
    Method("moco", {"initial": "first"}, degree=None, stateful=True),
    Method("excess_mtl", degree=None, stateful=True),
    Method("db_mtl", stateful=True),
    Method("scale_invariant"),
    Method("rlw"),
    Method("dwa", stateful=True),
    Method("uncertainty_weighting", stateful=True),
    Method("imtl_l", stateful=True),
    Method("imtl", stateful=True),
    Method("gradnorm", degree=None, stateful=True),
    Method("gls"),
    Method("stch"),
    Method("tchebycheff"),
    Method("cosmos"),
    Method("pbi"),
    Method("hypervolume_scalarization", {"reference": 2.0}),
    Method("famo", stateful=True),
    Method("go4align", stateful=True),
    Method("epo", solver=True),
    Method("pmgda", degree=None, solver=True),
    Method("ldc_mtl", stateful=True, equivariant=False),
    Method("cr_mogm", {"aggregator": jaxmtl.mgda()}, stateful=True, solver=True),
    Method("every_k", {"aggregator": jaxmtl.mgda(), "k": 2}, stateful=True),
    Method("scale_rows", {"aggregator": jaxmtl.mgda(), "by": "norm"}),
)

# Inputs of `update` beyond the gradients, of one number of tasks and one dtype.
INPUTS = {
    "losses": lambda m: jnp.linspace(0.5, 1.5, m),
    "previous_batch_losses": lambda m: jnp.linspace(0.4, 1.2, m),
    "cross_gramian": lambda m: jnp.eye(m) + 0.1 * jnp.arange(m)[None, :],
}

BY_NAME = {method.name: method for method in METHODS}

# One of each kind of computation: fixed weights, quadratic programs, random orders, singular
# values, equations of bargaining, a pseudo-inverse, coordinates without and with a state, losses
# with a state, heads of their own, a cross-Gramian, learned weights.
KINDS = (
    "linear_scalarization",
    "mgda",
    "upgrad",
    "pcgrad",
    "aligned_mtl",
    "nash_mtl",
    "config",
    "graddrop",
    "moco",
    "famo",
    "imtl",
    "sdmgrad",
    "ldc_mtl",
)


def sweep(names, quick=KINDS):
    """Parameters for a test of many methods that compiles much: one of each kind is quick."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in quick)) for name in names]


def table() -> str:
    """Returns the documentation's table of methods in Markdown."""
    lines = [
        "| method | update | needs | properties | reference |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        found = method.describe
        lines.append(
            f"| `{method.name}` | {found.update} | {method.needs} | "
            f"{', '.join(found.properties)} | {found.reference} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
