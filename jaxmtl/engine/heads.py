"""Which steps of m losses only one of them depends on, and passes that make use of it.

Networks of several tasks end in a head per task. The cotangents of all heads come from one backward
pass, as each head sees the loss of its own task alone; only what several tasks depend on, up to the
values that heads read of it, is pulled back once per task.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from jaxmtl import linalg
from jaxmtl.engine import execute
from jaxmtl.engine.program import DATA, PARAM, Program, Scan, Use, Value, is_float, operations

Residuals = dict[Use, tuple[jax.Array, ...]]


@dataclasses.dataclass(eq=False)
class Split:
    """The steps of a program by who depends on them.

    Attributes:
      trunk: Those on which several tasks depend.
      heads: For each task, those on which it alone depends.
      rest: All others.
      of_use: The task of each use in the heads.
      losses: The values that are stacked; none where all is trunk.
    """

    trunk: list[Any]
    heads: list[list[Any]]
    rest: list[Any]
    of_use: dict[Use, int]
    losses: list[Value]


def split(program: Program) -> Split:
    """Returns the steps by who depends on them; all are trunk where losses are not stacked."""
    made = {v: step for step in program.steps for v in step.outs}
    last = made.get(program.outs[0])
    losses: list[Value] = []
    if last is not None and not isinstance(last, Scan) and last.name in ("stack", "concatenate"):
        read = [v for v in last.eqn.invars if not isinstance(v, jex.Literal)]
        values = dict(zip(dict.fromkeys(read), last.ins, strict=False))
        losses = [values[v] for v in read if v in values]
    m = program.outs[0].aval.shape[0]
    if m == 1 or len(set(losses)) != m or len(losses) != m or any(v.kind != DATA for v in losses):
        return Split(list(program.steps), [[] for _ in range(m)], [], {}, [])
    wanted: dict[Value, set[int]] = {v: {i} for i, v in enumerate(losses)}
    found: dict[Any, set[int]] = {}
    for step in reversed(program.steps):
        tasks: set[int] = set()
        if step is not last:
            tasks = set().union(*(wanted.get(v, set()) for v in step.outs))
        found[step] = tasks
        for v in _reads(step):
            wanted.setdefault(v, set()).update(tasks)
    parts = Split([], [[] for _ in range(m)], [], {}, losses)
    for step in program.steps:
        tasks = found[step]
        if len(tasks) == 1:
            (task,) = tasks
            parts.heads[task].append(step)
            parts.of_use.update((use, task) for use in _uses(step))
        else:
            (parts.trunk if tasks else parts.rest).append(step)
    return parts


def _uses(step: Any) -> Sequence[Use]:
    if isinstance(step, Scan):
        return step.uses
    return [step] if isinstance(step, Use) else []


def _reads(step: Any) -> Iterable[Value]:
    if not isinstance(step, Scan):
        return step.ins
    inner = [v for s in step.steps for v in _reads(s)]
    return dict.fromkeys([*step.init, *step.xs, *inner, *step.carry_outs, *step.ys])


@dataclasses.dataclass(eq=False)
class Stage:
    """Some consecutive steps, with a backward pass of their own.

    Attributes:
      steps: The steps; of the last stage those of no task.
      heads: For each task, the steps on which it alone depends; the last stage has them.
      uses: The uses among all these.
      params: The PARAM values that they read.
      ins: The values of earlier stages that they read and that carry a derivative.
      outs: Their own that later stages read likewise; of the last stage the losses.
      fixed: Their own that later stages read, but carry none; of the last stage the other outputs.
      cuts: The reads of the trunk by heads, which have cotangents of their own, and the losses that
        the trunk makes, since they are part of others.
      is_layer: Whether only its last step is a use or a product.
    """

    steps: list[Any]
    heads: list[list[Any]]
    uses: list[Use]
    params: list[Value]
    ins: list[Value]
    outs: list[Value]
    fixed: list[Value]
    cuts: list[tuple[int, Value]]
    is_layer: bool


def stages(program: Program, parts: Split, most: int, size_of: Callable[[Use], int]) -> list[Stage]:
    """Cuts a program into stages, so that not all cotangents exist at a time.

    A layer after other uses or products begins a stage, and a large one ends it.

    Args:
      program: The losses over one batch.
      parts: Its steps by who depends on them.
      most: How many cotangents the taps of one stage may have.
      size_of: The number of those of a use.
    """
    pieces: list[list[Any]] = [[]]
    total, is_layer = 0, False
    for step in parts.trunk:
        size, has_products = sum(map(size_of, _uses(step))), _has_products(step)
        is_next = has_products and size and (total or is_layer)
        if is_next or (total and total + size > most):
            pieces.append([])
            total, is_layer = 0, False
        pieces[-1].append(step)
        total, is_layer = total + size, is_layer or has_products
        if 4 * total > most:  # The cotangent of the stage is then that of a tap.
            pieces.append([])
            total, is_layer = 0, False
    pieces = [piece for piece in pieces if piece]
    none: list[list[Any]] = [[] for _ in parts.heads]
    all_steps = [(piece, none) for piece in pieces] + [(parts.rest, parts.heads)]
    made = [{v for s in steps for v in s.outs} for steps, _ in all_steps]
    reads = [
        dict.fromkeys(v for part in (*heads, steps) for s in part for v in _reads(s))
        for steps, heads in all_steps
    ]
    reads[-1].update(dict.fromkeys(program.outs))
    found = []
    for k, (steps, heads) in enumerate(all_steps):
        every = [s for part in (*heads, steps) for s in part]
        later = [v for some in reads[k + 1 :] for v in some if v in made[k]]
        later = list(dict.fromkeys(later))
        earlier = set().union(*made[:k])
        is_last = k == len(pieces)
        found.append(
            Stage(
                steps,
                heads,
                [use for s in every for use in _uses(s)],
                [v for v in execute.needed(every) if v.kind == PARAM],
                [v for v in reads[k] if v in earlier and is_float(v.aval)],
                [program.outs[0]] if is_last else [v for v in later if is_float(v.aval)],
                list(program.outs[1:]) if is_last else [v for v in later if not is_float(v.aval)],
                [
                    (task, v)
                    for task, part in enumerate(heads)
                    for v in dict.fromkeys(
                        [v for s in part for v in _reads(s)]
                        + (parts.losses[task : task + 1] * is_last)
                    )
                    if v in earlier and is_float(v.aval)
                ],
                bool(steps) and not any(_uses(s) or _has_products(s) for s in steps[:-1]),
            )
        )
    return found


def _has_products(step: Any) -> bool:
    if isinstance(step, Scan):
        return True
    return step.eqn is not None and operations(step.eqn) > 0


Cotangents = dict[Value, jax.Array]


class Forward:
    """The losses, and what pulls cotangents back stage by stage.

    Attributes:
      losses: ``(m,)``.
      aux: The other outputs of the program.
      residuals: For each use, its DATA operands.
      pulls: For each stage, the backward pass.
    """

    def __init__(
        self,
        program: Program,
        found: list[Stage],
        leaves: list[jax.Array],
        constants: list[jax.Array],
    ) -> None:
        """Evaluates one stage after the other."""
        self.stages = found
        env = execute.shared_env(program, leaves, constants)
        for v in execute.needed(program.steps):
            execute.resolve(env, v)
        shapes = dict(zip(program.uses, execute.tap_shapes(program), strict=True))
        self.residuals: Residuals = {}
        self.pulls = []
        for stage in found:
            outs, self_pull, (fixed, residuals) = jax.vjp(
                functools.partial(_run, program, stage, env),
                [[jnp.zeros(s.shape, s.dtype) for s in shapes[use]] for use in stage.uses],
                [jnp.zeros(v.aval.shape, v.aval.dtype) for _, v in stage.cuts],
                [env[v] for v in stage.params],
                [env[v] for v in stage.ins],
                has_aux=True,
            )
            self.pulls.append(self_pull)
            self.residuals.update(zip(stage.uses, residuals, strict=True))
            if stage is not found[-1]:
                env.update(zip((*stage.outs, *stage.fixed), (*outs, *fixed), strict=True))
        (self.losses,), self.aux = outs, fixed

    def pull_tasks(self, consume: Callable[[dict[Use, list[jax.Array]]], Any]) -> None:
        """Pulls the loss of every task back by itself.

        Args:
          consume: Takes the cotangents of the taps of each stage, the last stage first: ``(m,
            *shape)``, of a use in a head ``(1, *shape)``. The cotangents of the next stage are not
            computed before what it returns is known, if that is an array.
        """
        *others, last = self.stages
        losses, pull = self.losses, self.pulls[-1]
        cotangents: Cotangents = {}
        if any(last.heads):
            taps, of_cuts, _, _ = pull([jnp.ones_like(losses)])
            taps = jax.tree.map(lambda x: x[None], taps)
            known = dict(zip(last.cuts, of_cuts, strict=True))
            for v in dict.fromkeys(v for _, v in last.cuts):
                zero = jnp.zeros(v.aval.shape, v.aval.dtype)
                rows = [known.get((i, v), zero) for i in range(losses.shape[0])]
                cotangents[v] = jnp.stack(rows)
        else:
            taps, _, _, ins = jax.vmap(lambda unit: pull([unit]))(linalg.units(losses))
            cotangents.update(zip(last.ins, ins, strict=True))
        done = consume(dict(zip(last.uses, taps, strict=True)))
        for stage, pull in zip(others[::-1], self.pulls[-2::-1], strict=True):
            cotangents = dict(
                zip(cotangents, linalg.after(done, list(cotangents.values())), strict=True)
            )
            if not stage.outs:  # No loss depends on it differentiably, so that it has no uses.
                continue
            outs = [_taken(cotangents, v, losses.shape) for v in stage.outs]
            taps, _, _, ins = jax.vmap(pull)(outs)
            done = consume(dict(zip(stage.uses, taps, strict=True)))
            if stage.is_layer:  # Nothing is computed twice, and the taps need not wait for these.
                _, _, _, ins = jax.vmap(pull)(linalg.after(done, outs))
            _add(cotangents, stage.ins, ins)


def _run(
    program: Program,
    stage: Stage,
    env: execute.Env,
    taps: list[list[jax.Array]],
    added: list[jax.Array],
    params: list[jax.Array],
    ins: list[jax.Array],
) -> Any:
    """Runs a stage; returns its outs, then what carries no derivative and the residuals."""
    env = {**env, **dict(zip((*stage.params, *stage.ins), (*params, *ins), strict=True))}
    residuals: Residuals = {}
    of_uses = dict(zip(stage.uses, taps, strict=True))
    for task, steps in enumerate(stage.heads):
        own = dict(env)
        for (reader, v), x in zip(stage.cuts, added, strict=True):
            if reader == task:
                own[v] = env[v] + x
        execute.run_steps(steps, own, of_uses, residuals)
        env.update((v, own[v]) for step in steps for v in step.outs)
    for (reader, v), x in zip(stage.cuts, added, strict=True):
        if not stage.heads[reader]:  # its loss is stacked as the trunk makes it
            env[v] = env[v] + x
    execute.run_steps(stage.steps, env, of_uses, residuals)
    fixed = [env[v] if v in env else execute.resolve(env, v) for v in stage.fixed]
    return [env[v] for v in stage.outs], (fixed, [residuals[use] for use in stage.uses])


def _taken(cotangents: Cotangents, v: Value, lead: tuple[int, ...] = ()) -> jax.Array:
    """Removes and returns the cotangent of a value, zeros where nothing has arrived."""
    found = cotangents.pop(v, None)
    return jnp.zeros((*lead, *v.aval.shape), v.aval.dtype) if found is None else found


def _add(cotangents: Cotangents, values: Iterable[Value], found: Iterable[jax.Array]) -> None:
    for v, x in zip(values, found, strict=True):
        cotangents[v] = cotangents[v] + x if v in cotangents else x


def pull(found: list[Stage], pulls: Sequence[Any], weights: jax.Array) -> Cotangents:
    """Returns ``J^T w`` for every PARAM value, given the ``pulls`` of a `Forward`."""
    cotangents: Cotangents = {}
    of_params: Cotangents = {}
    outs = [weights]
    for k in reversed(range(len(found))):
        stage = found[k]
        _, _, params, ins = pulls[k](outs)
        _add(of_params, stage.params, params)
        _add(cotangents, stage.ins, ins)
        outs = [_taken(cotangents, v) for v in found[k - 1].outs] if k else []
    return of_params
