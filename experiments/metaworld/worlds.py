"""The tasks in lockstep: Meta-World, a made-up world for tests, and either in its own process.

Nothing here imports JAX: the process of the simulator has no use for it. A *world* is all that
`Local` and `Remote` need. Every episode lasts its horizon, in all tasks alike, and `World.reset`
determines it from its key alone: after the end of an episode there is nothing to save of a world.
"""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

TASKS = {
    "MT3": ("reach-v3", "button-press-topdown-v3", "drawer-close-v3"),
    "MT10": (
        "reach-v3",
        "push-v3",
        "pick-place-v3",
        "door-open-v3",
        "drawer-open-v3",
        "drawer-close-v3",
        "button-press-topdown-v3",
        "peg-insert-side-v3",
        "window-open-v3",
        "window-close-v3",
    ),
}


class Step(NamedTuple):
    """What a step of all tasks gives."""

    observations: np.ndarray  # (m, o)
    rewards: np.ndarray  # (m,)
    successes: np.ndarray  # (m,) bool


class World(Protocol):
    """Tasks in lockstep."""

    observation_size: int
    action_size: int

    def reset(self, key: Sequence[int]) -> np.ndarray:
        """Starts an episode of every task, drawn by the key, and returns observations (m, o)."""

    def step(self, actions: np.ndarray) -> Step:
        """Takes a step of every task by actions (m, a) in [-1, 1]."""


class MadeUp:
    """A point in the plane for each task, to be driven to a goal; a made-up world for tests."""

    observation_size, action_size = 6, 2

    def __init__(self, tasks: Sequence[str], seed: int):
        """Makes the world; tasks differ in the strength of their actions."""
        self._seed, self._gain = seed, 0.2 / (1 + np.arange(len(tasks)))[:, None]
        self._position = self._goal = np.zeros((len(tasks), 2))

    def reset(self, key: Sequence[int]) -> np.ndarray:
        """Draws positions and goals."""
        generator = np.random.default_rng([self._seed, *key])
        self._position = generator.uniform(-1, 1, self._position.shape)
        self._goal = generator.uniform(-1, 1, self._position.shape)
        return self._observed()

    def step(self, actions: np.ndarray) -> Step:
        """Moves the points; the reward is minus the distance."""
        self._position = np.clip(self._position + self._gain * actions, -1, 1)
        distance = np.linalg.norm(self._position - self._goal, axis=1)
        return Step(self._observed(), -distance, distance < 0.1)

    def _observed(self) -> np.ndarray:
        return np.concatenate(
            [self._position, self._goal, self._goal - self._position], axis=1
        ).astype(np.float32)


class MetaWorld:
    """Tasks of Meta-World v3, their goals drawn anew in every episode from 50 of each."""

    observation_size, action_size = 39, 4

    def __init__(self, tasks: Sequence[str], seed: int, reward_version: str):
        """Starts a simulator per task.

        Raises:
          ValueError: Meta-World is not installed, or has no such task.
        """
        try:
            import metaworld
        except ImportError as error:
            raise ValueError(
                "expected Meta-World, which is not installed; pip install 'jaxmtl[rl]', or take "
                "--smoke, which needs no simulator"
            ) from error
        known = metaworld.ALL_V3_ENVIRONMENTS
        for task in tasks:
            if task not in known:
                raise ValueError(
                    f"expected a task of Meta-World v3, got {task!r}; take one of "
                    f"{', '.join(known)}"
                )
        self._seed, self._simulators, self._goals = seed, [], []
        for task in tasks:
            single = metaworld.MT1(task, seed=seed)
            simulator = single.train_classes[task](reward_function_version=reward_version)
            self._simulators.append(simulator)
            self._goals.append(single.train_tasks)

    def reset(self, key: Sequence[int]) -> np.ndarray:
        """Draws a goal for each task and starts it."""
        generator = np.random.default_rng([self._seed, *key])
        observations = []
        for simulator, goals in zip(self._simulators, self._goals, strict=True):
            simulator.set_task(goals[generator.integers(len(goals))])
            observations.append(simulator.reset()[0])
        return np.stack(observations).astype(np.float32)

    def step(self, actions: np.ndarray) -> Step:
        """Takes a step in each simulator."""
        found = [s.step(a) for s, a in zip(self._simulators, actions, strict=True)]
        observations, rewards, _, _, infos = zip(*found, strict=True)
        successes = [bool(info["success"]) for info in infos]
        return Step(
            np.stack(observations).astype(np.float32),
            np.array(rewards, np.float64),
            np.array(successes),
        )


class Local:
    """A world in this process.

    Attributes:
      seconds: That it has simulated.
    """

    def __init__(self, world: World):
        """Takes a world."""
        self._world, self.seconds = world, 0.0
        self.observation_size, self.action_size = world.observation_size, world.action_size
        self._step: Step | None = None

    def reset(self, key: Sequence[int]) -> np.ndarray:
        """See `World.reset`."""
        return self._world.reset(key)

    def start(self, actions: np.ndarray) -> None:
        """Begins a step."""
        begin = time.perf_counter()
        self._step = self._world.step(actions)
        self.seconds += time.perf_counter() - begin

    def finish(self) -> Step:
        """Returns the step that was begun."""
        step, self._step = self._step, None
        if step is None:
            raise ValueError("expected start(actions) before finish(), got none; call it first")
        return step

    def close(self) -> None:
        """Does nothing."""


class Remote:
    """The same in a process of its own: between `start` and `finish` both compute."""

    def __init__(self, make: Callable[[], World]):
        """Starts the process; ``make`` must be picklable."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.seconds = 0.0
        self.observation_size, self.action_size = self._answer()

    def reset(self, key: Sequence[int]) -> np.ndarray:
        """See `World.reset`."""
        self._pipe.send(("reset", tuple(key)))
        return np.asarray(self._answer())

    def start(self, actions: np.ndarray) -> None:
        """Begins a step."""
        self._pipe.send(("step", actions))

    def finish(self) -> Step:
        """Waits for the step that was begun."""
        step, seconds = self._answer()
        self.seconds += seconds
        return Step(*step)

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join()

    def _answer(self) -> Any:
        try:
            ok, answer = self._pipe.recv()
        except EOFError as error:
            raise RuntimeError("expected an answer of the simulator, got its end") from error
        if not ok:
            raise ValueError(answer)
        return answer


def _serve(make: Callable[[], World], pipe: Any) -> None:
    """Answers requests until the pipe is closed."""
    try:
        world = make()
        pipe.send((True, (world.observation_size, world.action_size)))
        while True:
            kind, argument = pipe.recv()
            if kind == "reset":
                pipe.send((True, world.reset(argument)))
                continue
            begin = time.perf_counter()
            step = world.step(argument)
            pipe.send((True, (tuple(step), time.perf_counter() - begin)))
    except (EOFError, KeyboardInterrupt):  # the other side has ended
        return
    except ValueError as error:
        pipe.send((False, str(error)))
    except Exception:  # any error of the simulator is told to the learner, which raises it
        pipe.send((False, traceback.format_exc()))
