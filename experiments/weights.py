"""Weights of torchvision's ResNets from a local file."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]


def read_safetensors(path: Path) -> Arrays:
    """Returns the arrays of a safetensors file.

    Raises:
      ValueError: The file is of another form, or holds numbers that NumPy has not.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays: Arrays = load_file(path)
    except (SafetensorError, TypeError, AttributeError) as error:  # the latter: unknown numbers
        raise ValueError(
            f"expected a safetensors file of numbers that NumPy has in {path}, got one that "
            f"cannot be read ({error}); save it anew, in float32"
        ) from None
    return arrays


def read_pth(path: Path) -> Arrays:
    """Returns the arrays of a file of PyTorch, which has to be installed.

    Raises:
      ValueError: It is not.
    """
    try:
        import torch  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ValueError(
            f"expected PyTorch to read {path}, got no installation of it; convert the file to "
            "safetensors where PyTorch is: safetensors.torch.save_file(torch.load(path), new)"
        ) from None
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def read_weights(path: str | Path) -> Arrays:
    """Returns the arrays of a ``.safetensors`` file, or of a ``.pth`` file if PyTorch is there.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"expected weights in {path}, got no such file; correct --weights")
    readers = {".safetensors": read_safetensors, ".pth": read_pth, ".pt": read_pth}
    if path.suffix not in readers:
        raise ValueError(
            f"expected a file that ends in {', '.join(readers)}, got {path}; rename it if it is one"
        )
    return readers[path.suffix](path)


_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def _name_of(path: tuple[Any, ...]) -> str:
    """Returns torchvision's name of a parameter or a statistic of `resnet.ResNet`."""
    keys = [str(entry.key) for entry in path]
    *layers, last = keys
    if layers[-1] == "norm":
        layers = layers[:-1]
    suffix = "weight" if last == "kernel" else _NORM[last]
    # layer1_0 is layer1.0, downsample_0 is downsample.0.
    return ".".join([*(layer.replace("_", ".") for layer in layers), suffix])


def load_encoder(params: Any, stats: Any, arrays: Arrays, name: str) -> tuple[Any, Any]:
    """Returns parameters and statistics with those of the encoder replaced by weights of a file.

    Args:
      params: Of a network with a `resnet.ResNet` as ``encoder``.
      stats: Its running averages.
      arrays: By torchvision's names; ``fc`` is not used.
      name: Of the network that they have to be of, as torchvision calls it.

    Raises:
      ValueError: An array is missing or has another shape.
    """

    def filled(tree: Any) -> Any:
        def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
            layer = _name_of(path)
            if layer not in arrays:
                raise ValueError(
                    f"expected {layer} among the weights of torchvision's {name}, got "
                    f"{len(arrays)} others; use its state dict"
                )
            array = arrays[layer]
            if array.ndim == 4:  # out, in, height, width
                array = array.transpose(2, 3, 1, 0)
            if array.shape != x.shape:
                raise ValueError(
                    f"expected {layer} of shape {x.shape} (height, width, in, out), got "
                    f"{array.shape}; weights fit --width 64 and all layers only"
                )
            return jnp.asarray(array, x.dtype)

        return jax.tree.map_with_path(one, tree)

    return (
        params | {"encoder": filled(params["encoder"])},
        stats | {"encoder": filled(stats["encoder"])},
    )
