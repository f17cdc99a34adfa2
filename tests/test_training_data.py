"""Data: what is in a batch, and that it is always the same."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mambax import Tokenizer
from mambax.training import Documents, LabelledRows, Reading, Stream, TokenDataset, Windows, corpus, vocabularies
from mambax.training import write_tokens as write
from mambax.training.corpus import Lines, TextFile

TEXT = "To be, or not to be:\n\nthat is  the question. Naïve ☃ 😀!\r\n  Whether 'tis nobler\tin the mind\n" * 40
IGNORE = -100


def dataset(folder: Path, documents: list[str], name: str = "tokens") -> TokenDataset:
    """The bytes of the documents."""
    return write([[text] for text in documents], vocabularies.byte_tokenizer(), folder / name)


@pytest.fixture
def numbers(tmp_path: Path) -> TokenDataset:
    """103 tokens 0, 1, 2, ... in documents of 10, 1, 30 and 62."""
    every = "".join(map(chr, range(103)))
    return dataset(tmp_path, [every[:10], every[10:11], every[11:41], every[41:]])


# --- text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 64, 10**6])
def test_blocks_give_the_tokens_of_the_whole_text(tmp_path, monkeypatch, block):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    monkeypatch.setattr(corpus, "BLOCK", block)
    (source,) = corpus.sources([path])
    assert isinstance(source, TextFile)
    blocks = list(source.blocks())
    assert "".join(blocks) == TEXT
    assert block > 100 or max(map(len, blocks)) <= block + 20
    tokenizer = vocabularies.bpe_tokenizer(source.blocks(), 300)
    tokens = write([source.blocks()], tokenizer, tmp_path / "tokens")
    assert tokens.tokens.tolist() == tokenizer.encode(TEXT)
    assert tokenizer.decode(tokens.tokens) == TEXT
    assert (tokens.text_bytes, tokens.characters) == (len(TEXT.encode()), len(TEXT))


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_a_file_is_split_between_characters(tmp_path, fraction):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    first, last = corpus.split_file(TextFile(path, 0, path.stat().st_size), fraction)
    assert "".join(first.blocks()) + "".join(last.blocks()) == TEXT
    assert (last.stop - last.start) / path.stat().st_size == pytest.approx(fraction, abs=0.01)


def test_folders_and_json_lines(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("two", encoding="utf-8")
    (tmp_path / "b" / ".hidden").write_text("no", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "öne"}\n', encoding="utf-8")
    found = corpus.sources([tmp_path])
    assert [type(source) for source in found] == [Lines, TextFile]
    assert ["".join(document) for document in corpus.documents(found)] == ["one", "öne", "two"]


BAD_TEXT = {
    "nothing.txt": (None, FileNotFoundError, "no such file"),
    "latin.txt": (b"caf\xe9 ", ValueError, "UTF-8"),
    "cut.txt": ("😀".encode()[:3], ValueError, "UTF-8"),
    "broken.jsonl": (b'{"text": "a"}\n{"text"', ValueError, "line 2: not valid JSON"),
    "other.jsonl": (b'{"body": "a"}\n', ValueError, "line 1.*'text', found 'body'.*data.field"),
    "number.jsonl": (b'{"text": 3}\n', ValueError, "line 1"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_text_that_cannot_be_read_is_named(tmp_path, name):
    content, error, message = BAD_TEXT[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=rf"{name}.*{message}"):
        write(corpus.documents(corpus.sources([tmp_path / name])), vocabularies.byte_tokenizer(), tmp_path / "t")


# --- vocabularies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [False, True])
def test_vocabularies_are_saved_and_undone_token_by_token(tmp_path, end):
    made = {
        "bytes": vocabularies.byte_tokenizer(end_of_text=end),
        "characters": vocabularies.character_tokenizer([TEXT], end_of_text=end),
        "bpe": vocabularies.bpe_tokenizer([TEXT], 280, end_of_text=end),
    }
    for name, tokenizer in made.items():
        tokenizer.save_pretrained(tmp_path / name)
        again = Tokenizer.from_pretrained(tmp_path / name)
        ids = again.encode(TEXT)
        assert ids == tokenizer.encode(TEXT)
        assert again.decode(ids) == TEXT, name
        assert len(again.eos_token_ids) == end
        assert max(ids) < again.vocab_size
    assert made["bytes"].encode(TEXT) == list(TEXT.encode())
    assert len(made["characters"].encode(TEXT)) == len(TEXT)
    assert made["characters"].decode(made["characters"].encode("to £")) == "to <unk>"


def test_a_vocabulary_too_small_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 256; expected at least 257"):
        vocabularies.bpe_tokenizer([TEXT], 256, end_of_text=True)
    with pytest.raises(ValueError, match="empty"):
        vocabularies.character_tokenizer([])


# --- token files -------------------------------------------------------------------------------------------------


def test_token_files_are_mapped_and_checked(tmp_path, numbers):
    assert isinstance(numbers.tokens, np.memmap)
    assert numbers.tokens.dtype == np.uint16
    assert numbers.tokens.tolist() == list(range(103))
    assert numbers.ends.tolist() == [10, 11, 41, 103]
    assert TokenDataset(numbers.folder).digest == numbers.digest != dataset(tmp_path, ["x"], "other").digest
    with (numbers.folder / "tokens.bin").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match="expected 206 bytes, found 207"):
        TokenDataset(numbers.folder)
    (numbers.folder / "dataset.json").write_text(json.dumps({"format": "other"}), encoding="utf-8")
    with pytest.raises(ValueError, match="'mambax-tokens' of version 1, found 'other'"):
        TokenDataset(numbers.folder)
    with pytest.raises(FileNotFoundError, match=r"no dataset\.json"):
        TokenDataset(tmp_path)


def test_the_end_of_text_follows_each_document(tmp_path):
    tokens = write(
        [["ab"], [], ["c"]], vocabularies.byte_tokenizer(end_of_text=True), tmp_path / "t", end_of_text=256
    )
    assert tokens.tokens.tolist() == [97, 98, 256, 99, 256]
    assert tokens.ends.tolist() == [3, 5]


def test_a_failed_write_leaves_nothing(tmp_path):
    def texts() -> Any:
        yield ["fine"]
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write(texts(), vocabularies.byte_tokenizer(), tmp_path / "tokens")
    with pytest.raises(ValueError, match="the texts are empty"):
        write([[""], []], vocabularies.byte_tokenizer(), tmp_path / "tokens")
    assert os.listdir(tmp_path) == []


# --- batches -----------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_windows_are_all_of_the_text_once_in_each_epoch(numbers):
    data = Windows(numbers, 5, 3, seed=1)
    assert data.count == 19
    seen = np.concatenate([data.batch(step).input_ids for step in range(19)])  # three epochs of 19 rows
    for epoch in range(3):
        rows = seen[19 * epoch : 19 * (epoch + 1)]
        assert (np.diff(rows, axis=1) == 1).all()
        assert np.array_equal(np.sort(rows[:, 0]), rows[:, 0].min() + 5 * np.arange(19))
    assert len({tuple(seen[19 * e : 19 * (e + 1), 0]) for e in range(3)}) == 3
    batch = data.batch(4)
    assert np.array_equal(batch.shift_labels, batch.input_ids + 1)
    assert batch.mask is batch.boundaries is batch.fresh is None


@pytest.mark.parametrize("make", [Windows, Reading, Documents])
def test_a_batch_is_a_function_of_the_step_and_the_seed(numbers, make):
    first, second = make(numbers, 5, 3, seed=1), make(numbers, 5, 3, seed=1)
    for step in (40, 3, 0, 17, 40, 12):
        assert same(first.batch(step), second.batch(step))
    assert not same(first.batch(0), make(numbers, 5, 3, seed=2).batch(0))
    assert first.fingerprint() == second.fingerprint() != make(numbers, 5, 3, seed=2).fingerprint()


def test_readers_read_on(numbers):
    data = Reading(numbers, 5, 4, restart=0.2, seed=3)
    before = data.batch(0)
    assert before.fresh is not None
    assert before.fresh.all()
    fresh = 0
    for step in range(1, 100):
        batch = data.batch(step)
        assert np.array_equal(batch.shift_labels, (batch.input_ids + 1) % 103)
        goes_on = batch.input_ids[:, 0] == before.shift_labels[:, -1]
        assert (goes_on | batch.fresh).all()
        fresh += batch.fresh.sum()
        before = batch
    assert 40 < fresh < 120
    assert not any(Reading(numbers, 5, 4, restart=0).batch(step).fresh.any() for step in range(1, 9))


@pytest.mark.parametrize("make", [Windows, Reading])
def test_separate_documents(numbers, make):
    data = make(numbers, 8, 4, seed=0, separate=True)
    for step in range(20):
        batch = data.batch(step)
        begins = np.isin(batch.input_ids, [0, 10, 11, 41])
        assert np.array_equal(batch.boundaries, begins)
        following = (batch.input_ids + 1) % 103
        want = np.where(np.isin(following, [0, 10, 11, 41]), IGNORE, following)
        assert np.array_equal(batch.shift_labels, want)
        assert batch.items == (want != IGNORE).sum()


def test_documents_one_to_a_row(numbers):
    data = Documents(numbers, 20, 3, seed=0)
    pairs: list[tuple[int, int]] = []
    assert data.count == 1 + 0 + 2 + 4
    for step in range(7):  # three epochs
        batch = data.batch(step)
        mask = np.ones_like(batch.input_ids, bool) if batch.mask is None else batch.mask
        assert (batch.shift_labels[~mask] == IGNORE).all()
        assert mask[:, 0].all()
        assert not (np.diff(mask.astype(int), axis=1) > 0).any()
        assert batch.tokens == mask.sum()
        pairs += zip(batch.input_ids[mask].tolist(), batch.shift_labels[mask].tolist(), strict=True)
    every = [(i, i + 1) for i in range(102) if i not in (9, 10, 40)]
    assert sorted(pairs) == sorted(every * 3)


@pytest.mark.parametrize("rows", [1, 3, 8, 200])
@pytest.mark.parametrize("length", [1, 7, 500])
def test_a_stream_predicts_every_token_once_and_carries_on(numbers, rows, length):
    data = Stream(numbers, length, rows)
    pairs, last = [], None
    for batch in data.batches():
        wanted = batch.shift_labels != IGNORE
        pairs += zip(batch.input_ids[wanted].tolist(), batch.shift_labels[wanted].tolist(), strict=True)
        assert batch.fresh.all() == (last is None)
        if last is not None:
            assert np.array_equal((last.input_ids[:, -1] + 1) % 103, batch.input_ids[:, 0])
        last = batch
    assert sorted(pairs) == [(i, i + 1) for i in range(102)]


def test_labelled_rows():
    sequences = [np.arange(n) + 1 for n in (3, 1, 5, 2)]
    data = LabelledRows(sequences, np.array([0, 1, 1, 0]), 2, seed=0)
    seen = []
    for step in range(4):
        batch = data.batch(step)
        for ids, label in zip(batch.input_ids, batch.labels, strict=True):
            seen.append((int(ids.max()), int(label)))
        assert batch.items == 2
    assert sorted(seen[:4]) == sorted(seen[4:]) == [(1, 1), (2, 0), (3, 0), (5, 1)]
    assert [batch.labels.tolist() for batch in data.batches()] == [[0, 1], [1, 0]]
    assert next(data.batches()).mask.tolist() == [[True] * 3, [True, False, False]]
    assert same(data.batch(7), LabelledRows(sequences, np.array([0, 1, 1, 0]), 2, seed=0).batch(7))


def test_data_that_are_too_short_are_refused(tmp_path, numbers):
    for make in (Windows, Reading):
        with pytest.raises(ValueError, match="has 103 tokens; expected at least 104 for rows of length 103"):
            make(numbers, 103, 2)
    with pytest.raises(ValueError, match="no document has two tokens"):
        Documents(dataset(tmp_path, ["a", "b"], "short"), 4, 2)
    with pytest.raises(ValueError, match="has 1 tokens; expected at least 2"):
        Stream(dataset(tmp_path, ["a"], "one"), 4)
    with pytest.raises(ValueError, match="at least one"):
        LabelledRows([], np.zeros(0), 2)
    with pytest.raises(ValueError, match="for each of the 1 sequences, found 2"):
        LabelledRows([np.arange(3)], np.zeros(2), 2)
    with pytest.raises(ValueError, match="restart is 2"):
        Reading(numbers, 5, 4, restart=2)
