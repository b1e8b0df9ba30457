"""The conformance table: one row per public method.

The tests cross it with their checks, and the README's table is printed from it by
``python -m tests.methods``.
"""

from collections.abc import Callable
from dataclasses import dataclass

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
    logs: bool = True  # has mtl_weights when num_tasks is given


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
