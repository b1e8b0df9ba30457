r"""Physics-informed networks: conflicting conditions by first-order methods, and by Gauss-Newton.

    python -m experiments.examples.physics_informed --data-dir DIR              # Burgers, one seed
    python -m experiments.examples.physics_informed --data-dir DIR --problems Burgers cavity \
        --seeds 5 --out OUT                                                     # recorded

DIR holds the reference solutions ``burgers_shock.mat`` and ``ldc_Re100.mat``. Burgers' equation has
a loss for the equation, one for the initial values and one for the boundary; the lid-driven cavity
(Reynolds number 100) one for the equations, one for the lid and one for the walls. Each condition
has its own batch. The network is of 609 and of 643 parameters, float64: small, to fit two cores.

The first-order methods draw new points for each of 2,000 steps, combine the gradients of the three
losses and hand them to Adam, whose rate falls from 5e-3 along a cosine. DCGD of Hwang and Lim 2024
takes two rows, the equation and the sum of its conditions: its center is `config` on these, its
projection twice `dual_proj`, its average `dcgd`. Gauss-Newton on Burgers takes 400 steps on 580 new
points each, of momentum 0.8, damping 1e-2, norm 1 at most and a rate that falls from 0.5; on the
cavity 200 steps of Levenberg and Marquardt on 430 points that stay, 1,290 residuals. The error is
the relative L2 error against the reference.

Recorded in ``experiments/results/physics_informed``, five seeds, mean and standard error:

                       Burgers            cavity
    mean               0.516 ± 0.010      0.763 ± 0.029
    upgrad             0.530 ± 0.009      0.767 ± 0.032
    config             0.559 ± 0.013      0.808 ± 0.042
    mgda               0.901 ± 0.034      0.900 ± 0.032
    dcgd_center        0.545 ± 0.010      0.820 ± 0.039
    dcgd_projection    0.516 ± 0.012      0.767 ± 0.030
    dcgd_average       0.531 ± 0.018      0.772 ± 0.028
    gauss_newton       0.017 ± 0.003      0.275 ± 0.051

No rule that resolves conflicts is better than the mean of the losses; seed by seed `upgrad` is a
little worse on Burgers, `config` and DCGD's center on both, its other forms on the cavity, and MGDA
by far. What these networks lack is curvature: Gauss-Newton's error is 30 times smaller on Burgers
and 3 times on the cavity, where it still falls when the steps end. 2,000 steps of Adam are few:
with ten times as many, as `experiments.examples.gauss_newton` shows at equal time, Burgers' error
is 0.05 to 0.12.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import jaxmtl
from experiments.examples import _pinn
from experiments.examples._pinn import Equation, Params, Reference
from experiments.report import with_tables

COUNTS = {
    "Burgers": {"equation": 480, "initial": 60, "boundary": 40},
    "cavity": {"equation": 300, "lid": 40, "walls": 90},
}
RATE = 5e-3
POINTS = 25  # of the curves that are shown

METHODS: dict[str, Callable[[], jaxmtl.Aggregator]] = {
    "mean": jaxmtl.linear_scalarization,
    "upgrad": jaxmtl.upgrad,
    "config": jaxmtl.config,
    "mgda": jaxmtl.mgda,
    "dcgd_center": jaxmtl.config,
    "dcgd_projection": jaxmtl.dual_proj,
    "dcgd_average": jaxmtl.dcgd,
}
SOLVERS = (*METHODS, "gauss_newton")

# Of the curves: a color and a dash for each, the three forms of DCGD in one color.
STYLES: dict[str, dict[str, Any]] = {
    "mean": {"color": "black", "ls": "-"},
    "upgrad": {"color": "#0072B2", "ls": "--"},
    "config": {"color": "#009E73", "ls": "-"},
    "mgda": {"color": "#999999", "ls": "-"},
    "dcgd_center": {"color": "#E69F00", "ls": "-"},
    "dcgd_projection": {"color": "#E69F00", "ls": "--"},
    "dcgd_average": {"color": "#E69F00", "ls": ":"},
    "gauss_newton": {"color": "#D00000", "ls": "-", "lw": 2.5},
}

Step = Callable[[Params, Any, jax.Array], tuple[Params, Any]]


def first_order(equation: Equation, method: str, key: jax.Array, steps: int) -> tuple[Any, Step]:
    """Returns how to start and to take a step of Adam behind a method."""
    rate = optax.cosine_decay_schedule(RATE, steps)
    optimizer = optax.chain(METHODS[method](), optax.adam(rate))

    def losses_fn(params: Params, batch: _pinn.Batch) -> jax.Array:
        losses = equation.losses_fn(params, batch)
        if method.startswith("dcgd"):
            return jnp.stack([losses[0], jnp.sum(losses[1:])])
        return losses

    def step(params: Params, state: Any, i: jax.Array) -> tuple[Params, Any]:
        batch = equation.draw(jax.random.fold_in(key, i), COUNTS[equation.name])
        losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(params, batch)
        updates, state = optimizer.update(jacobian, state, params, losses=losses)
        return jaxmtl.apply_updates(params, updates), state

    return optimizer.init, step


def second_order(equation: Equation, key: jax.Array, steps: int) -> tuple[Any, Step]:
    """Returns how to start and to take a step of Gauss-Newton.

    The cavity's flow is smooth: points that stay do, if they give more residuals than there are
    parameters. Between points that stay Burgers' network would hide shocks.
    """
    stays = equation.name == "cavity"
    options: dict[str, Any] = {"adaptive": True} if stays else {"momentum": 0.8}
    in_axes = (None, 0, 0, 0, 0)
    solver = jaxmtl.gauss_newton(equation.one_residual, in_axes=in_axes, damping=1e-2, **options)
    rate = optax.cosine_decay_schedule(0.5, steps, alpha=0.02)
    bounded = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate))
    after = optax.sgd(1.0) if stays else bounded

    def init(params: Params) -> Any:
        return solver.init(params), after.init(params)

    def step(params: Params, states: Any, i: jax.Array) -> tuple[Params, Any]:
        state, opt_state = states
        drawn = jax.random.fold_in(key, jnp.where(stays, 0, i))
        points = equation.points(equation.draw(drawn, COUNTS[equation.name]))
        (_, state), direction = solver.value_and_grad(params, state, *points)
        updates, opt_state = after.update(direction, opt_state, params)
        return jaxmtl.apply_updates(params, updates), (state, opt_state)

    return init, step


def train(
    equation: Equation, reference: Reference, method: str, steps: int, key: jax.Array
) -> tuple[Params, jax.Array]:
    """Returns the last parameters and the errors (`POINTS`,) on the way, the last one of these."""
    first, drawn = jax.random.split(key)
    if method == "gauss_newton":
        steps = steps // (10 if equation.name == "cavity" else 5)
        init, step = second_order(equation, drawn, steps)
    else:
        init, step = first_order(equation, method, drawn, steps)
    params = _pinn.initial_params(first, equation.sizes)
    each = steps // POINTS

    def stretch(carry: Any, start: jax.Array) -> tuple[Any, jax.Array]:
        def one(i: int, carry: Any) -> Any:
            params, state = carry
            return step(params, state, start + i)

        params, state = jax.lax.fori_loop(0, each, one, carry)
        return (params, state), reference.error(equation.solution(params, reference.points))

    (params, _), errors = jax.lax.scan(stretch, (params, init(params)), jnp.arange(POINTS) * each)
    return params, errors


# --- table and figure ---------------------------------------------------------------------------


def table(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns the mean of the last errors and its standard error, a row per method."""
    problems = list(dict.fromkeys(record["problem"] for record in records))
    rows = [["method", *problems]]
    for method in dict.fromkeys(record["method"] for record in records):
        rows.append([method])
        for name in problems:
            last = [r["errors"] for r in records if (r["problem"], r["method"]) == (name, method)]
            values = np.array(last)[0, :, -1]
            cell = f"{np.mean(values):.4f}"
            if len(values) > 1:
                cell += f" ± {np.std(values, ddof=1) / np.sqrt(len(values)):.4f}"
            rows[-1].append(cell)
    return rows


def conclude(records: Sequence[dict[str, Any]]) -> str:
    """Returns for each problem which methods differ from the mean by two standard errors.

    The differences are those of pairs of runs from the same start. Of one seed: the lowest.
    """
    lines = []
    for problem in dict.fromkeys(record["problem"] for record in records):
        last = {
            r["method"]: np.array(r["errors"])[:, -1] for r in records if r["problem"] == problem
        }
        if len(last["mean"]) == 1:
            _, best = min((errors[0], method) for method, errors in last.items())
            lines.append(f"{problem}: from this one start {best} ends lowest.")
            continue
        found: dict[str, list[str]] = {"better": [], "worse": []}
        for method, errors in last.items():
            gaps = errors - last["mean"]
            spread = np.std(gaps, ddof=1) / np.sqrt(len(gaps))
            if method != "mean" and abs(np.mean(gaps)) > 2 * spread:
                found["better" if np.mean(gaps) < 0 else "worse"].append(method)
        better, worse = (", ".join(found[word]) or "none" for word in ("better", "worse"))
        lines.append(f"{problem}: better than the mean {better}; worse {worse}.")
    return "\n".join(lines)


def draw(
    problems: dict[str, tuple[Equation, Reference]],
    records: Sequence[dict[str, Any]],
    trained: dict[tuple[str, str], Params],
    path: Path,
) -> None:
    """Saves a figure: a row per problem of errors on the way, reference and two solutions."""
    figure = Figure(figsize=(14, 3.3 * len(problems)), layout="constrained")
    grid = figure.add_gridspec(len(problems), 4, width_ratios=[1.7, 1, 1, 1])
    for row, (name, (equation, reference)) in enumerate(problems.items()):
        axes = [figure.add_subplot(grid[row, column]) for column in range(4)]
        shown = [record for record in records if record["problem"] == name]
        for record in shown:
            median = np.median(record["errors"], axis=0)
            style = STYLES[record["method"]]
            axes[0].semilogy(np.linspace(0, 1, POINTS), median, label=record["method"], **style)
        axes[0].set(xlabel="share of the steps", ylabel="relative L2 error, median", title=name)
        axes[0].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=3)
        fields = {"reference": reference.values}
        for method in (shown[0]["method"], shown[-1]["method"]):
            fields[method] = equation.solution(trained[name, method], reference.points)
        across, along = reference.points[:, 0], reference.points[:, 1]
        extent: Any = [float(f(axis)) for axis in (along, across) for f in (jnp.min, jnp.max)]
        for axis, (title, values) in zip(axes[1:], fields.items(), strict=False):
            field = np.asarray(values)[:, 0].reshape(reference.shape)
            if name == "cavity":
                field = field.T  # height upwards
            axis.imshow(field, origin="lower", extent=extent, aspect="auto", cmap="RdBu_r")
            axis.set_title(f"u, {title}", fontsize=9)
            x, y = ("t", "x") if name == "Burgers" else ("x", "y")
            axis.set(xlabel=x, ylabel=y)
    figure.savefig(path, dpi=75)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the study, prints its table and, with ``--out``, writes records and the figure."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="the reference solutions")
    parser.add_argument("--steps", type=int, default=2000, help="of the first-order methods")
    parser.add_argument("--problems", nargs="+", choices=COUNTS, default=["Burgers"])
    parser.add_argument("--methods", nargs="+", choices=SOLVERS, default=SOLVERS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="results go to its folder physics_informed")
    options = parser.parse_args(argv)
    if options.steps % (10 * POINTS):
        parser.error(f"expected steps in multiples of {10 * POINTS}, got {options.steps}")
    records, trained = [], {}
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), options.seeds)
        equations = {equation.name: equation for equation in (_pinn.burgers(), _pinn.cavity())}
        problems = {
            name: (equation, _pinn.load_reference(equation, options.data_dir))
            for name, equation in equations.items()
            if name in options.problems
        }
        for name, (equation, reference) in problems.items():
            for method in dict.fromkeys(("mean", *options.methods)):  # what others are beside

                def run(
                    key: jax.Array, e: Any = equation, r: Any = reference, m: str = method
                ) -> Any:
                    return train(e, r, m, options.steps, key)

                params, errors = jax.jit(lambda keys, run=run: jax.lax.map(run, keys))(keys)
                trained[name, method] = jax.tree.map(lambda x: x[0], params)
                errors = np.round(np.asarray(errors), 6).tolist()
                records.append({"problem": name, "method": method, "errors": errors})
                print(name, method, *(f"{curve[-1]:.4f}" for curve in errors), flush=True)
        for row in table(records):
            print("".join(f"{cell:>20}" for cell in row))
        print(conclude(records))
        if options.out is not None:
            folder = options.out / "physics_informed"
            folder.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (folder / "errors.jsonl").write_text(lines)
            draw(problems, records, trained, folder / "errors.png")
            notes = folder / "notes.md"
            title = f"Relative L2 errors, {options.seeds} seeds, mean and standard error"
            prose = notes.read_text() if notes.exists() else ""
            notes.write_text(
                with_tables(prose, [(title, table(records))]) + conclude(records) + "\n"
            )


if __name__ == "__main__":
    main()
