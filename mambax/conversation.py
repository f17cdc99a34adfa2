"""A conversation that keeps the model's state, so that a turn costs its own tokens and not those before it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mambax.chat import NAMED_TEMPLATES, check_messages
from mambax.generation import Generation, StreamEvent
from mambax.paths import path_of
from mambax.state import InferenceParams

SNAPSHOTS = 16
"""States kept, those of the latest turns; after undoing more than that, the conversation is read again."""

FORMAT = "mambax conversation 1"
"""What a saved conversation calls itself."""

_PROBE = "\ue000"  # a private-use character, to find where a template puts the assistant's words


class Snapshot(NamedTuple):
    """A state, the text that it has read, and how many messages that covers."""

    messages: int
    text: str
    state: InferenceParams | None


NOTHING = Snapshot(0, "", None)


class Conversation:
    """Turns of a user and a model.

    At each turn the chat template's text of the whole conversation is what the state has read, and only what it has
    grown by is read now. Where a template changes what it wrote for earlier turns (or an answer cannot be told from
    its end, such as one with special tokens in it), the model goes back to the latest state that still agrees and
    reads on from there; ``read_again`` says so.

    Args:
        model: a causal language model with a tokenizer.
        template: how messages become text, see :meth:`mambax.Tokenizer.find_template`; when None the tokenizer's
            own, or ``"plain"`` if it has none: a model that only continues text.
        system: instructions in front of the conversation, if the template takes them.

    Attributes:
        messages: what was said, ``{"role": ..., "content": ...}`` each.
        read_again: whether the latest turn had to read earlier ones again.

    Raises:
        ValueError: for what is no causal language model or has no tokenizer, and for a template that is unknown or
            fails.
    """

    def __init__(self, model: Any, *, template: str | None = None, system: str | None = None) -> None:
        if getattr(model, "generate_streaming", None) is None:
            raise ValueError(f"a conversation needs a causal language model, found {type(model).__name__}")
        if model.tokenizer is None:
            raise ValueError("a conversation needs a tokenizer, and this model has none; set model.tokenizer")
        self.model = model
        own = model.tokenizer.chat_template is not None
        self.template: str = model.tokenizer.find_template(template if template or own else "plain")
        self.messages: list[dict[str, str]] = []
        self.read_again = False
        self._snapshots = [NOTHING]
        self._system = system
        self.reset()
        self._eos = self._eos_ids(self.template, system)

    @property
    def is_plain(self) -> bool:
        """Whether the words of user and model simply follow each other, without roles."""
        return self.template == NAMED_TEMPLATES["plain"]

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._snapshots = [NOTHING]

    def undo(self) -> bool:
        """Take back the last turn, the model's answer included. Returns whether there was one."""
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not turns:
            return False
        self.messages = self.messages[: turns[-1]]
        self._snapshots = [s for s in self._snapshots if s.messages <= len(self.messages)]
        return True

    def say(self, text: str, **options: Any) -> Iterator[StreamEvent]:
        """Say something and stream the answer.

        The turn counts from its last event on, the one with the Generation; until then nothing is changed. An
        answer cut short by Ctrl-C counts as far as it went, also when a reader throws KeyboardInterrupt into this
        iterator.

        Args:
            text: what the user says.
            options: for ``model.generate_streaming``; ``state`` and, unless given, ``eos`` are set here.

        Raises:
            ValueError: for text or options that cannot be used; the conversation is as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        full = self.model.tokenizer.apply_chat_template(messages, template=self.template)
        base = next(s for s in reversed(self._snapshots) if full.startswith(s.text))
        if base.state is None:
            ids = self.model.tokenizer.encode(full, add_special_tokens=self.is_plain)
        else:
            ids = self.model.tokenizer.encode_rest(full, len(base.text))
        events = self.model.generate_streaming(ids, **({"eos": self._eos} | options | {"state": base.state}))
        return self._follow(events, messages, full, base)

    def save(self, path: str | Path) -> tuple[Path, ...]:
        """Write ``<path>.json``, what was said, and ``<path>.safetensors``, the state that has read it.

        Returns:
            The files written.

        Raises:
            ValueError: when nothing has been said yet.
            FileNotFoundError: when the folder does not exist.
            IsADirectoryError: when a folder has the name, or that of a file.
            OSError: when a file cannot be written; those of an earlier save are as they were.
        """
        from mambax.checkpoint.json_files import dump_object

        talk, arrays = _files(path)
        if not talk.parent.is_dir():
            raise FileNotFoundError(f"{talk.parent}: no such folder; expected one that exists")
        for place in (path_of(path, "path"), talk, arrays):
            if place.is_dir():
                raise IsADirectoryError(f"{place}: expected a name for two files, found a folder; use another name")
        latest = self._snapshots[-1]
        if not any(message["role"] == "user" for message in self.messages):
            raise ValueError("there is nothing to save: nothing has been said yet")
        content: dict[str, Any] = {"format": FORMAT, "template": self.template, "system": self._system}
        content |= {"messages": self.messages, "read": latest.text, "covers": latest.messages, "state": None}
        with tempfile.TemporaryDirectory(dir=talk.parent, prefix=".conversation-") as folder:
            new_talk, new_arrays = Path(folder, talk.name), Path(folder, arrays.name)
            if latest.state is not None:
                latest.state.save(new_arrays)
                content["state"] = _digest(new_arrays)
            new_talk.write_bytes(dump_object(content))
            if latest.state is None:
                os.replace(new_talk, talk)
                return (talk,)
            os.replace(new_arrays, arrays)
            os.replace(new_talk, talk)
        return talk, arrays

    def load(self, path: str | Path) -> None:
        """Go on with a saved conversation in place of this one.

        Raises:
            FileNotFoundError: when there is no such conversation.
            ValueError: when the files are damaged, do not belong together or are of another model. The
                conversation is as it was.
        """
        from mambax.checkpoint.json_files import read_object

        talk, arrays = _files(path)
        _expect(talk)
        saved = _checked(talk, read_object(talk))
        state = None
        if saved["state"] is not None:
            _expect(arrays)
            if _digest(arrays) != saved["state"]:
                raise ValueError(f"{arrays}: not the state that {talk.name} was saved with; save them again")
            state = self.model.load_state(arrays)
        eos = self._eos_ids(saved["template"], saved["system"])
        self.template, self._system, self._eos = saved["template"], saved["system"], eos
        self.messages, self._snapshots = saved["messages"], [NOTHING]
        if state is not None:
            self._snapshots.append(Snapshot(saved["covers"], saved["read"], state))

    def _eos_ids(self, template: str, system: str | None) -> tuple[int, ...]:
        """The tokens that end an answer: the model's, the tokenizer's, and what the template writes after one."""
        tokenizer = self.model.tokenizer
        probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        if system is not None:
            probe.insert(0, {"role": "system", "content": system})
        text = tokenizer.apply_chat_template(probe, add_generation_prompt=False, template=template)
        after = tokenizer.encode(text.rpartition(_PROBE)[2], add_special_tokens=False)
        turn_end = [token for token in after[:1] if tokenizer.pieces.is_special(token)]
        config = self.model.config
        ends = dict.fromkeys([*config.eos_token_ids, *tokenizer.eos_token_ids, *turn_end])
        return tuple(token for token in ends if token < config.vocab_size)

    def _follow(
        self, events: Any, messages: list[dict[str, str]], full: str, base: Snapshot
    ) -> Iterator[StreamEvent]:
        """Pass the events on, and take the turn down when its last one has come."""
        try:
            for event in events:
                self._take(event.generation, messages, full, base)
                yield event
        except KeyboardInterrupt:  # thrown in by the reader: the generation itself ends without raising it
            for event in interrupt(events):
                self._take(event.generation, messages, full, base)
                yield event

    def _take(
        self, generation: Generation | None, messages: list[dict[str, str]], full: str, base: Snapshot
    ) -> None:
        if generation is None or not generation.tokens:
            return
        self.read_again = base is not self._snapshots[-1]
        text = full + self.model.tokenizer.decode(generation.tokens, skip_special_tokens=False, continues=True)
        self.messages = [*messages, {"role": "assistant", "content": generation.text}]
        kept = self._snapshots[: self._snapshots.index(base) + 1][-SNAPSHOTS + 1 :]
        kept.append(Snapshot(len(self.messages), text, generation.state))
        self._snapshots = kept if kept[0] is NOTHING else [NOTHING, *kept]


def interrupt(events: Any) -> Iterator[StreamEvent]:
    """End a generation as Ctrl-C does while it computes, for a reader whom Ctrl-C met elsewhere.

    Args:
        events: the iterator of ``model.generate_streaming`` or :meth:`Conversation.say`.

    Returns:
        The events that are left: the one with the Generation, unless it has come or nothing had begun.
    """
    try:
        yield events.throw(KeyboardInterrupt())
    except (StopIteration, KeyboardInterrupt):  # it had finished, or had not begun
        return
    yield from events


def _files(path: str | Path) -> tuple[Path, Path]:
    path = path_of(path, "path")
    stem = path.name.removesuffix(".json").removesuffix(".safetensors")
    if not stem:
        raise ValueError(f"{str(path)!r} does not name a file")
    return path.with_name(f"{stem}.json"), path.with_name(f"{stem}.safetensors")


def _expect(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected one of the two that Conversation.save writes")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        import hashlib  # with OpenSSL, megabytes that are seldom needed

        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _checked(path: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """A saved conversation whose fields are what they should be."""
    if saved.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {saved.get('format')!r}; expected {FORMAT!r}, as save writes it")
    kinds = {"template": str, "read": str, "covers": int, "system": (str, type(None)), "state": (str, type(None))}
    for field, kind in kinds.items():
        if field not in saved or not isinstance(saved[field], kind):
            raise ValueError(f"{path}: {field} is missing or of the wrong kind; save the conversation again")
    check_messages(saved.get("messages", ()), saved["template"])
    return saved
