"""A run: steps of the simulator overlapped with updates, evaluations, and checkpoints of both."""

import os
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization

from experiments.metaworld.data import Replay, RewardScale, check_step
from experiments.metaworld.learner import Agent, Batch, Learner, Options, make_learner
from experiments.metaworld.worlds import Local, MadeUp, MetaWorld, Remote
from experiments.study import Record, Say, config_of

MADE_UP = "made_up"
# First entries of what random numbers are drawn from, beside the seed.
_TRAIN, _EVALUATE, _ACT, _SAMPLE = range(4)


def make_world(options: Options, seed: int, processes: int = 2) -> Local | Remote:
    """Returns the tasks of a run, in a process of their own if there are two."""
    make: Callable[[], Any] = (
        partial(MadeUp, options.tasks, seed)
        if options.benchmark == MADE_UP
        else partial(MetaWorld, options.tasks, seed, options.reward_version)
    )
    return Remote(make) if processes == 2 else Local(make())


def check_options(options: Options) -> None:
    """Raises a ValueError if numbers of steps do not fit together."""
    for name in ("steps", "evaluate_every"):
        if getattr(options, name) % options.horizon:
            raise ValueError(
                f"expected {name} in whole episodes of {options.horizon} steps, got "
                f"{getattr(options, name)}; a run is saved between episodes alone: take a multiple"
            )
    if options.random_steps < 1:
        raise ValueError(
            f"expected random_steps of at least 1, got {options.random_steps}; updates draw from "
            "what they leave in the buffer"
        )


class Run:
    """A run of one rule and one seed.

    Everything random is drawn from the seed and the number of the step, and checkpoints are made
    between episodes, so that a run which is resumed ends where it would have ended, bit for bit.
    """

    def __init__(self, options: Options, method: str, seed: int, world: Local | Remote):
        """Compiles the learner and starts at step 0."""
        check_options(options)
        self.options, self.method, self.seed, self._world = options, method, seed, world
        m, sizes = len(options.tasks), (world.observation_size, world.action_size)
        self._key = jax.random.key(seed)
        self._functions = compiled_learner(options, method, *sizes)
        self.agent: Agent = self._functions.init(self._key)
        self.replay = Replay(m, min(options.capacity, options.steps), *sizes)
        self.scale = RewardScale(m)
        self.step = 0
        self.history: list[Record] = []
        self._begin()

    def _begin(self) -> None:
        """Starts the measurements of a stretch between evaluations."""
        self._logs: list[Any] = []
        self._start, self._simulated, self._waited = time.perf_counter(), self._world.seconds, 0.0

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])

    def episode(self) -> None:
        """Takes one episode of every task, with one update at each step."""
        options, m = self.options, len(self.options.tasks)
        observations = self._world.reset((_TRAIN, self.step // options.horizon))
        for _ in range(options.horizon):
            if self.step < options.random_steps:
                generator = self._generator(_ACT, self.step)
                actions = generator.uniform(-1, 1, (m, self._world.action_size))
                actions = actions.astype(np.float32)
            else:
                number = np.int32(self.step)
                params = self.agent.actor.params
                actions = np.asarray(self._functions.act(params, observations, self._key, number))
            self._world.start(actions)
            if self.step >= options.random_steps:  # while the simulator computes
                self._update()
            waits = time.perf_counter()
            new, rewards, _ = self._world.finish()
            self._waited += time.perf_counter() - waits
            check_step(options.tasks, new, rewards, self.step)
            if options.reward_scale:
                rewards = self.scale(rewards)
            self.replay.add(Batch(observations, actions, rewards, new))
            observations = new
            self.step += 1

    def _update(self) -> None:
        """Takes one update; it runs on while this returns."""
        generator = self._generator(_SAMPLE, self.step)
        batch = self.replay.sample(generator, self.options.batch_size)
        number = np.int32(self.step)
        if self.step % self.options.monitor_every:
            self.agent = self._functions.update(self.agent, batch, self._key, number)
        else:
            self.agent, log = self._functions.monitored(self.agent, batch, self._key, number)
            self._logs.append(log)

    def evaluate(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the shares of successful episodes (m,), and mean returns, without noise."""
        options, params = self.options, self.agent.actor.params
        m = len(options.tasks)
        successes, returns = [], []
        for number in range(options.episodes):
            observations = self._world.reset((_EVALUATE, self.step, number))
            success, total = np.zeros(m, bool), np.zeros(m)
            for i in range(options.horizon):
                self._world.start(np.asarray(self._functions.best(params, observations)))
                observations, rewards, now = self._world.finish()
                check_step(options.tasks, observations, rewards, i)
                success, total = success | now, total + rewards
            successes.append(success)
            returns.append(total)
        return np.mean(successes, axis=0), np.mean(returns, axis=0)

    def record(self) -> Record:
        """Evaluates and returns the record of the stretch since the last evaluation."""
        options, m = self.options, len(self.options.tasks)
        jax.block_until_ready(self.agent)
        seconds = time.perf_counter() - self._start
        simulated = self._world.seconds - self._simulated
        steps = self.step - (self.history[-1]["step"] if self.history else 0)
        updates = self.step - max(self.step - steps, options.random_steps)
        success, returns = self.evaluate()
        record = {
            "method": self.method,
            "seed": self.seed,
            "config": config_of(options),
            "step": self.step,
            "success": rounded(success),
            "return": rounded(returns),
            "temperature": rounded(np.exp(self.agent.temperature.params)),
            "env_steps_per_second": round(m * steps / seconds, 1),
            "env_steps_per_second_alone": round(m * steps / simulated, 1),
            "updates_per_second": round(max(updates, 0) / seconds, 1),
            "share_waiting": round(self._waited / seconds, 3),
        }
        if self._logs:
            logs = jax.device_get(self._logs)
            means = jax.tree.map(lambda *x: np.mean(np.stack(x), axis=0), *logs)
            record |= jax.tree.map(rounded, means)
        self.history.append(record)
        return record

    def save(self, path: Path) -> None:
        """Writes all that decides the rest of the run; only whole files take the place of others.

        The world is not in it: between episodes the next one depends on its number alone.
        """
        state = {
            "agent": serialization.to_state_dict(jax.device_get(self.agent)),
            "replay": self.replay.state(),
            "scale": self.scale.state(),
            "step": self.step,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_suffix(".partial")
        partial_file.write_bytes(serialization.msgpack_serialize(state))
        os.replace(partial_file, path)

    def load(self, path: Path, history: list[Record]) -> None:
        """Goes on where `save` was called; ``history`` holds the records up to there."""
        state = serialization.msgpack_restore(path.read_bytes())
        self.agent = jax.device_put(serialization.from_state_dict(self.agent, state["agent"]))
        self.replay.restore(state["replay"])
        self.scale.restore(state["scale"])
        self.step = int(state["step"])
        self.history = [record for record in history if record["step"] <= self.step]
        self._begin()

    def advance(self) -> Record:
        """Runs to the next evaluation, evaluates, and returns its record."""
        self._begin()
        stop = min(self.step + self.options.evaluate_every, self.options.steps)
        while self.step < stop:
            self.episode()
        return self.record()


@cache
def compiled_learner(options: Options, method: str, *sizes: int) -> Learner:
    """Returns the learner compiled, with keys made of a run's key and the number of the step.

    The agent that an update takes is given up: its memory holds the new one.
    """
    learner = make_learner(options, method, *sizes)

    def with_key(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(first: Any, data: Any, key: jax.Array, number: jax.Array) -> Any:
            return function(first, data, jax.random.fold_in(key, number))

        return called

    return Learner(
        jax.jit(learner.init),
        jax.jit(with_key(learner.update), donate_argnums=0),
        jax.jit(with_key(learner.monitored), donate_argnums=0),
        jax.jit(with_key(lambda p, o, key: learner.act(p, o, jax.random.fold_in(key, 1)))),
        jax.jit(learner.best),
    )


def rounded(values: Any) -> Any:
    """Returns nested lists of four digits, or a number."""
    values = np.asarray(values, np.float64)
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log10(np.maximum(np.abs(values), 1e-30)))
    scale = 10.0 ** (3 - np.minimum(exponent, 0))
    return (np.round(values * scale) / scale).tolist()


def train(
    options: Options,
    method: str,
    seed: int,
    checkpoint: Path,
    history: list[Record],
    add: Callable[[Record], None],
    say: Say,
    processes: int = 2,
) -> None:
    """Runs to the end; each evaluation is a record, and is followed by a checkpoint.

    Args:
      options: Of the run.
      method: The rule.
      seed: Of everything.
      checkpoint: Its file, which is read if there is one.
      history: The records that the run has already.
      add: Writes a record.
      say: Tells of progress.
      processes: 2 for a simulator in a process of its own, else 1.
    """
    world = make_world(options, seed, processes)
    try:
        run = Run(options, method, seed, world)
        if checkpoint.exists():
            run.load(checkpoint, history)
            say(f"{method}, seed {seed}: resumed at step {run.step:,}", run.step // options.horizon)
        while run.step < options.steps:
            record = run.advance()
            if all(record["step"] != known["step"] for known in history):
                add(record)
            run.save(checkpoint)
            say(
                f"{method}, seed {seed}, {run.step:,} steps: success "
                f"{np.mean(record['success']):.2f}, {record['updates_per_second']} updates/s, "
                f"{record['env_steps_per_second']} environment steps/s",
                min(options.evaluate_every, options.steps) // options.horizon,
            )
        checkpoint.unlink(missing_ok=True)
    finally:
        world.close()
