"""Tokenizers: agreement with transformers and the tokenizers library, streams, files."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import time
import unicodedata
from functools import cache
from pathlib import Path

import pytest
import vocabularies
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from vocabularies import EOS, KINDS, TRICKY

from mambax import Tokenizer


@cache
def tokenizer(kind: str) -> Tokenizer:
    return Tokenizer(KINDS[kind]())


@cache
def backend(kind: str) -> Backend:
    return KINDS[kind]()


def streamed(tok: Tokenizer, ids: list[int]) -> list[str]:
    stream = tok.stream()
    return [*map(stream.add, ids), stream.finish()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["", "the fox", TRICKY, " the ", "a ab c! cb.", "\n\n"])
def test_encode_and_decode_are_those_of_the_library(kind: str, text: str) -> None:
    ids = tokenizer(kind).encode(text)
    assert ids == backend(kind).encode(text).ids
    assert tokenizer(kind).decode(ids) == backend(kind).decode(ids)
    assert "".join(streamed(tokenizer(kind), ids)) == backend(kind).decode(ids)
    with_special = backend(kind).decode(ids, skip_special_tokens=False)
    assert tokenizer(kind).decode(ids, skip_special_tokens=False) == with_special


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 340), max_size=40))
def test_any_byte_level_tokens_stream_to_the_text_of_the_library(ids: list[int]) -> None:
    pieces = streamed(tokenizer("byte_level"), ids)
    assert "".join(pieces) == backend("byte_level").decode(ids) == tokenizer("byte_level").decode(ids)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([kind for kind in KINDS if kind != "byte_level"]), st.lists(st.integers(0, 400), max_size=40)
)
def test_any_tokens_stream_to_their_text(kind: str, ids: list[int]) -> None:
    text = "".join(streamed(tokenizer(kind), ids))
    assert text == tokenizer(kind).decode(ids)
    expected = backend(kind).decode(ids)
    # the library turns a whole run of byte tokens into U+FFFD if any of it is ill-formed
    if "\ufffd" not in expected:
        assert text == expected


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_any_text_comes_back_from_a_stream_in_whole_characters(text: str) -> None:
    for kind in ("byte_level", "byte_fallback"):
        ids = tokenizer(kind).encode(text)
        expected = backend(kind).decode(ids)
        parts = streamed(tokenizer(kind), ids)
        assert "".join(parts) == expected
        position = 0
        for part in parts:
            assert expected.startswith(part, position)
            position += len(part)


def test_a_character_of_many_tokens_appears_with_its_last_one() -> None:
    tok = tokenizer("byte_level")
    ids = tok.encode("👩‍👧")
    parts = streamed(tok, ids)
    assert len(ids) >= 8
    assert [part for part in parts if part] == ["👩", "\u200d", "👧"]
    assert parts[:4] == ["", "", "", "👩"]


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    tok = tokenizer("byte_level")
    ids = tok.encode("a日")[:-1]
    assert streamed(tok, ids)[-1] == "\ufffd"
    assert "".join(streamed(tok, ids)) == backend("byte_level").decode(ids)


def test_a_run_of_bytes_that_is_not_utf_8_spoils_nothing_around_it() -> None:
    tok = tokenizer("byte_fallback")
    ids = [tok.token_id(f"<0x{byte:02X}>") for byte in "日".encode() + b"\xff" + "本".encode()]
    assert tok.decode([i for i in ids if i is not None]) == "日\ufffd本"


def test_the_cost_of_a_token_does_not_grow() -> None:
    stream = tokenizer("byte_level").stream()
    ids = tokenizer("byte_level").encode(TRICKY * 20)
    invalid = [tokenizer("byte_level").encode("日")[0]] * 500  # never a whole character

    def cost() -> float:
        start = time.perf_counter()
        for token in itertools.chain(ids, invalid):
            stream.add(token)
        return time.perf_counter() - start

    cost()
    early = min(cost() for _ in range(5))
    for _ in range(40):
        cost()
    assert min(cost() for _ in range(5)) < 5 * early


def test_special_and_padding_tokens_have_no_text() -> None:
    tok = vocabularies.chat_tokenizer()
    ids = [*tok.encode(f"a{EOS}b"), tok.vocab_size, tok.vocab_size + 1000]
    assert tok.decode(ids) == "ab"
    assert tok.decode(ids, skip_special_tokens=False) == f"a{EOS}b"
    assert "".join(streamed(tok, ids)) == "ab"


def test_a_text_that_is_carried_on_keeps_its_space() -> None:
    tok = tokenizer("byte_fallback")
    ids = tok.encode("the the", add_special_tokens=False)
    assert tok.decode(ids[:2]) + tok.decode(ids[2:]) == "thethe"
    assert tok.decode(ids[:2]) + tok.decode(ids[2:], continues=True) == "the the"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
def test_the_rest_of_a_text_reads_on(first: str, second: str) -> None:
    assume(unicodedata.is_normalized("NFC", first + second))
    tok = tokenizer("byte_level")
    rest = tok.encode_rest(first + second, len(first))
    assert tok.decode(rest) == second
    assert tok.decode([*tok.encode(first), *rest]) == first + second


def test_the_rest_of_a_text_is_tokenized_as_in_the_whole() -> None:
    for kind in ("byte_level", "byte_fallback"):
        tok = tokenizer(kind)
        whole = tok.encode("the quick the", add_special_tokens=False)
        assert tok.encode_rest("the quick the", 9) == whole[-len(tok.encode_rest("the quick the", 9)) :]
        assert tok.encode_rest("the", 3) == []
        assert tok.encode_rest("the", 0) == tok.encode("the", add_special_tokens=False)
    assert tokenizer("byte_level").encode_rest("the", 1) == tokenizer("byte_level").encode("he")


def test_ids_of_special_tokens() -> None:
    tok = vocabularies.chat_tokenizer()
    assert tok.eos_token_ids == (tok.token_id(EOS),)
    assert tok.bos_token_id is None
    assert tok.vocab_size == backend("byte_level").get_vocab_size()
    assert Tokenizer(vocabularies.byte_level()).eos_token_ids == ()


def test_a_special_token_that_the_vocabulary_lacks_is_added() -> None:
    tok = Tokenizer(vocabularies.byte_level(), pad_token="<pad>")
    assert tok.pad_token_id == backend("byte_level").get_vocab_size()
    assert tok.encode("a<pad>")[-1] == tok.pad_token_id


@pytest.mark.parametrize("text", [None, 3, ["a"], b"a"])
def test_only_text_is_encoded(text: object) -> None:
    with pytest.raises(ValueError, match="expected text, found"):
        tokenizer("byte_level").encode(text)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="half a surrogate pair at character 2"):
        tokenizer("byte_level").encode("ab\ud83d")


def test_a_negative_id_is_refused() -> None:
    with pytest.raises(ValueError, match="token id is -1"):
        tokenizer("byte_level").decode([-1])


def test_truncation_and_padding_of_the_file_are_off() -> None:
    raw = vocabularies.byte_level()
    raw.enable_truncation(3)
    raw.enable_padding(length=64)
    assert Tokenizer(raw).encode(TRICKY) == backend("byte_level").encode(TRICKY).ids


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Metaspace()]),
    ],
)
def test_a_decoder_that_needs_later_tokens_is_refused(decoder: decoders.Decoder) -> None:
    raw = vocabularies.words()
    raw.decoder = decoder
    with pytest.raises(ValueError, match="cannot be undone one token at a time"):
        Tokenizer(raw).stream()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies(duplicate: object) -> None:
    tok = vocabularies.chat_tokenizer("{{ messages[0]['content'] }}")
    tok.decode([1, 2, 3])
    other = duplicate(tok)
    assert other.encode(TRICKY) == tok.encode(TRICKY)
    assert other.decode(other.encode(TRICKY)) == tok.decode(tok.encode(TRICKY))
    assert (other.chat_template, other.eos_token_ids) == (tok.chat_template, tok.eos_token_ids)


# --- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}])
def test_transformers_opens_what_is_saved(kind: str, config: dict[str, bool], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    bos, eos = (EOS, EOS) if kind == "byte_level" else ("<s>", "</s>")
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    tok = Tokenizer(KINDS[kind](), bos_token=bos, eos_token=eos, chat_template=template, config=config)
    tok.save_pretrained(tmp_path / "new" / "folder")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new" / "folder")
    again = Tokenizer.from_pretrained(tmp_path / "new" / "folder")
    for text in (TRICKY, "", f"a{eos}b"):
        assert again.encode(text) == tok.encode(text) == theirs.encode(text)
        ids = tok.encode(text)
        assert tok.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert tok.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
    assert again.eos_token_ids == (theirs.eos_token_id,)
    assert again.bos_token_id == theirs.bos_token_id
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "日"}]
    assert again.apply_chat_template(messages) == theirs.apply_chat_template(messages, tokenize=False)
    assert again.chat_template == theirs.chat_template == template


def test_files_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabularies.byte_level(),
        eos_token=EOS,
        pad_token="<pad>",
        additional_special_tokens=["<x>"],
    )
    theirs.chat_template = {"default": "{{ messages[0].content }}", "shout": "{{ messages[0].content | upper }}"}
    theirs.save_pretrained(tmp_path)
    tok = Tokenizer.from_pretrained(tmp_path)
    assert tok.encode(f"<x>{TRICKY}<pad>") == theirs.encode(f"<x>{TRICKY}<pad>")
    assert tok.pad_token_id == theirs.pad_token_id
    assert tok.decode(tok.encode("<x>a")) == "a"
    messages = [{"role": "user", "content": "hi"}]
    assert tok.apply_chat_template(messages) == "hi"
    assert tok.apply_chat_template(messages, template="shout") == "HI"


def test_special_tokens_with_flags_and_older_files(tmp_path: Path) -> None:
    raw = vocabularies.byte_fallback()
    raw.save(str(tmp_path / "tokenizer.json"))
    token = {"__type": "AddedToken", "content": "</s>", "lstrip": False}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": token}))
    config = {
        "added_tokens_decoder": {"999": {"content": "<extra>", "special": True}},
        "chat_template": [{"name": "default", "template": "old"}, {"name": "rag", "template": "rag"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tok = Tokenizer.from_pretrained(tmp_path)
    assert (tok.bos_token_id, tok.eos_token_ids) == (1, (2,))
    assert tok.decode(tok.encode("the<extra>")) == "the"
    assert tok.chat_template == "old"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "ignored: it comes last"}))
    assert Tokenizer.from_pretrained(tmp_path).chat_template == "old"
    (tmp_path / "chat_template.jinja").write_bytes(b"new\r\n")
    assert Tokenizer.from_pretrained(tmp_path).chat_template == "new\r\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "not a tokenizer of the tokenizers library"),
        ("tokenizer.json", '{"model": 3}', "not a tokenizer of the tokenizers library"),
        ("tokenizer_config.json", "[]", "expected a JSON object"),
        ("tokenizer_config.json", "{'a': 1}", "not valid JSON"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token is 3; expected text"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"chat_template": {"a": 3}}', "expected Jinja source"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "../x", "template": ""}]}', "named '../x'"),
        ("chat_template.jinja", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_damaged_files_are_named(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    vocabularies.chat_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_pretrained(tmp_path)
    if "token is 3" not in message and "added" not in message:
        assert str(tmp_path) in str(error.value)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer.json, found tokenizer.model"):
        Tokenizer.from_pretrained(tmp_path)


def test_the_decoder_table_is_that_of_the_library() -> None:
    from tokenizers import pre_tokenizers

    from mambax.detokenizer import _byte_level_table

    assert set(_byte_level_table()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(_byte_level_table().values()) == list(range(256))
