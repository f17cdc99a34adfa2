"""From checkpoint files to a model on a backend."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from mambax import scan as scans
from mambax import tokenizer_files
from mambax.affine import Affine
from mambax.backend import Backend
from mambax.checkpoint.json_files import read_object
from mambax.checkpoint.layouts import CLASSIFIER, ENCODER, Description, parameter_name, read_config
from mambax.checkpoint.mapping import Mappings
from mambax.checkpoint.matching import TABLE, Found, main_dtype, match, parameter_dtype
from mambax.checkpoint.sources import Source, find_config, open_source
from mambax.checkpoint.tensors import FLOATS, is_finite
from mambax.checkpoint.weights import open_weights
from mambax.config import SELECTIVE, MambaConfig
from mambax.init import Initializer
from mambax.registry import choose_backend, choose_device, get_backend
from mambax.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all)."""

ORIGINAL_TOKENIZER = "EleutherAI/gpt-neox-20b"
_ORIGINAL_VOCABULARY = range(50277, 50433)  # its 50277 tokens, padded to a multiple of 128 at most

_log = logging.getLogger("mambax")


def load(
    repo_or_folder: str | os.PathLike[str],
    *,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    scan: str = "auto",
    quantize: str | int | None = None,
    group_size: int = 32,
    progress: Progress | None = None,
) -> Any:
    """Load a model with its weights and tokenizer.

    Takes Hugging Face's layout and the original package's, safetensors and ``pytorch_model.bin``, in one file or
    several. All names, shapes and dtypes are checked before a weight is read, and nothing in a file is run.

    Args:
        repo_or_folder: a local folder, or a repository ``"owner/name"`` on the Hugging Face hub, of which only the
            files that are needed are downloaded.
        backend: name of a backend. When None, the best installed for this machine, which is then named on stderr.
        device: name of a device of the backend; when None, the first of its ``devices()``.
        dtype: ``"float32"``, ``"float16"``, ``"bfloat16"`` or ``"float64"``; what the checkpoint has when None.
            ``A_log``, ``D`` and ``dt_proj.bias`` are float32 at least, whatever it is.
        revision: a branch, a tag or a commit of the repository.
        local_files_only: use what has been downloaded before, and no network.
        scan: name of the implementation of the scan: of the selective scan, or of ``ssd`` for Mamba-2.
        quantize: ``"int8"`` or ``"int4"`` to quantise the large layers; see :mod:`mambax.quantization`. On the
            numpy backend, on torch on the CPU and on CUDA, and on mlx, which packs the same weights in its own way.
            On mlx also 2, 3, 4, 6 or 8: bits of a weight as MLX and mlx-lm choose it; see :mod:`mambax.affine`. A
            checkpoint that was saved quantised is loaded so without it; MLX's packing on mlx alone.
        group_size: inputs to a scale: of ``"int4"`` 32 or 64, of MLX's weights 32, 64 or 128.
        progress: called with (bytes read, bytes in all).

    Returns:
        The backend's ``MambaForCausalLM``, ``MambaForSequenceClassification`` or ``MambaForFeatureExtraction``, as
        the checkpoint says, with ``model.tokenizer`` set, or None when there is no tokenizer.

    Raises:
        ValueError: for files that are damaged, unsupported or do not fit each other, and weights that are not
            finite; for an unknown backend, device, dtype, scan or quantize, and for one that does not run there.
        ImportError: when the backend's framework is not installed.
        FileNotFoundError: when there is no such folder or repository, or a file of it is missing.
        ConnectionError: when the hub cannot be reached.
    """
    nn = choose_backend(backend)
    device = choose_device(nn, device)
    if backend is None:
        print(f"mambax: using the {nn.name} backend on {device}; backend=... names another", file=sys.stderr)
    if dtype is not None:
        _check_dtype(nn, dtype)

    source = open_source(repo_or_folder, revision=revision, local_files_only=local_files_only)
    described = _describe(source, scan)
    _check_scan(nn, described.config)
    if quantize is not None:
        _check_quantize(nn, described, quantize, group_size, source.name)
    if (quantize is not None or described.quantization is not None) and (reason := nn.why_not_quantized(device)):
        raise ValueError(
            f"{source.name}: quantised weights cannot run on {device!r}: {reason}. Load with device='cpu'"
        )
    tensors = open_weights(source)
    described = with_layers(described, tensors)
    model = skeleton(nn, described)
    packed = packed_dtypes(described)
    if described.quantization is None:
        expected = {name: tuple(array.shape) for name, array in nn.parameters(model).items()}
    else:
        expected = stored_shapes(described, source.name)
    found, repeats = match(tensors, expected, described, source.name, packed)
    if dtype is None:
        dtype = main_dtype((item.parameter, item.info.dtype) for item in found if item.parameter not in packed)
        _check_dtype(nn, dtype)
    quantizes = quantize is not None and described.quantization is None
    in_place = not quantizes and _shares_memory(nn, device)
    aside = quantizes and device.partition(":")[0] == "cuda"  # whose memory may not hold the full weights
    first = "cpu" if aside else device
    model.mappings = _set_weights(nn, model, found, repeats, dtype, packed, first, in_place, progress)
    if quantizes:
        nn.quantize(model, quantize, group_size)
    if aside:
        _move(nn, model, device)
    if "backbone.embeddings.scales" in packed and nn.name != "mlx":  # what the vectors of a quantised table are in
        model.backbone.embeddings.dtype = nn.dtype(dtype)
    model.tokenizer = _tokenizer(source, described, local_files_only)
    return model


def skeleton(nn: Backend, described: Description) -> Any:
    """The model that a ``config.json`` describes, with placeholders for its weights."""
    model = _full_skeleton(nn, described)
    if described.quantization is None:
        return model
    if isinstance(described.quantization, Affine):
        return nn.quantize(model, described.quantization)
    return nn.quantize(model, *described.quantization)


def with_layers(described: Description, tensors: Iterable[str]) -> Description:
    """The description with the layers that are packed as MLX does it, which the names of the tensors tell."""
    if not isinstance(described.quantization, Affine):
        return described
    names = [parameter_name(name, described) for name in tensors]
    paths = [name.removesuffix(".scales") for name in names if name.endswith(".scales")]
    return dataclasses.replace(described, quantization=described.quantization.of(paths))


def stored_shapes(described: Description, where: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of a model as a checkpoint has them.

    Raises:
        ValueError: for a layer that cannot be packed as the files say.
    """
    reference, packing = get_backend("numpy"), described.quantization
    model = _full_skeleton(reference, described) if isinstance(packing, Affine) else skeleton(reference, described)
    shapes = {name: tuple(array.shape) for name, array in reference.parameters(model).items()}
    return packing.shapes(shapes, where) if isinstance(packing, Affine) else shapes


def packed_dtypes(described: Description) -> dict[str, np.dtype]:
    """The dtypes of the parameters of quantised layers, by path; empty for a model that is not quantised."""
    if described.quantization is None:
        return {}
    if isinstance(described.quantization, Affine):
        return {f"{path}.weight": np.dtype(np.uint32) for path in described.quantization.layers}
    arrays = get_backend("numpy").parameters(skeleton(get_backend("numpy"), described))
    layers = [name.removesuffix("scales") for name in arrays if name.endswith(".scales")]
    return {layer + part: arrays[layer + part].dtype for layer in layers for part in ("weight", "scales")}


def _full_skeleton(nn: Backend, described: Description) -> Any:
    if described.architecture == CLASSIFIER:
        return nn.MambaForSequenceClassification(described.config, init=Initializer(None))
    if described.architecture == ENCODER:
        return nn.MambaForFeatureExtraction(described.config, pooling=described.pooling, init=Initializer(None))
    return nn.MambaForCausalLM(described.config, init=Initializer(None))


def _check_quantize(nn: Backend, described: Description, kind: str | int, group_size: int, where: str) -> None:
    """Refuse, before any weight is read, what could not be quantised."""
    nn.quantize(_full_skeleton(nn, described), kind, group_size)
    found = described.quantization
    if found is not None and found != (kind, group_size):
        how = f"{found[0]!r} in groups of {found[1]}" if isinstance(found, tuple) else str(found)
        raise ValueError(
            f"{where}: quantize is {kind!r} in groups of {group_size}, but the checkpoint is quantised already: "
            f"{how}; load it without quantize"
        )


def _check_dtype(nn: Backend, dtype: str) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(map(repr, FLOATS))}, or None")
    nn.dtype(dtype)  # raises where the framework does not have it


def _check_scan(nn: Backend, config: MambaConfig) -> None:
    """Refuse a scan that the mixers of a model do not have, or that cannot run here."""
    if config.mamba2 is None or not SELECTIVE.isdisjoint(config.layer_kinds):
        scans.choose(config.scan, "auto", nn.scan_implementations())
    if config.mamba2 is not None:
        scans.choose(config.scan, "auto", nn.ssd_implementations())


def _describe(source: Source, scan: str) -> Description:
    path = find_config(source)
    described = read_config(read_object(path), str(path))
    return dataclasses.replace(described, config=dataclasses.replace(described.config, scan=scan))


def _set_weights(
    nn: Backend,
    model: Any,
    found: list[Found],
    repeats: list[Found],
    dtype: str,
    packed: Mapping[str, np.dtype],
    device: str,
    in_place: bool,
    progress: Progress | None,
) -> Mappings:
    """Take one tensor after another, the largest first; those that may be used in place, in their file.

    A framework may copy a tensor when it takes it over; taken in this order, the copy comes on top of the least, so
    that the memory needed is hardly more than the weights'.

    Returns:
        The files that are used in place.
    """
    total = sum(item.info.nbytes for item in found)
    done = 0
    for repeat in repeats:
        _check_tied(next(item for item in found if item.parameter == repeat.parameter), repeat)
    values = {}
    for item in found:
        wanted = packed.get(item.parameter) or parameter_dtype(item.parameter, dtype, item.info.dtype)
        array = _converted(item, wanted, in_place)
        values[item.parameter] = nn.from_numpy(array, device=device)
        del array
        nn.evaluate(values[item.parameter])
        done += item.info.nbytes
        if progress is not None:
            progress(done, total)
    nn.set_parameters(model, values)
    mappings = Mappings({item.file.mapped: None for item in found if item.file.mapped is not None})
    mappings.check()  # that what was checked is what they hold
    return mappings


def _move(nn: Backend, model: Any, device: str) -> None:
    """Bring all that a model holds to a device, one array after another."""
    for name, array in nn.parameters(model).items():
        nn.set_parameters(model, {name: nn.from_numpy(nn.to_numpy(array), device=device)})


def _shares_memory(nn: Backend, device: str) -> bool:
    """Whether arrays on a device lie where NumPy's do, so that weights in a file can be used in place."""
    probe = np.zeros(1, np.float32)
    return np.shares_memory(probe, nn.to_numpy(nn.from_numpy(probe, device=device)))


def _converted(item: Found, dtype: np.dtype, in_place: bool) -> np.ndarray:
    """The values of a parameter in a dtype, all of them finite; in its file where they may and need no change."""
    array = item.view() if in_place and item.info.dtype == dtype else item.read()
    if array.dtype not in FLOATS.values():
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(dtype, copy=False)
    if is_finite(converted):
        return converted
    if is_finite(array):
        raise ValueError(
            f"{item.file.path}: {item.name} has values too large for {dtype.name} "
            f"(up to {np.abs(array).max():g}); load with dtype='bfloat16' or 'float32'"
        )
    raise ValueError(
        f"{item.file.path}: {item.name} has weights that are NaN or infinite; training went wrong, or the file is "
        "damaged: download it again, or go back to an earlier checkpoint"
    )


def _check_tied(first: Found, repeat: Found) -> None:
    """A tensor that is stored although it is a parameter that is stored already must be equal to it.

    Digests are compared, so that the two largest tensors of a model are not in memory together.
    """
    import hashlib  # with OpenSSL, megabytes that are seldom needed

    digests = {hashlib.blake2b(item.read().reshape(-1).view(np.uint8).data).digest() for item in (first, repeat)}
    if len(digests) == 1 and first.info == repeat.info:
        return
    why = "they are one block at two places; download the checkpoint again"
    if first.parameter == TABLE:
        why = (
            "the head is the table of embeddings; if it is not, set tie_word_embeddings (tie_embeddings) to false "
            "in config.json"
        )
    raise ValueError(
        f"{repeat.file.path}: {repeat.name} differs from {first.name}, but config.json says that {why}"
    )


def _tokenizer(source: Source, described: Description, local_files_only: bool) -> Tokenizer | None:
    """The tokenizer among the files, or the one that the original models were trained with."""
    if (own := _tokenizer_files(source)) is not None:
        return own
    hint = "To give it text, set model.tokenizer = mambax.Tokenizer.from_pretrained(folder)"
    if not (described.original and described.config.vocab_size in _ORIGINAL_VOCABULARY):
        _log.info("mambax: %s has no tokenizer; the model takes token ids. %s", source.name, hint)
        return None
    shared = open_source(ORIGINAL_TOKENIZER, local_files_only=local_files_only)
    try:
        found, problem = _tokenizer_files(shared), shared.describe()
    except OSError as error:
        found, problem = None, str(error)
    if found is None:
        _log.warning(
            "mambax: the tokenizer of %s, %s, is not here: %s. %s", source.name, shared.name, problem, hint
        )
    return found


def _tokenizer_files(source: Source) -> Tokenizer | None:
    folder = tokenizer_files.find(source)
    return None if folder is None else Tokenizer.from_pretrained(folder)
