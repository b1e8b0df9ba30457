"""Flax: a Linen `TrainState` for aggregators, and the routes for NNX modules.

Needs flax, which jaxmtl does not depend on: ``import jaxmtl.flax`` by name.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax

from jaxmtl import arguments, checks, engine, jacobian
from jaxmtl.loop import report_skips
from jaxmtl.types import INPUTS, Aggregator

try:
    from flax import nnx, struct
    from flax.training import train_state
except ImportError as error:
    raise ImportError(
        "jaxmtl.flax needs flax, which is not installed (or too old): pip install flax"
    ) from error

PyTree = Any

# What the methods read, and what optax's line searches and `reduce_on_plateau` do.
UPDATE_INPUTS = (*INPUTS, "task_mask", "value", "grad", "value_fn")
SET_BY_THE_STEP = ("step", "params", "opt_state")


class TrainState(train_state.TrainState, kw_only=True):
    """Flax's train state, with extra arguments for the optimizer and a check of shapes.

    ``apply_gradients(grads=jacobian, losses=losses, batch_stats=stats)`` sorts its keywords by
    name alone: a *field* of the state (``batch_stats`` of a subclass) is replaced, as in Flax;
    an *update input* is passed to ``tx.update``. Update inputs are those of the methods
    (``losses``, ``key``, ``task_mask``, ``preference`` and all others that one of them reads),
    optax's ``value``, ``grad`` and ``value_fn``, and the names in ``extra_args``. Any other name
    is refused, and so is one that is both.

    Attributes:
      step: Counter, increased by every `apply_gradients`.
      apply_fn: Usually the ``apply`` of the model.
      params: Pytree of parameters.
      tx: An optax transformation, with an aggregator first in its chain.
      opt_state: The state of ``tx``.
      extra_args: Further names of update inputs, for rules of your own.
      on_skip: What to do when a step is skipped for a non-finite value: None, ``"print"``,
        ``"raise"`` or a function of the number of skipped steps.

    **Differs from** `flax.training.train_state.TrainState`, which passes no argument on to
    ``tx`` and broadcasts the parameters to ``(m, *shape)`` when no aggregator is in the chain.

    >>> import jax.numpy as jnp, optax
    >>> from jaxmtl import famo
    >>> from jaxmtl.flax import TrainState
    >>> tx = optax.chain(famo(num_tasks=2), optax.sgd(1.0))
    >>> state = TrainState.create(apply_fn=None, params={"w": jnp.zeros(2)}, tx=tx)
    >>> state = state.apply_gradients(
    ...     grads={"w": jnp.eye(2)},
    ...     losses=jnp.array([1.0, 3.0]),
    ...     previous_batch_losses=jnp.zeros(2),
    ... )
    >>> print(state.step, state.params["w"])
    1 [-0.75 -0.25]
    """

    extra_args: tuple[str, ...] = struct.field(pytree_node=False, default=())
    on_skip: Any = struct.field(pytree_node=False, default=None)

    def apply_gradients(self, *, grads: PyTree, **kwargs: Any) -> Self:
        """Takes one step.

        Args:
          grads: The Jacobian, leaves ``(m, *leaf.shape)``; or gradients shaped like ``params``
            where ``tx`` has no aggregator.
          **kwargs: Update inputs and fields of the state, told apart by name.

        Returns:
          The state after the step: ``step`` one higher, ``params`` and ``opt_state`` new, the
          fields that were named replaced.

        Raises:
          ValueError: A name is neither, or both; ``tx`` takes no update inputs; the updates do
            not have the shapes of ``params``.
        """
        fields, inputs = self._sort(kwargs)

        def update(rows: PyTree, opt_state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
            updates, new = self.tx.update(rows, opt_state, params, **inputs)
            checks.check_shapes_stay(opt_state, new)
            checks.check_updates(params, updates)
            report_skips(opt_state, new, self.on_skip)
            return updates, new

        # Flax's own step, which knows parameters that are overwritten by their gradients.
        bound = self.replace(tx=optax.GradientTransformation(self.tx.init, update))
        new = train_state.TrainState.apply_gradients(bound, grads=grads)
        checks.check_updates(self.params, new.params)
        return new.replace(**{"tx": self.tx, **fields})

    def _sort(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        allowed = {*UPDATE_INPUTS, *self.extra_args}
        own = {field.name for field in dataclasses.fields(self)}
        for name in kwargs:
            if name in SET_BY_THE_STEP:
                raise ValueError(
                    f"apply_gradients sets {name} itself: expected other names, got {name}=; use "
                    f"state.replace({name}=...) before or after it"
                )
            if name in own and name in allowed:
                raise ValueError(
                    f"expected every keyword to be a field of the state or an input of tx.update, "
                    f"got {name}=, which is both; rename the field of {type(self).__name__}, or "
                    f"set it with state.replace({name}=...)"
                )
            if name not in own and name not in allowed:
                raise ValueError(
                    f"expected a field of {type(self).__name__} ({', '.join(sorted(own))}) or an "
                    f"input of tx.update ({', '.join(sorted(allowed))}), got {name}=; correct the "
                    f'name, or declare an input of your own by create(..., extra_args=("{name}",))'
                )
        inputs = {name: value for name, value in kwargs.items() if name in allowed}
        if inputs and not isinstance(self.tx, optax.GradientTransformationExtraArgs):
            raise ValueError(
                f"expected a tx that takes {', '.join(inputs)}, got one without extra arguments; "
                "put an aggregator, such as jaxmtl.upgrad(), first in its chain"
            )
        return {name: value for name, value in kwargs.items() if name in own}, inputs


# --- NNX modules --------------------------------------------------------------------------------


class _Functional:
    """A losses function of a module as a function of its parameters; the rest comes back as aux.

    Attributes:
      pure: ``pure(params, keys, *args, **kwargs) -> (losses, (aux, counts, rest))``.
      params: The state of the parameters.
      keys: The random keys; with ``in_axes``, one for each example.
      in_axes: Those of ``pure``.
    """

    def __init__(
        self, losses_fn: Callable[..., Any], model: Any, wrt: Any, in_axes: Any, has_aux: bool
    ) -> None:
        kinds = (wrt, nnx.RngKey, nnx.RngCount, ...)
        parts: Any = nnx.split(model, *kinds)
        graph, self.params, self.keys, counts, rest = parts
        self.model, self.has_aux = model, has_aux
        self.in_axes = None if in_axes is None else (in_axes[0], 0, *in_axes[1:])

        def pure(params: PyTree, keys: PyTree, *args: Any, **kwargs: Any) -> Any:
            module = nnx.merge(graph, params, keys, counts, rest, copy=True)
            found = losses_fn(module, *args, **kwargs)
            losses, aux = found if has_aux else (found, None)
            split: Any = nnx.split(module, *kinds)
            new_counts, new_rest = split[3:]
            same: Any = jax.tree.structure(rest)
            if jax.tree.structure(new_rest) != same:
                raise ValueError(
                    "expected losses_fn to keep the structure of the module's state, got another "
                    "one (a variable was added); return such values with has_aux=True"
                )
            pairs = zip(jax.tree.leaves(new_rest), jax.tree.leaves(rest), strict=True)
            if in_axes is not None and any(new is not old for new, old in pairs):
                raise ValueError(
                    "with in_axes the function sees ONE example: expected a module whose state "
                    "stays, got one that changes it, such as BatchNorm in training; a batch has no "
                    "statistics there: call model.eval() for running averages, or normalize over "
                    "features (LayerNorm, GroupNorm)"
                )
            return losses, (aux, new_counts, new_rest)

        self.pure: Any = pure
        self._sign(losses_fn)

    def _sign(self, losses_fn: Callable[..., Any]) -> None:
        """Gives `pure` the signature of the losses function, by which keywords find their way."""
        signature = inspect.signature(losses_fn)
        first, *others = signature.parameters.values()
        keys = inspect.Parameter("random_keys", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        keys = keys.replace(kind=first.kind)
        self.pure.__signature__ = signature.replace(parameters=[first, keys, *others])

    def arguments(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the arguments of `pure` after the parameters."""
        if self.in_axes is None:
            return (self.keys, *args)
        axes = (self.in_axes[0], *self.in_axes[2:])
        index = jnp.arange(arguments.match(axes, self.params, args).size)
        each = jax.vmap(jax.random.fold_in, (None, 0))
        return (jax.tree.map(lambda key: each(key, index), self.keys), *args)

    def finish(self, value: tuple[Any, Any]) -> Any:
        """Updates the module, once, and returns what the user asked for."""
        losses, (aux, counts, rest) = value
        if self.in_axes is not None:  # every example has drawn as often, and changed nothing else
            counts = jax.tree.map(lambda x: x[0], counts)
            nnx.update(self.model, counts)
        else:
            nnx.update(self.model, counts, rest)
        return (losses, aux) if self.has_aux else losses


def value_and_jacobian(
    losses_fn: Callable[..., Any],
    *,
    wrt: Any = nnx.Param,
    in_axes: tuple[Any, ...] | None = None,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable[..., tuple[Any, PyTree]]:
    """Makes `jaxmtl.value_and_jacobian` for an NNX module.

    The module may have layers with state: batch statistics and the counters of random streams are
    updated in place, once for each call and not once for each task.

    Args:
      losses_fn: ``losses_fn(model, *args, **kwargs) -> (m,)``, or a dict of named losses; with
        ``in_axes``, the loss of ONE example.
      wrt: Filter of the variables that are differentiated, as in ``nnx.Optimizer(..., wrt=)``.
      in_axes: For ``(model, *args)``, with None for the model. Each example then draws random
        numbers of its own (dropout); layers whose state changes are refused, since one example has
        no batch statistics.
      has_aux: Whether ``losses_fn`` returns ``(losses, aux)``.
      chunk_size: See `jaxmtl.value_and_jacobian`.

    Returns:
      ``f(model, *args, **kwargs) -> (losses, jacobian)``, with the Jacobian an ``nnx.State`` of
      leaves (m, *leaf.shape), for ``optimizer.update(model, jacobian, losses=losses)``.

    Raises:
      ValueError: As `jaxmtl.value_and_jacobian`; when tracing, the module's state changes its
        structure, or changes at all with ``in_axes``.

    >>> import jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> import jaxmtl, jaxmtl.flax
    >>> rngs, chain = nnx.Rngs(0), optax.chain(jaxmtl.upgrad(), optax.adam(1e-3))
    >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
    >>> optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    >>> def losses_fn(model, x):
    ...     z = model(x)
    ...     return jnp.stack([jnp.mean(z[:, 0]), jnp.mean(z[:, 1] ** 2)])
    >>> losses, jacobian = jaxmtl.flax.value_and_jacobian(losses_fn)(model, jnp.ones((8, 3)))
    >>> _ = optimizer.update(model, jacobian, losses=losses)
    >>> print(losses.shape, jacobian["layers"][0]["kernel"].shape)
    (2,) (2, 3, 4)
    """

    def evaluate(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        functional = _Functional(losses_fn, model, wrt, in_axes, has_aux)
        route = jacobian.value_and_jacobian(
            functional.pure, in_axes=functional.in_axes, has_aux=True, chunk_size=chunk_size
        )
        value, rows = route(functional.params, *functional.arguments(args), **kwargs)
        return functional.finish(value), rows

    return evaluate


def value_and_gramian(
    losses_fn: Callable[..., Any],
    *,
    wrt: Any = nnx.Param,
    in_axes: tuple[Any, ...] | None = None,
    shared: Any = None,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable[..., tuple[Any, jax.Array, jax.tree_util.Partial]]:
    """Makes `jaxmtl.value_and_gramian` for an NNX module.

    Args:
      losses_fn: See `value_and_jacobian`, as ``wrt``, ``in_axes`` and ``has_aux``.
      wrt: See `value_and_jacobian`.
      in_axes: See `value_and_jacobian`.
      shared: Which parameters count, as in `jaxmtl.value_and_gramian`: a function of the path in
        the ``nnx.State``, or a prefix of it.
      has_aux: See `value_and_jacobian`.
      chunk_size: See `jaxmtl.value_and_gramian`.

    Returns:
      ``f(model, *args, **kwargs) -> (losses, gramian, pullback)``; ``pullback(weights)`` is an
      ``nnx.State`` like the parameters.

    Raises:
      ValueError: As `value_and_jacobian`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import jaxmtl.flax
    >>> model = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
    >>> losses_fn = lambda model, x: jnp.mean(model(x), 0)
    >>> losses, gramian, _ = jaxmtl.flax.value_and_gramian(losses_fn)(model, jnp.ones((4, 2)))
    >>> print(gramian)
    [[2. 0.]
     [0. 2.]]
    """

    def evaluate(
        model: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, jax.Array, jax.tree_util.Partial]:
        functional = _Functional(losses_fn, model, wrt, in_axes, has_aux)
        route = engine.value_and_gramian(
            functional.pure,
            in_axes=functional.in_axes,
            shared=shared,
            has_aux=True,
            chunk_size=chunk_size,
        )
        value, gramian, pull = route(functional.params, *functional.arguments(args), **kwargs)
        return functional.finish(value), gramian, pull

    return evaluate


def value_and_grad(
    losses_fn: Callable[..., Any],
    aggregator: Aggregator,
    *,
    wrt: Any = nnx.Param,
    in_axes: tuple[Any, ...] | None = None,
    shared: Any = None,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable[..., tuple[tuple[Any, PyTree], PyTree]]:
    """Makes `jaxmtl.value_and_grad` for an NNX module: no Jacobian is formed.

    Args:
      losses_fn: See `value_and_jacobian`, as ``wrt``, ``in_axes`` and ``has_aux``.
      aggregator: An `jaxmtl.Aggregator` with a weighting; its state is that of
        ``aggregator.init(nnx.state(model, wrt))``.
      wrt: See `value_and_jacobian`.
      in_axes: See `value_and_jacobian`.
      shared: See `value_and_gramian`.
      has_aux: See `value_and_jacobian`.
      chunk_size: See `jaxmtl.value_and_grad`.

    Returns:
      ``f(model, state, *args, **extra) -> ((losses, state), grads)``, or ``(((losses, aux), state),
      grads)``, with grads an ``nnx.State`` for ``optimizer.update(model, grads)``.

    Raises:
      ValueError: As `value_and_jacobian` and `jaxmtl.value_and_grad`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import jaxmtl, jaxmtl.flax
    >>> model = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
    >>> aggregator = jaxmtl.upgrad()
    >>> state = aggregator.init(nnx.state(model, nnx.Param))
    >>> step = jaxmtl.flax.value_and_grad(lambda model, x: jnp.mean(model(x), 0), aggregator)
    >>> (losses, state), grads = step(model, state, jnp.ones((4, 2)))
    >>> print(grads["kernel"][...])
    [[0.5 0.5]
     [0.5 0.5]]
    """

    def evaluate(model: Any, state: PyTree, *args: Any, **extra: Any) -> Any:
        functional = _Functional(losses_fn, model, wrt, in_axes, has_aux)
        route = engine.value_and_grad(
            functional.pure,
            aggregator,
            in_axes=functional.in_axes,
            shared=shared,
            has_aux=True,
            chunk_size=chunk_size,
        )
        (value, new), grads = route(functional.params, state, *functional.arguments(args), **extra)
        return (functional.finish(value), new), grads

    return evaluate
