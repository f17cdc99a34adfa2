"""Fine-tune a model with low-rank adapters on a text file: a few per cent of its weights learn, the rest stays.

    python examples/finetune_lora.py my.txt runs/adapted --model models/tinyshakespeare

The adapters are in ``runs/adapted/adapter`` afterwards, in PEFT's layout, and the model with them merged into its
weights in ``runs/adapted/merged``, which every backend loads.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import mambax
from mambax.adapters import add_lora, load_adapter, merge_adapter
from mambax.registry import default_backend
from mambax.training import Progress, Reading, Stream, TokenDataset, Trainer, TrainingConfig, corpus, write_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("text", type=Path, help="a UTF-8 text file")
    parser.add_argument("run", type=Path, help="folder for the adapters and all about them")
    parser.add_argument("--model", default="models/tinyshakespeare", help="a folder, or a repository on the hub")
    parser.add_argument("--backend", default=default_backend())
    parser.add_argument("--targets", nargs="+", default=["in_proj", "x_proj", "out_proj"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()

    # a model whose weights stay as they are, and adapters beside them
    model = mambax.load(args.model, backend=args.backend, dtype="float32")
    tokenizer = model.tokenizer
    if tokenizer is None:
        parser.error(f"{args.model}: expected a model with a tokenizer")
    total = sum(math.prod(array.shape) for array in model.nn.parameters(model).values())
    add_lora(model, args.targets, rank=args.rank)
    own = sum(math.prod(array.shape) for array in model.nn.parameters(model).values()) - total
    print(f"{own:,} of {total + own:,} weights learn")

    # the text, a tenth of it held out
    (source,) = corpus.sources([args.text])
    if not isinstance(source, corpus.TextFile):
        parser.error(f"{args.text}: expected one file of plain text")
    parts = corpus.split_file(source, 0.1)
    for part, name in zip(parts, ("tokens", "held-out"), strict=True):
        write_tokens([part.blocks()], tokenizer, args.run / name)
    data = Reading(TokenDataset(args.run / "tokens"), args.length, args.batch)
    validation = Stream(TokenDataset(args.run / "held-out"), 256)

    training = TrainingConfig(
        steps=args.steps,
        batch_size=args.batch,
        learning_rate=args.lr,
        weight_decay=0.0,
        eval_every=50,
        save_every=50,
    )
    summary = Trainer(model, data, training, args.run, validation=validation, observers=[Progress(10)]).train()
    if summary.model is None or summary.best is None:
        raise SystemExit("interrupted")
    print(f"held-out text: {summary.best.nats_per_character:.3f} nats per character")

    # the adapters of the best step, merged into a model of its own
    merged = load_adapter(mambax.load(args.model, backend="numpy", dtype="float32"), summary.model)
    merge_adapter(merged)
    merged.save_pretrained(args.run / "merged")


if __name__ == "__main__":
    main()
