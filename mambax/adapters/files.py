"""Adapters in PEFT's layout: ``adapter_config.json`` beside ``adapter_model.safetensors``.

The names of modules are those of the checkpoints of the model's family, as transformers has them; for Mamba-1 they
are mambax's own. https://huggingface.co/docs/peft/developer_guides/checkpoint describes the layout.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambax.adapters.adding import adaptable, check_tied, install, own_names
from mambax.adapters.binding import bound
from mambax.adapters.paths import at, owners
from mambax.checkpoint.json_files import dump_object, read_object
from mambax.checkpoint.layouts import checkpoint_name
from mambax.checkpoint.safetensors_files import SafetensorsFile, write_safetensors
from mambax.checkpoint.tensors import FLOATS, TensorInfo, is_finite
from mambax.lora import Lora
from mambax.paths import path_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_NEUTRAL = (None, False, 0, "", "none", "default")
_REFUSED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
    "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config",
    "corda_config", "eva_config", "loftq_config", "lora_ga_config", "kasa_config", "monteclora_config",
    "velora_config", "bias",
)  # fmt: skip
"""Fields of PEFT's that would change the numbers, and are not supported unless they are off."""
_INITIAL = (True, False, "gaussian", "orthogonal")
"""Values of ``init_lora_weights`` that leave the weights of the model as they were."""


def save_adapter(model: Any, folder: str | os.PathLike[str], *, base_model: str | None = None) -> None:
    """Write the adapters of a model, and nothing else of it, for :func:`load_adapter` and for PEFT.

    Args:
        model: with adapters.
        folder: where to; made if need be. An adapter that is there is replaced, its weights first.
        base_model: the folder or repository of the model without them, noted in the file.

    Raises:
        ValueError: for a model without adapters, and for values that are not finite.
        OSError: when a file cannot be written.
    """
    lora: Lora | None = model.adapter
    if lora is None:
        raise ValueError("save_adapter: the model has no adapters; merged ones are part of save_pretrained")
    arrays = arrays_of(model)
    for name, array in arrays.items():
        if not is_finite(array):
            raise ValueError(f"{name} is NaN or infinite, so that the adapter was not saved")
    target = path_of(folder, "folder")
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target}: expected a folder to write to, found a file; name another")
    for name in (WEIGHTS, CONFIG):
        if (target / name).is_dir():
            raise IsADirectoryError(
                f"{target / name}: expected a file or nothing, found a folder, so that nothing was saved; move it "
                "away"
            )
    target.mkdir(parents=True, exist_ok=True)
    infos = {name: TensorInfo(array.dtype, array.shape) for name, array in arrays.items()}
    write_safetensors(target / WEIGHTS, infos, lambda name: arrays[name], {"format": "pt"})
    config = target / f".{CONFIG}.tmp"
    config.write_bytes(dump_object(_config(model, lora, base_model)))
    config.replace(target / CONFIG)


def load_adapter(model: Any, folder: str | os.PathLike[str], *, trainable: bool = False) -> Any:
    """Give a model the adapters in a folder that mambax or PEFT wrote, in place.

    Args:
        model: the one that they were trained on, on any backend, quantised or not.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        trainable: to train them further; everything is frozen when False.

    Returns:
        The model.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: for files that are damaged, adapters of another kind or for another model, and values that are
            not finite. The model is then as it was.
    """
    source = path_of(folder, "folder")
    for name in (CONFIG, WEIGHTS):
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source / name}: no such file; expected a folder with {CONFIG} and {WEIGHTS}")
    if model.adapter is not None:
        raise ValueError(
            "the model has adapters already; merge them with mambax.adapters.merge_adapter, or load it anew"
        )
    config = read_object(source / CONFIG)
    rank, alpha = _check_config(config, source / CONFIG)
    file = SafetensorsFile(source / WEIGHTS)
    pairs, whole = _sorted(model, {name: file.read(name) for name in file.tensors}, rank, source / WEIGHTS)
    tied = check_tied(model, list(pairs), bool(config.get("ensure_weight_tying")))
    saved = sorted({path.rpartition(".")[0] for path in whole})
    lora = Lora(rank, alpha, bool(config.get("use_rslora")), tuple(pairs), tuple(saved), tied)
    like = {path: at(model, path.rpartition(".")[0]).weight for path in whole}
    nn, held = model.nn, model.nn.parameters(model)
    values = {path: array.astype(nn.to_numpy(held[path]).dtype) for path, array in whole.items()}
    nn.set_parameters(model, {path: nn.from_numpy(array, like=like[path]) for path, array in values.items()})
    install(model, lora, pairs)
    if not trainable:
        bound(model).set_trainable(model, ())
    return model


# --- what is written -----------------------------------------------------------------------------------------


def arrays_of(model: Any) -> dict[str, np.ndarray]:
    """The values of the adapters of a model, by PEFT's names."""
    parameters = model.nn.parameters(model)
    values = {name: model.nn.to_numpy(parameters[path]) for name, path in _names(model).items()}
    return {name: np.ascontiguousarray(_turned(name, array)) for name, array in values.items()}


def by_parameter(model: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What :func:`arrays_of` gave, by the paths of parameters; names that the model does not know stay."""
    names = _names(model)
    return {names.get(name, name): _turned(name, array) for name, array in tensors.items()}


def _turned(name: str, array: np.ndarray) -> np.ndarray:
    """A of a table is (R, V) in files and, as a table of its own, (V, R) in models."""
    return array.T if name.endswith(_ENDS[2]) else array


def _names(model: Any) -> dict[str, str]:
    """PEFT's names of the parameters that belong to the adapters of a model, and their paths."""
    found = {}
    for path in own_names(model):
        module, _, rest = path.rpartition(".lora_")
        if not module:
            name = checkpoint_name(path, model.config)
        else:
            rest = rest.removesuffix(".weight") if rest.startswith("embedding") else rest
            name = f"{_module_name(module, model)}.lora_{rest}"
        found[_PREFIX + name] = path
    return found


def _module_name(path: str, model: Any) -> str:
    return checkpoint_name(f"{path}.weight", model.config).removesuffix(".weight")


def _config(model: Any, lora: Lora, base_model: str | None) -> dict[str, Any]:
    """``adapter_config.json``; without a task, so that PEFT does not look for methods of transformers' models."""
    every = [_module_name(path, model) for path in owners(model)]
    chosen = [_module_name(path, model) for path in lora.modules]
    others = {name.rpartition(".")[2] for name in every if not _within(name, chosen)}
    short = sorted({name.rpartition(".")[2] for name in chosen})
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": short if others.isdisjoint(short) else chosen,
        "modules_to_save": [_module_name(path, model) for path in lora.modules_to_save] or None,
        "ensure_weight_tying": lora.tied,
    }


def _within(name: str, chosen: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in chosen)


# --- what is read --------------------------------------------------------------------------------------------


def _check_config(config: Mapping[str, Any], where: Path) -> tuple[int, float]:
    """Rank and alpha, when the file describes what :mod:`mambax.lora` computes."""
    kind, rank, alpha = config.get("peft_type"), config.get("r"), config.get("lora_alpha")
    if kind != "LORA":
        raise ValueError(f"{where}: peft_type is {kind!r}; expected 'LORA', other adapters are not supported")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{where}: r is {rank!r}; expected a whole number from 1")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < float("inf"):
        raise ValueError(f"{where}: lora_alpha is {alpha!r}; expected a number above 0")
    for name in _REFUSED:
        value = config.get(name)
        if value not in _NEUTRAL and value != {} and value != []:
            raise ValueError(f"{where}: {name} is {str(value)[:80]}, which is not supported: merge it with PEFT")
    if config.get("init_lora_weights", True) not in _INITIAL:
        raise ValueError(
            f"{where}: init_lora_weights is {config['init_lora_weights']!r}, which changes the weights of the "
            "model itself; convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    return rank, float(alpha)


def _sorted(
    model: Any, tensors: Mapping[str, np.ndarray], rank: int, where: Path
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, np.ndarray]]:
    """(A and B by path, values of whole modules by path) of the tensors of a file, all of them checked."""
    layers, nn = adaptable(model), model.nn
    paths = {_module_name(path, model): path for path in layers} | {path: path for path in layers}
    held = {name: tuple(array.shape) for name, array in nn.parameters(model).items()}
    named = {checkpoint_name(name, model.config): name for name in held} | {name: name for name in held}
    halves: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, np.ndarray] = {}
    for key, array in tensors.items():
        name = key.removeprefix(_PREFIX)
        if array.dtype not in FLOATS.values() or not is_finite(array):
            raise ValueError(f"{where}: {key} is {array.dtype.name} or has values that are NaN or infinite")
        end = next((end for end in _ENDS if name.endswith(end)), None)
        module = name if end is None else name.removesuffix(end)
        if end is not None and module in paths:
            halves.setdefault(paths[module], {})[end] = array
        elif name.endswith(".base_layer.weight") and name.removesuffix(".base_layer.weight") in paths:
            _check_equal(nn, layers[paths[name.removesuffix(".base_layer.weight")]], array, f"{where}: {key}")
        elif end is None and named.get(name) is not None and held[named[name]] == array.shape:
            whole[named[name]] = array
        else:
            known = ", ".join(sorted({path.rpartition(".")[2] for path in layers}))
            raise ValueError(
                f"{where}: {key}, {list(array.shape)}, belongs to nothing in this model; expected A and B of some "
                f"of {known}, or weights that are trained whole. Was the adapter trained on another model?"
            )
    if not halves:
        raise ValueError(f"{where}: there is no adapter in it; expected names that end in {', '.join(_ENDS)}")
    return {path: _pair(bound(model), path, layers[path], halves[path], rank, where) for path in layers
            if path in halves}, whole  # fmt: skip


def _pair(
    adapters: Any, path: str, layer: Any, found: Mapping[str, np.ndarray], rank: int, where: Path
) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = adapters.shape(layer)
    if isinstance(layer, adapters.EMBEDDING):
        expected = {_ENDS[2]: (rank, rows), _ENDS[3]: (columns, rank)}
    else:
        expected = {_ENDS[0]: (rank, columns), _ENDS[1]: (rows, rank)}
    shapes = {end: array.shape for end, array in found.items()}
    if shapes != expected:
        raise ValueError(
            f"{where}: the adapter of {path} has {shapes}, expected {expected}; is it one of another model, or "
            "another r in the config?"
        )
    A, B = (found[end] for end in expected)
    return A, B


def _check_equal(nn: Any, layer: Any, array: np.ndarray, where: str) -> None:
    """PEFT saves tables with adapters whole, in case their rows were changed; here they must be the model's."""
    own = nn.to_numpy(layer.weight)
    if own.dtype not in FLOATS.values() or not np.array_equal(array.astype(own.dtype), own):
        raise ValueError(f"{where} differs from the weights of this model; load the adapter onto its own model")
