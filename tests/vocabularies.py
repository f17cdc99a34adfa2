"""Tokenizers made for tests, of the kinds that checkpoints have."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from mambax import Tokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "O Romeo, Romeo! wherefore art thou Romeo?\nDeny thy father and refuse thy name;",
    "Grüße aus Köln, à bientôt, mañana. 日本語の文章です。 안녕하세요",
]
TRICKY = "a日本語 👩‍👩‍👧‍👦 🇩🇪 e\u0301n\u0303 Ünïcödé\n\n\t  two  spaces ﷽ \u200b!"
EOS = "<|endoftext|>"
CHATML = ("<|im_start|>", "<|im_end|>")


def byte_level() -> Backend:
    """A byte-level BPE as of GPT-NeoX, with the tokens of ChatML."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [EOS, *CHATML]
    trainer = trainers.BpeTrainer(
        vocab_size=320, show_progress=False, initial_alphabet=alphabet, special_tokens=special
    )
    backend.train_from_iterator(LINES, trainer)
    backend.add_tokens([AddedToken("   ", normalized=False), AddedToken("語の", normalized=False)])
    return backend


def byte_fallback() -> Backend:
    """A BPE with spaces as U+2581 and byte fallback, as of Llama; puts <s> in front of a text."""
    characters = sorted(set("".join(LINES[:2]).replace(" ", "▁")) | {"▁"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters, "▁t", "▁th", "he"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [("▁", "t"), ("▁t", "h"), ("h", "e")]
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def metaspace() -> Backend:
    """A vocabulary with spaces as U+2581 and the Metaspace decoder."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    return backend


def word_piece() -> Backend:
    """A WordPiece vocabulary, whose decoder puts spaces between words."""
    backend = Backend(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "c": 3, "!": 4, ".": 5}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def words() -> Backend:
    """A vocabulary without a decoder: tokens are put together with spaces."""
    backend = Backend(models.WordLevel({"the": 0, "fox": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


KINDS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "word_piece": word_piece,
    "words": words,
}


def chat_tokenizer(template: str | None = None) -> Tokenizer:
    """The byte-level one with an end-of-text token and perhaps a chat template."""
    return Tokenizer(byte_level(), eos_token=EOS, chat_template=template)
