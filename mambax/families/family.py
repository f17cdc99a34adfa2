"""What a family of checkpoints is to mambax: a translation of its ``config.json``, and the names of its weights.

A family says nothing about computing: the mixers that its models are made of are named by ``config.layer_types``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mambax.config import MambaLMConfig

CAUSAL_LM = "MambaForCausalLM"
CLASSIFIER = "MambaForSequenceClassification"
ENCODER = "MambaModel"


@dataclass(frozen=True)
class Fields:
    """What a ``config.json`` says, in mambax's words.

    Args:
        values: configuration field -> value.
        spelled: configuration field -> its name in the file, for messages.
    """

    values: dict[str, Any]
    spelled: dict[str, str] = field(default_factory=dict)


def _same_name(name: str, config: MambaLMConfig) -> str:
    return name


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Args:
        name: what ``config.family`` says.
        title: what people call it.
        architectures: names found in ``architectures`` -> :data:`CAUSAL_LM`, :data:`CLASSIFIER` or
            :data:`ENCODER`. The first name of each is the one that is written.
        matches: whether a ``config.json`` (already parsed) is of this family.
        read: the fields of a ``config.json``, given its path for messages. Raises a ValueError for what would
            change the numbers and is not supported.
        write: the ``config.json`` of a configuration: what transformers opens, without what every family has.
        to_parameter: the path inside mambax of a tensor, from its name in a checkpoint.
        to_checkpoint: the name in a checkpoint that is written, from the path inside mambax.
        original: whether it is the layout of the original package: its tokenizer is named nowhere, and its
            weights are written in Hugging Face's layout, by ``written_as``, where transformers has such a model.
        folded_by_mlx_lm: whether mlx-lm multiplies factors of the ``config.json`` into the weights that it writes,
            and leaves the factors in it: such files are refused. They are known by their convolutions, whose
            weights lie otherwise.
        written_as: name of the family as which models of this one are written; itself when empty.
    """

    name: str
    title: str
    architectures: Mapping[str, str]
    matches: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any], str], Fields]
    write: Callable[[MambaLMConfig], dict[str, Any]]
    to_parameter: Callable[[str, MambaLMConfig], str] = _same_name
    to_checkpoint: Callable[[str, MambaLMConfig], str] = _same_name
    original: bool = False
    written_as: str = ""
    folded_by_mlx_lm: bool = False

    def written_architecture(self, architecture: str) -> str:
        """The name in ``architectures`` of one of ours.

        Raises:
            ValueError: when the family has no such model.
        """
        for name, ours in self.architectures.items():
            if ours == architecture:
                return name
        raise ValueError(f"a {self.title} checkpoint holds no {architecture}; expected a causal language model")
