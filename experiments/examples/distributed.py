"""Many devices, many processes: parameters and batch split over all of them.

On one machine, every device that JAX finds::

    python -m experiments.examples.distributed

On several, the same command once per process, with the address of the first::

    python -m experiments.examples.distributed --coordinator HOST:PORT --processes 2 --process 0
    python -m experiments.examples.distributed --coordinator HOST:PORT --processes 2 --process 1

Each process holds its rows of the data and its part of the parameters, of Adam's moments and of the
Jacobian. The job prints one JSON line: the losses of the last step, the weights that UPGrad gave
the tasks in it, and the norm of the parameters. It does not depend on the number of processes: two
with two devices each print what one with four prints (to rounding).

``JAX_NUM_CPU_DEVICES=4`` makes four devices of one CPU.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import jaxmtl

PyTree = Any


@dataclass(frozen=True)
class Options:
    """What the job is made of."""

    rows: int = 512  # of data, over all processes
    inputs: int = 32
    width: int = 8  # narrow, so that tasks conflict
    tasks: int = 3
    steps: int = 20
    learning_rate: float = 1e-2


def rows_of_process(options: Options, process: int, processes: int) -> tuple[np.ndarray, ...]:
    """Returns the rows that one process reads; here they are made up, in the same way by all."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((options.rows, options.inputs))
    y = np.tanh(x @ rng.standard_normal((options.inputs, options.tasks)))
    share = options.rows // processes
    mine = slice(process * share, (process + 1) * share)
    return x[mine], y[mine]


def init(key: jax.Array, options: Options) -> PyTree:
    """Returns the parameters of a network with one hidden layer."""
    first, second = jax.random.split(key)
    return {
        "w": jax.random.normal(first, (options.inputs, options.width)) / options.inputs**0.5,
        "b": jnp.zeros(options.width),
        "head": jax.random.normal(second, (options.width, options.tasks)) / options.width**0.5,
    }


def losses_fn(params: PyTree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Returns the (m,) squared errors, one task per column of y."""
    x, y = batch
    # Each device fetches the parameters when it needs them, and gives their rows back in parts.
    params = jax.tree.map(lambda p: jax.sharding.reshard(p, PartitionSpec()), params)
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.mean((hidden @ params["head"] - y) ** 2, axis=0)


def train(options: Options) -> dict[str, Any]:
    """Trains on all devices of all processes and returns what can be compared."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))  # of an explicit axis
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    optimizer = optax.chain(
        jaxmtl.upgrad(num_tasks=options.tasks), optax.adam(options.learning_rate)
    )
    with jax.set_mesh(mesh):
        mine = rows_of_process(options, jax.process_index(), jax.process_count())
        batch = tuple(
            jax.make_array_from_process_local_data(split, x.astype(jnp.result_type(float)))
            for x in mine
        )
        params = jax.jit(init, static_argnums=1, out_shardings=split)(jax.random.key(0), options)
        opt_state = optimizer.init(params)  # outside jit, so that it lies where params do

        @jax.jit
        def run(params: PyTree, opt_state: PyTree, batch: PyTree) -> tuple[PyTree, ...]:
            def step(carry: tuple[PyTree, PyTree], _: None) -> tuple[Any, jax.Array]:
                params, opt_state = carry
                losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(params, batch)
                updates, opt_state = optimizer.update(jacobian, opt_state, params, losses=losses)
                return (jaxmtl.apply_updates(params, updates), opt_state), losses

            carry, losses = jax.lax.scan(step, (params, opt_state), length=options.steps)
            return *carry, losses[-1], optax.tree.norm(carry[0])

        params, opt_state, losses, norm = run(params, opt_state, batch)
        weights = jax.device_put(optax.tree.get(opt_state, "mtl_weights"), whole)
    return {
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "held": {name: list(x.addressable_shards[0].data.shape) for name, x in params.items()},
        "losses": np.asarray(losses).tolist(),
        "weights": np.asarray(weights).tolist(),
        "norm": float(norm),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Joins the other processes, if there are any, and trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--coordinator", help="HOST:PORT of process 0")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    options = parser.parse_args(argv)
    if options.coordinator:
        jax.distributed.initialize(
            options.coordinator, options.processes, options.process, initialization_timeout=60
        )
    result = train(Options())
    if jax.process_index() == 0:
        print(json.dumps(result), flush=True)
    if options.coordinator:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main()
