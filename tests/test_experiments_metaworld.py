"""The study of Meta-World: its learner against loops, its runs in a made-up world, its report."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax.linen", reason="the extra `experiments` is not installed")

import jaxmtl
from experiments.claims import NO_DATA, VERDICTS
from experiments.examples import multi_task_ppo
from experiments.metaworld import __main__ as metaworld
from experiments.metaworld import train
from experiments.metaworld.data import Replay, RewardScale, check_step
from experiments.metaworld.learner import Batch, make_learner, squashed
from experiments.metaworld.methods import METHODS, REFUSED, SINGLE, check_method
from experiments.metaworld.report import best, gains_of, last, runs_of
from experiments.metaworld.timing import OBSERVATION, program_of
from experiments.metaworld.worlds import TASKS, Local, MadeUp, MetaWorld, Remote, Step

pytestmark = pytest.mark.xdist_group("metaworld")

# Two tasks, small networks: those of the learner's tests.
SMALL = replace(metaworld.PRESETS["MT3"], tasks=("a", "b"), widths=(7, 5), batch_size=6)
# The options of a smoke run: all runs of this file share its compiled functions.
TINY = replace(metaworld.PRESETS["MT3"], **metaworld.SMOKE)
O, A = 3, 2  # sizes of observations and actions of the learner's tests


def random_batch(m, b, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (m, b, O), (m, b, A), (m, b), (m, b, O)
    found = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    found[1] = np.tanh(found[1])
    return Batch(*found)


# --- the density --------------------------------------------------------------------------------


def test_density_of_squashed_actions(x64):
    """Against the change of variables, in float64, and where tanh is 1 to the last bit."""
    rng = np.random.default_rng(0)
    outputs, noise = 0.6 * rng.normal(size=(50, 4)), rng.normal(size=(50, 2))
    actions, log_density = squashed(jnp.asarray(outputs), jnp.asarray(noise))
    mean, std = outputs[:, :2], np.exp(outputs[:, 2:])
    u = mean + std * noise
    normal = np.exp(-0.5 * ((u - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(actions, np.tanh(u), rtol=1e-7)  # XLA's tanh
    expected = (np.log(normal) + 2 * np.log(np.cosh(u))).sum(axis=1)  # 1 - tanh^2 = cosh^-2
    np.testing.assert_allclose(log_density, expected, rtol=1e-9)
    # Far out 1 - tanh(u)^2 is 4 exp(-2 u), which a subtraction gives as 0.
    far = squashed(jnp.array([100.0, 0.0]), jnp.zeros(1))[1]
    np.testing.assert_allclose(far, -0.5 * np.log(2 * np.pi) - np.log(4) + 200, rtol=1e-12)
    for log_std, bound in ((5.0, 2.0), (-30.0, -20.0)):  # clipped
        density = squashed(jnp.array([0.0, log_std]), jnp.zeros(1))[1]
        np.testing.assert_allclose(density, -0.5 * np.log(2 * np.pi) - bound, rtol=1e-12)


def test_density_integrates_to_one(x64):
    grid = np.linspace(-12, 12, 20_001)
    outputs = jnp.broadcast_to(jnp.array([0.4, -0.3]), (len(grid), 2))
    actions, log_density = squashed(outputs, jnp.asarray(grid)[:, None])
    total = np.trapezoid(np.exp(log_density), np.asarray(actions)[:, 0])
    np.testing.assert_allclose(total, 1, rtol=1e-4)


# --- the learner --------------------------------------------------------------------------------


def dense(params, x):
    """The layers of one network, written out."""
    layers = [params[f"Dense_{i}"] for i in range(len(params))]
    for layer in layers[:-1]:
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def draw(outputs, noise):
    mean, log_std = np.split(outputs, 2, axis=-1)
    log_std = np.clip(log_std, -20, 2)
    u = mean + np.exp(log_std) * noise
    normal = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
    return np.tanh(u), (normal - np.log(1 - np.tanh(u) ** 2)).sum(axis=-1)


class Loops:
    """Losses of a shared network, task by task and twin by twin, in NumPy."""

    def __init__(self, agent, batch, key, options):
        self.batch, self.options, self.m = batch, options, len(options.tasks)
        keys = jax.random.split(key, 4)
        shape = batch.actions.shape
        with jax.enable_x64(True):
            self.noise = [np.asarray(jax.random.normal(k, shape)) for k in keys[:2]]
        self.alpha = float(np.exp(agent.temperature.params))
        whole = partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
        self.actor, self.critic = (whole(p.params["trunk"]) for p in (agent.actor, agent.critic))
        self.target = whole(agent.target["trunk"])

    def values(self, params, i, observations, actions):
        task = np.tile(np.eye(self.m)[i], (len(observations), 1))
        x = np.concatenate([observations, actions, task], axis=1)
        twins = (jax.tree.map(lambda p, k=k: p[k], params) for k in (0, 1))
        return [dense(twin, x)[:, 0] for twin in twins]

    def policy(self, params, i, observations, noise):
        task = np.tile(np.eye(self.m)[i], (len(observations), 1))
        return draw(dense(params, np.concatenate([observations, task], axis=1)), noise)

    def critic_loss(self, params, i):
        observations, actions, rewards, new = (x[i] for x in self.batch)
        chosen, log_density = self.policy(self.actor, i, new, self.noise[0][i])
        worse = np.minimum(*self.values(self.target, i, new, chosen))
        # No transition ends an episode but by time, so that every target goes on.
        target = rewards + self.options.discount * (worse - self.alpha * log_density)
        return sum(
            np.mean((q - target) ** 2) for q in self.values(params, i, observations, actions)
        )

    def actor_loss(self, params, critic, i):
        observations = self.batch.observations[i]
        chosen, log_density = self.policy(params, i, observations, self.noise[1][i])
        worse = np.minimum(*self.values(critic, i, observations, chosen))
        return np.mean(self.alpha * log_density - worse)

    def log_densities(self):
        o = self.batch.observations
        found = [self.policy(self.actor, i, o[i], self.noise[1][i])[1] for i in range(self.m)]
        return np.mean(found, axis=1)


def slope(function, params, direction, step=1e-6):
    """The derivative along a direction, by central differences."""
    moved = [jax.tree.map(lambda p, d, s=s: p + s * step * d, params, direction) for s in (1, -1)]
    return (function(moved[0]) - function(moved[1])) / (2 * step)


@pytest.fixture(scope="module")
def updated():
    """An agent, a batch, a key, and what an update of the mean makes of them."""
    with jax.enable_x64(True):
        learner = make_learner(SMALL, "linear_scalarization", O, A)
        agent, key = learner.init(jax.random.key(0)), jax.random.key(1)

        # Networks of their own, so that it is seen which one is used, and biases off the kink at 0.
        def moved(x):
            return jax.tree.map(lambda p: 0.9 * p + 0.03, x)

        actor, critic = (p._replace(params=moved(p.params)) for p in (agent.actor, agent.critic))
        agent = agent._replace(actor=actor, critic=critic, target=moved(moved(agent.target)))
        batch = Batch(*(x.astype(np.float64) for x in random_batch(2, 6)))
        new, log = jax.jit(learner.monitored)(agent, batch, key)
        other = jax.jit(learner.update)(agent, batch, key)
        return jax.device_get((agent, batch, new, log, other)), key


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_loops(updated):
    (agent, batch, new, log, _), key = updated
    loops = Loops(agent, batch, key, SMALL)
    losses = [loops.critic_loss(loops.critic, i) for i in range(2)]
    np.testing.assert_allclose(log["critic"]["losses"], losses, rtol=1e-10)
    new_critic = new.critic.params["trunk"]
    losses = [loops.actor_loss(loops.actor, new_critic, i) for i in range(2)]
    np.testing.assert_allclose(log["actor"]["losses"], losses, rtol=1e-10)
    # Adam's first moment is a tenth of the mean gradient.
    rng = np.random.default_rng(3)
    for part, params, loss in (
        ("critic", loops.critic, loops.critic_loss),
        ("actor", loops.actor, partial(loops.actor_loss, critic=new_critic)),
    ):
        moment = optax.tree.get(getattr(new, part).optimizer, "mu")["trunk"]
        for _ in range(3):
            along = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
            products = jax.tree.map(lambda a, b: np.sum(a * b) / 0.1, moment, along)
            slopes = [slope(partial(loss, i=i), params, along) for i in (0, 1)]
            expected = np.mean(slopes)
            np.testing.assert_allclose(
                sum(jax.tree.leaves(products)), expected, rtol=1e-5, err_msg=part
            )


def test_target_temperature_and_step(updated):
    (agent, batch, new, log, other), key = updated
    rate = SMALL.learning_rate
    tau = SMALL.tau
    for old, fast, slow in zip(
        *map(jax.tree.leaves, (agent.target, new.critic.params, new.target)), strict=True
    ):
        np.testing.assert_allclose(slow, (1 - tau) * old + tau * fast, rtol=1e-6, atol=1e-12)
    # The loss exp(t) * mean(-log density + 2) of t = 0; Adam's first step has its sign.
    gradient = -(Loops(agent, batch, key, SMALL).log_densities().mean() - A)
    assert abs(gradient) > 1e-3
    np.testing.assert_allclose(new.temperature.params, -rate * np.sign(gradient), rtol=1e-4)
    moment = optax.tree.get(new.temperature.optimizer, "mu")
    np.testing.assert_allclose(moment, 0.1 * gradient, rtol=1e-6)
    # The route of one pass and that of rows agree.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), new, other)
    np.testing.assert_array_equal(log["critic"]["weights"], [0.5, 0.5])


@pytest.mark.slow
def test_each_component_has_its_own_rule_and_state(updated):
    """CAGrad with MoCo's tracking on the gradients of both tasks, in critic and actor apart."""
    (agent, batch, _, log, _), key = updated
    with jax.enable_x64(True):
        learner = make_learner(SMALL, "cagrad_moco", O, A)
        start = learner.init(jax.random.key(0))
        start = start._replace(
            target=agent.target,
            actor=start.actor._replace(params=agent.actor.params),
            critic=start.critic._replace(params=agent.critic.params),
        )
        new, found = jax.device_get(jax.jit(learner.monitored)(start, batch, key))
    np.testing.assert_allclose(found["critic"]["norms"], log["critic"]["norms"], rtol=1e-6)
    for part in ("critic", "actor"):
        tracked = optax.tree.get(getattr(new, part).rule, "tracked")["trunk"]
        flat = [np.reshape(x, (2, -1)) for x in jax.tree.leaves(tracked)]
        norms = np.linalg.norm(np.concatenate(flat, axis=1), axis=1)
        np.testing.assert_allclose(norms, 0.99 * found[part]["norms"], rtol=1e-6)
        # cagrad(c=0.9) of two rows: the best point of a grid over the segment of weights.
        rows = np.concatenate(flat, axis=1)
        g0, points = rows.mean(axis=0), np.linspace(0, 1, 20_001)
        combined = points[:, None] * rows[0] + (1 - points[:, None]) * rows[1]
        lengths, size = np.linalg.norm(combined, axis=1), np.linalg.norm(g0)
        k = np.argmin(combined @ g0 + 0.9 * size * lengths)
        update = g0 + 0.9 * size * combined[k] / lengths[k]
        weights = np.linalg.lstsq(rows.T, update, rcond=None)[0]
        np.testing.assert_allclose(found[part]["weights"], weights, atol=1e-3)
    states = [jax.tree.leaves(p.rule) for p in (new.critic, new.actor)]
    assert [x.shape for x in states[0]] != [x.shape for x in states[1]]


@pytest.mark.slow
def test_agents_of_their_own_share_nothing():
    learner = make_learner(SMALL, SINGLE, O, A)
    agent, key = learner.init(jax.random.key(0)), jax.random.key(1)
    update = jax.jit(learner.update)
    batch = random_batch(2, 6)
    other = Batch(
        *(np.stack([x[0], y[1]]) for x, y in zip(batch, random_batch(2, 6, 1), strict=True))
    )
    first, second = update(agent, batch, key), update(agent, other, key)
    for x, y in zip(*map(jax.tree.leaves, (first, second)), strict=True):
        if x.ndim:  # a step counter has no tasks
            np.testing.assert_array_equal(x[0], y[0])
    changed = jax.tree.map(
        lambda x, y: np.any(x[1] != y[1]), first.actor.params, second.actor.params
    )
    assert all(jax.tree.leaves(changed))
    assert agent.temperature.params.shape == (2,)


def test_heads_get_their_own_gradient_and_the_trunk_the_rule():
    learner = make_learner(replace(SMALL, network="multi_head"), "upgrad", O, A)
    agent, key, batch = learner.init(jax.random.key(0)), jax.random.key(1), random_batch(2, 6)
    assert agent.critic.params["heads"]["Dense_0"]["kernel"].shape == (2, 2, 5, 1)
    new, log = jax.jit(learner.monitored)(agent, batch, key)
    # Task 1 alone: the other has rewards that make its loss and its gradients vanish in no way,
    # so that only an own gradient leaves the head of task 1 as it is.
    changed = batch._replace(rewards=batch.rewards * np.array([[1.0], [3.0]], np.float32))
    other, _ = jax.jit(learner.monitored)(agent, changed, key)
    kernels = [x.critic.params["heads"]["Dense_0"]["kernel"] for x in (new, other)]
    np.testing.assert_array_equal(kernels[0][0], kernels[1][0])
    assert np.any(kernels[0][1] != kernels[1][1])
    assert log["critic"]["weights"].shape == (2,)


def test_actions_with_and_without_noise():
    learner = make_learner(SMALL, "upgrad", O, A)
    params = learner.init(jax.random.key(0)).actor.params
    observations = random_batch(2, 1).observations[:, 0]
    whole = jax.tree.map(lambda x: np.asarray(x, np.float64), params["trunk"])
    x = np.concatenate([observations, np.eye(2)], axis=1)
    mean, log_std = np.split(dense(whole, x), 2, axis=1)
    np.testing.assert_allclose(learner.best(params, observations), np.tanh(mean), atol=1e-6)
    keys = jax.random.split(jax.random.key(2), 4000)
    drawn = jax.jit(jax.vmap(learner.act, (None, None, 0)))(params, observations, keys)
    u = np.arctanh(np.clip(np.asarray(drawn, np.float64), -1 + 1e-12, 1 - 1e-12))
    np.testing.assert_allclose(u.mean(axis=0), mean, atol=5 * np.exp(log_std).max() / 4000**0.5)
    np.testing.assert_allclose(u.std(axis=0), np.exp(log_std), rtol=0.06)


# --- what an update costs -----------------------------------------------------------------------

TEN = replace(metaworld.PRESETS["MT10"], widths=(24, 24))
# Every rule reads one gradient of each task on its own batch, which the mean needs as well: none
# needs a further pass, so that none is excused from the bound.
CHEAP = ("upgrad",)


@pytest.fixture(scope="module")
def flops_of_mean():
    return program_of(TEN, "linear_scalarization").flops


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in CHEAP else [pytest.mark.slow]) for name in METHODS],
)
def test_no_rule_costs_more_than_half_an_update_of_the_mean(name, flops_of_mean):
    flops = program_of(TEN, name).flops
    assert 1.0 <= flops / flops_of_mean < 1.5


def test_mean_is_one_forward_and_backward_pass(flops_of_mean):
    """Counted by hand: products of 10 tasks x 64 rows, in critic, target and actor."""
    first_actor, first_critic = 24 * (OBSERVATION + 10), 2 * 24 * (OBSERVATION + 4 + 10)
    actor = first_actor + 24 * 24 + 24 * 8
    critic = first_critic + 2 * (24 * 24 + 24)
    forward = 2 * actor + 3 * critic  # actor: targets and loss; critic: target, loss, of the actor
    backward = (2 * critic - first_critic) + (2 * actor - first_actor) + critic
    products = 2 * 640 * (forward + backward)
    assert products < flops_of_mean < 1.35 * products  # the rest: Adam, activations, noise


# --- rules that do not suit ---------------------------------------------------------------------


def test_rules_of_losses_are_refused(tmp_path):
    assert {"famo", "gradnorm", "dwa", "gls", "scale_invariant", "stch"} <= set(REFUSED)
    assert set(METHODS).isdisjoint(REFUSED)
    assert {n for n in METHODS if n != "cagrad_moco"} <= set(jaxmtl.methods())
    for name in ("famo", "gradnorm"):
        with pytest.raises(ValueError, match=f"reads gradients alone, got '{name}', which reads"):
            check_method(name, 3)
    with pytest.raises(ValueError, match="at least 5 tasks for 'krum', got 3"):
        check_method("krum", 3)
    with pytest.raises(SystemExit, match="losses of an actor change their sign"):
        metaworld.study.main(["--smoke", "--out", str(tmp_path), "--rules", "famo"])
    with pytest.raises(SystemExit, match="steps in whole episodes of 150 steps, got 100"):
        metaworld.study.main(["--steps", "100", "--out", str(tmp_path)])


def test_the_papers_hyperparameters():
    assert METHODS["cagrad"].make.keywords == {"c": 0.9}
    assert METHODS["moco"].make.keywords == {"beta": 0.99, "gamma": 10.0}
    assert METHODS["pcgrad"].make.keywords == {"reduction": "mean"}  # as in mtrl


# --- data ---------------------------------------------------------------------------------------


def test_ring_buffer_keeps_the_newest():
    replay = Replay(2, 3, O, A)
    for k in range(5):
        values = np.array([k, 100 + k], np.float32)
        replay.add(Batch(np.tile(values[:, None], O), np.zeros((2, A)), values, np.ones((2, O))))
        assert len(replay) == min(k + 1, 3)
    sample = replay.sample(np.random.default_rng(0), 200)
    assert sample.observations.shape == (2, 200, O)
    assert sample.rewards.dtype == np.float32
    assert set(sample.rewards[0]) == {2, 3, 4}
    assert set(sample.rewards[1]) == {102, 103, 104}
    np.testing.assert_array_equal(sample.observations[..., 0], sample.rewards)  # of one transition
    assert np.any(sample.rewards[0] + 100 != sample.rewards[1])  # each task draws on its own
    other = Replay(2, 3, O, A)
    other.restore(replay.state())
    again = other.sample(np.random.default_rng(0), 200)
    np.testing.assert_array_equal(sample.rewards, again.rewards)
    assert other.count == 5


def test_scale_of_rewards_is_the_running_deviation():
    scale, mean, variance = RewardScale(2), np.zeros(2), np.ones(2)
    for rewards in np.random.default_rng(0).normal(size=(20, 2)) * [1, 30]:
        mean += 0.001 * (rewards - mean)
        variance += 0.001 * ((rewards - mean) ** 2 - variance)
        np.testing.assert_allclose(scale(rewards), rewards / variance**0.5, rtol=1e-6)
    other = RewardScale(2)
    other.restore(scale.state())
    np.testing.assert_array_equal(other(np.ones(2)), scale(np.ones(2)))


class Broken(MadeUp):
    """A made-up world whose second task goes wrong at its fifth step."""

    def __init__(self, what, value):
        super().__init__(TINY.tasks, 0)
        self._what, self._value, self._count = what, value, 0

    def step(self, actions):
        observations, rewards, successes = super().step(actions)
        self._count += 1
        if self._count == 5:
            (rewards if self._what == "rewards" else observations)[1] = self._value
        return Step(observations, rewards, successes)


@pytest.mark.parametrize(("what", "value"), [("rewards", np.nan), ("observations", np.inf)])
def test_non_finite_transitions_never_enter_the_buffer(what, value):
    run = train.Run(TINY, "upgrad", 0, Local(Broken(what, value)))
    with pytest.raises(
        ValueError, match=f"finite {what}, got {value} of {TINY.tasks[1]} at step 4"
    ):
        run.episode()
    assert run.replay.count == 4
    assert all(np.isfinite(x).all() for x in run.replay.state().values())
    assert np.isfinite(run.scale.mean).all()
    check_step(TINY.tasks, np.ones((3, 2)), np.ones(3), 0)


# --- runs in the made-up world ------------------------------------------------------------------


def same(first, second):
    """Tells whether two runs are in the same state of learning, bit for bit."""
    states = [
        (run.agent, run.replay.state(), run.scale.state(), run.step) for run in (first, second)
    ]
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get(states))


def new_run(method="cagrad_moco", seed=0):
    return train.Run(TINY, method, seed, Local(MadeUp(TINY.tasks, seed)))


MEASURED = {"env_steps_per_second", "env_steps_per_second_alone", "updates_per_second"}
MEASURED |= {"share_waiting"}


def learned(record):
    return {name: value for name, value in record.items() if name not in MEASURED}


@pytest.mark.slow
def test_resumed_run_is_the_same_bit_for_bit(tmp_path):
    whole = new_run()
    records = [whole.advance(), whole.advance()]
    part = new_run()
    part.advance()
    part.save(tmp_path / "a.msgpack")
    resumed = new_run()
    resumed.load(tmp_path / "a.msgpack", records[:1])
    assert resumed.step == 30
    second = resumed.advance()
    same(whole, resumed)
    assert learned(second) == learned(records[1])
    assert learned(records[0]) != learned(records[1])
    with pytest.raises(AssertionError):
        same(whole, part)


@pytest.mark.slow
def test_time_limit_does_not_end_what_is_learned():
    """The last transition of an episode leads to its last observation, not to the next start."""
    run = new_run()
    run.episode()
    world = MadeUp(TINY.tasks, 0)
    observations = [world.reset((0, 0))]
    actions = run.replay.state()["actions"]
    for t in range(TINY.horizon):
        observations.append(world.step(actions[:, t]).observations)
    np.testing.assert_array_equal(run.replay.state()["next_observations"][:, -1], observations[-1])
    np.testing.assert_array_equal(run.replay.state()["observations"][:, -1], observations[-2])
    run.episode()
    start = run.replay.state()["observations"][:, TINY.horizon]
    np.testing.assert_array_equal(start, world.reset((0, 1)))


def test_evaluation_counts_any_success_of_an_episode():
    run = new_run()
    values = iter(np.eye(3 * TINY.horizon, dtype=bool)[:, :3])  # each task once, in episode one

    class Once(MadeUp):
        def step(self, actions):
            return super().step(actions)._replace(successes=next(values), rewards=np.ones(3))

    run._world = Local(Once(TINY.tasks, 0))
    success, returns = run.evaluate()
    np.testing.assert_array_equal(success, [0.5] * 3)  # one of two episodes
    np.testing.assert_array_equal(returns, [TINY.horizon] * 3)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of a smoke run, with the simulator in a process of its own."""
    out = tmp_path_factory.mktemp("metaworld")
    arguments = ["--smoke", "--out", str(out), "--rules", "linear_scalarization", "cagrad_moco"]
    metaworld.study.main([*arguments, "--seeds", "2"])
    return out


def records_in(folder):
    lines = (folder / "metaworld" / "made_up.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_smoke_run_writes_a_record_per_evaluation(smoke):
    records = records_in(smoke)
    runs = [(s, m) for s in (0, 1) for m in ("linear_scalarization", "cagrad_moco")]
    assert [(r["seed"], r["method"], r["step"]) for r in records] == [
        (*run, step) for run in runs for step in (30, 60)
    ]
    for record in records:
        assert np.shape(record["success"]) == np.shape(record["return"]) == (3,)
        for part in ("critic", "actor"):
            assert np.shape(record[part]["cosines"]) == (3, 3)
            assert np.shape(record[part]["weights"]) == np.shape(record[part]["norms"]) == (3,)
            assert 0 <= record[part]["conflict_rate"] <= 1
        assert record["env_steps_per_second"] > 0
        assert 0 <= record["share_waiting"] <= 1
    assert list((smoke / "metaworld").glob("checkpoints/*")) == []


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(smoke):
    """The smoke run simulated apart from its updates; here they take turns."""
    run = new_run()
    expected = json.loads(json.dumps([learned(run.advance()), learned(run.advance())]))
    found = [r for r in records_in(smoke) if (r["method"], r["seed"]) == ("cagrad_moco", 0)]
    kept = [{name: record[name] for name in expected[0]} for record in found]
    assert kept == expected


@pytest.mark.slow
def test_resume_goes_on_from_the_last_evaluation(smoke, tmp_path):
    """As after an interruption: a checkpoint, and a file that lacks the last record."""
    run, folder = new_run(), tmp_path / "metaworld"
    run.advance()
    checkpoint = folder / "checkpoints" / "made_up_cagrad_moco_0.msgpack"
    run.save(checkpoint)
    kept = [r for r in records_in(smoke) if r["seed"] == 0 and r["method"] == "cagrad_moco"]
    (folder / "made_up.jsonl").write_text(json.dumps(kept[0]) + "\n")
    arguments = ["--smoke", "--out", str(tmp_path), "--rules", "cagrad_moco", "--processes", "1"]
    metaworld.study.main([*arguments, "--resume"])
    assert [learned(r) for r in records_in(tmp_path)] == [learned(r) for r in kept]
    assert not checkpoint.exists()
    before = (folder / "made_up.jsonl").read_text()
    metaworld.study.main([*arguments, "--resume"])
    assert (folder / "made_up.jsonl").read_text() == before
    with pytest.raises(SystemExit, match="expected the options of"):
        metaworld.study.main([*arguments, "--resume", "--batch-size", "4"])


@pytest.mark.slow
def test_report_and_claims(smoke, tmp_path, capsys):
    metaworld.study.main(["--smoke", "--report-only", "--out", str(smoke)])
    text = capsys.readouterr().out
    assert (smoke / "metaworld" / "made_up.png").stat().st_size > 10_000
    assert all(x in text for x in ("cagrad_moco", "drawer-close", ".86 ± .022", "Not reached"))
    with pytest.raises(SystemExit, match="expected results in"):
        metaworld.study.main(["--report-only", "--out", str(tmp_path)])
    assert metaworld.claims(tmp_path) == []
    records = records_in(smoke)
    # Success of seeds 0 and 1 at the two evaluations, the same for every task.
    mean = {(0, 30): 0.2, (0, 60): 0.1, (1, 30): 0.3, (1, 60): 0.5}
    for shift, verdict in ((0.3, "reproduced"), (0.0, "not"), (-0.1, "not")):
        for r in records:
            change = shift * (r["method"] == "cagrad_moco") * (1 + r["seed"])
            r["success"] = [mean[r["seed"], r["step"]] + change] * 3
        lines = "".join(json.dumps(r) + "\n" for r in records)
        (tmp_path / "mt3.jsonl").write_text(lines)
        made = metaworld.claims(tmp_path)
        (found,) = [claim for claim in made if claim.verdict != NO_DATA]
        assert found.differs.startswith("widths [16, 16] in place of [400, 400, 400], batch size 8")
        assert "seeds 2 in place of 5" in found.differs
        assert (found.verdict, found.paper) == (verdict, "best +0.37")
        assert found.verdict in VERDICTS
        gains = gains_of(runs_of(records), "cagrad_moco", "linear_scalarization", best)
        np.testing.assert_allclose(gains, [shift, 2 * shift])
    runs = runs_of(records)["linear_scalarization"]
    np.testing.assert_allclose(best(runs), [0.2, 0.5])
    np.testing.assert_allclose(last(runs), [0.1, 0.5])
    (tmp_path / "mt3.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in records if r["seed"] == 0)
    )
    undecided = metaworld.claims(tmp_path)  # by one seed
    assert {claim.verdict for claim in undecided} == {NO_DATA}
    (heads,) = [claim for claim in undecided if "`multi_head`" in claim.claim]
    assert heads.ours.endswith("--methods linear_scalarization --network multi_head`")


# --- the simulator ------------------------------------------------------------------------------


def test_worlds_need_neither_jax_nor_a_simulator():
    """The process of the simulator imports no JAX, and the learner no simulator."""
    code = "import sys, experiments.metaworld.worlds as w; print('jax' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
    code = "import sys, experiments.metaworld.__main__; print('metaworld' in sys.modules)"
    assert "metaworld" not in sys.modules
    if importlib.util.find_spec("metaworld") is None:
        with pytest.raises(ValueError, match=r"pip install 'jaxmtl\[rl\]'"):
            MetaWorld(("reach-v3",), 0, "v2")


def test_failure_of_the_simulator_is_told():
    with pytest.raises(ValueError, match="fails at the start"):
        Remote(failing)


def failing():
    raise ValueError("fails at the start")


def test_tasks_of_the_benchmarks():
    assert len(TASKS["MT10"]) == len(set(TASKS["MT10"])) == 10
    assert set(TASKS["MT3"]) < set(TASKS["MT10"])


def test_an_episode_of_the_simulator_depends_on_its_key_alone():
    """So that a run goes on after an interruption with the states that it would have had."""
    simulator = pytest.importorskip("metaworld", reason="the extra `rl` is not installed")
    assert set(TASKS["MT10"]) == set(simulator.MT10().train_classes)
    tasks = ("reach-v3", "drawer-close-v3")
    actions = np.random.default_rng(0).uniform(-1, 1, (40, 2, 4)).astype(np.float32)

    def episode(world, key):
        found = [world.reset(key)]
        rewards = []
        for action in actions:
            step = world.step(action)
            found.append(step.observations)
            rewards.append(step.rewards)
        return np.array(found), np.array(rewards)

    fresh = episode(MetaWorld(tasks, 0, "v2"), (0, 7))
    used = MetaWorld(tasks, 0, "v2")
    other = episode(used, (0, 3))
    again = episode(used, (0, 7))
    for x, y in zip(fresh, again, strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.any(other[0] != again[0])
    assert fresh[0].shape == (41, 2, 39)
    assert (fresh[0][:, :, 36:39] != 0).any(axis=(0, 2)).all()  # the goal is seen
    with pytest.raises(ValueError, match="expected a task of Meta-World v3, got 'fly-v3'"):
        MetaWorld(("fly-v3",), 0, "v2")


# --- the example --------------------------------------------------------------------------------


@pytest.mark.slow
def test_example_of_a_loop_logs_by_name_and_helps_the_quiet_tasks(capsys):
    multi_task_ppo.main(60)
    *lines, conclusion = capsys.readouterr().out.splitlines()
    found = {
        line.split()[0]: re.findall(r"(\w+) ([\d.]+) \(weight ([\d.]+)\)", line) for line in lines
    }
    assert list(found) == ["linear_scalarization", "upgrad", "aligned_mtl"]
    assert all(tuple(task for task, *_ in row) == multi_task_ppo.TASKS for row in found.values())
    assert [weight for *_, weight in found["linear_scalarization"]] == ["0.333"] * 3
    errors = {name: [float(error) for _, error, _ in row] for name, row in found.items()}
    weights = [float(weight) for *_, weight in found["aligned_mtl"]]
    assert weights[2] < 0.1 * min(weights[:2])  # the loud one
    assert max(errors["aligned_mtl"]) < 0.8 * max(errors["linear_scalarization"])
    assert "with aligned_mtl" in conclusion


@pytest.mark.slow
def test_per_task_gradients_of_the_example_are_those_of_each_minibatch():
    params = multi_task_ppo.Policy().init(jax.random.key(0), jnp.zeros((1, 7)))
    batch, _ = multi_task_ppo.collect(params, jax.random.key(1))
    rows = jaxmtl.value_and_jacobian(multi_task_ppo.task_loss, in_axes=(None, 0))(params, batch)[1]
    for i in range(3):
        one = jax.grad(multi_task_ppo.task_loss)(params, jax.tree.map(lambda x, i=i: x[i], batch))
        jax.tree.map(
            lambda r, g, i=i: np.testing.assert_allclose(r[i], g, rtol=2e-4, atol=1e-5), rows, one
        )

    # At the first epoch the ratio is 1: the policy gradient, -mean(advantage * grad log density).
    def objective(p):
        density = multi_task_ppo.log_density(p, batch.inputs[0], batch.actions[0])
        return -jnp.mean(batch.advantages[0] * density)

    expected = jax.grad(objective)(params)
    jax.tree.map(
        lambda r, g: np.testing.assert_allclose(r[0], g, rtol=2e-4, atol=1e-5), rows, expected
    )
