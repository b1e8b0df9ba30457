"""Meta-World: one agent learns several tasks of a robot arm, a rule in its critic and its actor.

    pip install 'jaxmtl[rl]'
    python -m experiments.metaworld                        # MT3: reach, button-press, drawer-close
    python -m experiments.metaworld --benchmark MT10 --seeds 1
    python -m experiments.metaworld --benchmark learner    # updates alone, no simulator
    python -m experiments.metaworld --smoke                # a made-up world, no simulator
    python -m experiments.metaworld --tasks push-v3 door-open-v3 --rules cagrad --steps 30000

``--resume`` goes on after an interruption. Soft actor-critic: tasks run in lockstep and fill a ring
buffer each; an update draws 64 transitions of every task, computes the losses of critic and actor
on the part of each task, and combines their gradients by a rule, in critic and actor apart, with
states of their own. One temperature follows the mean of its losses. Networks are 3 x 128 and see
the task as a one-hot vector; ``--network multi_head`` has a head for each task, which gets its own
gradient; ``single_task`` among the rules is an agent for each task. Rules that read losses are
refused, as an actor's losses change their sign.

The simulator runs in a process of its own: it takes a step while the learner updates, with the same
result as in turn. All random numbers come from the seed and the number of the step. A run is saved
after every evaluation, between episodes: parameters, optimizers, states of rules, buffers and
scales of rewards; what the simulator does in an episode depends on that episode's key and actions
alone (a test compares a fresh simulator with a used one), so that nothing of it is saved. What is
resumed on the same machine is the same bit for bit.

Success: the flag at any step of an episode, ten episodes without noise for each task after every
10,050 steps. The papers report the best of all evaluations of a run, which is above the last; both
are shown. What was found: ``results/metaworld/notes.md``.

**Reference**: Haarnoja et al. 2018 (soft actor-critic); Yu et al. 2019 (Meta-World); Fernando et
al. 2023, table 4 (MoCo); Senushkin et al. 2023, table 5 (Aligned-MTL).

**Differs from** these tables: Meta-World v3 (rewards "v2"; v1 there), 100,050 steps of each task in
place of 2 million, networks 3 x 128 in place of 3 x 400, 64 transitions of each task in place of
128, three tasks first, two seeds in place of 5 and 10, ten evaluation episodes in place of one.
Rewards are divided by their running deviation, as in mtrl (``--raw-rewards`` leaves that out);
episodes last 150 steps, as there. The logarithm of the deviation is clipped to [-20, 2], where
mtrl squeezes it by tanh. The rule does not act on the temperature. CAGrad is exact here.
"""
