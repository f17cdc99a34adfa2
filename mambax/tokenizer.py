"""Tokenizers: ``tokenizer.json`` through the tokenizers library, special tokens, chat templates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambax import chat, tokenizer_files
from mambax.detokenizer import Detokenizer, Pieces
from mambax.paths import path_of

if TYPE_CHECKING:
    import tokenizers

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to token ids and back, as ``transformers`` does with the same files.

    Args:
        backend: a tokenizer of the tokenizers library. It is taken over, not copied: its padding and truncation are
            turned off.
        bos_token, eos_token, pad_token: special tokens; added to the vocabulary if they are not in it.
        chat_template: a Jinja template, or several by name with one of them ``"default"``.
        config: what else ``tokenizer_config.json`` says; kept for :meth:`save_pretrained`.

    Raises:
        ValueError: when a special token is not text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        given = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        self._config = dict(config or {}) | {name: token for name, token in given.items() if token is not None}
        self._templates = (
            {"default": chat_template} if isinstance(chat_template, str) else dict(chat_template or {})
        )
        self.special_tokens = {
            name: _content(name, self._config[name]) for name in SPECIAL_TOKENS if self._config.get(name)
        }
        """The text of each special token that is set, by its role: ``{"eos_token": "<|endoftext|>"}``."""
        _prepare(backend, self._config, self.special_tokens)
        self._backend = backend
        self._pieces: Pieces | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer files of a checkpoint folder.

        Raises:
            FileNotFoundError: when the folder has neither ``tokenizer.json`` nor Mistral's ``tokenizer.model.v3``.
            ValueError: for a file that is not what it should be.
        """
        folder = path_of(folder, "folder")
        backend, config = tokenizer_files.read_backend(folder)
        config |= tokenizer_files.read_config(folder)
        templates = tokenizer_files.read_templates(folder, config.pop("chat_template", None))
        return cls(backend, chat_template=templates, config=config)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write files that ``transformers`` and :meth:`from_pretrained` open; the folder is made if need be."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        tokenizer_files.write(
            path_of(folder, "folder"), self._backend, config | self._config, self.special_tokens, self._templates
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text.

        Args:
            text: any text; special tokens written out in it are recognised.
            add_special_tokens: put those around it that the tokenizer puts around a text, often a beginning-of-text
                token, often none. A rendered chat template has them already.

        Raises:
            ValueError: for what is not text, half a surrogate pair included.
        """
        if not isinstance(text, str):
            raise ValueError(f"Tokenizer.encode: expected text, found {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Tokenizer.encode: the text has half a surrogate pair at character {error.start}, so that it is "
                "not Unicode; was it read with the wrong encoding?"
            ) from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_rest(self, text: str, start: int) -> list[int]:
        """The token ids of ``text[start:]`` as they are within the whole text, without added special tokens.

        What a state should read next that has read ``text[:start]``. Where a token begins at ``start``, these are
        the last tokens of ``encode(text)``; else ``text[start:]`` is encoded by itself.
        """
        ids = self.encode(text, add_special_tokens=False)
        target, read = len(text[:start].encode()), b""
        for number, token in enumerate(ids):
            if len(read) >= target:
                if read.decode(errors="replace") == text[:start]:
                    return ids[number:]
                break
            read += self.pieces.piece(token, first=number == 0) or b""
        return self.encode(text[start:], add_special_tokens=False)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True, continues: bool = False) -> str:
        """The text of token ids.

        Args:
            token_ids: ids; those outside the vocabulary have no text.
            skip_special_tokens: leave special tokens out.
            continues: the tokens carry on a text, so that the space in front of the first word is kept.
        """
        stream = Detokenizer(self.pieces, skip_special_tokens=skip_special_tokens, continues=continues)
        return stream.text(map(int, token_ids))

    def stream(self, *, continues: bool = False) -> Detokenizer:
        """A :class:`Detokenizer`: ``add`` each token, then ``finish``. Arguments as of :meth:`decode`."""
        return Detokenizer(self.pieces, continues=continues)

    @property
    def pieces(self) -> Pieces:
        """The bytes of each token.

        Raises:
            ValueError: when this kind of tokenizer cannot be decoded one token at a time.
        """
        if self._pieces is None:
            self._pieces = Pieces(self._backend)
        return self._pieces

    def token_id(self, token: str) -> int | None:
        """The id of a token, or None when the vocabulary does not have it."""
        return self._backend.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's table may have more rows, as padding."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text."""
        return self._special_id("bos_token")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end a text; empty when there is none."""
        eos = self._special_id("eos_token")
        return () if eos is None else (eos,)

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token."""
        return self._special_id("pad_token")

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_id(token)

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of a conversation, or None."""
        return self._templates.get("default")

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        if template is None:
            self._templates.pop("default", None)
        else:
            self._templates["default"] = self.find_template(template)

    def find_template(self, template: str | None = None) -> str:
        """The source of a chat template.

        Args:
            template: the tokenizer's own when None; one of its own by name; ``"zephyr"``, ``"chatml"`` or
                ``"plain"``; or Jinja source.

        Raises:
            ValueError: when there is none.
        """
        names = ", ".join(map(repr, {**self._templates, **chat.NAMED_TEMPLATES}))
        if template is None and "default" not in self._templates:
            raise ValueError(f"this tokenizer has no chat template; pass template=, one of {names} or Jinja source")
        for known in (self._templates, chat.NAMED_TEMPLATES):
            if (template or "default") in known:
                return known[template or "default"]
        if not isinstance(template, str) or "{" not in template:
            raise ValueError(f"unknown chat template {template!r}; expected one of {names}, or Jinja source")
        return template

    def apply_chat_template(
        self,
        messages: Sequence[chat.Message],
        add_generation_prompt: bool = True,
        *,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """A conversation as the text to encode, with ``add_special_tokens=False``.

        Args:
            messages: ``[{"role": "user", "content": "Hello"}, ...]``.
            add_generation_prompt: end with what introduces the assistant's answer.
            template: see :meth:`find_template`.
            variables: passed to the template beside the special tokens.

        Raises:
            ValueError: see :func:`mambax.chat.render`.
        """
        values = {**self.special_tokens, "add_generation_prompt": add_generation_prompt, **variables}
        return chat.render(self.find_template(template), messages, **values)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pieces": None}  # cheap to build again

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, {self.special_tokens})"


def _prepare(backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Set up a backend as the ``TokenizersBackend`` of ``transformers`` sets up its own."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    backend.no_padding()
    backend.no_truncation()
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in _listed_tokens(config):
        if token["content"] not in known:
            flags = {
                name: token[name] for name in ("lstrip", "rstrip", "single_word", "normalized") if name in token
            }
            backend.add_tokens([AddedToken(token["content"], special=token.get("special", False), **flags)])
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for token in special.values():
        if token not in known:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    if "add_bos_token" in config or "add_eos_token" in config:
        bos = [special["bos_token"]] if config.get("add_bos_token") and "bos_token" in special else []
        eos = [special["eos_token"]] if config.get("add_eos_token") and "eos_token" in special else []
        ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys(bos + eos)]
        single = [*bos, "$A", *eos]
        backend.post_processor = TemplateProcessing(single=single, pair=[*single, "$B:1"], special_tokens=ids)


def _listed_tokens(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of ``added_tokens_decoder``, by their id."""
    listed = config.get("added_tokens_decoder") or {}
    valid = isinstance(listed, Mapping) and all(
        str(number).isdecimal() and isinstance(token, Mapping) and isinstance(token.get("content"), str)
        for number, token in listed.items()
    )
    if not valid:
        raise ValueError(
            "tokenizer_config.json: added_tokens_decoder is not a mapping of ids to tokens; expected such as "
            '"0": {"content": "<|endoftext|>", "special": true}'
        )
    return [token for _, token in sorted(listed.items(), key=lambda item: int(item[0]))]


def _content(name: str, token: Any) -> str:
    """The text of a special token, written as text or as a mapping with its flags."""
    content = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(content, str):
        raise ValueError(f"{name} is {token!r}; expected text, or a mapping with the text under 'content'")
    return content
