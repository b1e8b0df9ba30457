"""Every rule on eight simulated devices beside one device; run in a process of its own.

``python -m tests.devices JOB...`` prints one JSON object per job; `tests.test_devices` reads them.
After the word ``few`` the jobs take the rules `FEW` in place of all.
A job is ``KIND:LAYOUT:MODE:ROUTE``:

* ``rules``: two steps of every rule. ROUTE ``rows``: the Jacobian; ``pieces``: `value_and_gramian`,
  the weighting, the pullback; ``grad``: `value_and_grad`.
* ``map``: the same inside `jax.shard_map`, LAYOUT one of `MAPS`.
* ``examples``: one objective per example.
* ``separate``: one loss function and one batch per task.
* ``gradient``: the plain gradient of the mean loss, for its collectives.
* ``plan``, ``traces``, ``lookup``, ``readme``: see there.

In float64: rules that divide by small differences of inner products, or choose by their sign,
amplify the rounding of a sum whose order depends on the devices.
"""

import collections
import dataclasses
import functools
import itertools
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmtl
from tests.methods import BY_NAME, INPUTS, METHODS

TASKS = 5
BATCH = 16
SHAPES = {"w1": (16, 32), "b1": (32,), "w2": (32, 8), "head": (8, TASKS), "scale": ()}
REPLICATED = dict.fromkeys(SHAPES, P())
TENSOR = REPLICATED | {"w1": P(None, "model"), "b1": P("model"), "w2": P("model", None)}
SHARDED = REPLICATED | {name: P("data") for name in ("w1", "b1", "w2", "head")}
MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
# Seconds rather than minutes of compilation: each program runs twice.
OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
STEPS = 2
# What a rule can hold or send: a Gramian and its solver, coordinates and their random numbers,
# rows of its own and weights.
FEW = ("upgrad", "graddrop", "moco")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where batch and parameters lie."""

    mesh: dict
    batch: P
    params: dict


LAYOUTS = {
    "data": Layout({"data": 8}, P("data"), REPLICATED),
    "parameters": Layout({"model": 8}, P(), TENSOR),
    "fsdp": Layout({"data": 8}, P("data"), SHARDED),
    "both": Layout({"data": 2, "model": 4}, P("data"), TENSOR),
}
ONE = Layout({}, P(), REPLICATED)


def problem():
    """Returns parameters and, per step, two batches."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape))

    params = {name: normal(*shape) / max(shape, default=1) ** 0.5 for name, shape in SHAPES.items()}
    batches = [
        tuple((normal(BATCH, SHAPES["w1"][0]), normal(BATCH, TASKS)) for _ in range(2))
        for _ in range(STEPS)
    ]
    return params, batches


def network(params, x, layout=ONE, mode="auto"):
    """The outputs; with sharded parameters each device first fetches them."""
    explicit = mode == "explicit"
    if layout.params is SHARDED:
        fetch = jax.sharding.reshard if explicit else lax.with_sharding_constraint
        params = jax.tree.map(lambda p: fetch(p, P()), params)
    rows = (*layout.batch,) if x.ndim == 2 else ()
    hidden = P(*rows, *(None,) * (x.ndim - len(rows))) if explicit else None
    h = jnp.tanh(x @ params["w1"] + params["b1"])
    h = jnp.tanh(jnp.dot(h, params["w2"], out_sharding=hidden))
    return params["scale"] * h @ params["head"]


def losses_fn(params, batch, layout=ONE, mode="auto"):
    x, y = batch
    return jnp.mean((network(params, x, layout, mode) - y) ** 2, axis=0)


def example_loss(params, x, y, layout=ONE, mode="auto"):
    return jnp.mean((network(params, x, layout, mode) - y) ** 2)


def inputs_of(name, losses, cross):
    inputs = {key: INPUTS[key](TASKS) for key in BY_NAME[name].inputs} | {"losses": losses}
    return inputs | {"cross_gramian": cross} if "cross_gramian" in inputs else inputs


tested = set(BY_NAME)


@functools.cache
def rules(route):
    made = {method.name: method.make(TASKS) for method in METHODS if method.name in tested}
    return {name: rule for name, rule in made.items() if route == "rows" or rule.weighting}


def initial(route, params):
    return {name: rule.init(params) for name, rule in rules(route).items()}


def step(route, losses_fn, params, states, batch, other, jacobian_of=None, baseline=False):
    """One update of every rule; ``baseline`` stops where the rules begin."""
    if route == "rows":
        jacobian_of = jacobian_of or jaxmtl.value_and_jacobian(losses_fn)
        losses, jacobian = jacobian_of(params, batch)
        _, second = jacobian_of(params, other)
        if baseline:
            return losses, jacobian, second
        cross = jaxmtl.gramian(jacobian, second)
    else:
        losses, gramian, pullback = jaxmtl.value_and_gramian(losses_fn)(params, batch)
        cross = jaxmtl.cross_gramian(losses_fn)(params, (batch,), (other,))
        if baseline:
            return losses, gramian, cross, jax.vmap(pullback)(jnp.ones((len(states), TASKS)))
    updates, weights, new = {}, {}, {}
    for name, state in states.items():
        rule, inputs = rules(route)[name], inputs_of(name, losses, cross)
        if route == "rows":
            updates[name], new[name] = rule.update(jacobian, state, params, **inputs)
        elif route == "grad":
            del inputs["losses"]
            found = jaxmtl.value_and_grad(losses_fn, rule)(params, state, batch, **inputs)
            (_, new[name]), updates[name] = found
        else:
            weights[name], new[name] = rule.weighting.update(gramian, state, **inputs)
    return updates if weights == {} else pull_all(jax.vmap(pullback), weights), new


def pull_all(pull, weights):
    """``J^T w`` for every rule's weights at once."""
    pulled = pull(jnp.stack(list(weights.values())))
    return {name: jax.tree.map(lambda x, i=i: x[i], pulled) for i, name in enumerate(weights)}


def step_of_parts(value_and_jacobian, split, params, states, batch, other):
    """One update of every rule with a weighting, each device holding a part of the rows."""
    losses, jacobian = value_and_jacobian(params, batch)
    _, second = value_and_jacobian(params, other)

    def gramian(rows, others=None):
        def of(flag):
            part = {name: x for name, x in rows.items() if split[name] is flag}
            return jaxmtl.gramian(part, others and {name: others[name] for name in part})

        return lax.psum(of(True), "data") + of(False)

    weights, new = {}, {}
    for name, state in states.items():
        inputs = inputs_of(name, losses, gramian(jacobian, second))
        weighting = rules("pieces")[name].weighting
        weights[name], new[name] = weighting.update(gramian(jacobian), state, **inputs)
    return pull_all(jax.vmap(lambda w: jaxmtl.combine(jacobian, w)), weights), new


def compiled(fun, *args):
    return jax.jit(fun).lower(*args).compile(OPTIONS)


def run(program, params, states, batches):
    updates = []
    for batch, other in batches:
        found, states = program(params, states, batch, other)
        updates.append(jax.tree.map(np.asarray, found))
    return updates


@functools.cache
def expected():
    """The updates of one device, from the Jacobian, and the mean norms of its rows."""
    params, batches = problem()
    states = initial("rows", params)
    fun = functools.partial(step, "rows", losses_fn)
    updates = run(compiled(fun, params, states, *batches[0]), params, states, batches)
    norms = []
    for batch, _ in batches:
        _, jacobian = jaxmtl.value_and_jacobian(losses_fn)(params, batch)
        norms.append(float(jnp.mean(jnp.sqrt(jnp.diagonal(jaxmtl.gramian(jacobian))))))
    return updates, norms


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return float(np.sqrt(sum(np.sum((x - y) ** 2) for x, y in pairs)))


def deviations(updates):
    """Per rule the largest distance to one device over the steps, in mean row norms."""
    wanted, norms = expected()
    return {
        name: max(
            distance(new[name], old[name]) / norm
            for new, old, norm in zip(updates, wanted, norms, strict=True)
        )
        for name in updates[0]
    }


OPERATIONS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({OPERATIONS})(-start)?\(")


def collectives(program):
    """Counts ``kind:elements`` of every array that a compiled program sends between devices.

    What a loop sends counts once per turn.
    """
    blocks, block = collections.defaultdict(list), ""
    for line in program.as_text().splitlines():
        if line.endswith("{") and not line.startswith(" "):
            block = line.removeprefix("ENTRY ").split()[0].lstrip("%")
        blocks[block].append(line)
    turns = {}
    for lines in blocks.values():
        for body, text in re.findall(r"body=%?([\w.-]+)(.*)", "\n".join(lines)):
            known = re.search(r'known_trip_count.*?"n":"(\d+)"', text)
            turns[body] = int(known[1]) if known else 1
    found = collections.Counter()
    for name, lines in blocks.items():
        for match in filter(None, map(COLLECTIVE.search, lines)):
            for dims in re.findall(r"[a-z]+\d*\[([\d,]*)\]", match[1]):
                size = int(np.prod([int(n) for n in dims.split(",") if n]))
                found[f"{match[2]}:{size}"] += turns.get(name, 1)
    return dict(found)


def mesh_of(layout, mode):
    kinds = (MODES[mode],) * len(layout.mesh)
    return jax.make_mesh(tuple(layout.mesh.values()), tuple(layout.mesh), axis_types=kinds)


def place(mesh, layout, params, batches):
    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    params = {name: put(x, layout.params[name]) for name, x in params.items()}
    return params, jax.tree.map(lambda x: put(x, layout.batch), batches)


def report(program, base, route, layout, mesh, params, batches):
    states = initial(route, params)
    tracked = states["moco"].inner.tracking.tracked if route == "rows" else {}
    return {
        "deviation": deviations(run(program, params, states, batches)),
        "collectives": collectives(program),
        "baseline": collectives(base),
        "states_lie_as_params": all(
            x.sharding.is_equivalent_to(NamedSharding(mesh, P(None, *layout.params[name])), x.ndim)
            for name, x in tracked.items()
        ),
    }


def job_rules(name, mode, route):
    layout = LAYOUTS[name]
    mesh = mesh_of(layout, mode)
    with jax.set_mesh(mesh):
        params, batches = place(mesh, layout, *problem())
        fun = functools.partial(step, route, functools.partial(losses_fn, layout=layout, mode=mode))
        args = (params, initial(route, params), *batches[0])
        base = compiled(functools.partial(fun, baseline=True), *args)
        return report(compiled(fun, *args), base, route, layout, mesh, params, batches)


def job_gradient(name, mode, _):
    layout = LAYOUTS[name]
    mesh = mesh_of(layout, mode)
    with jax.set_mesh(mesh):
        params, batches = place(mesh, layout, *problem())

        def mean_loss(params, batch):
            return jnp.mean(losses_fn(params, batch, layout, mode))

        return {"collectives": collectives(compiled(jax.grad(mean_loss), params, batches[0][0]))}


# Ways to use shard_map, by the layout of the arrays that enter it.
MAPS = {
    "mean": "data",  # the losses function takes the mean over devices
    "rows": "data",  # the user averages the Jacobian
    "partial": "both",  # the axis of the batch is manual, that of the parameters is not
    "parts": "fsdp",  # each device holds a part of the rows
    "outside": "fsdp",  # rows leave shard_map, and the rule is applied to them there
}


def job_map(kind, mode, route):
    layout = LAYOUTS[MAPS[kind]]
    mesh = mesh_of(layout, mode)
    split = {name: layout.params is SHARDED and spec != P() for name, spec in SHARDED.items()}
    parts = {name: P("data") if flag else P() for name, flag in split.items()}

    def local_losses(params, batch):
        params = {
            name: lax.all_gather(x, "data", tiled=True) if split[name] else x
            for name, x in params.items()
        }
        inside = dataclasses.replace(layout, batch=P(None)) if kind == "partial" else ONE
        return losses_fn(params, batch, inside, mode if kind == "partial" else "auto")

    def mean_losses(params, batch):
        return lax.pmean(local_losses(params, batch), "data")

    def averaged_rows(params, batch):
        varying = lax.pcast(params, "data", to="varying")
        return lax.pmean(jaxmtl.value_and_jacobian(local_losses)(varying, batch), "data")

    def mapped(fun, in_specs, out_specs):
        return jax.shard_map(
            fun, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={"data"}
        )

    batch_spec = P("data")
    value_and_jacobian = jaxmtl.value_and_jacobian(mean_losses)
    if kind == "outside":
        row_specs = {name: P(None, *spec) for name, spec in parts.items()}
        jacobian_of = mapped(value_and_jacobian, (parts, batch_spec), (P(), row_specs))
        fun = functools.partial(step, route, None, jacobian_of=jacobian_of)
    else:
        fun = functools.partial(step, route, mean_losses)
        if kind == "rows":
            fun = functools.partial(fun, jacobian_of=averaged_rows)
        if kind == "parts" and route == "rows":
            route = "pieces"
            fun = functools.partial(step_of_parts, value_and_jacobian, split)
        updates = dict.fromkeys(rules(route), parts)
        fun = mapped(fun, (parts, P(), batch_spec, batch_spec), (updates, P()))
    with jax.set_mesh(mesh):
        params, batches = place(mesh, layout, *problem())
        program = compiled(fun, params, initial(route, params), *batches[0])
        return report(program, program, route, layout, mesh, params, batches)


def job_examples(name, mode, _):
    """The Gramian of one objective per example, its pullback and UPGrad's update."""

    def evaluate(layout, mode, params, batch):
        loss = functools.partial(example_loss, layout=layout, mode=mode)
        axes, rule = (None, 0, 0), jaxmtl.upgrad()
        _, gramian, pullback = jaxmtl.value_and_gramian(loss, in_axes=axes)(params, *batch)
        value_and_grad = jaxmtl.value_and_grad(loss, rule, in_axes=axes)
        _, update = value_and_grad(params, rule.init(params), *batch)
        return gramian, pullback(jnp.arange(float(BATCH))), update

    params, batches = problem()
    args = (params, batches[0][0])
    wanted = compiled(functools.partial(evaluate, ONE, "auto"), *args)(*args)
    layout = LAYOUTS[name]
    mesh = mesh_of(layout, mode)
    with jax.set_mesh(mesh):
        args = place(mesh, layout, *args)
        program = compiled(functools.partial(evaluate, layout, mode), *args)
        found = jax.tree.map(np.asarray, program(*args))
    zero = jax.tree.map(np.zeros_like, wanted)
    names = ("gramian", "pullback", "upgrad")
    triples = zip(names, found, wanted, zero, strict=True)
    return {
        "deviation": {name: distance(a, b) / distance(b, c) for name, a, b, c in triples},
        "collectives": collectives(program),
    }


def job_separate(name, mode, _):
    """One loss function and one batch per task: the Jacobian, the Gramian and UPGrad's update."""
    names = tuple(f"task{i}" for i in range(TASKS))

    def evaluate(layout, mode, params, batches):
        def loss_of(i):
            def loss(params, batch):
                x, y = batch
                return jnp.mean((network(params, x, layout, mode)[:, i] - y[:, i]) ** 2)

            return loss

        functions, rule = {n: loss_of(i) for i, n in enumerate(names)}, jaxmtl.upgrad()
        _, jacobian = jaxmtl.value_and_jacobian(functions)(params, batches)
        gramian, chunked = (
            jaxmtl.value_and_gramian(functions, chunk_size=size)(params, batches)[1]
            for size in (None, 2)
        )
        value_and_grad = jaxmtl.value_and_grad(functions, rule)
        _, update = value_and_grad(params, rule.init(params), batches)
        return jacobian, gramian, chunked, update

    params, ((first, second), *_) = problem()
    batches = {n: (first if i % 2 else second) for i, n in enumerate(names)}
    wanted = compiled(functools.partial(evaluate, ONE, "auto"), params, batches)(params, batches)
    layout = LAYOUTS[name]
    mesh = mesh_of(layout, mode)
    with jax.set_mesh(mesh):
        params, _ = place(mesh, layout, params, [])
        split = NamedSharding(mesh, layout.batch)
        batches = jax.tree.map(lambda x: jax.device_put(x, split), batches)
        program = compiled(functools.partial(evaluate, layout, mode), params, batches)
        found = jax.tree.map(np.asarray, program(params, batches))
    zero = jax.tree.map(np.zeros_like, wanted)
    parts = ("jacobian", "gramian", "chunked", "upgrad")
    triples = zip(parts, found, wanted, zero, strict=True)
    return {name: distance(a, b) / distance(b, c) for name, a, b, c in triples}


def job_traces(name, mode, _):
    """Whether what surrounds the rules passes explicit axes; updates are to lie as parameters."""
    layout, m = LAYOUTS[name], TASKS
    mesh = mesh_of(layout, mode)
    of_layout = functools.partial(losses_fn, layout=layout, mode=mode)
    of_example = functools.partial(example_loss, layout=layout, mode=mode)
    rule = jaxmtl.upgrad()
    mask = jnp.arange(m) != 1

    def encoder(params, batch):
        params = jax.tree.map(lambda p: jax.sharding.reshard(p, P()), params)
        return jnp.tanh(batch[0] @ params["w1"] + params["b1"]) @ params["w2"]

    def of_features(params, z, batch):
        head = jax.sharding.reshard(params["head"], P())
        return jnp.mean((z @ head - batch[1]) ** 2, axis=0)

    def not_head(path):
        return "head" not in jax.tree_util.keystr(path)

    groups = {"trunk": rule, "head": jaxmtl.linear_scalarization(jnp.ones(m))}
    labels = {name: "head" if name == "head" else "trunk" for name in SHAPES}
    tracked = jaxmtl.track_gradients(num_tasks=m, initial="first", max_norm=1.0)
    averaged = jaxmtl.cr_mogm(jaxmtl.mgda(), num_tasks=m)
    chains = {
        "tracked": (optax.chain(tracked, averaged, optax.adam(0.1)), {}),
        "clipped": (optax.chain(jaxmtl.clip_rows(1.0), rule), {}),
        "accumulated": (jaxmtl.multi_steps(optax.chain(rule, optax.adam(0.1)), 2, num_tasks=m), {}),
        "masked": (rule, {"task_mask": mask}),
        "masked moco": (jaxmtl.moco(num_tasks=m, normalize="norm_loss"), {"task_mask": mask}),
        "partition": (optax.partition(groups, labels), {}),
    }
    calls = {
        "chunked": (of_layout, {"chunk_size": 2}),
        "heads": (of_layout, {"shared": not_head}),
        "encoder": (of_features, {"encoder": encoder}),
        "examples": (lambda p, batch: of_example(p, *batch), {"in_axes": (None, 0)}),
    }

    def of_chain(tx, extra, params, state, batch):
        losses, jacobian = jaxmtl.value_and_jacobian(of_layout)(params, batch)
        return tx.update(jacobian, state, params, losses=losses, **extra)

    def of_call(fun, options, params, state, batch):
        found = jaxmtl.value_and_grad(fun, rule, **options)(params, state, batch)
        return found[1], found[0][1]

    def of_rows(params, state, batch):
        jacobian_of = jaxmtl.value_and_jacobian(of_example, in_axes=(None, 0, 0))
        _, jacobian = jacobian_of(params, *batch)
        return rule.update(jacobian, state, params)

    found = {}
    with jax.set_mesh(mesh):
        params, ((batch, _), *_) = place(mesh, layout, *problem())
        cases = {
            key: (functools.partial(of_chain, tx, extra), tx.init(params))
            for key, (tx, extra) in chains.items()
        }
        cases |= {
            key: (functools.partial(of_call, fun, options), rule.init(params))
            for key, (fun, options) in calls.items()
        }
        if "model" in layout.mesh:  # a row cannot be split along the axis that splits the examples
            cases["rows of examples"] = (of_rows, rule.init(params))
        for key, (fun, state) in cases.items():
            update, new = jax.eval_shape(fun, params, state, batch)
            after, before = jax.tree.leaves((update, new)), jax.tree.leaves((params, state))
            pairs = zip(after, map(jax.typeof, before), strict=True)
            found[key] = all(x.sharding.spec == y.sharding.spec for x, y in pairs)
    return found


# What the guide to devices plans with, per device and step, in numbers of the accumulation dtype:
# a ring all-reduce sends 2 (d - 1) / d of its operand, a reduce-scatter or an all-gather half of
# that.
ROUTES = ("Jacobian", "no Jacobian")
PLACES = ("replicated", "sharded")


def plan(route, place, n, m, d):
    """Returns the numbers reduced and gathered over devices, and those held beside the model.

    n parameters, m tasks, d devices over which the batch is split; parameters are replicated, or
    split over the same devices and fetched once per pass.
    """
    rows = m if route == "Jacobian" else 1
    passes = m if route == "Jacobian" else m + 1
    if place == "replicated":
        return {"reduced": passes * n, "gathered": 0, "held": rows * n}
    # Without the Jacobian every row is fetched again, to be pushed through the losses.
    gathered = n if route == "Jacobian" else (m + 1) * n
    return {"reduced": passes * n, "gathered": gathered, "held": rows * n // d}


def sent(route, place, n, m, d):
    """Returns the numbers that one device sends in a step."""
    planned = plan(route, place, n, m, d)
    twice = 2 if place == "replicated" else 1
    return (twice * planned["reduced"] + planned["gathered"]) * (d - 1) / d


def gigabytes(numbers):
    """Returns counts of float32 for the table, one in place of many that agree."""
    cells = [f"{float(f'{4e-9 * x:.2g}'):g}" for x in numbers]
    return " / ".join(cells if len(set(cells)) > 1 else cells[:1])


def table():
    """Returns the guide's plan in Markdown: gigabytes per device, on 8 / 64 / 512 devices."""
    head = "| n | m | route | sent, replicated | held, replicated | sent, sharded | held, sharded |"
    lines, devices = [head, "|---|---|---|---|---|---|---|"], (8, 64, 512)
    sizes = [(10**8, 8), (10**9, 2), (10**9, 8), (10**9, 40), (10**10, 8)]  # all linear in n
    for (n, m), route in itertools.product(sizes, ROUTES):
        cells = [f"1e{len(str(n)) - 1}", str(m), route]
        for place in PLACES:
            cells.append(gigabytes([sent(route, place, n, m, d) for d in devices]))
            cells.append(gigabytes([plan(route, place, n, m, d)["held"] for d in devices]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def job_plan(place, route, size):
    """What a compiled step sends, holds and needs, for two numbers of tasks."""
    spec = P() if place == "replicated" else P("data")
    width, found = int(size), {"n": 2 * 32 * int(size)}
    mesh = mesh_of(LAYOUTS["data"], "explicit")

    def losses_fn(params, x, m):
        params = jax.tree.map(lambda p: jax.sharding.reshard(p, P()), params)
        outputs = jnp.tanh(jnp.tanh(x @ params["in"]) @ params["out"])
        return jnp.mean(outputs[:, :m] ** 2, axis=0)

    def of_rows(m, params, x):
        return jaxmtl.value_and_jacobian(losses_fn)(params, x, m=m)

    def of_gramian(m, params, x):
        of_tasks = functools.partial(losses_fn, m=m)
        _, gramian, pullback = jaxmtl.value_and_gramian(of_tasks)(params, x)
        return pullback(jnp.sum(gramian, axis=1))

    with jax.set_mesh(mesh):
        shapes = {"in": (32, width), "out": (width, 32)}
        params = {
            name: jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
            for name, shape in shapes.items()
        }
        x = jax.device_put(jnp.ones((8, 32)), NamedSharding(mesh, P("data")))
        for m in (2, 6):
            fun = of_rows if route == "Jacobian" else of_gramian
            program = compiled(functools.partial(fun, m), params, x)
            memory = program.memory_analysis()
            found[m] = {
                "collectives": collectives(program),
                "arguments": memory.argument_size_in_bytes / 8,
                "outputs": memory.output_size_in_bytes / 8,
                "temporary": memory.temp_size_in_bytes / 8,
            }
    return found


def job_tasks(place, _, size):
    """How many numbers tasks send without the Jacobian, by layers and gradient after gradient."""
    m, width = 8, 64
    mesh = mesh_of(LAYOUTS["data"], "auto")
    split = NamedSharding(mesh, P("data"))

    def losses_fn(params, x):
        for w in params["layers"]:
            x = jnp.tanh(x @ w)
        return jnp.mean(jnp.einsum("bd,mdk->mbk", x, params["heads"]) ** 2, (1, 2))

    def step(chunk_size, params, x):
        fun = jaxmtl.value_and_gramian(losses_fn, chunk_size=chunk_size)
        _, gramian, pullback = fun(params, x)
        return pullback(jnp.sum(gramian, axis=1))

    params = {"layers": [jnp.eye(width)] * 3, "heads": jnp.ones((m, width, 4))}
    where = NamedSharding(mesh, P()) if place == "replicated" else split
    params, x = jax.device_put(params, where), jax.device_put(jnp.ones((int(size), width)), split)
    found = {}
    for name, chunk_size in {"layers": None, "gradients": 1}.items():
        sent = collectives(compiled(functools.partial(step, chunk_size), params, x))
        found[name] = sum(int(kind.split(":")[1]) * n for kind, n in sent.items())
    return found


def job_readme(*_):
    """Runs the listing of the guide to devices, and its step on one device."""
    text = (Path(__file__).parents[1] / "notebooks" / "guide" / "devices.md").read_text()
    listings = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    with jax.enable_x64(False):
        scope = {}
        for listing in listings:
            exec(listing, scope)
        batch = jax.tree.map(np.asarray, scope["batch"])
        params = {"w": np.zeros(scope["params"]["w"].shape, np.float32)}

        def losses_fn(params, batch):
            x, y = batch
            return jnp.mean((x @ params["w"] - y) ** 2, axis=0)

        _, jacobian = jaxmtl.value_and_jacobian(losses_fn)(params, batch)
        update, _ = jaxmtl.upgrad().update(jacobian, jaxmtl.upgrad().init(params), params)
    found = np.asarray(scope["params"]["w"])
    return {
        "listings": len(listings),
        "held": scope["params"]["w"].addressable_shards[0].data.shape,
        "difference": distance(found, -0.1 * update["w"]) / float(np.linalg.norm(found)),
    }


def job_lookup(*_):
    """Whether JAX maps a lookup over a split batch, by how it is written."""

    def plain(table, i):
        return table[i]

    def told(table, i):
        return table.at[i].get(out_sharding=P(None))

    def one_hot(table, i):
        return jax.nn.one_hot(i, len(table)) @ table

    def works(lookup):
        try:
            jax.eval_shape(jax.vmap(lookup, in_axes=(None, 0)), table, indices)
        except Exception as error:
            if type(error).__name__ != "ShardingTypeError":  # which has no public name
                raise
            return False
        return True

    mesh = mesh_of(LAYOUTS["data"], "explicit")
    with jax.set_mesh(mesh):
        table = jnp.ones((7, 3))
        indices = jax.device_put(jnp.arange(16) % 7, NamedSharding(mesh, P("data")))
        found = {fun.__name__: works(fun) for fun in (plain, told, one_hot)}

        def example_loss(table, i):
            return jnp.sum(one_hot(table, i) ** 2)

        value_and_gramian = jaxmtl.value_and_gramian(example_loss, in_axes=(None, 0))
        _, gramian, _ = value_and_gramian(table, indices)
    return found | {"gramian": np.asarray(gramian).tolist()}


JOBS = {
    "rules": job_rules,
    "map": job_map,
    "gradient": job_gradient,
    "examples": job_examples,
    "separate": job_separate,
    "plan": job_plan,
    "tasks": job_tasks,
    "readme": job_readme,
    "lookup": job_lookup,
    "traces": job_traces,
}


def main(jobs):
    if jobs == ["table"]:
        print(table())
        return
    jax.config.update("jax_enable_x64", True)
    if jobs[0] == "few":
        tested.intersection_update(FEW)
        jobs = jobs[1:]
    for job in jobs:
        kind, *rest = job.split(":")
        print(json.dumps(JOBS[kind](*rest)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
