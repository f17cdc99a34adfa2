"""The weight files of a checkpoint, found and opened: one file or several shards, safetensors or ``.bin``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mambax.checkpoint.json_files import read_object
from mambax.checkpoint.safetensors_files import SafetensorsFile
from mambax.checkpoint.sources import Source, check_shard_name
from mambax.checkpoint.tensors import TensorFile

SAFETENSORS = "model.safetensors"


def _torch_file(path: Path) -> TensorFile:
    from mambax.checkpoint.torch_files import TorchFile  # with what reads archives and pickles

    return TorchFile(path)


KINDS: tuple[tuple[str, Callable[[Path], TensorFile]], ...] = (
    (SAFETENSORS, SafetensorsFile),
    ("pytorch_model.bin", _torch_file),
    ("consolidated.safetensors", SafetensorsFile),  # Mistral's
)
"""Names of weight files, in the order in which they are looked for."""


def open_weights(source: Source) -> dict[str, TensorFile]:
    """Find the weights of a checkpoint and check the headers of their files.

    Returns:
        Tensor name -> the file that has it.

    Raises:
        FileNotFoundError: when there are none, or a shard is missing.
        ValueError: for a damaged file, and for an index that does not fit its shards.
    """
    for name, reader in KINDS:
        if path := source.find(name):
            file = reader(path)
            return dict.fromkeys(file.tensors, file)
        if index := source.find(f"{name}.index.json"):
            return _open_shards(source, index, reader)
    names = " or ".join(name for name, _ in KINDS)
    raise FileNotFoundError(
        f"{source.name}: no weights; expected {names}, or one of them with .index.json and its shards; "
        f"{source.describe()}"
    )


def _open_shards(source: Source, index: Path, reader: Callable[[Path], TensorFile]) -> dict[str, TensorFile]:
    where = str(index)
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{where}: weight_map is missing; expected tensor names with their files")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        shards.setdefault(check_shard_name(shard, where), set()).add(tensor)
    opened: dict[str, TensorFile] = {}
    for shard, announced in sorted(shards.items()):
        path = source.find(shard)
        if path is None:
            raise FileNotFoundError(
                f"{source.name}: shard {shard} is missing, which the index announces; {source.describe()}; "
                "download the checkpoint again"
            )
        file = reader(path)
        if different := sorted(announced ^ file.tensors.keys()):
            side = "the index" if different[0] in announced else "the shard"
            raise ValueError(
                f"{path}: does not fit {index.name}: {different[0]!r} is in {side} alone; download both again"
            )
        opened |= dict.fromkeys(file.tensors, file)
    return opened
