"""What an interrupted training goes on from."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.study import Record, config_of


class Checkpoint:
    """A file with the state after an epoch, and the history up to it."""

    def __init__(self, path: Path, options: Any):
        """Names the file and the options of its run."""
        self.path, self.config = path, config_of(options)

    def save(self, state: Any, history: Sequence[Record]) -> None:
        """Writes it, in one move: an interrupted run leaves the last one whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}.npz")
        arrays: dict[str, Any] = {
            f"leaf{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))
        }
        about = json.dumps({"config": self.config, "history": list(history)})
        np.savez(partial, about=about, **arrays)
        partial.replace(self.path)

    def load(self, like: Any) -> tuple[Any, list[Record]]:
        """Returns state and history, the given state and no history if there is no file."""
        if not self.path.exists():
            return like, []
        tree = jax.tree.structure(like)
        with np.load(self.path) as file:
            arrays = [file[f"leaf{i}"] for i in range(len(file.files) - 1)]
            about = json.loads(str(file["about"]))
        if about["config"] != self.config:
            raise SystemExit(
                f"expected the state of a run of {self.config} in {self.path}, got "
                f"{about['config']}; drop --resume, or delete it"
            )
        history: list[Record] = about["history"]
        return jax.tree.unflatten(tree, [jnp.asarray(a) for a in arrays]), history

    def remove(self) -> None:
        """Deletes the file of a run that is recorded."""
        self.path.unlink(missing_ok=True)
