"""The conformance table: one row per public method.

The tests cross it with their checks, and the README's table is printed from it by
``python -m tests.methods``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import optax

import jaxmtl


@dataclass(frozen=True)
class Method:
    """A method and what is claimed of it."""

    name: str
    make: Callable[[int], optax.GradientTransformationExtraArgs]  # num_tasks -> aggregator
    rule: str
    reference: str
    needs: str = "Gramian"  # what the README says it needs
    inputs: tuple[str, ...] = ()  # keyword inputs of update beyond the gradients
    non_conflicting: bool = False
    linear_under_scaling: bool = False
    weighted: bool = True
    scale_free: bool = True  # multiplying by 2^k changes no bit of the weights
    degree: float | None = 1.0  # of homogeneity; None: not homogeneous
    random: bool = False
    stateful: bool = False  # state that depends on the gradients seen
    min_tasks: int = 1
    solver: bool = False  # iterates, so that float32 is tested as well
    masks: bool = True
    equivariant: bool = True
    logs: bool = True  # has mtl_weights when num_tasks is given


def _loss_rule(name: str, make, rule: str, reference: str, **claims) -> Method:
    """A rule on the losses alone, whose weights do not depend on the gradients."""
    inputs = claims.pop("inputs", ("losses",))
    needs = ", ".join(f"`{name}`" for name in inputs)
    return Method(
        name,
        make,
        rule,
        reference,
        needs=needs,
        inputs=inputs,
        linear_under_scaling=True,
        **claims,
    )


METHODS = (
    Method(
        "linear_scalarization",
        lambda m: jaxmtl.linear_scalarization(),
        "fixed weights, 1/m by default",
        "any",
        needs="nothing",
        linear_under_scaling=True,
        logs=False,
    ),
    Method(
        "rgw",
        lambda m: jaxmtl.rgw(num_tasks=m),
        "softmax of Gaussian noise",
        "Lin 2021",
        needs="nothing",
        linear_under_scaling=True,
        random=True,
    ),
    Method(
        "mgda",
        lambda m: jaxmtl.mgda(num_tasks=m),
        "least norm in the convex hull",
        "Desideri 2012",
        non_conflicting=True,
        solver=True,
    ),
    Method(
        "upgrad",
        lambda m: jaxmtl.upgrad(num_tasks=m),
        "mean of the gradients projected onto their dual cone",
        "Quinton and Rey 2024",
        non_conflicting=True,
        linear_under_scaling=True,
        solver=True,
    ),
    Method(
        "dual_proj",
        lambda m: jaxmtl.dual_proj(num_tasks=m),
        "mean gradient projected onto the dual cone",
        "Lopez-Paz 2017",
        non_conflicting=True,
        solver=True,
    ),
    Method(
        "pcgrad",
        lambda m: jaxmtl.pcgrad(num_tasks=m),
        "sum of gradients projected off those in conflict, in random order",
        "Yu 2020",
        linear_under_scaling=True,
        random=True,
    ),
    Method(
        "gradvac",
        lambda m: jaxmtl.gradvac(num_tasks=m),
        "sum of gradients turned to running target cosines",
        "Wang 2021",
        random=True,
        stateful=True,
    ),
    Method(
        "cagrad",
        lambda m: jaxmtl.cagrad(0.5, num_tasks=m),
        "best worst improvement in a ball around the mean",
        "Liu 2021a",
        solver=True,
    ),
    Method(
        "imtl_g",
        lambda m: jaxmtl.imtl_g(num_tasks=m),
        "equal projections on every gradient",
        "Liu 2021b",
    ),
    Method(
        "nash_mtl",
        lambda m: jaxmtl.nash_mtl(num_tasks=m),
        "Nash bargaining, G a = 1/a",
        "Navon 2022",
        non_conflicting=True,
        scale_free=False,
        degree=0.0,
        solver=True,
    ),
    Method(
        "fairgrad",
        lambda m: jaxmtl.fairgrad(2.0, num_tasks=m),
        "alpha-fairness, G w = w^(-1/alpha)",
        "Ban and Ji 2024",
        non_conflicting=True,
        scale_free=False,
        degree=-1 / 3,
        solver=True,
    ),
    Method(
        "aligned_mtl",
        lambda m: jaxmtl.aligned_mtl(num_tasks=m),
        "equal singular values (min, median, rmse)",
        "Senushkin 2023",
    ),
    Method(
        "config",
        lambda m: jaxmtl.config(num_tasks=m),
        "equal cosines with every gradient",
        "Liu 2024",
    ),
    Method(
        "krum",
        lambda m: jaxmtl.krum(1, num_tasks=m),
        "the gradient nearest to its neighbours",
        "Blanchard 2017",
        min_tasks=5,  # at m = f + 3 the nearest two always tie
    ),
    Method(
        "graddrop",
        lambda m: jaxmtl.graddrop(num_tasks=m),
        "per coordinate, gradients of one random sign",
        "Chen 2020",
        needs="coordinates",
        weighted=False,
        random=True,
        logs=False,
    ),
    Method(
        "trimmed_mean",
        lambda m: jaxmtl.trimmed_mean(1, num_tasks=m),
        "per coordinate, mean without the extremes",
        "Yin 2018",
        needs="coordinates",
        weighted=False,
        min_tasks=3,
        logs=False,
    ),
    Method(
        "sdmgrad",
        lambda m: jaxmtl.sdmgrad(num_tasks=m),
        "common direction near a preferred one, from independent batches",
        "Xiao 2023",
        needs="`cross_gramian`",
        inputs=("cross_gramian",),
        scale_free=False,
        degree=None,
        stateful=True,
    ),
    Method(
        "modo",
        lambda m: jaxmtl.modo(num_tasks=m),
        "one step a call towards the least norm, from independent batches",
        "Chen 2023",
        needs="`cross_gramian`",
        inputs=("cross_gramian",),
        scale_free=False,
        degree=None,
        stateful=True,
    ),
    Method(
        "moco",
        lambda m: jaxmtl.moco(num_tasks=m, initial="first"),
        "tracked gradients, combined towards the least norm",
        "Fernando 2022",
        needs="coordinates",
        weighted=False,
        scale_free=False,
        degree=None,
        stateful=True,
    ),
    Method(
        "excess_mtl",
        lambda m: jaxmtl.excess_mtl(num_tasks=m),
        "weights to tasks whose excess risk falls least",
        "He 2024",
        needs="coordinates",
        weighted=False,
        scale_free=False,
        degree=None,
        stateful=True,
    ),
    Method(
        "db_mtl",
        lambda m: jaxmtl.db_mtl(num_tasks=m),
        "tracked gradients of log losses, all of the largest norm",
        "Lin 2023",
        needs="coordinates, `losses`",
        inputs=("losses",),
        weighted=False,
        scale_free=False,
        stateful=True,
        logs=False,
    ),
    _loss_rule("scale_invariant", lambda m: jaxmtl.scale_invariant(num_tasks=m), "1 / l", "-"),
    _loss_rule(
        "rlw",
        lambda m: jaxmtl.rlw(num_tasks=m),
        "softmax of Gaussian noise",
        "Lin 2021",
        random=True,
    ),
    _loss_rule(
        "dwa",
        lambda m: jaxmtl.dwa(num_tasks=m),
        "softmax of the losses' rates of change",
        "Liu 2019",
        stateful=True,
    ),
    _loss_rule(
        "uncertainty_weighting",
        lambda m: jaxmtl.uncertainty_weighting(num_tasks=m),
        "learned variances",
        "Kendall 2018",
        stateful=True,
    ),
    _loss_rule(
        "imtl_l",
        lambda m: jaxmtl.imtl_l(num_tasks=m),
        "learned scales, e^s l - s",
        "Liu 2021b",
        stateful=True,
    ),
    Method(
        "imtl",
        lambda m: jaxmtl.imtl(num_tasks=m),
        "`imtl_l`, then `imtl_g` on the shared part",
        "Liu 2021b",
        needs="Gramian, `losses`",
        inputs=("losses",),
        stateful=True,
    ),
    Method(
        "gradnorm",
        lambda m: jaxmtl.gradnorm(num_tasks=m),
        "weights learned until gradient norms follow training rates",
        "Chen 2018",
        needs="Gramian, `losses`",
        inputs=("losses",),
        scale_free=False,
        degree=None,
        stateful=True,
    ),
    _loss_rule("gls", lambda m: jaxmtl.gls(num_tasks=m), "geometric mean", "Chennupati 2019"),
    _loss_rule(
        "stch", lambda m: jaxmtl.stch(num_tasks=m), "smooth maximum of the losses", "Lin 2024"
    ),
    _loss_rule(
        "famo",
        lambda m: jaxmtl.famo(num_tasks=m),
        "equal rates of improvement, amortised",
        "Liu 2023",
        inputs=("losses", "previous_batch_losses"),
        stateful=True,
    ),
    _loss_rule(
        "go4align",
        lambda m: jaxmtl.go4align(num_tasks=m),
        "groups of tasks that lag together",
        "Shen 2024",
        stateful=True,
    ),
    _loss_rule(
        "ldc_mtl",
        lambda m: jaxmtl.ldc_mtl(num_tasks=m),
        "bilevel: loss discrepancy above, router weights below",
        "Xiao 2025",
        stateful=True,
        equivariant=False,
    ),
    Method(
        "cr_mogm",
        lambda m: jaxmtl.cr_mogm(jaxmtl.mgda(), num_tasks=m),
        "another rule's weights, averaged over steps",
        "Zhou 2022",
        needs="a rule",
        stateful=True,
        solver=True,
    ),
    Method(
        "every_k",
        lambda m: jaxmtl.every_k(jaxmtl.mgda(), 2, num_tasks=m),
        "another rule's weights, renewed every k steps",
        "Navon 2022",
        needs="a rule",
        stateful=True,
    ),
    Method(
        "scale_rows",
        lambda m: jaxmtl.scale_rows(jaxmtl.mgda(), by="norm", num_tasks=m),
        "another rule's weights on rows divided by norm or loss",
        "Sener and Koltun 2018",
        needs="a rule",
    ),
)

# Inputs of `update` beyond the gradients, of one number of tasks and one dtype.
INPUTS = {
    "losses": lambda m: jnp.linspace(0.5, 1.5, m),
    "previous_batch_losses": lambda m: jnp.linspace(0.4, 1.2, m),
    "cross_gramian": lambda m: jnp.eye(m) + 0.1 * jnp.arange(m),
}

BY_NAME = {method.name: method for method in METHODS}


def table() -> str:
    """Returns the README's table of methods in Markdown."""
    lines = [
        "| method | update | needs | properties | reference |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        properties = [
            name
            for name, holds in (
                ("non-conflicting", method.non_conflicting),
                ("linear under scaling", method.linear_under_scaling),
                ("weighted", method.weighted),
                ("scale-free", method.scale_free),
                ("random", method.random),
            )
            if holds
        ]
        lines.append(
            f"| `{method.name}` | {method.rule} | {method.needs} | {', '.join(properties)} | "
            f"{method.reference} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
