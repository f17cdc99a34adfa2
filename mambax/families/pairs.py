"""What hybrids with a Llama-like layout share: a layer of theirs is two blocks here, a mixer and an MLP.

Names of tensors are ``model.layers.<i>.<mixer>...`` and ``model.layers.<i>.<norm>...``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mambax.config import MambaLMConfig
from mambax.families.translation import refuse
from mambax.options import AttentionOptions

_INSIDE = re.compile(r"backbone\.layers\.(\d+)\.(norm|mixer)\.(.+)")
_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
"""What ``rope_parameters`` of the default rotary embedding may have."""
_OTHERWISE = "Use a checkpoint without scaled positions; without the field, the numbers would be others"
"""What is to be done about a rotary embedding that is not implemented."""
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.([a-z_]+)\.(.+)")


@dataclass(frozen=True)
class LayerPairs:
    """The names of such a family.

    Args:
        mixers: kind of mixer -> its name in a layer; empty where the parts of a mixer stand in the layer itself.
        norms: names of the norms before the mixer and before the MLP.
        final_norm: name of the last norm of the model.
    """

    mixers: Mapping[str, str]
    norms: tuple[str, str]
    final_norm: str

    def to_parameter(self, name: str, config: MambaLMConfig) -> str:
        """The path inside mambax of a tensor that a checkpoint calls ``name``."""
        named = _LAYER.fullmatch(name)
        if named is None:
            return {theirs: ours for ours, theirs in self._outside().items()}.get(name, name)
        layer, first, inside = int(named[1]), named[2], named[3]
        if first in self.norms:
            return f"backbone.layers.{2 * layer + self.norms.index(first)}.norm.{inside}"
        kinds = config.layer_kinds[2 * layer : 2 * layer + 2]
        for i, kind in enumerate(kinds):
            if self.mixers[kind] == first:
                return f"backbone.layers.{2 * layer + i}.mixer.{inside}"
        for i, kind in enumerate(kinds):
            if not self.mixers[kind]:
                return f"backbone.layers.{2 * layer + i}.mixer.{first}.{inside}"
        return name

    def to_checkpoint(self, parameter: str, config: MambaLMConfig) -> str:
        """The name in a checkpoint of the parameter at this path."""
        named = _INSIDE.fullmatch(parameter)
        if named is None:
            return self._outside().get(parameter, parameter)
        block, part, inside = int(named[1]), named[2], named[3]
        first = self.mixers[config.layer_kinds[block]] if part == "mixer" else self.norms[block % 2]
        return ".".join(filter(None, (f"model.layers.{block // 2}", first, inside)))

    def _outside(self) -> dict[str, str]:
        return {
            "backbone.embeddings.weight": "model.embed_tokens.weight",
            "backbone.norm_f.weight": f"model.{self.final_norm}.weight",
        }


def whole_numbers(raw: Mapping[str, Any], defaults: Mapping[str, int], where: str) -> dict[str, int]:
    """Whole numbers of a file, with what transformers takes where the file says nothing.

    Where it says ``null`` of the heads of keys and values, they are as many as those of the queries.

    Raises:
        ValueError: for one that is none, or out of range.
    """
    found = {name: default if raw.get(name) is None else raw[name] for name, default in defaults.items()}
    if "num_key_value_heads" in found and raw.get("num_key_value_heads", 0) is None:
        found["num_key_value_heads"] = found["num_attention_heads"]
    for name, value in found.items():
        low = 0 if name.endswith(("_offset", "_experts")) else 1
        if type(value) is not int or not low <= value <= 2**24:
            raise ValueError(f"{where}: {name} is {value!r}; expected a whole number from {low} to {2**24}")
    return found


def head_dim(raw: Mapping[str, Any], d_model: Any, heads: int, where: str) -> int:
    """Channels of an attention head: ``head_dim``, or the model's width divided by the heads where it is missing.

    Raises:
        ValueError: for one that is no whole number, and when it is missing and the heads do not divide the width.
    """
    width = raw.get("head_dim")
    if width is not None:
        if type(width) is not int or not 1 <= width <= 2**16:
            raise ValueError(f"{where}: head_dim is {width!r}; expected a whole number from 1 to {2**16}")
        return width
    if type(d_model) is not int or d_model < 1 or d_model % heads:
        raise ValueError(f"{where}: hidden_size is {d_model!r}; expected a multiple of num_attention_heads {heads}")
    return d_model // heads


def write_head_dim(attention: AttentionOptions, d_model: int) -> dict[str, int]:
    """The field that :func:`head_dim` reads, where it is not what follows from the others."""
    follows = attention.n_heads * attention.head_dim == d_model
    return {} if follows else {"head_dim": attention.head_dim}


def rope_theta(raw: Mapping[str, Any], where: str, fraction: float = 1.0) -> float:
    """The base of the rotary embedding, as old and new files spell it.

    Args:
        raw: the file.
        where: its path.
        fraction: of the channels of a head, those that turn: that of the family, and the only one it may have.

    Raises:
        ValueError: for a scaling of positions, another fraction, or an embedding for each kind of layer, which are
            not supported.
    """
    parameters = raw.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"{where}: rope_parameters is {str(parameters)[:80]}; expected an object")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    scaling = raw.get("rope_scaling")
    if kind != "default" or scaling:
        found = f"rope_type {kind!r}" if kind != "default" else f"rope_scaling {str(scaling)[:80]}"
        raise ValueError(f"{where}: {found} is not supported; only the default rotary embedding is. {_OTHERWISE}")
    unknown = sorted(parameters.keys() - _ROPE)
    if unknown:
        names = ", ".join(unknown)[:200]
        raise ValueError(
            f"{where}: rope_parameters with {names} is not supported; only the default rotary one is. {_OTHERWISE}"
        )
    turned = (1.0, 1) if fraction == 1 else (fraction,)
    refuse(parameters, {"partial_rotary_factor": turned}, f"{where}: rope_parameters")
    theta = parameters.get("rope_theta", raw.get("rope_theta", 10000.0))
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not theta >= 1:
        raise ValueError(f"{where}: rope_theta is {theta!r}; expected a number from 1")
    return float(theta)
