"""A run that is saved, killed and resumed, on the same devices or on others.

    python -m experiments.examples.checkpoint --folder DIR --steps 20
    python -m experiments.examples.checkpoint --folder DIR --steps 40

The second command finds the checkpoint of the first and goes on from step 20; the result is bit for
bit that of 40 steps at once, whichever rule is chosen. With ``XLA_FLAGS=
--xla_force_host_platform_device_count=8`` before one of them, the batch and the first layer are
split over 8 devices there, and results agree to rounding.

What has to be saved is the whole of ``Run``: parameters, the optimizer's state, the rule's state in
it, and the position in the data, from which batches are drawn (a stateless pipeline; an iterator's
own state would go beside it). Orbax needs the shapes and shardings of what it restores: those of a
fresh run.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxmtl

TASKS, FEATURES, HIDDEN, EXAMPLES, BATCH = 3, 8, 16, 64, 16

# Rules that keep weights, logits, tracked gradients or target cosines from step to step.
RULES: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    "famo": lambda: jaxmtl.famo(num_tasks=TASKS),
    "cr_mogm": lambda: jaxmtl.cr_mogm(jaxmtl.mgda(), num_tasks=TASKS),
    "moco": lambda: jaxmtl.moco(num_tasks=TASKS, beta=0.5),
    "gradvac": lambda: jaxmtl.gradvac(num_tasks=TASKS),
}


class Run(NamedTuple):
    """All that a run needs to go on.

    Attributes:
      params: Parameters of a network with one hidden layer.
      opt_state: State of the chain; the rule's is its first entry.
      position: int32 scalar, batches drawn so far.
    """

    params: Any
    opt_state: Any
    position: jax.Array


def make_data() -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs (examples, features) and targets (examples, m)."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((EXAMPLES, FEATURES), np.float32)
    return x, np.tanh(x @ rng.standard_normal((FEATURES, TASKS), np.float32))


def batch_at(position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns batch number ``position`` of an endless random stream: inputs and targets."""
    key = jax.random.fold_in(jax.random.key(0), position)
    chosen = jax.random.randint(key, (BATCH,), 0, EXAMPLES)
    x, y = map(jnp.asarray, make_data())
    return x[chosen], y[chosen]


def losses_fn(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Returns the mean squared error of every task, (m,)."""
    x, y = batch
    hidden = jnp.tanh(x @ params["trunk"])
    return jnp.mean((hidden @ params["heads"] - y) ** 2, axis=0)


def chain(rule: str) -> optax.GradientTransformationExtraArgs:
    """Returns the whole optimizer, whose schedule counts steps in its state too."""
    schedule = optax.cosine_decay_schedule(0.05, 100)
    return optax.chain(RULES[rule](), optax.adam(schedule))


def start(rule: str) -> Run:
    """Returns the run before its first step."""
    first, second = jax.random.split(jax.random.key(1))
    params = {
        "trunk": jax.random.normal(first, (FEATURES, HIDDEN)) / FEATURES**0.5,
        "heads": jax.random.normal(second, (HIDDEN, TASKS)) / HIDDEN**0.5,
    }
    return Run(params, chain(rule).init(params), jnp.zeros((), jnp.int32))


def step(rule: str, mesh: Mesh, run: Run) -> tuple[Run, jax.Array]:
    """Takes one step on the batch at the run's position; returns its losses (m,)."""
    split = NamedSharding(mesh, PartitionSpec("data"))
    batch = jax.lax.with_sharding_constraint(batch_at(run.position), split)
    losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(run.params, batch)
    # FAMO reads the losses of the batch before at today's parameters; the position tells which.
    after = losses_fn(run.params, batch_at(jnp.maximum(run.position - 1, 0)))
    updates, opt_state = chain(rule).update(
        jacobian, run.opt_state, run.params, losses=losses, previous_batch_losses=after
    )
    return Run(jaxmtl.apply_updates(run.params, updates), opt_state, run.position + 1), losses


@cache
def steps_until(rule: str, mesh: Mesh) -> Callable[[Run, int], tuple[Run, jax.Array]]:
    """Returns the loop up to a position, compiled once for every stretch of a run."""

    def loop(run: Run, end: int) -> tuple[Run, jax.Array]:
        return jax.lax.while_loop(
            lambda carry: carry[0].position < end,
            lambda carry: step(rule, mesh, carry[0]),
            (run, jnp.zeros(TASKS)),
        )

    return jax.jit(loop)


def mesh_of_all() -> Mesh:
    """Returns the mesh of all devices, along the data."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def shardings(run: Run, mesh: Mesh) -> Run:
    """Returns how to place every leaf: axes of the input features are split, others are not."""

    def leaf(x: Any) -> NamedSharding:
        axes = ["data" if size == FEATURES else None for size in x.shape]
        return NamedSharding(mesh, PartitionSpec(*axes))

    places: Run = jax.tree.map(leaf, run)
    return places


def train(rule: str, folder: Path, num_steps: int) -> tuple[Run, int]:
    """Goes on to step ``num_steps`` from the last checkpoint in ``folder``, if any; saves the end.

    Returns:
      The run at its end and the step from which it went on.
    """
    mesh = mesh_of_all()
    abstract = jax.eval_shape(partial(start, rule))
    places = shardings(abstract, mesh)
    with ocp.CheckpointManager(folder.absolute()) as manager:
        latest = manager.latest_step()
        if latest is None:
            run = jax.jit(start, static_argnums=0, out_shardings=places)(rule)
        else:
            target = jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                abstract,
                places,
            )
            run = manager.restore(latest, args=ocp.args.StandardRestore(target))
        begin = int(run.position)
        if num_steps > begin:
            run, losses = steps_until(rule, mesh)(run, num_steps)
            print(f"{rule}, steps {begin} to {num_steps}: last losses {losses}")
            manager.save(num_steps, args=ocp.args.StandardSave(run))
            manager.wait_until_finished()
    return run, begin


def main(argv: Sequence[str] | None = None) -> None:
    """Trains to a step, from where the folder's last checkpoint stands."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rule", choices=sorted(RULES), default="famo")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)
    run, begin = train(options.rule, options.folder, options.steps)
    weights = optax.tree.get(run.opt_state, "mtl_weights")
    print(f"resumed at step {begin}, now at {run.position}; weights {weights}")


if __name__ == "__main__":
    main()
