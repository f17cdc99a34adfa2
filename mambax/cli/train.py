"""``mambax train``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mambax.cli.terminal import bar, note, size
from mambax.training.card import write_card
from mambax.training.processes import join, started_by
from mambax.training.progress import Progress
from mambax.training.recipe import (
    RECIPE,
    VOCABULARIES,
    Recipe,
    parse,
    parse_assignment,
    read_file,
    set_value,
)
from mambax.training.setup import Checked, build, check


def train(
    path: Path | None,
    flags: Mapping[str, Any],
    assignments: Sequence[str],
    *,
    resume: bool,
    dry_run: bool,
    quiet: bool,
) -> bool:
    """Check a recipe, then run it; of several processes that a launcher started, each calls this.

    Args:
        path: the recipe's file; None for flags alone, and when a run is resumed as it was.
        flags: values by ``section.key``, None for those that were not given.
        assignments: ``section.key=value``; they come last.
        resume: go on from the last checkpoint.
        dry_run: only check, and show what would be run.
        quiet: no progress.

    Returns:
        Whether the run came to its end; False when it was interrupted.

    Raises:
        ValueError, OSError, ImportError: before anything runs, for what would keep it from running; and as
            :meth:`mambax.training.Trainer.train`.
    """
    recipe = _recipe(path, flags, assignments, resume)
    checked = check(recipe, resume=resume)
    if dry_run:
        _show(checked)
        return True
    world = join(checked.backend, checked.device)
    quiet = quiet or world.process > 0
    progress = Progress(recipe.training.log_every, quiet=quiet)
    with bar("Reading the text", in_bytes=True, quiet=quiet) as advance:
        trainer = build(
            checked,
            world,
            resume=resume,
            observers=[progress],
            progress=lambda what, done, total: advance(done, total),
        )
    if not quiet:
        several = f" ({world.processes} processes, {recipe.training.distributed})" if world.processes > 1 else ""
        note(f"{checked.backend} on {checked.device}{several}; the run is in {recipe.run}")
    summary = trainer.train(resume=resume)
    if summary.model is None:
        if world.process == 0:
            how = started_by(checked.backend, world.processes)
            note(f"interrupted after step {summary.step}; go on with: {how} train --run {recipe.run} --resume")
        return False
    if world.process == 0:
        write_card(trainer, recipe, summary)
    if not quiet:
        note(f"model: {summary.model}")
    return True


def _recipe(path: Path | None, flags: Mapping[str, Any], assignments: Sequence[str], resume: bool) -> Recipe:
    given = {key: value for key, value in flags.items() if value is not None}
    where = "the command line"
    values: dict[str, Any] = {}
    assigned = [parse_assignment(text) for text in assignments]
    if path is None and resume:
        run = dict(assigned).get("run", given.get("run", "run"))
        path = Path(str(run)).expanduser() / RECIPE
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; name the run to resume with --run")
    if path is not None:
        values, where = read_file(path), str(path)
    for key, value in given.items():
        set_value(values, key, value)
    for key, value in assigned:
        set_value(values, key, value)
    return parse(values, where)


def _show(checked: Checked) -> None:
    """What would be run, on stdout as a recipe."""
    from rich.console import Console

    from mambax.checkpoint.json_files import dump_object

    recipe, found = checked.recipe, checked.corpus
    Console(highlight=False, soft_wrap=True).print(dump_object(recipe.to_dict()).decode(), end="", markup=False)
    files = len(found.train) + len(found.held_out)
    note(f"{checked.backend} on {checked.device}; {files} file(s), {size(found.bytes)} of text; nothing was run")
    seen = recipe.training.steps * recipe.training.batch_size * recipe.data.length
    note(f"{recipe.training.steps} steps of {recipe.training.batch_size} x {recipe.data.length}: {seen:,} tokens")
    if "pretrained" not in recipe.model:
        note(f"about {_parameters(recipe):,} parameters")


def _parameters(recipe: Recipe) -> int:
    """Of the new model, with the vocabulary that the recipe asks for."""
    from mambax.init import Initializer
    from mambax.registry import get_backend
    from mambax.tokenizer import Tokenizer

    nn = get_backend("numpy")
    named = recipe.data.tokenizer
    if named in VOCABULARIES:
        size = recipe.data.vocab_size if named == "bpe" else 256
    else:
        size = Tokenizer.from_pretrained(Path(named).expanduser()).vocab_size
    model = nn.MambaForCausalLM(recipe.model_config(size), init=Initializer(None))
    return sum(math.prod(array.shape) for array in nn.parameters(model).values())
