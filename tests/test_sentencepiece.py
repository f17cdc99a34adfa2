"""Mistral's ``tokenizer.model.v3``: the tokens of sentencepiece itself, and files that are refused."""

from __future__ import annotations

import io
import random
import string
from pathlib import Path
from typing import Any

import pytest
from vocabularies import LINES, TRICKY

import mambax
from mambax.checkpoint.sources import Folder
from mambax.tokenizer_files import find

FILE = "tokenizer.model.v3"
EDGES = ["", " ", "  two  spaces ", "Grüße, 日本語", "\n\nx\t", "<s>", "[INST]", "a\u2581b", TRICKY]


def write(folder: Path, **changes: Any) -> Any:
    """A model of sentencepiece as Mistral makes them, in a checkpoint's folder; returns what reads it."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    lines = LINES + Path(__file__).with_name("reference.py").read_text(encoding="utf-8").splitlines()
    options: dict[str, Any] = {
        "vocab_size": 600, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True,
        "control_symbols": ["[INST]", "[/INST]"], "num_threads": 1, "minloglevel": 2,
    }  # fmt: skip
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=stream, **(options | changes)
    )
    (folder / FILE).write_bytes(stream.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_tokens_are_those_of_sentencepiece(tmp_path, add_dummy_prefix):
    theirs = write(tmp_path, add_dummy_prefix=add_dummy_prefix)
    ours = mambax.Tokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    texts = [*EDGES, *LINES, Path(__file__).with_name("tolerances.py").read_text(encoding="utf-8")]
    texts += ["".join(rng.choices(string.ascii_lowercase + " .'", k=60)) for _ in range(500)]
    for text in texts:
        ids = ours.encode(text)
        assert ids[0] == theirs.bos_id(), text
        if text not in ("<s>", "[INST]"):  # which are text to sentencepiece, and that token to mambax
            assert ids[1:] == theirs.encode(text), text
            assert ours.decode(ids) == theirs.decode(ids[1:]) == text.replace("\u2581", " ")
    assert ours.encode("[INST]", add_special_tokens=False) == [theirs.piece_to_id("[INST]")]
    assert (ours.vocab_size, ours.eos_token_ids) == (theirs.get_piece_size(), (theirs.eos_id(),))
    assert ours.special_tokens == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def test_it_is_saved_as_tokenizer_json(tmp_path):
    write(tmp_path)
    ours = mambax.Tokenizer.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "saved")
    again = mambax.Tokenizer.from_pretrained(tmp_path / "saved")
    for text in EDGES:
        assert again.encode(text) == ours.encode(text)
    assert find(Folder(tmp_path / "saved")) == tmp_path / "saved"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unigram"}, "model_type is 1; only 2 is supported"),
        ({"byte_fallback": False}, "byte_fallback is 0; only 1"),
        ({"normalization_rule_name": "nmt_nfkc"}, "precompiled_charsmap is b.*; only b'' is supported"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is 1; only 0"),
        ({"user_defined_symbols": ["[X]"]}, "user_defined_symbols is 1; only 0"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix is 1; only 0"),
    ],
)
def test_other_kinds_are_refused(tmp_path, changes, message):
    write(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"{FILE}: {message}.*make a tokenizer.json of it"):
        mambax.Tokenizer.from_pretrained(tmp_path)


def test_a_damaged_file_is_refused_wherever_it_is_cut(tmp_path):
    write(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    rng = random.Random(1)
    for size in [0, 1, 2, len(whole) - 1, *rng.sample(range(len(whole)), 100)]:
        (tmp_path / FILE).write_bytes(whole[:size])
        with pytest.raises(ValueError, match=FILE):
            mambax.Tokenizer.from_pretrained(tmp_path)
    for content in (b"\xff" * 50, b"{}", b"version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(ValueError, match=f"{FILE}: not a model of sentencepiece"):
            mambax.Tokenizer.from_pretrained(tmp_path)
