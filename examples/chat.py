"""Chat with a model that keeps its state between turns: a turn reads its own words, not the conversation again.

    python examples/chat.py models/tinyshakespeare
    python examples/chat.py havenhq/mamba-chat zephyr

/reset forgets, /undo takes back a turn, /save NAME and /load NAME keep one for later, Ctrl-C ends an answer.
A model without a chat template goes on with the text.
"""

from __future__ import annotations

import sys

import mambax
from mambax.conversation import Conversation


def answer(talk: Conversation, text: str) -> None:
    """Say something to the model and print its answer as it comes."""
    for event in talk.say(text, max_new_tokens=200, temperature=0.7, top_p=0.95):
        print(event, end="", flush=True)
    print()


def obey(talk: Conversation, line: str) -> None:
    """Do what a line says: run a command, or say it to the model."""
    command, _, name = line.partition(" ")
    if command == "/reset":
        talk.reset()
    elif command == "/undo":
        print("(taken back)" if talk.undo() else "(nothing has been said)")
    elif command == "/save":
        print("(saved)", *talk.save(name))
    elif command == "/load":
        talk.load(name)
    elif line:
        answer(talk, line)


def main(model: str = "models/tinyshakespeare", template: str | None = None, backend: str | None = None) -> None:
    talk = Conversation(mambax.load(model, backend=backend), template=template)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            obey(talk, line)
        except (ValueError, OSError) as error:  # the conversation is as it was
            print(f"({error})", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
