"""Checkpoints of models that are spread over processes, and how they become whole.

In such a checkpoint, ``shards/`` has the weights and the moments of AdamW, as ``torch.distributed.checkpoint``
writes them from every process, and ``config.json`` and the tokenizer lie beside it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mambax.checkpoint.json_files import dump_object, read_object
from mambax.checkpoint.layouts import read_config, write_config
from mambax.checkpoint.loading import skeleton
from mambax.checkpoint.saving import describe
from mambax.checkpoint.sources import CONFIG
from mambax.registry import get_backend
from mambax.tokenizer import Tokenizer
from mambax.training.matching import check_arrays

SHARDS = "shards"


def gather_checkpoint(checkpoint: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Write the model in a sharded checkpoint of a run in Hugging Face layout, which every backend loads.

    Runs in one process, whatever the number of those that trained, and needs PyTorch. The whole model is in host
    memory meanwhile. What the shards hold is written as a pickle, which can run code when it is read: gather
    checkpoints of runs that you trust.

    Args:
        checkpoint: a folder ``step-<number>`` of a run with ``distributed="fsdp"``.
        folder: where to; made if need be. Files of an older checkpoint are replaced.

    Raises:
        FileNotFoundError: when it is not a sharded checkpoint.
        ImportError: without PyTorch.
        ValueError: when it is damaged.
        OSError: when a file cannot be written.
    """
    get_backend("torch")
    from mambax_torch.sharded import read_weights

    source = Path(checkpoint).expanduser()
    save_gathered(source, read_weights(source), Path(folder).expanduser())


def save_gathered(checkpoint: Path, weights: Mapping[str, np.ndarray], folder: Path) -> None:
    """Write weights, by path, with the configuration and the tokenizer of a sharded checkpoint.

    Raises:
        ValueError: for weights of another model, and those that are not finite.
        OSError: when a file cannot be written.
    """
    nn = get_backend("numpy")
    model = skeleton(nn, read_config(read_object(checkpoint / CONFIG), str(checkpoint / CONFIG)))
    check_arrays({name: tuple(array.shape) for name, array in nn.parameters(model).items()}, weights, "weights")
    nn.set_parameters(model, {name: nn.from_numpy(array) for name, array in weights.items()})
    if (checkpoint / "tokenizer.json").is_file():
        model.tokenizer = Tokenizer.from_pretrained(checkpoint)
    model.save_pretrained(folder)


def write_beside(model: Any, folder: Path) -> None:
    """Write the configuration and the tokenizer of a model, for :func:`save_gathered`."""
    (folder / CONFIG).write_bytes(dump_object(write_config(describe(model), "float32")))
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
