"""Train a small Mamba language model on a text file, with PyTorch, on a laptop CPU.

    python examples/train_tiny.py examples/data/tinyshakespeare.txt models/tinyshakespeare

The text is cut into BPE tokens by a vocabulary learnt from its training part; the last tenth is held out. The
batch is a set of readers at different places of the text. Each reads on where it stopped, from the state it had
there, so that the model learns to use a state much older than one window.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F

import mambax

CARD = """---
library_name: mambax
tags: [mamba, tiny, shakespeare]
---
# A tiny Mamba that has read Shakespeare

A Mamba-1 language model of {parameters:,} parameters ({d_model} wide, {n_layer} blocks, {vocab} BPE tokens), for
demonstrations and tests. It writes in the manner of its training text, and knows nothing else.

- Training text: tinyshakespeare (public domain), the first {train_chars:,} characters.
- Held-out text: the last {held_chars:,} characters, read as one stream: **{nats:.3f} nats per character**
  ({bits:.3f} bits).
- Training: {steps} steps of {batch} x {length} tokens, {minutes:.0f} minutes on {threads} CPU thread(s)
  (PyTorch {torch}), seed {seed}.

```sh
{command}
```
"""


def train_tokenizer(text: str, size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of ``size`` tokens learnt from a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def parameter_groups(model: torch.nn.Module, decay: float) -> list[dict]:
    """Weight decay for matrices alone: not for A_log, D, biases, norms and the convolution."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and not n.endswith("A_log")]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def held_out_loss(model: Any, ids: torch.Tensor, chunk: int = 1024) -> float:
    """Summed cross-entropy in nats of ids (L,), read as one stream; the first token is not counted."""
    model.eval()
    total, state = 0.0, None
    for start in range(0, len(ids) - 1, chunk):
        part = ids[start : start + chunk + 1]
        output = model(part[None, :-1], state)
        state = output.state
        total += F.cross_entropy(output.logits[0], part[1:], reduction="sum").item()
    model.train()
    return total


def train(model: Any, ids: torch.Tensor, args: argparse.Namespace) -> None:
    """Run the optimiser over the training ids (L,)."""
    optimizer = torch.optim.AdamW(parameter_groups(model, args.decay), lr=args.lr, betas=(0.9, 0.98))
    warmup = max(1, min(100, args.steps // 10))
    at = torch.randint(len(ids), (args.batch,))
    window = torch.arange(args.length + 1)
    state = model.init_state(args.batch)
    began, loss = time.perf_counter(), math.nan
    for step in track(range(args.steps), description="training"):
        progress = (step + 1) / args.steps
        rate = min((step + 1) / warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        part = ids[(at[:, None] + window) % len(ids)]  # (B, L + 1), around the end
        output = model(part[:, :-1], state)
        loss = F.cross_entropy(output.logits.flatten(0, 1), part[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        at = at + args.length
        fresh = torch.rand(args.batch) < args.restart  # some readers go to another place, with an empty state
        at = torch.where(fresh, torch.randint(len(ids), (args.batch,)), at)
        state = model.init_state(args.batch).where(fresh, output.state.detach())
        if (step + 1) % 50 == 0:
            speed = (step + 1) * args.batch * args.length / (time.perf_counter() - began)
            print(f"step {step + 1:5d}  loss {loss.item():.3f} nats per token  {speed:,.0f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("text", type=Path, help="a UTF-8 text file")
    parser.add_argument("out", type=Path, help="folder for the model, in Hugging Face layout")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=512, help="BPE tokens, at least 256")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--restart", type=float, default=0.05, help="chance that a reader starts afresh, per step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    text = args.text.read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    bpe = train_tokenizer(text[:cut], args.vocab)
    ids, held = (torch.tensor(bpe.encode(part).ids) for part in (text[:cut], text[cut:]))
    if min(len(ids), len(held)) <= args.length:
        parser.error(
            f"{args.text} gives {len(ids)} + {len(held)} tokens; expected more than --length {args.length}"
        )

    torch.manual_seed(args.seed)
    config = mambax.MambaLMConfig(
        d_model=args.d_model, n_layer=args.layers, vocab_size=bpe.get_vocab_size(), dt_min=0.001, dt_max=0.1
    )
    model = mambax.from_config(config, backend="torch", seed=args.seed)
    model.tokenizer = mambax.Tokenizer(bpe)
    began = time.perf_counter()
    train(model, ids, args)
    minutes = (time.perf_counter() - began) / 60
    nats = held_out_loss(model, held) / len(text[cut:])
    mambax.save_pretrained(model, args.out)
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        d_model=config.d_model,
        n_layer=config.n_layer,
        vocab=config.vocab_size,
        train_chars=cut,
        held_chars=len(text) - cut,
        nats=nats,
        bits=nats / math.log(2),
        minutes=minutes,
        threads=torch.get_num_threads(),
        torch=torch.__version__.partition("+")[0],
        command=f"python examples/train_tiny.py {args.text.as_posix()} {args.out.as_posix()}"
        + "".join(
            f" --{name.replace('_', '-')} {value}"
            for name, value in vars(args).items()
            if value != parser.get_default(name) and name not in ("text", "out")
        ),
        **{name: getattr(args, name) for name in ("steps", "batch", "length", "seed")},
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(f"held-out loss {nats:.3f} nats per character after {minutes:.1f} minutes; saved to {args.out}")


if __name__ == "__main__":
    main()
