"""Random weights of a shape as checkpoints for every contender: ``python -m benchmarks.weights FOLDER SHAPE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

import mambax
from benchmarks.shapes import PROMPT, REFERENCE, SHAPE_FILE, SHAPES, folder_of

DTYPES = ("float32", "bfloat16")


def write(folder: Path, shape: str) -> None:
    """Write the checkpoints of a shape in each dtype, and the reference logits."""
    config = mambax.MambaLMConfig(**SHAPES[shape], scan="sequential")
    model = mambax.from_config(config, backend="numpy", seed=0)
    folder.mkdir(parents=True, exist_ok=True)
    mambax.save_pretrained(model, folder_of(folder, DTYPES[0]))
    ids = np.random.default_rng(1).integers(0, config.vocab_size, PROMPT)
    np.save(folder / REFERENCE, model(ids[None], logits_to_keep=1).logits[0, -1])
    for dtype in DTYPES[1:]:
        mambax.convert(folder_of(folder, DTYPES[0]), folder_of(folder, dtype), dtype=dtype)
    (folder / SHAPE_FILE).write_text(json.dumps(config.to_dict()), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2])
