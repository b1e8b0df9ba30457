"""Domains: Office-31 and Office-Home, a task and a batch of its own for each domain.

    python -m experiments.domains --smoke                             # made-up images
    python -m experiments.domains --data-dir DIR --weights resnet18.pth
    python -m experiments.domains --data-dir DIR --weights resnet18.pth --dataset office_home
    python -m experiments.domains --data-dir DIR --size 64 --width 16 --batch-size 16 --epochs 10

``DIR`` holds LibMTL's lists, ``DIR/data_txt/office-31/amazon_train.txt`` and so on, and the images
at the paths that the lists give: ``amazon/images/...``, ``Art/...``. ``--lists`` names another
folder for the lists, such as ``examples/office/data_txt`` of LibMTL. Weights are torchvision's for
ImageNet, as ``.pth`` or ``.safetensors``; without them the network starts from random ones. Sizes
are by default the papers', which need an accelerator; ``--resume`` goes on with a run that was cut
short, from the end of its last epoch.

Every domain is a task of as many classes: 31 in amazon, dslr and webcam, 65 in Art, Clipart,
Product and Real_World. A step takes a batch of every domain, whose loss is differentiated on this
batch alone (the library's route of separate data: m gradients, and no factor m). Batches are
shuffled passes over the domain without what fills no batch; a domain that is through starts the
next pass at once, in the middle of an epoch and on into the next. An epoch is as many steps as the
largest domain has batches: 26 on Office-31, of whose dslr it sees 6.5 passes, and 41 on
Office-Home. ResNet-18, average pool, a layer of 512 with BatchNorm, ReLU and dropout are shared,
the last layer is the domain's own; images of 224 x 224 without augmentation; Adam, 64 images a
domain, 100 epochs.

A method combines the gradients of the shared part, and last layers get that of their own loss, or,
by methods that never look at gradients, the weighted one. BatchNorm normalizes each batch by its
own statistics. Its running averages take in the batches of a step one after the other, in the order
of the tasks (``train.merged``). Dropout draws for each domain alone. Results are test accuracies
after the epoch of the best mean validation accuracy; delta_m is measured against equal weights,
not against single tasks. What was found: ``results/domains/notes.md``.

**Reference**: Fernando et al. 2023 (MoCo), tables 7 and 8; Lin and Zhang 2023 (LibMTL).

**Differs from** LibMTL: GradDrop acts on the gradients of the shared parameters, there on those of
the features; PCGrad draws an order for each task; MGDA and Nash-MTL are solved exactly; MoCo's
authors take "the average of the losses" and LibMTL their sum, the same direction for Adam. Running
variances are those of the batch without Bessel's correction. The best epoch is that of the best
mean, as the paper says, where LibMTL compares relative gains on the first epoch.
"""
