"""Every rule through a long run of hostile gradients and losses, in one compiled scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmtl
from tests.methods import BY_NAME, METHODS, sweep

NAMES = [method.name for method in METHODS]
QUICK = ("linear_scalarization", "upgrad", "nash_mtl", "graddrop", "moco", "famo")
PARAMS = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(())}
SIZE = 7
SHORT, LONG = 300, 100_000
TINY = 20  # the place of the rows of size 2^-100


def row_events(m):
    """Jacobians (events, m, SIZE) of every hostile kind; the first is an ordinary one."""
    rng = np.random.default_rng(0)
    generic = rng.standard_normal((8, m, SIZE))
    line = np.arange(1, m + 1) * (-1.0) ** np.arange(m)
    opposite = generic[1].copy()
    opposite[1] = -opposite[0]
    twins = generic[2].copy()
    twins[1] = twins[0]
    lame = generic[3].copy()
    lame[0] = 0
    stationary = generic[4].copy()
    stationary[-1] = -stationary[:-1].sum(0)
    uneven = generic[5] * np.ldexp(1.0, np.linspace(-50, 50, m).astype(int))[:, None]
    events = [
        *generic,
        generic[0] - 0.9 * generic[0].mean(0),
        generic[6] - generic[6].mean(0) * (1 + 1e-6),
        np.outer(line, generic[7][0]),  # rank 1
        rng.standard_normal((m, 2)) @ rng.standard_normal((2, SIZE)),  # rank 2
        opposite,
        twins,
        lame,
        stationary,
        uneven,
        np.zeros((m, SIZE)),
        np.ldexp(generic[1], 50),
        np.ldexp(generic[2] - 0.9 * generic[2].mean(0), 50),
        np.ldexp(generic[3], -100),
    ]
    for bad in (np.nan, np.inf, -np.inf):
        hostile = generic[0].copy()
        hostile[-1, 2] = bad
        events.append(hostile)
    return np.stack([*events, np.full((m, SIZE), np.nan)]).astype(np.float32)


def loss_events(m, span):
    """Losses (events, m) from 2^-span to 2^span, positive on average, as losses are."""
    rng = np.random.default_rng(1)
    mixed = np.ldexp(1.0, np.linspace(-span, span, m).astype(int))
    events = [
        *rng.uniform(0.5, 2, (10, m)),
        np.zeros(m),
        -rng.uniform(0.01, 0.1, m),
        np.where(np.arange(m) % 2, 0.0, 1.0),
        np.full(m, 2.0**span),
        np.full(m, 2.0**-span),
        mixed,
        mixed[::-1],
    ]
    for bad in (np.nan, np.inf):
        events.append(np.where(np.arange(m) == 1, bad, 1.0))
    return np.stack(events).astype(np.float32)


def cross_events(m):
    """Cross-Gramians (events, m, m): neither symmetric nor definite."""
    rng = np.random.default_rng(2)
    events = rng.standard_normal((8, m, m))
    events[2], events[3], events[4] = 0, events[3] * 2.0**60, events[4] * 2.0**-60
    bad = np.stack([np.full((m, m), np.nan), np.where(np.eye(m) > 0, np.inf, 1.0)])
    return np.concatenate([events, bad]).astype(np.float32)


def choose(t, number, salt):
    """The event of step t, without a pattern; the first step is an ordinary one."""
    key = jax.random.fold_in(jax.random.key(salt), t)
    return jnp.where(t == 0, 0, jax.random.randint(key, (), 0, number))


def events_of(name, m):
    # GO4Align's weights are ratios of losses, those of the hypervolume powers of them: times rows
    # of 2^50 they would leave float32.
    spans = {"go4align": 30, "hypervolume_scalarization": 20}
    losses = loss_events(m, spans.get(name, 50))
    return {
        "rows": row_events(m),
        "losses": losses,
        "previous_batch_losses": losses,
        "cross_gramian": cross_events(m),
    }


def chosen(events, t):
    return {name: choose(t, len(table), salt) for salt, (name, table) in enumerate(events.items())}


@functools.cache
def expected_skips(name, m, steps, reads):
    """How many steps hold a non-finite number in something that is read."""
    events = events_of(name, m)
    index = jax.vmap(functools.partial(chosen, events))(jnp.arange(steps))
    bad = np.zeros(steps, bool)
    for key in reads:
        finite = np.isfinite(events[key]).reshape(len(events[key]), -1).all(1)
        bad |= ~finite[np.asarray(index[key])]
    if name == "fairgrad":  # whose weights grow as |g|^(-4/3), beyond float32
        bad |= np.asarray(index["rows"]) == TINY
    return int(bad.sum())


def soak(name, steps):
    """Compiles the whole run: aggregator, Adam, `apply_updates`, in one scan."""
    method = BY_NAME[name]
    m = max(4, method.min_tasks)
    # Adam squares what it gets.
    optimizer = optax.chain(method.make(m), optax.clip(2.0**50), optax.adam(1e-3))
    events = events_of(name, m)

    def step(carry, _):
        params, state, t = carry
        index = chosen(events, t)
        now = {key: jnp.asarray(table)[index[key]] for key, table in events.items()}
        rows = now.pop("rows")
        jacobian = {"a": rows[:, :6].reshape(m, 2, 3), "b": rows[:, 6]}
        inputs = {key: now[key] for key in {"losses", *method.inputs}}
        updates, state = optimizer.update(jacobian, state, params, **inputs)
        return (jaxmtl.apply_updates(params, updates), state, t + 1), None

    def run(params):
        start = (params, optimizer.init(params), jnp.zeros((), jnp.int32))
        (params, state, _), _ = jax.lax.scan(step, start, length=steps)
        return params, state

    reads = tuple(key for key in events if key == "rows" or key in method.inputs)
    return jax.jit(run).lower(PARAMS).compile(), expected_skips(name, m, steps, reads)


def check(name, run, expected):
    params, state = run(PARAMS)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((params, state)))
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(params)) > 0
    if name != "linear_scalarization":  # which has no state to count in
        assert int(optax.tree.get(state, "mtl_skipped")) == expected
    assert expected > 0


@pytest.mark.parametrize("name", sweep(NAMES, QUICK))
def test_three_hundred_hostile_steps(name):
    """Ends finite, and the guard counts each non-finite step that the rule reads, no other."""
    check(name, *soak(name, SHORT))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_thousand_hostile_steps(name):
    """The same for long, in memory that does not depend on the number of steps."""
    run, expected = soak(name, LONG)
    check(name, run, expected)
    short, _ = soak(name, SHORT)
    needed, needed_short = run.memory_analysis(), short.memory_analysis()
    assert needed.temp_size_in_bytes == needed_short.temp_size_in_bytes
