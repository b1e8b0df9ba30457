"""A run that was stopped and resumed is the run that was not, on one device or on several."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import optax
import pytest

pytest.importorskip("orbax.checkpoint", reason="the extra `experiments` is not installed")

from experiments.examples import checkpoint

pytestmark = pytest.mark.xdist_group("checkpoints")

ROOT = Path(__file__).parents[1]
STOP, END = 5, 9

ELSEWHERE = """
import sys
from pathlib import Path
from experiments.examples import checkpoint
for rule in checkpoint.RULES:
    run, begin = checkpoint.train(rule, Path(sys.argv[1]) / rule, int(sys.argv[2]))
    print("trunk", begin, [x.data.shape for x in run.params["trunk"].addressable_shards])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of every rule the run of END steps at once, and a folder that stands at STOP."""
    results = {}
    for rule in checkpoint.RULES:
        whole, parts = (tmp_path_factory.mktemp(f"{rule}_{name}") for name in ("whole", "parts"))
        uninterrupted, begin = checkpoint.train(rule, whole, END)
        assert begin == 0
        stopped, _ = checkpoint.train(rule, parts, STOP)
        assert int(stopped.position) == STOP
        results[rule] = (uninterrupted, parts)
    return results


@pytest.mark.parametrize("rule", checkpoint.RULES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(rule, runs, tmp_path):
    uninterrupted, parts = runs[rule]
    shutil.copytree(parts, tmp_path / "run")
    resumed, begin = checkpoint.train(rule, tmp_path / "run", END)
    assert begin == STOP
    assert jax.tree.structure(resumed) == jax.tree.structure(uninterrupted)
    chex.assert_trees_all_equal(resumed, uninterrupted)
    chex.assert_tree_all_finite(resumed)


@pytest.mark.parametrize("rule", checkpoint.RULES)
def test_what_is_saved_is_needed(rule, runs, tmp_path):
    """Without the rule's state, or the position, the run ends elsewhere."""
    uninterrupted, parts = runs[rule]
    shutil.copytree(parts, tmp_path / "run")
    stopped, _ = checkpoint.train(rule, tmp_path / "run", STOP)
    mesh = checkpoint.mesh_of_all()
    fresh = jax.device_put(checkpoint.start(rule), checkpoint.shardings(stopped, mesh))
    loop = checkpoint.steps_until(rule, mesh)
    without_rule = stopped._replace(opt_state=(fresh.opt_state[0], *stopped.opt_state[1:]))
    elsewhere = stopped._replace(position=fresh.position)
    for run, steps in ((without_rule, END), (elsewhere, END - STOP)):
        end, _ = loop(run, steps)
        assert np.max(np.abs(end.params["trunk"] - uninterrupted.params["trunk"])) > 1e-4


@pytest.mark.slow
def test_on_other_devices_the_continued_run_agrees(runs, tmp_path):
    """Saved on one device, continued on four that split trunk and batch, read again on one."""
    for rule, (_, parts) in runs.items():
        shutil.copytree(parts, tmp_path / rule)
    env = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", ELSEWHERE, str(tmp_path), str(END)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=env,
    )
    split = f"trunk {STOP} {[(checkpoint.FEATURES // 4, checkpoint.HIDDEN)] * 4}"
    assert result.stdout.count(split) == len(runs)
    for rule, (uninterrupted, _) in runs.items():
        back, begin = checkpoint.train(rule, tmp_path / rule, END)
        assert begin == END
        chex.assert_trees_all_close(back, uninterrupted, rtol=1e-6, atol=1e-6)


def test_the_example_runs_as_its_docstring_says(tmp_path, capsys):
    for steps in ("2", "3"):
        checkpoint.main(["--folder", str(tmp_path), "--steps", steps])
    out = capsys.readouterr().out
    assert "resumed at step 0, now at 2" in out
    assert "resumed at step 2, now at 3" in out
    state = checkpoint.start("famo").opt_state
    assert optax.tree.get(state, "mtl_weights").shape == (checkpoint.TASKS,)
