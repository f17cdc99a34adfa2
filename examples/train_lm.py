"""Train a small Mamba language model on a text file, from characters to text: ``mambax train`` from Python.

    python examples/train_lm.py examples/data/tinyshakespeare.txt runs/characters

Each character is a token (``--tokenizer bpe`` learns 512 longer ones). The last tenth of the text is held out; the
model is in ``runs/characters/model`` afterwards, the curve of its loss in ``runs/characters/loss.png``, and what it
writes on the screen. 500 steps give 1.613 nats per character of Shakespeare in 80 seconds of one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mambax
from mambax.registry import default_backend
from mambax.training import (
    Progress,
    Stream,
    TokenDataset,
    Trainer,
    TrainingConfig,
    Windows,
    corpus,
    vocabularies,
    write_tokens,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("text", type=Path, help="a UTF-8 text file")
    parser.add_argument("run", type=Path, help="folder for the model and all about it")
    parser.add_argument("--backend", default=default_backend())
    parser.add_argument("--tokenizer", choices=["characters", "bpe"], default="characters")
    parser.add_argument("--vocab", type=int, default=512, help="tokens of bpe, at least 256")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--d-model", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()

    # the text, as tokens in files
    (source,) = corpus.sources([args.text])
    if not isinstance(source, corpus.TextFile):
        parser.error(f"{args.text}: expected one file of plain text")
    first, last = corpus.split_file(source, 0.1)
    if args.tokenizer == "bpe":
        tokenizer = vocabularies.bpe_tokenizer(first.blocks(), args.vocab)
    else:
        tokenizer = vocabularies.character_tokenizer(first.blocks())
    folders = [args.run / "tokens", args.run / "held-out"]
    if not args.resume:
        for part, folder in zip((first, last), folders, strict=True):
            write_tokens([part.blocks()], tokenizer, folder)
    tokens, held_out = map(TokenDataset, folders)

    # the model
    config = mambax.MambaLMConfig(d_model=args.d_model, n_layer=args.layers, vocab_size=tokenizer.vocab_size)
    model = mambax.from_config(config, backend=args.backend, seed=args.seed)
    model.tokenizer = tokenizer

    # every window of the text once in each epoch; the held-out text is read as one stream
    training = TrainingConfig(
        steps=args.steps, batch_size=args.batch, learning_rate=args.lr, min_ratio=0.0, beta2=0.98, eval_every=100,
        save_every=100, seed=args.seed,
    )  # fmt: skip
    data = Windows(tokens, args.length, args.batch, seed=args.seed)
    validation = Stream(held_out, 1024)
    trainer = Trainer(model, data, training, args.run, validation=validation, observers=[Progress(50)])
    summary = trainer.train(resume=args.resume)
    if summary.model is None or summary.best is None:
        raise SystemExit("interrupted; --resume goes on")
    print(f"held-out text: {summary.best.nats_per_character:.3f} nats per character")

    # what it writes
    trained = mambax.load(summary.model, backend=args.backend)
    for event in trained.generate_streaming("\n", max_new_tokens=200, temperature=0.8, seed=args.seed):
        print(event, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
