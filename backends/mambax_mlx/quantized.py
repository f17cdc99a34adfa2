"""A model whose large layers have quantised weights, packed as MLX and mlx-lm do it; see :mod:`mambax.affine`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from mambax import affine, quantization
from mambax.affine import Affine, Packing
from mambax.models import MambaForCausalLM
from mambax_mlx import repacking
from mambax_mlx.host import values
from mambax_mlx.layers import Embedding, Linear, QuantizedEmbedding, QuantizedLinear


def quantize(model: Any, kind: str | int | Affine, group_size: int = 32) -> Any:
    """Replace the large layers of a model by quantised ones, in place; of placeholders by placeholders.

    Args:
        model: any model of this backend. The layers that are named in :data:`mambax.quantization.LAYERS` are
            replaced, and the table of embeddings where it is the head; those that the group does not divide stay.
        kind: bits of a weight, 2, 3, 4, 6 or 8, chosen by ``mlx.core.quantize``; x_proj, which gives delta, B and
            C, has 8. Or ``"int4"`` or ``"int8"`` for exactly the weights of the other backends, see
            :mod:`mambax.quantization`; these need widths that are multiples of the group. Or which layers are to be
            packed how, for placeholders.
        group_size: inputs to a scale: 32, 64 or 128; of ``"int4"`` 32 or 64.

    Returns:
        The model.

    Raises:
        ValueError: for another kind or group size, weights that are not finite, and when there is nothing to
            replace. The model is then as it was.
    """
    if isinstance(kind, Affine):
        layers = dict(model.named_modules())
        return _replaced(model, {path: _empty(layers[path], own) for path, own in kind.layers.items()})
    if isinstance(kind, str):
        quantization.check_kind(kind, group_size)
    else:
        affine.packing(kind, group_size)
    found = dict(_layers(model))
    quantization.check_layers({path: values(layer.weight) for path, layer in found.items()})
    new = {}
    for path, layer in found.items():
        own = _packing(path, layer.weight.shape[1], kind, group_size)
        if own is not None:
            empty = quantization.is_placeholder(values(layer.weight))
            new[path] = _empty(layer, own) if empty else _over(layer, own, _arrays(layer, path, kind, own))
    if not new:
        raise ValueError(f"quantize: no layer has a width that is a multiple of the group, {group_size}")
    return _replaced(model, new)


def why_not_quantized(device: str) -> str:
    """See :meth:`mambax.backend.Backend.why_not_quantized`."""
    return ""


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every layer to replace."""
    causal: type[Any] = MambaForCausalLM
    tied = isinstance(model, causal) and model.lm_head is None
    for path, layer in model.named_modules():
        name = path.rpartition(".")[2]
        if (isinstance(layer, Linear) and name in quantization.LAYERS) or (tied and isinstance(layer, Embedding)):
            yield path, layer


def _packing(path: str, inputs: int, kind: str | int, group_size: int) -> Packing | None:
    """How a layer is packed; None where it stays as it is."""
    name = path.rpartition(".")[2]
    if isinstance(kind, int):
        return None if inputs % group_size else Packing(8 if name == "x_proj" else kind, group_size)
    own = repacking.packing_of(quantization.kind_of(name, kind), inputs, group_size)
    if own is None:
        raise ValueError(
            f"quantize={kind!r}: {path} has {inputs} inputs, which is no multiple of the group, {group_size}; MLX "
            f"cannot hold it. Use quantize={kind.removeprefix('int')}, which leaves such layers as they are"
        )
    return own


def _arrays(layer: Any, path: str, kind: str | int, own: Packing) -> dict[str, mx.array]:
    """The arrays that take the place of the weight."""
    if isinstance(kind, str):
        name = path.rpartition(".")[2]
        size = own.group_size if own.bits == 4 else quantization.GROUP_SIZES[0]
        matrix = quantization.quantize(values(layer.weight), quantization.kind_of(name, kind), size)
        return repacking.packed(matrix, own)
    parts = mx.quantize(layer.weight, group_size=own.group_size, bits=own.bits)
    return dict(zip(("weight", "scales", "biases"), parts, strict=True))


def _empty(layer: Any, own: Packing) -> Any:
    """A layer over placeholders."""
    arrays: dict[str, Any] = {
        name: mx.broadcast_to(mx.zeros((), mx.uint32) if name == "weight" else mx.array(float("nan")), shape)
        for name, shape in own.shapes(*layer.weight.shape).items()
    }
    return _over(layer, own, arrays)


def _over(layer: Any, own: Packing, arrays: dict[str, mx.array]) -> Any:
    """The quantised layer in place of one."""
    format_ = {**own._asdict(), "mode": "affine"}
    if isinstance(layer, Linear):
        return QuantizedLinear(**arrays, bias=layer.get("bias"), format_=format_)
    return QuantizedEmbedding(**arrays, format_=format_)


def _replaced(model: Any, layers: dict[str, Any]) -> Any:
    model.update_modules(tree_unflatten(list(layers.items())))
    return model
