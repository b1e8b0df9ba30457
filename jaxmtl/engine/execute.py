"""Run a `Program`: its losses, the taps on its uses, and the gradients that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl import linalg
from jaxmtl.engine.program import DATA, PARAM, Call, Program, Scan, Use, Value, derived

Array = Any
Env = dict[Value, Array]

# Uses that are linear in their one parameter: they transpose without a forward pass.
_LINEAR = frozenset(
    {
        "dot_general",
        "conv_general_dilated",
        "gather",
        "dynamic_slice",
        "mul",
        "identity",
        "reshape",
        "transpose",
    }
)


def resolve(env: Env, value: Value) -> Array:
    """Return a value that does not depend on the example, as seen outside all loops."""
    if value in env:
        return env[value]
    if value.literal is not None:
        return value.literal
    if isinstance(value.origin, Value):
        env[value] = resolve(env, value.origin)
        return env[value]
    assert value.origin is not None  # Every other value is an input, and inputs are in `env`.
    call, _ = value.origin
    outs = over_loops(call, value.loops)(*(resolve(env, v) for v in call.ins))
    env.update(zip(call.outs, outs, strict=True))
    return env[value]


def over_loops(call: Call, loops: Sequence[Any], data_varies: bool = False) -> Callable[..., Any]:
    """Return `call.fun` mapped over loops, outermost first, for the operands that change."""
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
    def repeated(*args: Array) -> list[Array]:
        return [jnp.broadcast_to(x, (length, *x.shape)) for x in fun(*args)]

    return repeated


def derive(program: Program, leaves: Sequence[Array], constants: Sequence[Array]) -> Env:
    """Return an environment that holds the inputs shared by all examples."""
    env: Env = dict(zip(program.leaves, leaves, strict=True))
    env.update(zip(program.constants, constants, strict=True))
    return env


def tap_shapes(program: Program) -> list[list[jax.ShapeDtypeStruct]]:
    """Return, per use and tapped output, the type of its cotangent for one example."""
    return [
        [
            jax.ShapeDtypeStruct(
                tuple(loop.length for loop in use.loops) + use.outs[k].aval.shape,
                use.outs[k].aval.dtype,
                sharding=linalg.explicit_sharding(use.outs[k].aval, lead=len(use.loops)),
            )
            for k in use.tapped
        ]
        for use in program.uses
    ]


def _needed(steps: Iterable[Any]) -> dict[Value, None]:
    """Return the values of these steps that are computed from the parameters alone."""
    found: dict[Value, None] = {}
    for step in steps:
        if isinstance(step, Scan):
            found.update(_needed(step.steps))
            found.update((v, None) for v in step.xs if derived(v))
        else:
            found.update((v, None) for v in step.ins if derived(v))
    return found


def run(
    program: Program, env: Env, example: Sequence[Array], taps: Sequence[Sequence[Array]]
) -> tuple[list[Array], list[tuple[Array, ...]]]:
    """Evaluate the program on one example, with `taps` added to the outputs of the uses.

    Args:
      program: the program.
      env: from `derive`.
      example: its DATA inputs.
      taps: per use, one array for each tapped output.

    Returns:
      The outputs, and per use the values of its DATA operands, stacked over the loops around it.
    """
    env = dict(env)
    for value in _needed(program.steps):
        resolve(env, value)
    env.update(zip(program.data, example, strict=True))
    residuals: dict[Use, tuple[Array, ...]] = {}
    _run_steps(program.steps, env, dict(zip(program.uses, taps, strict=True)), residuals)
    outs = [env[v] if v in env else resolve(env, v) for v in program.outs]
    return outs, [residuals[use] for use in program.uses]


def _read(env: Env, value: Value) -> Array:
    return env.get(value, value.literal)


def _run_steps(
    steps: Iterable[Any],
    env: Env,
    taps: dict[Use, Sequence[Array]],
    residuals: dict[Use, tuple[Array, ...]],
) -> None:
    for step in steps:
        if isinstance(step, Scan):
            _run_scan(step, env, taps, residuals)
            continue
        outs = list(step.fun(*(_read(env, v) for v in step.ins)))
        if isinstance(step, Use):
            for k, tap in zip(step.tapped, taps[step], strict=True):
                outs[k] = outs[k] + tap
            residuals[step] = tuple(_read(env, v) for v in step.data)
        env.update(zip(step.outs, outs, strict=True))


def _run_scan(
    scan: Scan,
    env: Env,
    taps: dict[Use, Sequence[Array]],
    residuals: dict[Use, tuple[Array, ...]],
) -> None:
    sliced = [v for v in _needed(scan.steps) if scan.loop in v.loops]

    def body(carry: Sequence[Array], xs: Any) -> tuple[list[Array], Any]:
        slices, pieces, inner_taps = xs
        inner_env = dict(env)
        inner_env.update(zip(scan.carry, carry, strict=True))
        inner_env.update(zip(scan.slices, slices, strict=True))
        inner_env.update(zip(sliced, pieces, strict=True))
        inner_residuals: dict[Use, tuple[Array, ...]] = {}
        inner = dict(zip(scan.uses, inner_taps, strict=True))
        _run_steps(scan.steps, inner_env, inner, inner_residuals)
        ys = [_read(inner_env, v) for v in scan.ys]
        return [_read(inner_env, v) for v in scan.carry_outs], (
            ys,
            [inner_residuals[use] for use in scan.uses],
        )

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


def pull(
    use: Use,
    env: Env,
    residual: Sequence[Array],
    cotangents: Sequence[Array],
    over_examples: bool = False,
) -> list[Array]:
    """Return the cotangents of the PARAM operands of one use.

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

    def of_params(*params: Array) -> list[Array]:
        values = {**known, **dict(zip(use.params, params, strict=True))}
        outs = fun(*(values[v] for v in use.ins))
        return [outs[k] for k in use.tapped]

    primals = [resolve(env, v) for v in use.params]
    if use.name in _LINEAR and len(primals) == 1:
        return list(jax.linear_transpose(of_params, *primals)(list(cotangents)))
    return list(jax.vjp(of_params, *primals)[1](list(cotangents)))


def pull_to_leaves(
    program: Program,
    leaves: Sequence[Array],
    constants: Sequence[Array],
    cotangents: dict[Value, Array],
) -> list[Array]:
    """Carry cotangents of PARAM values back to the leaves; zeros where nothing arrives."""
    targets = [v for v in cotangents if v.leaf is None]
    if targets:

        def values(leaves: Sequence[Array]) -> list[Array]:
            env = derive(program, leaves, constants)
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
