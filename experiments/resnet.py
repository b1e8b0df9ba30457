"""ResNets in Flax, of layers named as torchvision's, and BatchNorm as PyTorch has it."""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

MOMENTUM = 0.9  # of BatchNorm's running averages: what remains of the old one


class Norm(nn.Module):
    """BatchNorm as PyTorch has it by default."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalizes over all axes but the last."""
        norm = nn.BatchNorm(
            use_running_average=not train, momentum=MOMENTUM, epsilon=1e-5, name="norm"
        )
        return jnp.asarray(norm(x))


def pytorch_uniform(fan_in: int) -> Callable[..., jax.Array]:
    """Returns PyTorch's default for kernels and biases, uniform within 1 / sqrt(fan in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def _conv(features: int, size: int, name: str, stride: int = 1, dilation: int = 1) -> nn.Conv:
    """Returns a convolution without bias that keeps the size at stride 1, padded as PyTorch's."""
    pad = dilation * (size // 2)
    return nn.Conv(
        features,
        (size, size),
        stride,
        padding=((pad, pad), (pad, pad)),
        kernel_dilation=dilation,
        use_bias=False,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        name=name,
    )


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut: the block of ResNet-18."""

    planes: int
    stride: int
    dilation: int
    project: bool  # whether the shortcut is a convolution

    expansion: ClassVar[int] = 1  # output channels over planes

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (b, h, w, c) to (b, h / stride, w / stride, planes)."""
        y = _conv(self.planes, 3, "conv1", self.stride, self.dilation)(x)
        y = nn.relu(Norm(name="bn1")(y, train))
        y = Norm(name="bn2")(_conv(self.planes, 3, "conv2", 1, self.dilation)(y), train)
        if self.project:
            x = _conv(self.planes, 1, "downsample_0", self.stride)(x)
            x = Norm(name="downsample_1")(x, train)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut: the block of ResNet-50."""

    planes: int
    stride: int
    dilation: int
    project: bool  # whether the shortcut is a convolution

    expansion: ClassVar[int] = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (b, h, w, c) to (b, h / stride, w / stride, 4 * planes)."""
        y = nn.relu(Norm(name="bn1")(_conv(self.planes, 1, "conv1")(x), train))
        middle = _conv(self.planes, 3, "conv2", self.stride, self.dilation)
        y = nn.relu(Norm(name="bn2")(middle(y), train))
        y = Norm(name="bn3")(_conv(4 * self.planes, 1, "conv3")(y), train)
        if self.project:
            x = _conv(4 * self.planes, 1, "downsample_0", self.stride)(x)
            x = Norm(name="downsample_1")(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A ResNet without its last layer.

    Attributes:
      width: Channels of the first layer; 64 for torchvision's.
      blocks: Of each stage.
      block: `BasicBlock` or `Bottleneck`.
      strides: Of the first block of each stage.
      dilations: Of each stage; its first block keeps half of it, where a stride became a dilation.
    """

    width: int
    blocks: tuple[int, ...]
    block: Any
    strides: tuple[int, ...] = (1, 2, 2, 2)
    dilations: tuple[int, ...] = (1, 1, 1, 1)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps (b, h, w, 3) to (b, h/s, w/s, 8 * width * expansion), s four times all strides."""
        x = nn.relu(Norm(name="bn1")(_conv(self.width, 7, "conv1", 2)(images), train))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, number in enumerate(self.blocks):
            planes = self.width * 2**stage
            for i in range(number):
                stride, dilation = 1, self.dilations[stage]
                if i == 0:
                    stride, dilation = self.strides[stage], max(dilation // 2, 1)
                project = stride != 1 or x.shape[-1] != planes * self.block.expansion
                name = f"layer{stage + 1}_{i}"
                x = self.block(planes, stride, dilation, project, name=name)(x, train)
        return x


def resnet18(
    width: int = 64, blocks: tuple[int, ...] = (2, 2, 2, 2), name: str | None = None
) -> ResNet:
    """Returns ResNet-18, or with other numbers of blocks its kin."""
    return ResNet(width, blocks, BasicBlock, name=name)


def dilated_resnet50(width: int = 64, blocks: tuple[int, ...] = (3, 4, 6, 3)) -> ResNet:
    """Returns ResNet-50 of output stride 8: the last two strides become dilations."""
    return ResNet(width, blocks, Bottleneck, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
