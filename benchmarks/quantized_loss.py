"""How much quantised weights cost in loss: ``python -m benchmarks.quantized_loss [--backend mlx]``.

Reads held-out text as one stream, by a model as it is and once more for each way of quantising it, and prints a
table in Markdown. No timing, so that the machine need not be idle.

Dimensions: L length, V vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import mambax

ROOT = Path(__file__).resolve().parent.parent
KINDS: dict[str, tuple[str | int | None, ...]] = {"mlx": (None, 8, 4, "int8", "int4")}
"""What is tried on a backend: bits of MLX's own quantisation, and what every backend has."""

CHUNK = 512


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantized_loss", description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tinyshakespeare")
    parser.add_argument("--text", type=Path, default=ROOT / "examples" / "data" / "tinyshakespeare.txt")
    parser.add_argument("--held-out", type=int, default=111_540, help="characters at the end of the text")
    parser.add_argument("--backend", default="mlx")
    chosen = parser.parse_args(arguments)
    if chosen.held_out < 2:
        parser.error(f"--held-out is {chosen.held_out}; expected at least 2 characters")
    text = chosen.text.read_text(encoding="utf-8")[-chosen.held_out :]
    print("| weights | bytes of weights | nats per character | more than as it is |")
    print("| --- | ---: | ---: | ---: |")
    full = None
    for kind in KINDS.get(chosen.backend, (None, "int8", "int4")):
        model = mambax.load(chosen.model, backend=chosen.backend, quantize=kind)
        found = loss(model, text)
        full = found if full is None else full
        size = sum(int(array.nbytes) for array in model.nn.parameters(model).values())
        name = "as they are" if kind is None else f"{kind} bits (MLX)" if isinstance(kind, int) else kind
        print(f"| {name} | {size:,} | {found:.4f} | {100 * (found / full - 1):.2f} % |", flush=True)
    return 0


def loss(model: Any, text: str) -> float:
    """Nats for each character of a text that is read from its beginning to its end, the first token not counted."""
    nn, ids = model.nn, np.asarray(model.tokenizer.encode(text), np.int64)
    state, total = None, 0.0
    with nn.no_grad():
        for start in range(0, len(ids) - 1, CHUNK):
            part = ids[start : min(start + CHUNK, len(ids) - 1)]
            output = model(part[None], state)
            logits, state = nn.to_numpy(output.logits)[0].astype(np.float64), output.state  # (L, V)
            top = logits.max(-1, keepdims=True)
            normed = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
            total -= normed[np.arange(len(part)), ids[start + 1 : start + 1 + len(part)]].sum()
    return total / len(text)


if __name__ == "__main__":
    raise SystemExit(main())
