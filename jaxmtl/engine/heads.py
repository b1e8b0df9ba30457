"""Which steps of m losses only one of them depends on, and passes that make use of it.

Networks of several tasks end in a head per task. The cotangents of all heads come from one backward
pass, as each head sees the loss of its own task alone; only what several tasks depend on, up to the
values that heads read of it, is pulled back once per task.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmtl import linalg
from jaxmtl.engine import execute
from jaxmtl.engine.program import DATA, Program, Scan, Use, Value, is_float

Residuals = dict[Use, tuple[jax.Array, ...]]


@dataclasses.dataclass(eq=False)
class Split:
    """The steps of a program by who depends on them.

    Attributes:
      trunk: Those on which several tasks depend.
      heads: For each task, those on which it alone depends.
      rest: All others.
      of_use: The task of each use in the heads.
    """

    trunk: list[Any]
    heads: list[list[Any]]
    rest: list[Any]
    of_use: dict[Use, int]


def split(program: Program) -> Split:
    """Returns the steps by who depends on them; all are trunk where losses are not stacked."""
    made = {v: step for step in program.steps for v in step.outs}
    last = made.get(program.outs[0])
    losses: list[Value] = []
    if last is not None and not isinstance(last, Scan) and last.name in ("stack", "concatenate"):
        values = dict(zip(dict.fromkeys(last.eqn.invars), last.ins, strict=False))
        losses = [values[v] for v in last.eqn.invars if v in values]
    m = program.outs[0].aval.shape[0]
    if m == 1 or len(set(losses)) != m or len(losses) != m or any(v.kind != DATA for v in losses):
        return Split(list(program.steps), [[] for _ in range(m)], [], {})
    wanted: dict[Value, set[int]] = {v: {i} for i, v in enumerate(losses)}
    found: dict[Any, set[int]] = {}
    for step in reversed(program.steps):
        tasks: set[int] = set()
        if step is not last:
            tasks = set().union(*(wanted.get(v, set()) for v in step.outs))
        found[step] = tasks
        for v in _reads(step):
            wanted.setdefault(v, set()).update(tasks)
    parts = Split([], [[] for _ in range(m)], [], {})
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


class Forward:
    """The losses and what pulls cotangents back.

    Attributes:
      losses: ``(m,)``.
      aux: The other outputs of the program.
      residuals: For each use, its DATA operands.
    """

    def __init__(
        self, program: Program, parts: Split, leaves: list[jax.Array], constants: list[jax.Array]
    ) -> None:
        """Evaluates the steps that several tasks depend on, then all others."""
        shapes = dict(zip(program.uses, execute.tap_shapes(program), strict=True))
        of_trunk = [use for step in parts.trunk for use in _uses(step)]
        of_rest = [use for use in program.uses if use not in set(of_trunk)]
        made = {v for step in parts.trunk for v in step.outs}
        cuts = [
            (task, v)
            for task, steps in enumerate(parts.heads)
            for v in dict.fromkeys(v for step in steps for v in _reads(step))
            if v in made and is_float(v.aval)
        ]
        # The losses themselves are the last value of the trunk where there are no heads.
        moving = list(dict.fromkeys([v for _, v in cuts] or program.outs[:1]))
        later = [v for steps in (*parts.heads, parts.rest) for s in steps for v in _reads(s)]
        fixed = [v for v in dict.fromkeys([*later, *program.outs]) if v in made]
        fixed = [v for v in fixed if v not in moving]

        def zeros(uses: Sequence[Use]) -> list[list[jax.Array]]:
            return [[jnp.zeros(s.shape, s.dtype) for s in shapes[use]] for use in uses]

        def trunk(taps: list[list[jax.Array]], leaves: list[jax.Array]) -> Any:
            env = execute.shared_env(program, leaves, constants)
            found: Residuals = {}
            execute.run_steps(parts.trunk, env, dict(zip(of_trunk, taps, strict=True)), found)
            others = [env[v] for v in fixed], [found[use] for use in of_trunk]
            return [env[v] for v in moving], others

        def rest(
            taps: list[list[jax.Array]],
            added: list[jax.Array],
            leaves: list[jax.Array],
            values: list[jax.Array],
        ) -> Any:
            env = execute.shared_env(program, leaves, constants)
            env.update(zip((*moving, *fixed), (*values, *others), strict=True))
            found: Residuals = {}
            of_uses = dict(zip(of_rest, taps, strict=True))
            for task, steps in enumerate(parts.heads):
                own = dict(env)
                for (reader, v), x in zip(cuts, added, strict=True):
                    if reader == task:
                        own[v] = env[v] + x
                execute.run_steps(steps, own, of_uses, found)
                env.update((v, own[v]) for step in steps for v in step.outs)
            execute.run_steps(parts.rest, env, of_uses, found)
            outs = [env[v] if v in env else execute.resolve(env, v) for v in program.outs]
            return outs[0], (outs[1:], [found[use] for use in of_rest])

        values, pull_trunk, (others, of_uses) = jax.vjp(
            trunk, zeros(of_trunk), leaves, has_aux=True
        )
        added = [jnp.zeros(v.aval.shape, v.aval.dtype) for _, v in cuts]
        self.losses, pull_rest, (self.aux, of_others) = jax.vjp(
            rest, zeros(of_rest), added, leaves, values, has_aux=True
        )
        self.residuals = dict(zip((*of_trunk, *of_rest), (*of_uses, *of_others), strict=True))
        self.pulls = pull_trunk, pull_rest
        self._moving, self._cuts = moving, cuts
        self._of_trunk, self._of_rest = of_trunk, of_rest

    def cotangents(self) -> dict[Use, list[jax.Array]]:
        """Returns those of all taps, ``(m, *shape)``; ``(1, *shape)`` for a use in a head."""
        losses, (pull_trunk, pull_rest) = self.losses, self.pulls
        if not self._cuts:

            def pull(unit: jax.Array) -> Any:
                of_rest, _, _, values = pull_rest(unit)
                return pull_trunk(values)[0], of_rest

            of_trunk, of_rest = jax.vmap(pull)(linalg.units(losses))
        else:
            of_rest, of_cuts, _, _ = pull_rest(jnp.ones_like(losses))
            of_rest = jax.tree.map(lambda x: x[None], of_rest)
            known = dict(zip(self._cuts, of_cuts, strict=True))
            zero = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in self._moving]
            values = [
                jnp.stack([known.get((i, v), z) for i in range(losses.shape[0])])
                for v, z in zip(self._moving, zero, strict=True)
            ]
            of_trunk = jax.vmap(lambda values: pull_trunk(values)[0])(values)
        uses = *self._of_trunk, *self._of_rest
        return dict(zip(uses, (*of_trunk, *of_rest), strict=True))


def pull(pulls: Any, weights: jax.Array) -> list[jax.Array]:
    """Returns ``J^T w`` for every leaf, given the ``pulls`` of a `Forward`."""
    pull_trunk, pull_rest = pulls
    _, _, of_heads, values = pull_rest(weights)
    _, of_trunk = pull_trunk(values)
    return [x + y for x, y in zip(of_trunk, of_heads, strict=True)]
