"""Run a ``Program``: its losses, the taps on its uses, and the gradients that follow from them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmtl import linalg
from jaxmtl.engine.primitives import rule_of
from jaxmtl.engine.program import DATA, PARAM, Call, Program, Scan, Use, Value, from_params

Env = dict[Value, jax.Array]


def resolve(env: Env, value: Value) -> jax.Array:
    """Returns a value that does not depend on the example, as seen outside all loops."""
    stack = [value]  # and no recursion: a parameter may pass through thousands of equations
    while stack:
        v = stack[-1]
        missing = [u for u in _origins(v) if not _is_known(env, u)]
        if _is_known(env, v):
            stack.pop()
        elif missing:
            stack.extend(missing)
        elif isinstance(v.origin, Value):
            env[v] = _read(env, v.origin)
        else:
            assert v.origin is not None  # Every other value is an input, and inputs are in `env`.
            call, _ = v.origin
            outs = over_loops(call, v.loops)(*(_read(env, u) for u in call.ins))
            env.update(zip(call.outs, outs, strict=True))
    return _read(env, value)


def _origins(value: Value) -> tuple[Value, ...]:
    if isinstance(value.origin, Value):
        return (value.origin,)
    return () if value.origin is None else value.origin[0].ins


def _is_known(env: Env, value: Value) -> bool:
    return value in env or value.literal is not None


def _read(env: Env, value: Value) -> jax.Array:
    if value in env:
        return env[value]
    return jnp.asarray(value.literal) if isinstance(value.literal, np.ndarray) else value.literal


def over_loops(call: Call, loops: Sequence[Any], data_varies: bool = False) -> Callable[..., Any]:
    """Returns ``call.fun`` mapped over loops, outermost first, for the operands that change."""
    fun = call.fun
    for loop in reversed(loops):
        axes = [
            0 if loop in v.loops or (data_varies and v.kind == DATA) else None for v in call.ins
        ]
        if any(axis == 0 for axis in axes):
            fun = jax.vmap(fun, in_axes=axes)
        else:
            fun = _broadcast_outputs(fun, loop.length)
    return fun


def _broadcast_outputs(fun: Callable[..., Any], length: int) -> Callable[..., Any]:
    def repeated(*args: jax.Array) -> list[jax.Array]:
        return [jnp.broadcast_to(x, (length, *x.shape)) for x in fun(*args)]

    return repeated


def shared_env(
    program: Program, leaves: Sequence[jax.Array], constants: Sequence[jax.Array]
) -> Env:
    """Returns an environment that holds the inputs shared by all examples."""
    env: Env = dict(zip(program.leaves, leaves, strict=True))
    env.update(zip(program.constants, constants, strict=True))
    return env


def tap_shapes(program: Program) -> list[list[jax.ShapeDtypeStruct]]:
    """Returns, per use, the types of its taps for one example."""
    return [
        [
            jax.ShapeDtypeStruct(
                tuple(loop.length for loop in use.loops) + aval.shape,
                aval.dtype,
                sharding=linalg.explicit_sharding(aval, lead=len(use.loops)),
            )
            for aval in use.taps
        ]
        for use in program.uses
    ]


def needed(steps: Iterable[Any]) -> dict[Value, None]:
    """Returns the values of these steps that are computed from the parameters alone."""
    found: dict[Value, None] = {}
    for step in steps:
        if isinstance(step, Scan):
            found.update(needed(step.steps))
            found.update((v, None) for v in step.xs if from_params(v))
        else:
            found.update((v, None) for v in step.ins if from_params(v))
    return found


def run(
    program: Program, env: Env, example: Sequence[jax.Array], taps: Sequence[Sequence[jax.Array]]
) -> tuple[list[jax.Array], list[tuple[jax.Array, ...]]]:
    """Evaluates the program on one example, with ``taps`` added where the uses want them.

    Args:
      program: the program.
      env: from `shared_env`.
      example: its DATA inputs.
      taps: per use, arrays of the types that `tap_shapes` tells.

    Returns:
      The outputs, and per use the values of its DATA operands, stacked over the loops around it.
    """
    env = dict(env)
    env.update(zip(program.data, example, strict=True))
    residuals: dict[Use, tuple[jax.Array, ...]] = {}
    run_steps(program.steps, env, dict(zip(program.uses, taps, strict=True)), residuals)
    outs = [env[v] if v in env else resolve(env, v) for v in program.outs]
    return outs, [residuals[use] for use in program.uses]


def run_steps(
    steps: Sequence[Any],
    env: Env,
    taps: Mapping[Use, Sequence[jax.Array]],
    residuals: dict[Use, tuple[jax.Array, ...]],
) -> None:
    """Runs steps that are outside all loops; ``env`` and ``residuals`` are added to."""
    for value in needed(steps):
        resolve(env, value)
    _run_steps(steps, env, taps, residuals)


def _run_steps(
    steps: Iterable[Any],
    env: Env,
    taps: Mapping[Use, Sequence[jax.Array]],
    residuals: dict[Use, tuple[jax.Array, ...]],
) -> None:
    for step in steps:
        if isinstance(step, Scan):
            _run_scan(step, env, taps, residuals)
            continue
        ins = [_read(env, v) for v in step.ins]
        if isinstance(step, Use) and step.probed:
            probes = iter(taps[step])
            ins = [
                x + next(probes) if v.kind == PARAM else x
                for v, x in zip(step.ins, ins, strict=True)
            ]
            residuals[step] = ()
        outs = list(step.fun(*ins))
        if isinstance(step, Use) and not step.probed:
            for k, tap in zip(step.tapped, taps[step], strict=True):
                outs[k] = outs[k] + tap
            residuals[step] = tuple(_read(env, v) for v in step.data)
        env.update(zip(step.outs, outs, strict=True))


def _run_scan(
    scan: Scan,
    env: Env,
    taps: Mapping[Use, Sequence[jax.Array]],
    residuals: dict[Use, tuple[jax.Array, ...]],
) -> None:
    sliced = [v for v in needed(scan.steps) if scan.loop in v.loops]

    def body(carry: Sequence[jax.Array], xs: Any) -> tuple[list[jax.Array], Any]:
        slices, pieces, inner_taps = xs
        inner_env = dict(env)
        inner_env.update(zip(scan.carry, carry, strict=True))
        inner_env.update(zip(scan.slices, slices, strict=True))
        inner_env.update(zip(sliced, pieces, strict=True))
        inner_residuals: dict[Use, tuple[jax.Array, ...]] = {}
        inner = dict(zip(scan.uses, inner_taps, strict=True))
        _run_steps(scan.steps, inner_env, inner, inner_residuals)
        ys = [_read(inner_env, v) for v in scan.ys]
        return [_read(inner_env, v) for v in scan.carry_outs], (
            ys,
            [inner_residuals[use] for use in scan.uses],
        )

    if scan.remat:
        body = jax.checkpoint(body, prevent_cse=False)
    xs = (
        [_read(env, v) for v in scan.xs],
        [env[v] for v in sliced],
        [list(taps[use]) for use in scan.uses],
    )
    init = [_read(env, v) for v in scan.init]
    carry, (ys, stacked) = lax.scan(
        body, init, xs, length=scan.loop.length, reverse=scan.reverse, unroll=scan.unroll
    )
    env.update(zip(scan.outs, [*carry, *ys], strict=True))
    residuals.update(zip(scan.uses, stacked, strict=True))


def probed_rows(use: Use, cotangents: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the cotangents of the PARAM operands of a probed use, from those of its taps.

    Args:
      use: A use whose taps are on its operands.
      cotangents: ``(examples, *loops, *shape)``.
    """
    rows = []
    for value, x in zip(use.params, cotangents, strict=True):
        repeated = [1 + i for i, loop in enumerate(use.loops) if loop not in value.loops]
        rows.append(jnp.sum(x, axis=repeated) if repeated else x)
    return rows


def pull(
    use: Use,
    env: Env,
    residual: Sequence[jax.Array],
    cotangents: Sequence[jax.Array],
    over_examples: bool = False,
) -> list[jax.Array]:
    """Returns the cotangents of the PARAM operands of one use.

    Args:
      use: the use.
      env: values shared by all examples, as seen outside all loops.
      residual: its DATA operands for one example, or for all of them.
      cotangents: those of its tapped outputs, likewise.
      over_examples: whether the arrays have a leading axis of examples, to sum over.

    Returns:
      One array per PARAM operand, shaped like the operand outside all loops.
    """
    fun = over_loops(use, use.loops, data_varies=True)
    if over_examples and residual:
        fun = jax.vmap(fun, in_axes=[0 if v.kind == DATA else None for v in use.ins])
    elif over_examples:
        # Nothing but the parameter enters, so the sum over examples can be taken first.
        cotangents = [jnp.sum(c, axis=0) for c in cotangents]
    known = {v: resolve(env, v) for v in use.ins if v.kind not in (PARAM, DATA)}
    known.update(zip(use.data, residual, strict=True))

    def of_params(*params: jax.Array) -> list[jax.Array]:
        values = {**known, **dict(zip(use.params, params, strict=True))}
        outs = fun(*(values[v] for v in use.ins))
        return [outs[k] for k in use.tapped]

    primals = [resolve(env, v) for v in use.params]
    if rule_of(use).is_linear and len(primals) == 1:
        return list(jax.linear_transpose(of_params, *primals)(list(cotangents)))
    return list(jax.vjp(of_params, *primals)[1](list(cotangents)))


def pull_to_leaves(
    program: Program,
    leaves: Sequence[jax.Array],
    constants: Sequence[jax.Array],
    cotangents: dict[Value, jax.Array],
) -> list[jax.Array]:
    """Carries cotangents of PARAM values back to the leaves; zeros where nothing arrives."""
    targets = [v for v in cotangents if v.leaf is None]
    if targets:

        def values(leaves: Sequence[jax.Array]) -> list[jax.Array]:
            env = shared_env(program, leaves, constants)
            return [resolve(env, v) for v in targets]

        _, pullback = jax.vjp(values, list(leaves))
        grads = list(pullback([cotangents[v] for v in targets])[0])
    else:
        grads = [jnp.zeros_like(x) for x in leaves]
    for value, cotangent in cotangents.items():
        if value.leaf is not None:
            present = cotangent.astype(grads[value.leaf].dtype)
            grads[value.leaf] = grads[value.leaf] + present if targets else present
    return grads
