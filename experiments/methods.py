"""The methods under study: the one place where experiments name them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxmtl


def inverse_sqrt(step: jax.Array) -> jax.Array:
    """Return eta_k / eta_1 = 1 / sqrt(1 + (k - 1) / 100), the shape of all learning rates.

    It is O(1 / sqrt k), as corollary 1 of Zhou 2022 asks. The literal 1 / sqrt k falls tenfold in
    the first 100 steps: a rate that is stable at the start is then far too small for the rest.
    """
    return 1 / jnp.sqrt(1 + step / 100)


def _cr(aggregator: jaxmtl.Aggregator, num_tasks: int) -> jaxmtl.Aggregator:
    # The corollary needs the learning rate only up to a factor.
    return jaxmtl.cr_mogm(
        aggregator, alpha="corollary1", learning_rate=inverse_sqrt, num_tasks=num_tasks
    )


def _mean(
    aggregator: optax.GradientTransformationExtraArgs, num_tasks: int
) -> optax.GradientTransformationExtraArgs:
    # Some papers define a sum over tasks: divided by m, one learning rate suits all methods.
    return optax.chain(aggregator, optax.scale(1 / num_tasks))


def pcgrad_mean() -> jaxmtl.Aggregator:
    """Return PCGrad as Zhou 2022 writes it, the mean of the projected gradients.

    It is a rule of its own and not `pcgrad` scaled afterwards: corollary 1 measures how far the
    weights move, and starts them at 1/m.
    """
    inner = jaxmtl.pcgrad().weighting

    def weigh(
        gramian: jax.Array, state: Any, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        weights, state = inner.update(gramian, state, key=key)
        return weights / len(weights), state

    return jaxmtl.from_weighting(weigh, init=inner.init)


# A factory takes the number of tasks m. `krum` and `trimmed_mean` need three tasks or more.
METHODS: dict[str, Callable[[int], optax.GradientTransformationExtraArgs]] = {
    "linear_scalarization": lambda m: jaxmtl.linear_scalarization(num_tasks=m),
    "rgw": lambda m: jaxmtl.rgw(),
    "mgda": lambda m: jaxmtl.mgda(),
    "cr_mgda": lambda m: _cr(jaxmtl.mgda(), m),
    "pcgrad": lambda m: pcgrad_mean(),
    "cr_pcgrad": lambda m: _cr(pcgrad_mean(), m),
    "gradvac": lambda m: _mean(jaxmtl.gradvac(num_tasks=m), m),
    "graddrop": lambda m: _mean(jaxmtl.graddrop(), m),
    "cagrad": lambda m: jaxmtl.cagrad(0.4),
    "cr_cagrad": lambda m: _cr(jaxmtl.cagrad(0.4), m),
    "imtl_g": lambda m: jaxmtl.imtl_g(),
    # Their authors' codes bound the norm of the update by 1 too: it does not vanish with J.
    "nash_mtl": lambda m: jaxmtl.nash_mtl(max_norm=1.0),
    "fairgrad": lambda m: jaxmtl.fairgrad(2.0, max_norm=1.0),
    "aligned_mtl": lambda m: jaxmtl.aligned_mtl(),
    "config": lambda m: _mean(jaxmtl.config(), m),
    "dual_proj": lambda m: jaxmtl.dual_proj(),
    "upgrad": lambda m: jaxmtl.upgrad(),
}
