"""Random weights of a shape as checkpoints for every contender: ``python -m benchmarks.weights FOLDER SHAPE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

import mambax
from benchmarks.shapes import PROMPT, REFERENCE, SHAPE_FILE, SHAPES, folder_of
from mambax.options import Mamba2Options

DTYPES = ("float32", "bfloat16")


def write(folder: Path, shape: str) -> None:
    """Write the checkpoints of a shape in each dtype, and the reference logits."""
    fields = dict(SHAPES[shape])
    if "mamba2" in fields:
        fields["mamba2"] = Mamba2Options(**fields["mamba2"])
    config = mambax.MambaLMConfig(**fields, scan="sequential")
    model = mambax.from_config(config, backend="numpy", seed=0)
    folder.mkdir(parents=True, exist_ok=True)
    mambax.save_pretrained(model, folder_of(folder, DTYPES[0]))
    ids = np.random.default_rng(1).integers(0, config.vocab_size, PROMPT)
    if config.mamba2 is not None:  # whose scan is sequential in float64 alone
        del model
        model = mambax.load(folder_of(folder, DTYPES[0]), backend="numpy", dtype="float64")
    np.save(folder / REFERENCE, model(ids[None], logits_to_keep=1).logits[0, -1].astype(np.float32))
    for dtype in DTYPES[1:]:
        mambax.convert(folder_of(folder, DTYPES[0]), folder_of(folder, dtype), dtype=dtype)
    (folder / SHAPE_FILE).write_text(json.dumps(config.to_dict()), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2])
