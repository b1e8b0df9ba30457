"""The networks of actor and critic: one for all tasks, a head for each task, or one per task.

Parameters are ``{"trunk": ..., "heads": ...}``: the trunk is shared, heads have a leading axis of
tasks. A network that all tasks share has a trunk alone, one per task heads alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

Params = Any
KINDS = ("shared", "multi_head", "single")


class Dense(nn.Module):
    """Dense layers, as many as widths, with a rectifier after all of them but for ``outputs``."""

    widths: tuple[int, ...]
    outputs: int | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, inputs) to (b, outputs), or to the last hidden layer."""
        initial = nn.initializers.xavier_uniform()
        for width in self.widths:
            x = nn.relu(nn.Dense(width, kernel_init=initial)(x))
        return x if self.outputs is None else nn.Dense(self.outputs, kernel_init=initial)(x)


class Network(NamedTuple):
    """A network for m tasks."""

    init: Callable[[jax.Array], Params]  # from a key
    apply: Callable[[Params, jax.Array, jax.Array], jax.Array]  # of one task: (b, inputs), (m,)
    axes: dict[str, int | None]  # of the parameters over tasks, as ``jax.vmap`` wants them


def make_network(
    kind: str, num_tasks: int, inputs: int, outputs: int, widths: tuple[int, ...], twins: bool
) -> Network:
    """Makes a network.

    Args:
      kind: One of `KINDS`. ``"shared"`` sees the task as a one-hot vector beside its input.
      num_tasks: m.
      inputs: Size of an input without the task.
      outputs: Of a network.
      widths: Of the hidden layers.
      twins: Whether there are two of it, stacked: outputs are then (2, b, outputs).

    Returns:
      Its functions; ``apply`` takes the parameters of one task.

    Raises:
      ValueError: The kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"expected a network of {KINDS}, got {kind!r}; take one of these")
    seen = inputs + num_tasks * (kind == "shared")
    trunk = Dense(widths, None if kind == "multi_head" else outputs)
    head = Dense((), outputs)

    def initializer(module: nn.Module, size: int) -> Callable[[jax.Array], Params]:
        def init(key: jax.Array) -> Params:
            return module.init(key, jnp.zeros((1, size)))["params"]

        return _stacked(init, 2) if twins else init

    def init(key: jax.Array) -> Params:
        if kind == "shared":
            return {"trunk": initializer(trunk, seen)(key)}
        if kind == "single":
            return {"heads": _stacked(initializer(trunk, seen), num_tasks)(key)}
        keys = jax.random.split(key)
        heads = _stacked(initializer(head, widths[-1]), num_tasks)
        return {"trunk": initializer(trunk, seen)(keys[0]), "heads": heads(keys[1])}

    def apply_one(params: Params, x: jax.Array) -> jax.Array:
        if kind != "multi_head":
            (whole,) = params.values()
            return jnp.asarray(trunk.apply({"params": whole}, x))
        features = trunk.apply({"params": params["trunk"]}, x)
        return jnp.asarray(head.apply({"params": params["heads"]}, features))

    def apply(params: Params, x: jax.Array, task: jax.Array) -> jax.Array:
        if kind == "shared":
            x = jnp.concatenate([x, jnp.broadcast_to(task, (len(x), num_tasks))], axis=-1)
        return jax.vmap(apply_one, (0, None))(params, x) if twins else apply_one(params, x)

    axes: dict[str, int | None] = {"trunk": None, "heads": 0}
    missing = {"shared": "heads", "single": "trunk"}.get(kind)
    return Network(init, apply, {part: axis for part, axis in axes.items() if part != missing})


def _stacked(init: Callable[[jax.Array], Params], size: int) -> Callable[[jax.Array], Params]:
    """Returns an init of several, stacked."""
    return lambda key: jax.vmap(init)(jax.random.split(key, size))
