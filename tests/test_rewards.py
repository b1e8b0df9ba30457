"""Advantages of several rewards against the authors' formula, and the example on a bandit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.examples import multi_reward_bandit
from jaxmtl.rewards import gdpo_advantages, grpo_advantages, standardize_rewards


def gdpo_in_numpy(rewards, weights, eps):
    """Reward by reward, as the authors' code does: group mean and deviation (n - 1), then batch."""
    total = 0
    for k, weight in enumerate(weights):
        r = rewards[..., k]
        mean, std = r.mean(1, keepdims=True), r.std(1, ddof=1, keepdims=True)
        total = total + weight * (r - mean) / (std + eps)
    return (total - total.mean()) / (total.std(ddof=1) + eps)


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 0.0)])
def test_gdpo_is_the_authors_formula(weights, precision):
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 2, (6, 5, 3)) * np.array([1.0, 0.1, 40.0])
    rewards[2, :, 1] = 7.0  # a group in which a reward is constant
    given = None if weights is None else jnp.array(weights)
    found = jax.jit(lambda r: gdpo_advantages(r, weights=given))(jnp.asarray(rewards, float))
    expected = gdpo_in_numpy(rewards, (1, 1, 1) if weights is None else weights, 1e-4)
    tolerance = 1e-12 if precision == "float64" else 1e-5
    np.testing.assert_allclose(found, expected, atol=tolerance)
    total = rewards @ np.array((1, 1, 1) if weights is None else weights)
    expected = (total - total.mean(1, keepdims=True)) / (total.std(1, ddof=1)[:, None] + 1e-4)
    found = grpo_advantages(jnp.asarray(rewards, float), weights=given)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=tolerance)


def test_the_sum_hides_what_gdpo_tells_apart(x64):
    """Groups in which one or both of two rewards are earned: one advantage, then two."""
    rewards = jnp.array([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]])
    one = grpo_advantages(rewards, eps=0)
    np.testing.assert_allclose(one[0], one[1])
    both = gdpo_advantages(rewards, eps=0)
    np.testing.assert_allclose(both[1], 2 * both[0])


def test_units_and_constant_rewards_without_eps(precision):
    rng = np.random.default_rng(1)
    rewards = rng.standard_normal((3, 4, 2))
    plain = standardize_rewards(jnp.asarray(rewards, float), eps=0)
    units = np.array([2.0**-20, 2.0**12])
    np.testing.assert_array_equal(standardize_rewards(jnp.asarray(rewards * units), eps=0), plain)
    np.testing.assert_array_equal(gdpo_advantages(jnp.ones((3, 4, 2)), eps=0), 0)
    slope = jax.grad(lambda r: jnp.sum(gdpo_advantages(r) ** 3))(jnp.asarray(rewards, float))
    np.testing.assert_array_equal(slope, 0)


def test_wrong_rewards_are_sentences():
    for rewards, match in (
        (jnp.ones((4, 3)), r"\(groups, samples, m\)"),
        (jnp.ones((4, 1, 3)), "two samples"),
    ):
        with pytest.raises(ValueError, match=match):
            gdpo_advantages(rewards)
    with pytest.raises(ValueError, match=r"weights of shape \(3,\)"):
        gdpo_advantages(jnp.ones((4, 2, 3)), weights=jnp.ones(2))
    with pytest.raises(ValueError, match="eps in"):
        standardize_rewards(jnp.ones((4, 2, 3)), eps=-1)


@pytest.mark.slow
def test_the_bandit_s_losses_follow_the_policy_gradient(x64):
    """With all answers as samples in proportion, the loss's slope is that of expected rewards."""
    bandit = multi_reward_bandit.draw_bandit(jax.random.key(3))
    key = jax.random.key(0)
    shapes = {"weights": (5, 5), "bias": (5,)}
    params = {n: 0.3 * jax.random.normal(key, s) for n, s in shapes.items()}
    chances = jnp.exp(multi_reward_bandit.log_policy(params, bandit))

    def surrogate(p):
        logs = multi_reward_bandit.log_policy(p, bandit)
        return jnp.einsum("ca,cak,ca->k", chances, bandit.means, logs) / len(chances)

    found, expected = (
        jax.jacobian(f)(params)
        for f in (surrogate, lambda p: multi_reward_bandit.expected_rewards(p, bandit))
    )
    for name in shapes:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_the_bandit_s_conclusion():
    """What the example's docstring and table say of rewards that pay for others."""
    gains = multi_reward_bandit.run(150, 4)
    smallest = {name: float(each.min(1).mean()) for name, each in gains.items()}
    assert smallest["GRPO"] < 0
    assert smallest["GDPO"] < 0
    assert smallest["rows, UPGrad"] > smallest["GDPO"] + 0.05
    text = multi_reward_bandit.table(gains) + multi_reward_bandit.conclude(gains)
    assert all(name in text for name in multi_reward_bandit.METHODS)
