"""What is kept of the transitions: a ring buffer per task, and the scale of its rewards."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.metaworld.learner import Batch


def check_step(
    tasks: Sequence[str], observations: np.ndarray, rewards: np.ndarray, step: int
) -> None:
    """Raises a ValueError if a task has returned what is not finite."""
    for what, values in (("rewards", rewards[:, None]), ("observations", observations)):
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            i = int(np.argmax(bad))
            raise ValueError(
                f"expected finite {what}, got {values[i][~np.isfinite(values[i])][0]} of "
                f"{tasks[i]} at step {step}; nothing of it entered the buffer: resume from the "
                "last evaluation, or leave the task out"
            )


class Replay:
    """A ring buffer for each task, in arrays (m, capacity, ...) that are made once."""

    def __init__(self, num_tasks: int, capacity: int, observation_size: int, action_size: int):
        """Makes empty buffers."""
        sizes = (observation_size,), (action_size,), (), (observation_size,)
        arrays = (np.zeros((num_tasks, capacity, *size), np.float32) for size in sizes)
        self._arrays = Batch(*arrays)
        self.count = 0  # transitions of each task so far

    def __len__(self) -> int:
        """Returns how many transitions each buffer holds."""
        return min(self.count, self._arrays.rewards.shape[1])

    def add(self, transition: Batch) -> None:
        """Writes a transition (m, ...) of each task, over the oldest one if the ring is full."""
        at = self.count % self._arrays.rewards.shape[1]
        for array, value in zip(self._arrays, transition, strict=True):
            array[:, at] = value
        self.count += 1

    def sample(self, generator: np.random.Generator, size: int) -> Batch:
        """Draws transitions (m, size, ...), those of each task on their own, with replacement."""
        num_tasks = len(self._arrays.rewards)
        index = generator.integers(len(self), size=(num_tasks, size))
        return Batch(*(array[np.arange(num_tasks)[:, None], index] for array in self._arrays))

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds of it."""
        held = {name: array[:, : len(self)] for name, array in self._arrays._asdict().items()}
        return {"count": self.count, **held}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` returned."""
        self.count = int(state["count"])
        for name, array in self._arrays._asdict().items():
            array[:, : len(self)] = state[name]


class RewardScale:
    """Divides the rewards of each task by their running standard deviation.

    As mtrl's environments do: ``mean <- (1 - a) mean + a r``, ``var <- (1 - a) var + a (r -
    mean)^2`` with a = 0.001, from 0 and 1, and the reward is ``r / (sqrt(var) + 1e-8)``. The mean
    is not subtracted, and rewards in the buffer keep the scale that they had when they came.
    """

    def __init__(self, num_tasks: int, rate: float = 0.001):
        """Starts at mean 0 and variance 1."""
        self._rate = rate
        self.mean, self.variance = np.zeros(num_tasks), np.ones(num_tasks)

    def __call__(self, rewards: np.ndarray) -> np.ndarray:
        """Returns scaled rewards (m,), after their entry into the averages."""
        self.mean = (1 - self._rate) * self.mean + self._rate * rewards
        square = (rewards - self.mean) ** 2
        self.variance = (1 - self._rate) * self.variance + self._rate * square
        return rewards / (np.sqrt(self.variance) + 1e-8)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds of it."""
        return {"mean": self.mean, "variance": self.variance}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` returned."""
        self.mean, self.variance = np.array(state["mean"]), np.array(state["variance"])
