"""One token through a stack of blocks of Mamba-1 or Mamba-2 on the CPU, where no gradient is wanted: in NumPy.

Between two operations MLX hands work to its own thread and waits for it, which for one token takes longer than
many of the operations. So the blocks are NumPy's, over the memory of MLX's weights: its fused step of the whole
stack for weights of floats, its blocks one after another for quantised ones.

Dimensions: B batch, M d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mambax.init import Initializer
from mambax.layer_states import LayerState
from mambax_mlx import cpu_affine, host, products
from mambax_mlx.layers import QuantizedLinear
from mambax_mlx.walking import same, walk

_OWN = ("mambax_mlx.layers", "mambax_mlx.models")
"""Where the definitions are that NumPy's blocks repeat."""


class _Twin(NamedTuple):
    """Blocks of the NumPy backend over the weights of MLX's.

    Attributes:
        blocks: NumPy's, or None where there are none that compute the same.
        modules: all modules of MLX's blocks.
        settings: what users set on them.
        addresses: of all their arrays.
        arrays: the arrays, so that no other can take their memory.
    """

    blocks: list[Any] | None
    modules: list[Any]
    settings: list[Any]
    addresses: list[int]
    arrays: list[mx.array]

    def __reduce__(self) -> Any:  # a copy of a model makes its own
        return type(None), ()

    def __deepcopy__(self, memo: Any) -> None:
        return None


def cpu_step(
    layers: Sequence[Any], hidden: mx.array, states: Sequence[Any]
) -> tuple[mx.array, tuple[Any, ...]] | None:
    """hidden (B, 1, M) through the blocks; None where a gradient may be wanted or not all are plain Mamba."""
    if not (host.no_gradients() and products.by_numpy()):
        return None
    if not host.computable(hidden, *(array for state in states for array in state)):
        return None
    blocks = _twin(layers).blocks
    if blocks is None:
        return None
    from mambax_numpy.step import decode_step

    given = host.values(hidden)
    before = [LayerState(*map(host.values, state)) for state in states]
    written: list[mx.array] = []

    def room(count: int, shape: tuple[int, ...]) -> list[np.ndarray]:
        """Memory of arrays of MLX's, which nobody else has yet."""
        written.extend(mx.zeros(shape) for _ in range(count))
        mx.eval(written)
        return [host.values(array) for array in written]

    stepped = decode_step(blocks, given, before, room)
    if stepped is not None:
        after = tuple(LayerState(_array(s.conv), ssm) for s, ssm in zip(stepped[1], written, strict=True))
        return _array(stepped[0]), after
    after = []
    for block, state in zip(blocks, before, strict=True):
        given, state = block(given, state)
        after.append(LayerState(*map(_array, state)))
    return _array(given), tuple(after)


def _array(x: np.ndarray) -> mx.array:
    """A copy as an array of MLX."""
    return mx.array(x.view(np.uint16)).view(mx.bfloat16) if x.dtype.name == "bfloat16" else mx.array(x)


def _twin(layers: Sequence[Any]) -> _Twin:
    """The twin of a stack, from the last token if neither its modules nor their arrays have changed."""
    modules, places = walk(layers)
    arrays = [module[name] for module, name in places]
    mx.eval(arrays)
    addresses = [np.frombuffer(memoryview(array), np.uint8).__array_interface__["data"][0] for array in arrays]
    found, settings = vars(layers[0]).get("_twin"), _settings(layers)
    unchanged = found is not None and found.addresses == addresses and same(found.modules, modules)
    if found is None or not unchanged or not same(found.settings, settings):
        blocks = [_block(layer) for layer in layers] if all(map(_is_plain, layers)) else None
        kept = [mx.stop_gradient(array) for array in arrays]  # which a change in place does not reach
        mx.eval(kept)
        found = _Twin(blocks, modules, settings, addresses, kept)
        object.__setattr__(layers[0], "_twin", found)
    return found


def _is_plain(layer: Any) -> bool:
    """Whether a block consists of the classes of this backend alone, and of nothing that was set beside them."""
    from mambax_mlx.models import Block, Mamba2Mixer, MambaMixer

    if type(layer) is not Block or type(layer.mixer) not in (MambaMixer, Mamba2Mixer):
        return False
    modules = walk([layer])[0]
    quantized = [module for module in modules if isinstance(module, QuantizedLinear)]
    return (
        layer.mixer.config.scan in ("auto", "cpu")
        and all(type(module).__module__ in _OWN for module in modules)
        and all(module.mode == "affine" and module.bits in cpu_affine.BITS for module in quantized)
    )


def _block(layer: Any) -> Any:
    """NumPy's block over the arrays of one of MLX's."""
    from mambax_numpy import models, module

    config, number = layer.mixer.config, layer.mixer.layer_idx
    mixer_cls = getattr(models, type(layer.mixer).__name__)
    block = models.Block(config, number, mixer_cls=mixer_cls, init=Initializer(None))
    for ours, theirs in ((block, layer), (block.norm, layer.norm), (block.mixer, layer.mixer)):
        for name in vars(ours).keys() & _own_settings(theirs).keys():
            setattr(ours, name, getattr(theirs, name))
    values = {f"norm.{key}": host.values(array) for key, array in layer.norm.items()}
    for name, part in layer.mixer.items():
        if isinstance(part, mx.array):
            setattr(block.mixer, name, host.values(part))
        elif isinstance(part, QuantizedLinear):
            bias, biases = part.get("bias"), part.biases
            assert biases is not None  # which affine packing always has
            matrix = cpu_affine.packed(part.weight, part.scales, biases, part.bits)
            linear = cpu_affine.AffineLinear(matrix, None if bias is None else host.values(bias))
            setattr(block.mixer, name, linear)
        else:
            values |= {f"mixer.{name}.{key}": host.values(array) for key, array in part.items()}
    module.set_parameters(block, values)
    return block


def _settings(layers: Sequence[Any]) -> list[Any]:
    """What users set on blocks, beside modules and arrays."""
    modules = [module for layer in layers for module in (layer, layer.get("norm"), layer.get("mixer"))]
    return [value for module in modules if module is not None for value in _own_settings(module).values()]


def _own_settings(module: Any) -> dict[str, Any]:
    """Of one module: MLX keeps modules and arrays elsewhere."""
    return {name: value for name, value in vars(module).items() if name[0] != "_"}
