"""Tokenizers."""


class Tokenizer: ...
