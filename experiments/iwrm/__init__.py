"""Instance-wise risk minimisation: every image of a batch is a task.

    python -m experiments.iwrm --data-dir DIR --out experiments/results     # four hours
    python -m experiments.iwrm --paper --full-search                        # the paper's scale
    python -m experiments.iwrm --data-dir DIR --parts kmnist                # or eurosat, svhn

Small convolutional networks learn 1,024 images by SGD; each step turns the gradients of the 32
images of a batch into one by each of the paper's eleven aggregators. For every aggregator and seed
the learning rate is the one with the least area under the training-loss curve (appendix C.1). A
part (``--parts``) is a data set, the study of batch sizes, of Adam, or the timing of table 7. What
was found: ``results/iwrm/notes.md``.

Rules with a weighting take the Jacobian-free route, where the cosine of update and mean gradient
comes from the Gramian for nothing; one compiled program serves all of them, with the rule as an
argument. GradDrop needs coordinates and takes the Jacobian. On CPU seeds are trained in turn:
batched matrix products are slower than one, and eight seeds' activations do not fit the cache. On
an accelerator the full search maps the seeds.

**Reference**: Quinton and Rey 2024, section 5, appendices C, D and E.

**Differs from** the paper, unless by ``--paper`` and ``--full-search``: fewer seeds but for MNIST,
fewer aggregators with Adam and other batch sizes, and a search that walks over the same 22 coarse
rates to a minimum of the area instead of trying all 72 rates. Kuzushiji-MNIST (two seeds, of the
first all 72 rates) and EuroSAT run where ``--parts`` names them; SVHN, which needs TFDS, has not
been trained. ``--data-dir`` may hold the publishers' own files of EuroSAT and Kuzushiji-MNIST
(``experiments.images``) in place of TFDS's. The folder that made the results holds the first 10,000
training images of CIFAR-10, the 10,000 test images of Kuzushiji-MNIST and 4,000 of EuroSAT's
27,000, 400 of each class; subsets are drawn from these, and images normalized by their means and
deviations. c of CAGrad is not stated: 0.5. Loss curves are means over the batches of an epoch,
without smoothing; the area is their mean. UPGrad and DualProj run as defined, with a ridge of 1e-4
of the Gramian's largest eigenvalue (``*_ridge_largest``), as the paper's code of the time has it,
and of its trace (``*_ridge``), as TorchJD since 0.6.
"""
