"""``mambax info``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mambax.checkpoint.json_files import read_object
from mambax.checkpoint.layouts import Description, read_config
from mambax.checkpoint.loading import packed_dtypes, skeleton, stored_shapes, with_layers
from mambax.checkpoint.matching import main_dtype, match, parameter_dtype
from mambax.checkpoint.sources import Folder, Source, find_config, open_source
from mambax.checkpoint.weights import open_weights
from mambax.cli.terminal import size
from mambax.families import named
from mambax.registry import get_backend

DTYPES = ("float32", "bfloat16")
FIELDS = (
    "d_model", "n_layer", "d_inner", "d_state", "d_conv", "dt_rank", "vocab_size", "tie_embeddings", "num_labels",
    "use_bias", "use_conv_bias", "norm_epsilon", "residual_in_fp32", "eos_token_id",
)  # fmt: skip


def info(name: str, revision: str | None, offline: bool) -> None:
    """Print what a checkpoint is. Reads its configuration and, in a folder, the headers of its weights.

    Args:
        name: a folder or a repository; of the latter, only small files are downloaded.
        revision: a branch, tag or commit of the repository.
        offline: use what was downloaded before, and no network.

    Raises:
        ValueError, OSError: as :func:`mambax.load` does.
    """
    from rich.console import Console

    source = open_source(name, revision=revision, local_files_only=offline)
    path = find_config(source)
    described = read_config(read_object(path), str(path))
    full = dataclasses.replace(described, quantization=None)
    shapes = _shapes(full)
    rows = _family(name, described) | _weights(source, described, shapes)
    rows |= {f"size in {dtype}": size(_bytes(shapes, dtype)) for dtype in DTYPES}
    rows |= {f"state per sequence, {dtype}": size(state_bytes(full, dtype)) for dtype in DTYPES}
    rows |= _tokenizer(source)
    out, width = Console(highlight=False, soft_wrap=True), max(map(len, rows))
    for label, value in rows.items():
        out.print(f"{label:<{width}}", style="dim", end="  ")
        out.print(value, markup=False)


def state_bytes(described: Description, dtype: str) -> int:
    """Bytes of the state of one sequence before its first token, the past of the convolutions in the dtype."""
    arrays = skeleton(get_backend("numpy"), described).init_state(1).arrays()
    narrow = parameter_dtype("", dtype).itemsize
    return sum(array.size * (narrow if ".conv" in name else array.itemsize) for name, array in arrays.items())


def _shapes(described: Description) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, from placeholders that hold no values."""
    nn = get_backend("numpy")
    return {name: tuple(array.shape) for name, array in nn.parameters(skeleton(nn, described)).items()}


def _bytes(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    return sum(math.prod(shape) * parameter_dtype(name, dtype).itemsize for name, shape in shapes.items())


def _family(name: str, described: Description) -> dict[str, str]:
    config = described.config
    rows = {"checkpoint": name, "family": named(str(config.family)).title, "architecture": described.architecture}
    rows["layout"] = "original (state-spaces)" if described.original else "Hugging Face"
    return rows | {field: str(getattr(config, field)) for field in FIELDS if hasattr(config, field)}


def _weights(source: Source, described: Description, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What the files hold; their headers are checked against the configuration."""
    count = sum(math.prod(shape) for shape in shapes.values())
    rows = {"parameters": f"{count:,}"}
    if not isinstance(source, Folder):
        return rows | {"weights": "not looked at: they would have to be downloaded"}
    tensors = open_weights(source)
    described = with_layers(described, tensors)
    packed = packed_dtypes(described)
    found, _ = match(tensors, stored_shapes(described, source.name), described, source.name, packed)
    files = {Path(file.path) for file in tensors.values()}
    dtype = main_dtype((item.parameter, item.info.dtype) for item in found if item.parameter not in packed)
    if described.quantization is not None:
        kind = described.quantization
        dtype = f"{kind[0] if isinstance(kind, tuple) else kind} and {dtype}"
    names = ", ".join(sorted(path.name for path in files))
    total = sum(path.stat().st_size for path in files)
    return rows | {"weights": f"{names}, {dtype}, {size(total)}; names and shapes fit the configuration"}


def _tokenizer(source: Source) -> dict[str, str]:
    from mambax.checkpoint.loading import ORIGINAL_TOKENIZER
    from mambax.tokenizer import Tokenizer
    from mambax.tokenizer_files import FILES

    paths = [source.find(file) for file in FILES if "*" not in file]
    if paths[0] is None:
        return {"tokenizer": f"none here (the original models use that of {ORIGINAL_TOKENIZER})"}
    tokenizer = Tokenizer.from_pretrained(paths[0].parent)
    special: dict[str, Any] = tokenizer.special_tokens
    names = ", ".join(f"{role.removesuffix('_token')} {token!r}" for role, token in special.items())
    template = "yes" if tokenizer.chat_template is not None else "none"
    return {
        "tokenizer": f"{tokenizer.vocab_size:,} tokens{', ' + names if names else ''}",
        "chat template": template,
    }
