"""MultiMNIST: read two overlapping digits with one network, by every method.

    python -m experiments.multimnist                                # bundled digits
    python -m experiments.multimnist --dataset mnist                # table 1 of Zhou et al. 2022
    python -m experiments.multimnist --dataset mnist_batches        # their table 2

MNIST comes from TFDS, which downloads it, or from ``--data-dir``. A network with a shared trunk and
two heads is trained by SGD; a method gets the Jacobian of all parameters, heads included. Seeds
differ in initial parameters and minibatches, which all methods share. A step counts as conflicting
if the inner product of the two gradients of the trunk is negative. What was found, and how learning
rates were chosen: ``results/multimnist/notes.md``. Where cores are few or busy,
``XLA_FLAGS=--xla_cpu_multi_thread_eigen=false`` spares them threads that wait.

**Reference**: Sener and Koltun 2018, section 5; Zhou et al. 2022, section 6, tables 1 and 2.

**Differs from** Zhou et al.: one epoch of batches of 32 for table 1 and a sixth of an epoch for
table 2 (they state no batch size for the first and no number of steps for either), a 36 x 36
canvas, no dropout in LeNet, and a learning rate (hence alpha) that falls as ``inverse_sqrt`` says.
"""
