"""What does a language model know of a text? Its features, and a linear probe that asks them.

    python examples/features.py examples/data/tinyshakespeare.txt --model models/tinyshakespeare

The question: are the words of a passage in the order of the author, or shuffled? Passages come from the last tenth
of the text, which the model was not trained on; the probe learns from some and is asked of others. Both kinds have
the same words, so that the mean of their embeddings says nothing: 50.0 % is what it must reach, and reaches. The
features of the shipped model reach 81.5 % (mean), 51.2 % (last) and 80.0 % (state), in 7 seconds.

Dimensions: T passages, L tokens of the longest in a batch, P features.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import mambax
from mambax.init import Initializer
from mambax.registry import default_backend


def passages(text: str, words: int, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """Passages of so many words, each as it is and shuffled, and which is which: 0 and 1."""
    found = text.split()
    pieces = [found[start : start + words] for start in range(0, len(found) - words + 1, words)]
    both = [piece for whole in pieces for piece in (whole, [whole[i] for i in rng.permutation(words)])]
    return ["".join(f" {word}" for word in piece) for piece in both], np.tile([0, 1], len(pieces))


def features(model: Any, pooling: Any, texts: Sequence[str], batch: int = 32) -> np.ndarray:
    """(T, P): the vector of each text that a language model gives with a pooling, of ``batch`` texts at a time."""
    nn, tokenizer = model.nn, model.tokenizer
    extractor = nn.MambaForFeatureExtraction(model.config, pooling=pooling, init=Initializer(None))
    extractor.backbone = model.backbone  # the weights are those of the language model
    found = []
    with nn.no_grad():
        for start in range(0, len(texts), batch):
            rows = [tokenizer.encode(text) for text in texts[start : start + batch]]
            length = max(map(len, rows))
            mask = np.arange(length) < np.array([len(row) for row in rows])[:, None]  # padding is not read
            ids = np.zeros(mask.shape, np.int64)
            ids[mask] = np.concatenate(rows)
            found.append(nn.to_numpy(extractor(ids, mask=mask).features))
    return np.concatenate(found)


def bag(model: Any, texts: Sequence[str]) -> np.ndarray:
    """(T, P): the mean of the embeddings, which knows no order."""
    table, encode = model.nn.to_numpy(model.backbone.embeddings.weight), model.tokenizer.encode
    return np.stack([table[np.sort(encode(text))].mean(0) for text in texts])


def probe(learnt: np.ndarray, labels: np.ndarray, asked: np.ndarray, ridge: float) -> np.ndarray:
    """Classes 0 and 1 of the rows asked, (T, P), by ridge regression on rows with labels."""
    mean, scale = learnt.mean(0), learnt.std(0) + 1e-9
    x = (learnt - mean) / scale
    weights = x.T @ np.linalg.solve(x @ x.T + ridge * len(x) * np.eye(len(x)), 2.0 * labels - 1)  # the dual form
    return ((asked - mean) / scale @ weights > 0).astype(np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("text", type=Path, help="a UTF-8 text file")
    parser.add_argument("--model", default="models/tinyshakespeare", help="a folder, or a repository on the hub")
    parser.add_argument("--backend", default=default_backend())
    parser.add_argument("--words", type=int, default=24, help="of a passage")
    parser.add_argument("--passages", type=int, default=400, help="at most")
    parser.add_argument("--ridge", type=float, default=1.0)
    args = parser.parse_args()

    model = mambax.load(args.model, backend=args.backend)
    if model.tokenizer is None:
        parser.error(f"{args.model}: expected a model with a tokenizer")
    text = args.text.read_text(encoding="utf-8")
    texts, labels = passages(text[len(text) * 9 // 10 :], args.words, np.random.default_rng(0))
    texts, labels = texts[: 2 * args.passages], labels[: 2 * args.passages]
    if len(texts) < 4:
        parser.error(f"{args.text}: expected two passages of {args.words} words in its last tenth")
    half = len(texts) // 4 * 2  # both kinds of a passage are on the same side
    print(f"{half} passages to learn from, {len(texts) - half} to be asked of")

    tables = {"bag of embeddings": bag(model, texts)}
    tables |= {f"pooling {name!r}": features(model, name, texts) for name in ("mean", "last", "state")}
    for name, table in tables.items():
        right = np.mean(probe(table[:half], labels[:half], table[half:], args.ridge) == labels[half:])
        print(f"{name}: {table.shape[1]} features, {right:.1%} right")


if __name__ == "__main__":
    main()
