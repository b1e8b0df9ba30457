"""Norms of per-example gradients: the diagonal of the Gramian alone, B norms and not B^2 products.

For a dense layer at one position the squared norm of an example's gradient is that of its input
times that of its output cotangent; at T positions it is a sum over pairs of positions. Where a
parameter's gradients are dearer that way, or no such rule is known, they are formed, as for the
Gramian; the choice is made anew, for a diagonal.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmtl import keywords, linalg
from jaxmtl.engine.per_example import PerExample
from jaxmtl.engine.route import Options

PyTree = Any


def per_example_norms(
    losses_fn: Callable[..., Any],
    *,
    in_axes: Any,
    shared: Any = None,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, jax.Array, jax.tree_util.Partial]]:
    """Makes a function that returns losses, norms of the gradients of examples and ``w -> J^T w``.

    One forward and one backward pass, like `value_and_gramian`, and then B norms.

    Args:
      losses_fn: ``losses_fn(params, *example, **kwargs) -> ()``, the loss of one example, or its
        losses of any shape, which count as so many examples.
      in_axes: Which axes of ``(params, *args)`` run over examples, as in `value_and_gramian`.
      shared: See `value_and_gramian`: parameters marked False do not count in the norms.
      has_aux: Whether ``losses_fn`` returns ``(losses, aux)``.

    Returns:
      A function ``(params, *args, **kwargs) -> (losses, norms, pullback)``, or ``((losses, aux),
      norms, pullback)``: losses and norms (B,), the norms at least float32, the pullback as in
      `value_and_gramian`: ``pullback(weights)`` is the weighted sum of the gradients.

    Raises:
      ValueError: ``in_axes`` is None, or as in `value_and_gramian`.

    **Properties**: the diagonal of the Gramian of `value_and_gramian`, up to rounding. Every
    gradient is first scaled by a power of two, so that no square overflows or vanishes.

    **Reference**: Goodfellow 2015, "Efficient per-example gradient computations" (dense layers);
    Li et al. 2022, "Large language models can be strong differentially private learners", section
    4 (sequences).

    >>> import jax.numpy as jnp, jaxmtl
    >>> def example_loss(params, x):
    ...     return jnp.vdot(params, x) ** 2 / 2
    >>> params, batch = jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0], [3.0, 4.0]])
    >>> losses, norms, pullback = jaxmtl.per_example_norms(example_loss, in_axes=(None, 0))(
    ...     params, batch
    ... )
    >>> print(norms)  # of the gradients (1, 0) and 11 (3, 4)
    [ 1. 55.]
    >>> print(pullback(1 / norms))  # the sum of the unit gradients
    [1.6 0.8]
    """
    if in_axes is None:
        raise ValueError(
            "expected in_axes, which says what runs over examples, got None; write for instance "
            "in_axes=(None, 0), and pass the loss of one example"
        )
    options = Options(losses_fn, in_axes, None, shared, has_aux)

    def evaluate(
        params: PyTree, *args: Any, **kwargs: Any
    ) -> tuple[Any, jax.Array, jax.tree_util.Partial]:
        keywords.check(options.takes(len(args)), kwargs)
        found = PerExample(options, params, args, kwargs, diagonal=True)
        value = found.aux.returned(found.losses, has_aux, True)
        return value, found.norms(), found.pullback

    return evaluate


def clipped_sum(
    losses_fn: Callable[..., Any],
    max_norm: float | jax.Array,
    *,
    in_axes: Any,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, PyTree]]:
    """Makes a function that returns losses and the sum of the clipped gradients of the examples.

    ``sum_i min(1, C / |g_i|) g_i``: the deterministic part of DP-SGD, and a bound on what one
    example can do elsewhere. Noise and accounting belong to a library for them; the sum changes by
    at most C, up to rounding, when an example is added or removed.

    Args:
      losses_fn: As in `per_example_norms`.
      max_norm: C, positive; may be traced.
      in_axes: As in `per_example_norms`.
      has_aux: As in `per_example_norms`.

    Returns:
      A function ``(params, *args, **kwargs) -> (losses, grads)``, or ``((losses, aux), grads)``,
      with losses (B,) and grads like params. Divide by the batch size after the noise.

    Raises:
      ValueError: ``max_norm`` is known and not positive, or as in `per_example_norms`.

    **Reference**: Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1.

    **Differs from** jax_privacy's ``clipped_grad``, which clips gradients one by one or in
    microbatches, and by default gives weight 0 to an example whose gradient is not finite: here
    such an example makes the sum not finite.

    >>> import jax.numpy as jnp, jaxmtl
    >>> def example_loss(params, x):
    ...     return jnp.vdot(params, x) ** 2 / 2
    >>> params, batch = jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0], [3.0, 4.0]])
    >>> losses, grads = jaxmtl.clipped_sum(example_loss, 5.0, in_axes=(None, 0))(params, batch)
    >>> print(grads)  # (1, 0) + (3, 4)
    [4. 4.]
    """
    try:
        known = float(max_norm)
    except jax.errors.ConcretizationTypeError:
        known = 1.0
    if not known > 0:
        raise ValueError(f"expected a positive max_norm, got {max_norm}")
    evaluate = per_example_norms(losses_fn, in_axes=in_axes, has_aux=has_aux)

    def value_and_sum(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        losses, norms, pullback = evaluate(params, *args, **kwargs)
        return losses, pullback(jnp.where(norms > max_norm, max_norm / norms, 1))

    return value_and_sum


class GradientNoise(NamedTuple):
    """What `gradient_noise` estimates.

    Attributes:
      variance: Scalar, the trace of the covariance of one example's gradient.
      squared_norm: Scalar, the squared norm of the expected gradient; negative where noise hides
        it.
      scale: Scalar, ``variance / squared_norm``: the batch size at which noise and gradient are
        equal; infinity where ``squared_norm`` is not positive.
    """

    variance: jax.Array
    squared_norm: jax.Array
    scale: jax.Array


def gradient_noise(norms: jax.Array, mean_gradient: PyTree) -> GradientNoise:
    """Estimates the noise of a gradient from the norms of a batch of examples.

    With the mean gradient g of B examples, ``variance = (sum |g_i|^2 - B |g|^2) / (B - 1)`` and
    ``squared_norm = |g|^2 - variance / B``, both without bias; their ratio, the simple noise scale,
    is best taken of running means of the two.

    Args:
      norms: (B,) with B at least 2, from `per_example_norms`.
      mean_gradient: Pytree, the mean of the gradients: ``pullback(jnp.full(B, 1 / B))``.

    Returns:
      A `GradientNoise`.

    Raises:
      ValueError: There are fewer than two examples.

    **Reference**: McCandlish et al. 2018, "An empirical model of large-batch training", section 2
    and appendix A.1.

    >>> import jax.numpy as jnp, jaxmtl
    >>> norms, mean = jnp.array([1.0, 1.0]), jnp.array([0.5, 0.5])  # of (1, 0) and (0, 1)
    >>> print(jaxmtl.gradient_noise(norms, mean).variance)
    1.0
    """
    if jnp.ndim(norms) != 1 or jnp.size(norms) < 2:
        raise ValueError(
            f"expected the norms of at least two examples, got shape {jnp.shape(norms)}; a "
            "variance needs two"
        )
    count = norms.shape[0]
    leaves = [x.astype(linalg.accumulation_dtype(x)) for x in jax.tree.leaves(mean_gradient)]
    square = jnp.sum(jnp.stack([jnp.sum(x**2) for x in leaves]))
    variance = jnp.maximum(jnp.sum(norms**2) - count * square, 0) / (count - 1)
    squared_norm = square - variance / count
    found = squared_norm > 0
    scale = jnp.where(found, variance / jnp.where(found, squared_norm, 1), jnp.inf)
    return GradientNoise(variance, squared_norm, scale)
