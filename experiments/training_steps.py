"""The steps of ``experiments.examples.training_steps``, under the name of before."""

from experiments.examples.training_steps import main, runs, train

__all__ = ["main", "runs", "train"]

if __name__ == "__main__":
    main()
