"""Gauss-Newton beside Adam and L-BFGS at equal time: a curve, and a network for Burgers' equation.

    python -m experiments.examples.gauss_newton                     # the curve alone
    python -m experiments.examples.gauss_newton --data-dir DIR      # and Burgers
    python -m experiments.examples.gauss_newton --data-dir DIR --seeds 3 --out OUT   # as recorded

**Curve**: a network of 321 parameters through 64 points of ``sin(3 x) + x cos(9 x) / 2``, float64.
Gauss-Newton with Levenberg-Marquardt damping takes 1,000 steps; the others run for the same time.

**Burgers**: 580 points drawn anew for each of 600 steps of Gauss-Newton with momentum 0.8 and
damping 1e-2, steps of norm 1 at most times a rate that falls from 0.5 along a cosine. Adam gets
points drawn anew as well, and the cosine from 5e-3 over as many steps as fit in the same time.
L-BFGS needs a fixed objective: 2,000 points. The error is that of the solution, against the
reference; time is processor time of the process, which other work on the machine does not enter.

Recorded in ``experiments/results/gauss_newton`` (``runs.jsonl`` and two figures), three seeds:

               time    Gauss-Newton              Adam                      L-BFGS
    Curve      0.1 s   2e-8, 4e-10, 5e-8         1e-4, 4e-6, 1e-5          4e-5, 3e-4, 4e-4
    Burgers    8.9 s   0.010, 0.012, 0.016       0.121, 0.052, 0.084       0.55, 0.38, 0.21

Losses of the curve, errors of Burgers' solution. At equal time Gauss-Newton is better by two to six
digits on the curve; on the equation its error is 4 to 13 times smaller than Adam's. Between the
points that stay in place for L-BFGS its network hides shocks.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import jaxmtl
from experiments.examples import _pinn
from experiments.examples._pinn import Params

CURVE_STEPS, CHUNK = 1000, 10  # Burgers: three steps for each five
COUNTS = {"equation": 480, "initial": 60, "boundary": 40}
FIXED = {"equation": 1700, "initial": 200, "boundary": 100}
COLORS = {"Gauss-Newton": "tab:red", "Adam": "tab:blue", "L-BFGS": "tab:green"}


class Method(NamedTuple):
    """An optimizer as the timer takes it: its first state, and a step that may see its number."""

    init: Callable[[Params], Any]
    step: Callable[[Params, Any, jax.Array], tuple[Params, Any]]


class History(NamedTuple):
    """What was measured on the way.

    Attributes:
      seconds: Processor time since the first step, compilation left out.
      steps: Steps so far.
      values: What ``evaluate`` returned.
      params: The last parameters.
    """

    seconds: list[float]
    steps: list[int]
    values: list[float]
    params: Params


def run(
    method: Method,
    params: Params,
    evaluate: Callable[[Params], jax.Array],
    *,
    steps: int | None = None,
    seconds: float = np.inf,
) -> History:
    """Takes steps, ten in each call, up to a number of them or for so many seconds."""

    def chunk(params: Params, state: Any, first: jax.Array) -> tuple[Params, Any]:
        def one(i: int, carry: tuple[Params, Any]) -> tuple[Params, Any]:
            return method.step(*carry, first + i)

        result: tuple[Params, Any] = jax.lax.fori_loop(0, CHUNK, one, (params, state))
        return result

    state = method.init(params)
    compiled = jax.jit(chunk).lower(params, state, jnp.asarray(0)).compile()
    measured = jax.jit(evaluate).lower(params).compile()
    history = History([0.0], [0], [float(measured(params))], params)
    spent, done = 0.0, 0
    while spent < seconds and done < (steps or np.inf):
        began = time.process_time()
        params, state = jax.block_until_ready(compiled(params, state, jnp.asarray(done)))
        spent, done = spent + time.process_time() - began, done + CHUNK
        history.seconds.append(spent)
        history.steps.append(done)
        history.values.append(float(measured(params)))
    return history._replace(params=params)


def first_order(
    optimizer: optax.GradientTransformation, loss_fn: Callable[[Params, jax.Array], jax.Array]
) -> Method:
    """Returns optax's optimizer on the loss of a step."""

    def step(params: Params, state: Any, i: jax.Array) -> tuple[Params, Any]:
        grads = jax.grad(loss_fn)(params, i)
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    return Method(optimizer.init, step)


def quasi_newton(loss_fn: Callable[[Params], jax.Array]) -> Method:
    """Returns optax's L-BFGS with its line search, on a loss that does not change."""
    optimizer = optax.lbfgs(memory_size=20)
    value_and_grad = optax.value_and_grad_from_state(loss_fn)

    def step(params: Params, state: Any, _: jax.Array) -> tuple[Params, Any]:
        value, grads = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grads, state, params, value=value, grad=grads, value_fn=loss_fn
        )
        return jax.tree.map(jnp.add, params, updates), state

    return Method(optimizer.init, step)


def beside(
    params: Params,
    evaluate: Callable[[Params], jax.Array],
    gauss_newton: Method,
    steps: int,
    adam: Callable[[int], Method],
    lbfgs: Method,
) -> dict[str, History]:
    """Runs Gauss-Newton, then Adam and L-BFGS for the time that it took."""
    histories = {"Gauss-Newton": run(gauss_newton, params, evaluate, steps=steps)}
    seconds = histories["Gauss-Newton"].seconds[-1]
    tried = run(adam(1000), params, evaluate, steps=20 * CHUNK)
    fitting = int(seconds / (tried.seconds[-1] - tried.seconds[1]) * 19 * CHUNK)
    histories["Adam"] = run(adam(fitting), params, evaluate, seconds=seconds)
    histories["L-BFGS"] = run(lbfgs, params, evaluate, seconds=seconds)
    return histories


# --- the two problems ---------------------------------------------------------------------------


def curve(key: jax.Array, steps: int) -> tuple[dict[str, History], dict[str, Any]]:
    """Fits a network to a curve; returns histories of the loss and what the figure shows."""
    x = jnp.linspace(-1, 1, 64)[:, None]
    y = jnp.sin(3 * x[:, 0]) + x[:, 0] * jnp.cos(9 * x[:, 0]) / 2
    params = _pinn.initial_params(key, (1, 16, 16, 1))

    def residual(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        return _pinn.network(params, x)[0] - y

    def loss(params: Params) -> jax.Array:
        return jnp.mean(jax.vmap(residual, (None, 0, 0))(params, x, y) ** 2) / 2

    solver = jaxmtl.gauss_newton(residual, in_axes=(None, 0, 0), damping=1e-2, adaptive=True)

    def step(params: Params, state: Any, _: jax.Array) -> tuple[Params, Any]:
        (_, state), direction = solver.value_and_grad(params, state, x, y)
        return jax.tree.map(jnp.subtract, params, direction), state

    def adam(steps: int) -> Method:
        rate = optax.cosine_decay_schedule(1e-2, steps)
        return first_order(optax.adam(rate), lambda params, _: loss(params))

    histories = beside(params, loss, Method(solver.init, step), steps, adam, quasi_newton(loss))
    fits = {
        name: jax.vmap(_pinn.network, (None, 0))(history.params, x)[:, 0]
        for name, history in histories.items()
    }
    return histories, {"x": x[:, 0], "reference": y, "fits": fits, "label": "loss"}


def burgers(
    key: jax.Array, data_dir: Path, steps: int
) -> tuple[dict[str, History], dict[str, Any]]:
    """Solves Burgers' equation; returns histories of the error and what the figure shows."""
    equation = _pinn.burgers()
    reference = _pinn.load_reference(equation, data_dir)
    first, drawn, fixed = jax.random.split(key, 3)
    params = _pinn.initial_params(first, equation.sizes)

    def error(params: Params) -> jax.Array:
        return reference.error(equation.solution(params, reference.points))

    def batch(i: jax.Array) -> _pinn.Batch:
        return equation.draw(jax.random.fold_in(drawn, i), COUNTS)

    in_axes = (None, 0, 0, 0, 0)
    solver = jaxmtl.gauss_newton(equation.one_residual, in_axes=in_axes, damping=1e-2, momentum=0.8)
    bounded = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.sgd(optax.cosine_decay_schedule(0.5, steps, alpha=0.02)),
    )

    def init(params: Params) -> Any:
        return solver.init(params), bounded.init(params)

    def step(params: Params, states: Any, i: jax.Array) -> tuple[Params, Any]:
        state, opt_state = states
        points = equation.points(batch(i))
        (_, state), direction = solver.value_and_grad(params, state, *points)
        updates, opt_state = bounded.update(direction, opt_state, params)
        return jax.tree.map(jnp.add, params, updates), (state, opt_state)

    def adam(steps: int) -> Method:
        def loss(params: Params, i: jax.Array) -> jax.Array:
            return jnp.sum(equation.losses_fn(params, batch(i)))

        return first_order(optax.adam(optax.cosine_decay_schedule(5e-3, steps)), loss)

    still = equation.draw(fixed, FIXED)
    lbfgs = quasi_newton(lambda params: jnp.sum(equation.losses_fn(params, still)))
    histories = beside(params, error, Method(init, step), steps, adam, lbfgs)
    last = reference.points[:, 1] == reference.points[:, 1].max()
    fits = {
        name: equation.solution(history.params, reference.points[last])[:, 0]
        for name, history in histories.items()
    }
    x, u = reference.points[last, 0], reference.values[last, 0]
    return histories, {"x": x, "reference": u, "fits": fits, "label": "relative L2 error"}


# --- table and figures --------------------------------------------------------------------------


def draw(histories: dict[str, History], shown: dict[str, Any], title: str, path: Path) -> None:
    """Saves a figure: the measure against time, and the fits."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    right.plot(shown["x"], shown["reference"], color="black", lw=3, alpha=0.3, label="reference")
    for name, history in histories.items():
        left.semilogy(history.seconds, history.values, color=COLORS[name], label=name)
        right.plot(shown["x"], shown["fits"][name], color=COLORS[name], lw=1, label=name)
    left.set(xlabel="seconds of processor time", ylabel=shown["label"])
    right.set_xticks([-1, 0, 1])
    right.set(xlabel="x", ylabel="u at the last time" if title == "Burgers" else "y")
    left.legend()
    right.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=90)


def conclude(records: Sequence[dict[str, Any]]) -> str:
    """Returns in a sentence for each problem which method ended lowest, and in how many seeds."""
    lines = []
    for problem in dict.fromkeys(record["problem"] for record in records):
        runs = [record for record in records if record["problem"] == problem]
        measure = next(key for key in ("loss", "relative L2 error") if key in runs[0])
        values: dict[str, list[float]] = {}
        for record in runs:
            values.setdefault(record["method"], []).append(record[measure])
        lowest = [min(values, key=lambda name: values[name][i]) for i in range(len(runs) // 3)]
        best = max(set(lowest), key=lowest.count)
        medians = ", ".join(f"{name} {np.median(v):.1e}" for name, v in values.items())
        lines.append(
            f"{problem}, at equal time: {best} ends lowest in {lowest.count(best)} of "
            f"{len(lowest)} seeds ({measure}, median: {medians})."
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs both problems, prints a table and, with ``--out``, writes records and figures."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with burgers_shock.mat")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=CURVE_STEPS, help="of Gauss-Newton, the curve")
    parser.add_argument("--out", type=Path, help="results go to its folder gauss_newton")
    options = parser.parse_args(argv)
    folder = options.out / "gauss_newton" if options.out is not None else None
    problems: dict[str, Any] = {"Curve": functools.partial(curve, steps=options.steps)}
    if options.data_dir is not None:
        problems["Burgers"] = functools.partial(
            burgers, data_dir=options.data_dir, steps=options.steps * 3 // 5
        )
    records = []
    with jax.enable_x64(True):
        for title, problem in problems.items():
            for seed in range(options.seeds):
                histories, shown = problem(jax.random.key(seed))
                for name, history in histories.items():
                    last = {"seconds": history.seconds[-1], "steps": history.steps[-1]}
                    record = {"problem": title, "seed": seed, "method": name} | last
                    records.append(record | {shown["label"]: history.values[-1]})
                    print(
                        f"{title:8} seed {seed}  {name:13} {history.steps[-1]:6} steps "
                        f"{history.seconds[-1]:6.1f} s  {shown['label']} {history.values[-1]:.2e}",
                        flush=True,
                    )
                if folder is not None and seed == 0:
                    folder.mkdir(parents=True, exist_ok=True)
                    draw(histories, shown, title, folder / f"{title.lower()}.png")
    if folder is not None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "runs.jsonl").write_text(lines)
    print(conclude(records))


if __name__ == "__main__":
    main()
