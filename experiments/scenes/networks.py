"""Dense-prediction networks: SegNet, SegNet with MTAN's attention, Cross-Stitch, PSPNet.

Every network has three methods: ``features`` from images to what the heads read, z, ``predict``
from z to a dict of predictions by task, and both in one call. Parameters whose name starts with
``heads`` belong to one task; a method combines the gradients of all others. Running averages of
BatchNorm are the collection ``batch_stats``.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.resnet import Norm, dilated_resnet50, pytorch_uniform

Predictions = dict[str, jax.Array]  # by task, (b, h, w, channels)


class Output(NamedTuple):
    """What a task predicts at every pixel."""

    task: str
    channels: int
    kind: str  # "classes": log-probabilities; "values"; "directions": of norm 1


def finish(output: Output, x: jax.Array) -> jax.Array:
    """Returns the predictions (..., channels) from what the last convolution gives."""
    if output.kind == "classes":
        return nn.log_softmax(x)
    if output.kind == "directions":  # the square is kept from 0, where the norm has no slope
        squares = jnp.sum(x * x, axis=-1, keepdims=True)
        return x * lax.rsqrt(jnp.maximum(squares, jnp.finfo(x.dtype).tiny))
    return x


# --- pooling and resizing -----------------------------------------------------------------------


def _quarters(x: jax.Array) -> list[jax.Array]:
    return [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]


def max_pool(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the maximum of every 2 x 2 window, and its place.

    Args:
      x: (b, h, w, c) of even height and width.

    Returns:
      (b, h/2, w/2, c), and int8 places 0..3 in reading order, the first among equals.
    """
    quarters = _quarters(x)
    places = jnp.zeros(quarters[0].shape, jnp.int8)
    largest = quarters[0]
    for k, quarter in enumerate(quarters[1:], 1):
        places = jnp.where(quarter > largest, jnp.int8(k), places)
        largest = jnp.where(quarter > largest, quarter, largest)
    return largest, places


def max_unpool(x: jax.Array, places: jax.Array) -> jax.Array:
    """Puts every value where the maximum was, zeros elsewhere.

    Args:
      x: (b, h, w, c).
      places: (b, h, w, c) of `max_pool`.

    Returns:
      (b, 2h, 2w, c).
    """
    b, h, w, c = x.shape
    parts = [jnp.where(places == k, x, 0) for k in range(4)]
    rows = [jnp.stack(parts[i : i + 2], axis=3) for i in (0, 2)]  # (b, h, w, 2, c)
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, c)


def bilinear_matrix(size: int, out: int, *, align_corners: bool) -> np.ndarray:
    """Returns the matrix (out, size) of linear interpolation along one axis.

    Args:
      size: Of the input.
      out: Of the output.
      align_corners: Whether the first and last points of both coincide; else their pixels' outer
        edges do.
    """
    i = np.arange(out)
    if align_corners:
        places = i * ((size - 1) / max(out - 1, 1))
    else:
        places = np.clip((i + 0.5) * size / out - 0.5, 0, size - 1)
    low = np.minimum(places.astype(int), size - 1)
    matrix = np.zeros((out, size), np.float32)
    np.add.at(matrix, (i, low), 1 - (places - low))
    np.add.at(matrix, (i, np.minimum(low + 1, size - 1)), places - low)
    return matrix


def average_matrix(size: int, out: int) -> np.ndarray:
    """Returns the matrix (out, size) of adaptive average pooling along one axis.

    Bin i goes from ``floor(i size / out)`` to ``ceil((i + 1) size / out)``; bins may overlap.
    """
    matrix = np.zeros((out, size), np.float32)
    for i in range(out):
        begin, end = i * size // out, -(-(i + 1) * size // out)
        matrix[i, begin:end] = 1 / (end - begin)
    return matrix


def along_both(rows: np.ndarray, columns: np.ndarray, x: jax.Array) -> jax.Array:
    """Returns (b, h', w', c): a matrix for each axis of an image (b, h, w, c)."""
    x = jnp.einsum("ih,bhwc->biwc", rows, x, precision=lax.Precision.HIGHEST)
    return jnp.einsum("jw,biwc->bijc", columns, x, precision=lax.Precision.HIGHEST)


def resize_bilinear(x: jax.Array, height: int, width: int, *, align_corners: bool) -> jax.Array:
    """Returns images (b, h, w, c) at another size."""
    rows = bilinear_matrix(x.shape[1], height, align_corners=align_corners)
    columns = bilinear_matrix(x.shape[2], width, align_corners=align_corners)
    return along_both(rows, columns, x)


# --- SegNet and MTAN ----------------------------------------------------------------------------


class ConvLayer(nn.Module):
    """A convolution with bias, BatchNorm, ReLU."""

    features: int
    size: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (b, h, w, c) to (b, h, w, features)."""
        init = nn.initializers.glorot_normal()
        x = nn.Conv(self.features, (self.size,) * 2, kernel_init=init, name="conv")(x)
        return nn.relu(Norm(name="norm")(x, train))


class Mask(nn.Module):
    """MTAN's attention: values in (0, 1) to multiply a shared feature with."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (b, h, w, c) to (b, h, w, features)."""
        init = nn.initializers.glorot_normal()
        x = ConvLayer(self.features, size=1, name="first")(x, train)
        x = nn.Conv(self.features, (1, 1), kernel_init=init, name="conv")(x)
        return nn.sigmoid(Norm(name="norm")(x, train))


class Head(nn.Module):
    """Two convolutions, without nonlinearity between them."""

    output: Output
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, h, w, c) to the predictions (b, h, w, channels)."""
        init = nn.initializers.glorot_normal()
        x = nn.Conv(self.features, (3, 3), kernel_init=init, name="first")(x)
        x = nn.Conv(self.output.channels, (1, 1), kernel_init=init, name="last")(x)
        return finish(self.output, jnp.asarray(x))


def filters_of(width: int, levels: int) -> list[int]:
    """Returns the channels of every level: 64, 128, 256, 512, 512 at width 64."""
    return [width * factor for factor in (1, 2, 4, 8, 8)][:levels]


def more_layers(level: int) -> int:
    """Returns how many layers follow the first one of a block."""
    return 1 if level < 2 else 2


class Block(NamedTuple):
    """What a block of SegNet leaves for the attention."""

    given: jax.Array  # what the first layer saw
    first: jax.Array  # what it made of it
    last: jax.Array  # what the last layer made


class Body(nn.Module):
    """SegNet's encoder and decoder, block by block."""

    width: int
    levels: int

    def setup(self) -> None:
        """Makes the layers."""
        filters = filters_of(self.width, self.levels)
        before = [filters[0], *filters[:-1]]

        def block(features: int, level: int) -> list[ConvLayer]:
            return [ConvLayer(features) for _ in range(1 + more_layers(level))]

        self.encoder = [block(filters[i], i) for i in range(self.levels)]
        self.decoder = [block(before[i], i) for i in range(self.levels)]

    def down(self, level: int, x: jax.Array, train: bool) -> tuple[Block, jax.Array, jax.Array]:
        """Returns a block of the encoder, its last feature at half the size, and the places."""
        block = self._run(self.encoder[level], x, train)
        return block, *max_pool(block.last)

    def up(self, level: int, x: jax.Array, places: jax.Array, train: bool) -> Block:
        """Returns a block of the decoder, at twice the size of x."""
        return self._run(self.decoder[level], max_unpool(x, places), train)

    def _run(self, layers: Sequence[ConvLayer], x: jax.Array, train: bool) -> Block:
        given, first = x, layers[0](x, train)
        x = first
        for layer in layers[1:]:
            x = layer(x, train)
        return Block(given, first, x)

    def __call__(self, x: jax.Array, train: bool) -> tuple[list[Block], list[Block]]:
        """Returns all blocks of the encoder and the decoder, by level."""
        down, places = [], []
        for i in range(self.levels):
            block, x, place = self.down(i, x, train)
            down.append(block)
            places.append(place)
        up: list[Block] = []
        for i in reversed(range(self.levels)):
            up.insert(0, self.up(i, x, places[i], train))
            x = up[0].last
        return down, up


class SegNet(nn.Module):
    """One encoder and decoder, with heads on the last feature."""

    outputs: tuple[Output, ...]
    width: int = 64
    levels: int = 5

    def setup(self) -> None:
        """Makes the layers."""
        self.body = Body(self.width, self.levels)
        self.heads = [Head(output, self.width) for output in self.outputs]

    def features(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps (b, h, w, 3) to (b, h, w, width), which all heads read."""
        return self.body(images, train)[1][0].last

    def predict(self, z: jax.Array, train: bool) -> Predictions:
        """Maps the last feature to predictions."""
        del train
        return {head.output.task: head(z) for head in self.heads}

    def __call__(self, images: jax.Array, train: bool) -> Predictions:
        """Maps images to predictions."""
        return self.predict(self.features(images, train), train)


class _OwnFeatures(nn.Module):
    """A network whose heads read a feature each.

    ``z`` is (b, h, w, tasks * width), of which every head reads its own ``width`` channels: the
    gradients of the losses at z are orthogonal, and a Gramian of them is diagonal.
    """

    outputs: tuple[Output, ...]
    width: int = 64
    levels: int = 5

    def own_features(self, images: jax.Array, train: bool) -> list[jax.Array]:
        """Maps (b, h, w, 3) to a feature (b, h, w, width) per task."""
        raise NotImplementedError

    def features(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps (b, h, w, 3) to (b, h, w, tasks * width)."""
        return jnp.concatenate(self.own_features(images, train), axis=-1)

    def predict(self, z: jax.Array, train: bool) -> Predictions:
        """Maps the last features to predictions."""
        del train
        return self._read(jnp.split(z, len(self.outputs), axis=-1))

    def __call__(self, images: jax.Array, train: bool) -> Predictions:
        """Maps images to predictions."""
        # Without z: through it, zeros would go back into the features of all other tasks.
        return self._read(self.own_features(images, train))

    def _read(self, own: list[jax.Array]) -> Predictions:
        return {head.output.task: head(x) for head, x in zip(self.heads, own, strict=True)}


class MTAN(_OwnFeatures):
    """SegNet with an attention tower per task, whose layers between levels are shared."""

    def setup(self) -> None:
        """Makes the layers."""
        filters = filters_of(self.width, self.levels)
        before, after = [filters[0], *filters[:-1]], [*filters[1:], filters[-1]]
        layers, tasks = range(self.levels), range(len(self.outputs))
        self.body = Body(self.width, self.levels)
        self.encoder_mask = [[Mask(filters[i]) for i in layers] for _ in tasks]
        self.decoder_mask = [[Mask(before[i]) for i in layers] for _ in tasks]
        self.tower_down = [ConvLayer(after[i]) for i in layers]
        self.tower_up = [ConvLayer(before[i]) for i in layers]
        self.heads = [Head(output, self.width) for output in self.outputs]

    def tower(self, task: int, down: list[Block], up: list[Block], train: bool) -> jax.Array:
        """Returns the last feature (b, h, w, width) of a task."""
        x = down[0].first[..., :0]  # at the first level there is nothing from before
        for i in range(self.levels):
            seen = jnp.concatenate([down[i].first, x], axis=-1)
            x = self.encoder_mask[task][i](seen, train) * down[i].last
            x, _ = max_pool(self.tower_down[i](x, train))
        for i in reversed(range(self.levels)):
            _, h, w, _ = up[i].given.shape
            x = self.tower_up[i](resize_bilinear(x, h, w, align_corners=True), train)
            seen = jnp.concatenate([up[i].given, x], axis=-1)
            x = self.decoder_mask[task][i](seen, train) * up[i].last
        return jnp.asarray(x)

    def own_features(self, images: jax.Array, train: bool) -> list[jax.Array]:
        """Maps (b, h, w, 3) to a feature (b, h, w, width) per task."""
        down, up = self.body(images, train)
        return [self.tower(task, down, up, train) for task in range(len(self.outputs))]


class CrossStitch(_OwnFeatures):
    """A SegNet per task; after every block each goes on with a learnt mixture of all.

    The mixtures (m, m) start with ``keep`` of a network's own feature and equal parts of others.

    **Reference**: Misra et al. 2016, section 3.
    """

    keep: float = 0.9

    def setup(self) -> None:
        """Makes the layers."""
        self.nets = [Body(self.width, self.levels) for _ in self.outputs]
        # After every block of the encoder, pooled, and of the decoder but the last.
        self.stitch_down = self.param("stitch_down", self._start, self.levels)
        self.stitch_up = self.param("stitch_up", self._start, self.levels - 1)
        self.heads = [Head(output, self.width) for output in self.outputs]

    def _start(self, key: jax.Array, units: int) -> jax.Array:
        del key
        m = len(self.outputs)
        mixture = np.full((m, m), (1 - self.keep) / max(m - 1, 1), np.float32)
        np.fill_diagonal(mixture, self.keep if m > 1 else 1)
        return jnp.broadcast_to(jnp.asarray(mixture), (units, m, m))

    def own_features(self, images: jax.Array, train: bool) -> list[jax.Array]:
        """Maps (b, h, w, 3) to a feature (b, h, w, width) per task."""
        m = len(self.outputs)

        def mixed(mixture: jax.Array, xs: list[jax.Array]) -> list[jax.Array]:
            return [reduce(jnp.add, [row[j] * xs[j] for j in range(m)]) for row in mixture]

        xs, places = [images] * m, []
        for i in range(self.levels):
            made = [net.down(i, x, train) for net, x in zip(self.nets, xs, strict=True)]
            places.append([place for _, _, place in made])
            xs = mixed(self.stitch_down[i], [x for _, x, _ in made])
        for i in reversed(range(self.levels)):
            xs = [
                net.up(i, x, place, train).last
                for net, x, place in zip(self.nets, xs, places[i], strict=True)
            ]
            if i > 0:
                xs = mixed(self.stitch_up[i - 1], xs)
        return xs


# --- PSPNet -------------------------------------------------------------------------------------

STAGES = (3, 4, 6, 3)  # bottlenecks of ResNet-50
SCALES = (1, 2, 3, 6)  # of the pyramid


class PyramidHead(nn.Module):
    """The decoder of one task: averages at four scales, then two convolutions."""

    output: Output
    features: int  # 512 at width 64
    upsample: int

    @nn.compact
    def __call__(self, z: jax.Array, train: bool) -> jax.Array:
        """Maps (b, h, w, c) to the predictions (b, h * upsample, w * upsample, channels)."""
        h, w = z.shape[1:3]

        def conv_norm(x: jax.Array, size: int, name: str) -> jax.Array:
            init = pytorch_uniform(size * size * x.shape[-1])
            x = nn.Conv(
                self.features, (size, size), use_bias=False, kernel_init=init, name=f"{name}_conv"
            )(x)
            return nn.relu(Norm(name=f"{name}_norm")(x, train))

        parts = [z]
        for scale in SCALES:
            x = along_both(average_matrix(h, scale), average_matrix(w, scale), z)
            x = conv_norm(x, 1, f"scale{scale}")
            parts.append(resize_bilinear(x, h, w, align_corners=False))
        x = conv_norm(jnp.concatenate(parts, axis=-1), 3, "merge")
        init = pytorch_uniform(self.features)
        x = nn.Conv(self.output.channels, (1, 1), kernel_init=init, bias_init=init, name="last")(x)
        for axis in (1, 2):  # to the nearest pixel
            x = jnp.repeat(x, self.upsample, axis=axis)
        return finish(self.output, x)


class PSPNet(nn.Module):
    """A dilated ResNet-50 with a decoder of pyramids per task; ``z`` is the encoder's output."""

    outputs: tuple[Output, ...]
    width: int = 64
    blocks: tuple[int, ...] = STAGES
    upsample: int = 1

    def setup(self) -> None:
        """Makes the layers."""
        self.encoder = dilated_resnet50(self.width, self.blocks)
        self.heads = [PyramidHead(output, 8 * self.width, self.upsample) for output in self.outputs]

    def features(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps (b, h, w, 3) to (b, h/8, w/8, 32 * width)."""
        return self.encoder(images, train)

    def predict(self, z: jax.Array, train: bool) -> Predictions:
        """Maps the encoder's output to predictions."""
        return {head.output.task: head(z, train) for head in self.heads}

    def __call__(self, images: jax.Array, train: bool) -> Predictions:
        """Maps images to predictions."""
        return self.predict(self.features(images, train), train)


# --- by name ------------------------------------------------------------------------------------

SEGNETS = {"segnet": SegNet, "mtan": MTAN, "cross_stitch": CrossStitch}
NETWORKS = (*SEGNETS, "pspnet")
LEVELS = 5  # of a network in full


def make_network(
    name: str, outputs: tuple[Output, ...], *, width: int, levels: int, stride: int
) -> nn.Module:
    """Returns a network.

    Args:
      name: One of ``NETWORKS``.
      outputs: Of the tasks.
      width: Channels of the first level; 64 in the papers.
      levels: 1 to 5; less than 5 leaves out levels of a SegNet, or a share of the blocks of ResNet.
      stride: Of the predictions, in pixels of the image: 1, or 8 for PSPNet.
    """
    if name == "pspnet":
        blocks = tuple(max(1, round(n * levels / LEVELS)) for n in STAGES)
        return PSPNet(outputs, width, blocks, upsample=8 // stride)
    return SEGNETS[name](outputs, width=width, levels=levels)


def is_own(path: Sequence[Any]) -> bool:
    """Tells whether a parameter belongs to one task: that of a head."""
    return str(path[0].key).startswith("heads")


def last_shared_layer(network: nn.Module) -> Callable[[Sequence[Any]], bool]:
    """Returns a function that tells whether a parameter is in the last layer all tasks share.

    It is the last layer of SegNet's decoder, and the last stage of ResNet.

    Raises:
      ValueError: The network has none.
    """
    if isinstance(network, SegNet | MTAN):
        prefix = ("body", "decoder_0_1")
    elif isinstance(network, PSPNet):
        prefix = ("encoder", "layer4_")
    else:
        raise ValueError(
            f"expected a network with a last shared layer, got {type(network).__name__}, whose "
            "tasks share none; leave gradnorm out of --methods"
        )
    return lambda path: path[0].key == prefix[0] and path[1].key.startswith(prefix[1])
