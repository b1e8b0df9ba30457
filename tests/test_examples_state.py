"""The examples of layers with state train, and what they promise holds."""

import pytest

pytest.importorskip("flax", reason="the extra `experiments` is not installed")
pytest.importorskip("sklearn", reason="the extra `experiments` is not installed")
pytest.importorskip("equinox", reason="the extra `experiments` is not installed")

from experiments.examples import (
    _pictures,
    state_equinox,
    state_linen,
    state_nnx,
)
from jaxmtl import flax
from tests.problems import some

pytestmark = pytest.mark.xdist_group("examples_state")


@pytest.mark.parametrize("example", some([state_linen, state_nnx, state_equinox]))
def test_averaged_parameters_learn_both_tasks(example):
    """Sixty steps: a tenth and a half of the answers are right by chance."""
    found = example.train(60)
    assert found["digit"] > 0.5
    assert found["parity"] > 0.65


@pytest.mark.slow
def test_statistics_move_once_for_each_step():
    """Not once for each task: the mean moves by a tenth of the way, as momentum 0.9 says."""
    data, _ = _pictures.load()
    model = state_nnx.Network(state_nnx.nnx.Rngs(0))
    seen = model.conv(data.images[:64]).mean((0, 1, 2))
    momentum = model.norm.momentum
    flax.value_and_jacobian(state_nnx.losses_fn)(model, _pictures.Pictures(*(x[:64] for x in data)))
    moved = model.norm.mean[...] / (1 - momentum)
    assert float(abs(moved - seen).max()) < 1e-5
