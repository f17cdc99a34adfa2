"""The page about a trained model that is saved with it."""

from __future__ import annotations

import math
import platform
from pathlib import Path

from mambax.training.recipe import Recipe
from mambax.training.trainer import Summary, Trainer


def write_card(trainer: Trainer, recipe: Recipe, summary: Summary) -> None:
    """Write ``README.md`` beside a model that was trained to the end."""
    if summary.model is None:
        return
    model, config = trainer.model, trainer.config
    nn = model.nn
    parameters = sum(math.prod(array.shape) for array in nn.parameters(model).values())
    minutes = trainer.seconds / 60
    lines = [
        "---",
        "library_name: mambax",
        "tags: [mamba]",
        "---",
        f"# {Path(recipe.run).name}",
        "",
        f"A Mamba language model of {parameters:,} parameters ({model.config.d_model} wide, {model.config.n_layer} "
        f"blocks, {model.config.vocab_size:,} tokens).",
        "",
        f"- Trained on: {', '.join(Path(name).name for name in recipe.data.train)}.",
        f"- {_held_out(summary)}",
        f"- Training: {summary.step} steps of {config.batch_size} x {recipe.data.length} tokens, {minutes:.0f} "
        f"minutes ({nn.name} {nn.version()}, {platform.machine()}), seed {config.seed}.",
        "",
        "The recipe, which `mambax train` takes, is in `recipe.json`.",
        "",
    ]
    (summary.model / "README.md").write_text("\n".join(lines), encoding="utf-8", newline="\n")
    recipe.save(summary.model)


def _held_out(summary: Summary) -> str:
    found = summary.best
    if found is None:
        return "It was not evaluated."
    parts = [f"{found.loss:.4f} nats per token (perplexity {found.perplexity:.2f})"]
    if found.nats_per_character is not None and found.bits_per_byte is not None:
        text = f"**{found.nats_per_character:.3f} nats per character**, {found.bits_per_byte:.3f} bits per byte"
        parts = [text, *parts]
    return f"Held-out text: {', '.join(parts)}, after {summary.best_step} steps."
