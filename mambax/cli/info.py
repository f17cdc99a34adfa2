"""``mambax info``."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mambax import tokenizer_files
from mambax.checkpoint.json_files import read_object
from mambax.checkpoint.layouts import Description, read_config
from mambax.checkpoint.loading import packed_dtypes, skeleton, stored_shapes, with_layers
from mambax.checkpoint.matching import main_dtype, match, parameter_dtype
from mambax.checkpoint.sources import Folder, Source, find_config, open_source
from mambax.checkpoint.weights import open_weights
from mambax.cli.terminal import size
from mambax.config import SELECTIVE
from mambax.families import named
from mambax.generation import PREFILL_CHUNK
from mambax.registry import get_backend

DTYPES = ("float32", "bfloat16")
FIELDS = ("d_model", "n_layer", "vocab_size", "tie_embeddings", "num_labels", "norm_epsilon", "eos_token_id")
MAMBA_FIELDS = ("d_inner", "d_state", "d_conv", "dt_rank", "use_bias", "use_conv_bias")
"""Sizes of the mixers of Mamba-1, which a model without them has too, and which mean nothing there."""

_OTHER_FORMS = re.compile(r"token|^vocab\.|^merges\.txt$|^spiece\.model$")
"""In the names of the files of a tokenizer."""


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
    rows |= {f"KV cache per token, {dtype}": size(kv_bytes(full, dtype)) for dtype in DTYPES}
    rows |= {f"memory to run, {dtype}": _memory(full, shapes, dtype) for dtype in DTYPES}
    rows |= _tokenizer(source, described)
    out, width = Console(highlight=False, soft_wrap=True), max(map(len, rows))
    for label, value in rows.items():
        out.print(f"{label:<{width}}", style="dim", end="  ")
        out.print(value, markup=False)


def state_bytes(described: Description, dtype: str) -> int:
    """Bytes of the state of one sequence before its first token, the past of the convolutions in the dtype."""
    arrays = _state(described)
    return sum(array.size * _state_itemsize(name, array, dtype) for name, array in arrays.items())


def kv_bytes(described: Description, dtype: str) -> int:
    """Bytes by which the state of one sequence grows with each token it reads; 0 without attention."""
    growing = [(name, array) for name, array in _state(described).items() if 0 in array.shape]
    return sum(
        math.prod(n for n in array.shape if n) * _state_itemsize(name, array, dtype) for name, array in growing
    )


def memory_bytes(described: Description, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    """An estimate of the bytes that a model needs for one sequence, beside those of its framework.

    The weights, the state, and the arrays of a chunk of the prompt in the widest block: twice what its linear
    layers give, in float32.
    """
    widths: dict[str, int] = {}
    for name, shape in shapes.items():
        block = re.search(r"layers\.\d+\.", name)
        if block and len(shape) == 2 and name.endswith("weight"):
            widths[block[0]] = widths.get(block[0], 0) + shape[0]
    working = PREFILL_CHUNK * 4 * (2 * max(widths.values()) + 4 * described.config.d_model)
    return _bytes(shapes, dtype) + state_bytes(described, dtype) + working


def _memory(described: Description, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> str:
    growth = kv_bytes(described, dtype)
    more = f", and {size(growth)} for each token" if growth else ""
    return f"about {size(memory_bytes(described, shapes, dtype))}{more}"


def _state(described: Description) -> dict[str, Any]:
    return skeleton(get_backend("numpy"), described).init_state(1).arrays()


def _state_itemsize(name: str, array: Any, dtype: str) -> int:
    """Bytes of a number of a state: what the recurrence keeps is float32 whatever the weights are."""
    follows = name.split(".")[-1] in ("conv_state", "key_state", "value_state")
    return parameter_dtype("", dtype).itemsize if follows else array.itemsize


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
    rows |= {field: str(getattr(config, field)) for field in FIELDS if hasattr(config, field)}
    kinds = Counter(config.layer_kinds)
    rows["layers"] = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    if not SELECTIVE.isdisjoint(kinds):
        rows |= {field: str(getattr(config, field)) for field in MAMBA_FIELDS}
    for name, options in vars(config).items():
        if dataclasses.is_dataclass(options):
            rows |= _options(name, options)
    return rows


def _options(name: str, options: Any) -> dict[str, str]:
    """The fields of some options that are not their defaults, those of options inside them included."""
    rows: dict[str, str] = {}
    for field in dataclasses.fields(options):
        value, path = getattr(options, field.name), f"{name}.{field.name}"
        if dataclasses.is_dataclass(value):
            rows |= _options(path, value)
        elif value != field.default:
            rows[path] = _brief(value)
    return rows


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


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


def _tokenizer(source: Source, described: Description) -> dict[str, str]:
    from mambax.checkpoint.loading import ORIGINAL_TOKENIZER
    from mambax.tokenizer import Tokenizer

    folder = tokenizer_files.find(source)
    if folder is None:
        own = f" (the original models use that of {ORIGINAL_TOKENIZER})" if described.original else ""
        return {"tokenizer": f"none here{_other_files(source)}{own}"}
    tokenizer = Tokenizer.from_pretrained(folder)
    special: dict[str, Any] = tokenizer.special_tokens
    names = ", ".join(f"{role.removesuffix('_token')} {token!r}" for role, token in special.items())
    template = "yes" if tokenizer.chat_template is not None else "none"
    known = described.config.vocab_size
    beyond = f", more than the {known:,} that the model knows" if tokenizer.vocab_size > known else ""
    return {
        "tokenizer": f"{tokenizer.vocab_size:,} tokens{beyond}{', ' + names if names else ''}",
        "chat template": template,
    }


def _other_files(source: Source) -> str:
    """Files of a tokenizer in another form, as transformers writes those that have no tokenizer.json."""
    if not isinstance(source, Folder):
        return ""
    found = sorted(path.name for path in source.path.glob("*") if _OTHER_FORMS.search(path.name))
    if not found:
        return ""
    return f" that mambax reads: expected {tokenizer_files.VOCABULARIES[0]}, found {', '.join(found)}"
