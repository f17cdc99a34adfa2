"""From a recipe to a trainer that is ready to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambax.construction import from_config
from mambax.init import check_seed
from mambax.registry import default_backend, get_backend
from mambax.tokenizer import Tokenizer
from mambax.training.engine import engine_class
from mambax.training.prepared import Corpus, Prepared, Progress, prepare
from mambax.training.processes import Processes, check_launcher, own_device
from mambax.training.recipe import PRETRAINED, RECIPE, Recipe
from mambax.training.token_data import Documents, Reading, Stream, Windows
from mambax.training.trainer import CHECKPOINTS, Observer, Trainer

DATA = "data"


@dataclass(frozen=True)
class Checked:
    """A recipe of which everything that can be checked without work has been."""

    recipe: Recipe
    corpus: Corpus
    backend: str
    device: str
    tokenizer: Tokenizer | None  # of a pretrained model


def check(recipe: Recipe, *, resume: bool = False) -> Checked:
    """Look at everything that a run needs, and change nothing.

    Raises:
        ValueError, FileNotFoundError, ImportError: for what would keep it from running.
    """
    backend = recipe.backend or default_backend()
    nn = get_backend(backend)
    device = recipe.device or nn.devices()[0]
    if device.partition(":")[0] not in nn.devices():
        names = ", ".join(map(repr, nn.devices()))
        raise ValueError(f"device is {device!r}; the {backend} backend has {names} here")
    check_launcher(backend)
    engine_class(nn, recipe.training)
    check_seed(recipe.training.seed)
    tokenizer = _own_tokenizer(recipe)
    named = recipe.data.tokenizer
    if tokenizer is None and named not in ("bpe", "bytes", "characters"):
        Tokenizer.from_pretrained(Path(named).expanduser())
    found = Corpus(recipe.data, recipe.training.seed)
    run = Path(recipe.run).expanduser()
    exists = any((run / CHECKPOINTS).glob("step-*"))
    if exists and not resume:
        raise ValueError(f"{run}: the folder has a run already; resume it, or name another folder")
    if resume and not exists:
        raise ValueError(f"{run}: there is no checkpoint to resume from; train without resume to begin")
    return Checked(recipe, found, backend, own_device(backend, device), tokenizer)


def _own_tokenizer(recipe: Recipe) -> Tokenizer | None:
    if PRETRAINED not in recipe.model:
        return None
    from mambax.checkpoint.sources import open_source
    from mambax.tokenizer_files import find

    name = recipe.model[PRETRAINED]
    folder = find(open_source(name))
    if folder is None:
        raise FileNotFoundError(f"{name}: no tokenizer.json; a model that is trained further needs its tokenizer")
    return Tokenizer.from_pretrained(folder)


def build(
    checked: Checked,
    world: Processes | None = None,
    *,
    observers: Sequence[Observer] = (),
    progress: Progress | None = None,
) -> Trainer:
    """Make the tokens, the model and the trainer; the recipe is written into the folder of the run.

    Args:
        checked: what :func:`check` gave.
        world: of several processes, what :func:`mambax.training.processes.join` gave: process 0 makes the tokens
            and writes the recipe, and all read them from the folder.
        observers: of the trainer.
        progress: told how far the tokens are.

    Raises:
        ValueError, OSError: as :func:`mambax.training.prepared.prepare` and :func:`mambax.load` do.
    """
    recipe = checked.recipe
    world = world or Processes()
    run = Path(recipe.run).expanduser()
    if run.exists() and not run.is_dir():
        raise NotADirectoryError(f"{run}: expected a folder to write to, found a file; name another")
    run.mkdir(parents=True, exist_ok=True)
    if world.process:
        world.wait()  # until process 0 has made what all of them read
    prepared = prepare(checked.corpus, run / DATA, tokenizer=checked.tokenizer, progress=progress)
    if not world.process:
        world.wait()
    data, validation = arrange(recipe, prepared)
    model = make_model(checked, prepared.tokenizer)
    trainer = Trainer(model, data, recipe.training, run, validation=validation, observers=observers)
    if not world.process and not (run / RECIPE).exists():
        recipe.save(run)
    return trainer


def arrange(recipe: Recipe, prepared: Prepared) -> tuple[Any, Stream]:
    """The batches to learn from, and those to evaluate on.

    Raises:
        ValueError: for a text that is shorter than a row.
    """
    data, size, seed = recipe.data, recipe.training.batch_size, recipe.training.seed
    separate = data.separate
    if data.arrangement == "documents":
        train: Any = Documents(prepared.train, data.length, size, seed=seed)
        separate = True
    elif data.arrangement == "windows":
        train = Windows(prepared.train, data.length, size, seed=seed, separate=separate)
    else:
        options: dict[str, Any] = {"restart": data.restart, "seed": seed, "separate": separate}
        train = Reading(prepared.train, data.length, size, **options)
    return train, Stream(prepared.validation, data.validation_length, data.validation_rows, separate=separate)


def make_model(checked: Checked, tokenizer: Tokenizer) -> Any:
    """A new model, or a pretrained one, on the device, with its tokenizer."""
    recipe = checked.recipe
    if PRETRAINED in recipe.model:
        from mambax.checkpoint import load

        name = recipe.model[PRETRAINED]
        return load(name, backend=checked.backend, device=checked.device, dtype="float32")
    ends = tokenizer.eos_token_ids
    config = recipe.model_config(tokenizer.vocab_size, eos_token_id=ends[0] if ends else None)
    model = from_config(config, backend=checked.backend, seed=recipe.training.seed)
    model.tokenizer = tokenizer
    nn = model.nn
    arrays = nn.parameters(model)
    nn.set_parameters(model, {n: nn.from_numpy(nn.to_numpy(a), device=checked.device) for n, a in arrays.items()})
    return model
