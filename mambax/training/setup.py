"""From a recipe to a trainer that is ready to run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambax.construction import from_config
from mambax.init import check_seed
from mambax.registry import default_backend, get_backend
from mambax.tokenizer import Tokenizer
from mambax.training.checkpoints import Checkpoints
from mambax.training.engine import engine_class
from mambax.training.prepared import Corpus, Prepared, Progress, open_prepared, prepare
from mambax.training.processes import Processes, check_launcher, own_device
from mambax.training.recipe import PRETRAINED, RECIPE, VOCABULARIES, Recipe
from mambax.training.together import Together, lost_means_failed
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
    if tokenizer is None and named not in VOCABULARIES:
        Tokenizer.from_pretrained(Path(named).expanduser())
    found = Corpus(recipe.data, recipe.training.seed)
    run = Path(recipe.run).expanduser()
    if run.exists() and not run.is_dir():
        raise NotADirectoryError(f"{run}: expected a folder to write to, found a file; name another")
    exists = Checkpoints(run / CHECKPOINTS).latest() is not None
    if exists and not resume:
        raise ValueError(f"{run}: the folder has a run already; resume it, or name another folder")
    if resume and not exists:
        raise ValueError(f"{run}: there is no checkpoint to resume from; train without resume to begin")
    return Checked(recipe, found, backend, own_device(backend, device), tokenizer)


def _own_tokenizer(recipe: Recipe) -> Tokenizer | None:
    if PRETRAINED not in recipe.model:
        return None
    from mambax.checkpoint.json_files import read_object
    from mambax.checkpoint.layouts import CAUSAL_LM, read_config
    from mambax.checkpoint.sources import find_config, open_source
    from mambax.tokenizer_files import find

    name = recipe.model[PRETRAINED]
    source = open_source(name)
    path = find_config(source)
    described = read_config(read_object(path), str(path))
    if described.architecture != CAUSAL_LM:
        raise ValueError(
            f"{name} is a {described.architecture}; expected a {CAUSAL_LM} to train on text. From Python, "
            "mambax.training.Trainer trains the others"
        )
    if described.quantization is not None:
        raise ValueError(
            f"{name} is quantised; expected weights in floating point, which learn: name the checkpoint that it "
            "was made from, or train adapters on it from Python"
        )
    folder = find(source)
    if folder is None:
        raise FileNotFoundError(f"{name}: no tokenizer.json; a model that is trained further needs its tokenizer")
    return Tokenizer.from_pretrained(folder)


def build(
    checked: Checked,
    world: Processes | None = None,
    *,
    resume: bool = False,
    observers: Sequence[Observer] = (),
    progress: Progress | None = None,
) -> Trainer:
    """Make the tokens, the model and the trainer; the recipe is written into the folder of the run.

    Where that fails, a folder that was not there before is gone again.

    Args:
        checked: what :func:`check` gave.
        world: of several processes, what :func:`mambax.training.processes.join` gave: process 0 makes the tokens
            and writes the recipe, and all read them from the folder.
        resume: the run goes on from a checkpoint in its folder, with the same tokens; its recipe stays.
        observers: of the trainer.
        progress: told how far the tokens are.

    Raises:
        ValueError, OSError: as :func:`mambax.training.prepared.prepare` and :func:`mambax.load` do.
        ProcessFailed: when process 0 raised one of these.
    """
    recipe = checked.recipe
    world = world or Processes()
    run = Path(recipe.run).expanduser()
    alone = nullcontext() if world.process else _or_nothing(run)
    with lost_means_failed(world.process, world.processes), alone:
        prepared = _tokens(checked, world, run / DATA, resume, progress)
        data, validation = arrange(recipe, prepared)
        model = make_model(checked, prepared.tokenizer)
        if checked.tokenizer is not None or recipe.data.tokenizer not in VOCABULARIES:
            _check_ids(model, prepared)
        trainer = Trainer(model, data, recipe.training, run, validation=validation, observers=observers)
        with Together(trainer.engine, "writing the recipe"):
            if not world.process and not (resume and (run / RECIPE).exists()):
                recipe.save(run)
    return trainer


def _tokens(checked: Checked, world: Processes, folder: Path, resume: bool, progress: Progress | None) -> Prepared:
    """The tokens, which process 0 makes while the others wait; it goes on when they have opened them."""
    found: Any = None
    try:
        try:
            if not world.process:
                found = prepare(
                    checked.corpus, folder, tokenizer=checked.tokenizer, progress=progress, resume=resume
                )
        finally:
            world.wait()
        if world.process:
            found = open_prepared(checked.corpus, folder, tokenizer=checked.tokenizer)
    finally:
        world.wait()
    return found


@contextmanager
def _or_nothing(run: Path) -> Iterator[None]:
    """Where what is done within it fails, folders of a run that were not there before are deleted."""
    missing = [folder for folder in (run / DATA, run) if not folder.exists()]
    above = [folder for folder in run.parents if not folder.exists()]
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            for folder in missing:
                shutil.rmtree(folder, ignore_errors=True)
            for folder in above:
                with suppress(OSError):  # another run has begun beside this one
                    folder.rmdir()


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


def _check_ids(model: Any, prepared: Prepared) -> None:
    """Refuse tokens of another's tokenizer that a model does not know, before it meets one within a run."""
    known = model.config.vocab_size
    for side in (prepared.train, prepared.validation):
        if (highest := int(side.tokens.max())) >= known:
            raise ValueError(
                f"{side.folder}: the text has the token {highest} of its tokenizer, and the model knows {known} "
                "tokens; do the tokenizer and the model belong together?"
            )


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
