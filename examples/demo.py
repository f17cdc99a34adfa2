"""Stream text from the shipped model on one backend or several, and check that they agree.

    python examples/demo.py                    on NumPy alone
    python examples/demo.py numpy torch mlx    the same prompt and seed on each

The exit status is 1 when two backends give different text.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mambax

MODEL = Path(__file__).parent.parent / "models" / "tinyshakespeare"


def stream(backend: str, options: argparse.Namespace) -> str:
    """Print what one backend makes of the prompt, as it comes; return it."""
    model = mambax.load(options.model, backend=backend)
    print(f"\n--- {backend} {model.nn.version()}\n{options.prompt}", end="", flush=True)
    text, tokens, began = "", 0, 0.0
    for event in model.generate_streaming(
        options.prompt, max_new_tokens=options.tokens, temperature=0.8, top_p=0.95, seed=options.seed
    ):
        began = began or time.perf_counter()  # when the prompt has been read, and what needed compiling is compiled
        text += str(event)
        tokens += event.token is not None
        print(event, end="", flush=True)
    seconds = time.perf_counter() - began
    print(f"\n--- {tokens} tokens, {(tokens - 1) / seconds:.0f} per second" if tokens > 1 else "")
    return text


def disagreement(texts: dict[str, str]) -> str:
    """Which backend first leaves the text of the first one, and where; "" when all are the same."""
    (first, expected), *others = texts.items()
    for name, text in others:
        if text != expected:
            same = next((i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), None)
            at = min(len(text), len(expected)) if same is None else same
            ours, theirs = text[at : at + 40], expected[at : at + 40]
            return f"{name} differs from {first} after {at} characters: {ours!r}, not {theirs!r}"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backends", nargs="*", default=["numpy"], help="backends to run (default: numpy)")
    parser.add_argument("--model", default=str(MODEL), help="checkpoint folder or repository")
    parser.add_argument("--prompt", default="ROMEO:\n")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to generate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    texts = {name: stream(name, options) for name in dict.fromkeys(options.backends)}
    difference = disagreement(texts)
    if difference:
        print(f"\n{difference}", file=sys.stderr)
        return 1
    if len(texts) > 1:
        print(f"\nsame text on {len(texts)} backends")
    return 0


if __name__ == "__main__":
    sys.exit(main())
