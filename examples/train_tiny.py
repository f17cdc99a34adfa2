"""Train a small Mamba language model on a text file, on a laptop CPU: what ``mambax train`` does, from Python.

    python examples/train_tiny.py examples/data/tinyshakespeare.txt runs/shakespeare

The text is cut into BPE tokens by a vocabulary learnt from its first nine tenths; the rest is held out. The model
is in ``runs/shakespeare/model`` afterwards, and the curve of its loss in ``runs/shakespeare/loss.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mambax
from mambax.registry import default_backend
from mambax.training import (
    Progress,
    Reading,
    Stream,
    TokenDataset,
    Trainer,
    TrainingConfig,
    corpus,
    vocabularies,
    write_tokens,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("text", type=Path, help="a UTF-8 text file")
    parser.add_argument("run", type=Path, help="folder for the model and all about it")
    parser.add_argument("--backend", default=default_backend())
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16, help="readers")
    parser.add_argument("--length", type=int, default=256, help="tokens that each reads in a step")
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=512, help="BPE tokens, at least 256")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()

    # the text, as tokens in files
    (source,) = corpus.sources([args.text])
    if not isinstance(source, corpus.TextFile):
        parser.error(f"{args.text}: expected one file of plain text")
    first, last = corpus.split_file(source, 0.1)
    tokenizer = vocabularies.bpe_tokenizer(first.blocks(), args.vocab)
    folders = [args.run / "tokens", args.run / "held-out"]
    if not args.resume:
        for part, folder in zip((first, last), folders, strict=True):
            write_tokens([part.blocks()], tokenizer, folder)
    train, held_out = map(TokenDataset, folders)

    # the model
    config = mambax.MambaLMConfig(d_model=args.d_model, n_layer=args.layers, vocab_size=tokenizer.vocab_size)
    model = mambax.from_config(config, backend=args.backend, seed=args.seed)
    model.tokenizer = tokenizer

    # readers go on where they stopped, from the state they had there; now and then one goes elsewhere
    data = Reading(train, args.length, args.batch, restart=0.05, seed=args.seed)
    training = TrainingConfig(
        steps=args.steps, batch_size=args.batch, learning_rate=args.lr, min_ratio=0.05, beta2=0.98, eval_every=100,
        save_every=100, seed=args.seed,
    )  # fmt: skip
    validation = Stream(held_out, 1024)
    trainer = Trainer(model, data, training, args.run, validation=validation, observers=[Progress(50)])
    summary = trainer.train(resume=args.resume)
    if summary.evaluation is not None:
        print(f"held-out text: {summary.evaluation.nats_per_character:.3f} nats per character")


if __name__ == "__main__":
    main()
