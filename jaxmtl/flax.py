"""A Flax `TrainState` whose optimizer receives losses, keys and masks.

Needs flax, which jaxmtl does not depend on: ``import jaxmtl.flax`` by name.
"""

import dataclasses
from typing import Any

import optax

from jaxmtl import checks
from jaxmtl.loop import report_skips
from jaxmtl.types import INPUTS

try:
    from flax import struct
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

    def apply_gradients(self, *, grads: PyTree, **kwargs: Any) -> "TrainState":
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
            checks.check_state(opt_state, new)
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
