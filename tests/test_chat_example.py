"""Conversations that keep their state, and the example that uses them."""

from __future__ import annotations

import builtins
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ScriptedModel
from vocabularies import CHATML, EOS, byte_fallback, chat_tokenizer

import mambax
from mambax import Tokenizer
from mambax.conversation import SNAPSHOTS, Conversation, interrupt

EXAMPLE = Path(__file__).parent.parent / "examples" / "chat.py"
ENDS = {"chatml": CHATML[1], "zephyr": EOS}
SAYINGS = ["Hi!", " Why? ", "日本 \n\n", "the the"]
ANSWERS = ["Hello there.", " Because,\nyou see.", "👩‍👧 ", "no"]


def turn(talk: Conversation, text: str, **options: Any) -> str:
    return "".join(map(str, talk.say(text, **options)))


def state_of(talk: Conversation) -> list[int]:
    return list(talk._snapshots[-1].state or ())


@pytest.mark.parametrize("template", ["chatml", "zephyr"])
def test_what_the_state_has_read_is_the_template_of_the_conversation(template: str) -> None:
    tok = chat_tokenizer()
    model = ScriptedModel(tok, ANSWERS, ENDS[template])
    talk = Conversation(model, template=template, system="Be brief.")
    expected = [{"role": "system", "content": "Be brief."}]
    for text, answer in zip(SAYINGS, ANSWERS, strict=True):
        assert turn(talk, text) == answer
        expected += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        assert talk.messages == expected
        whole = tok.encode(tok.apply_chat_template(expected, False, template=template), add_special_tokens=False)
        newline = tok.encode("\n")  # that the template writes after the answer is read with the next turn
        assert [*state_of(talk), *newline] == whole
        assert not talk.read_again
    assert sum(map(len, model.read)) < len(whole)  # every token was read once


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["chatml", "zephyr", "plain"]),
    st.lists(st.tuples(st.text(min_size=1, max_size=8), st.text(max_size=8)), min_size=1, max_size=5),
)
def test_any_words_are_read_as_the_template_has_them(template: str, turns: list[tuple[str, str]]) -> None:
    tok = chat_tokenizer()
    model = ScriptedModel(tok, [answer for _, answer in turns], ENDS.get(template, "\n"))
    talk = Conversation(model, template=template)
    for text, _ in turns:
        turn(talk, text)
    final = tok.decode(state_of(talk), skip_special_tokens=False)
    rendered = tok.apply_chat_template(talk.messages, False, template=template)
    normal = tok.decode(tok.encode(rendered), skip_special_tokens=False)
    assert normal.startswith(final) or rendered.startswith(final)


def test_answers_in_unusual_tokens_are_not_read_again() -> None:
    tok = chat_tokenizer()
    letters = [i for letter in "the" for i in tok.encode(letter)]
    assert letters != tok.encode("the")
    model = ScriptedModel(tok, [[*letters, *tok.encode(ENDS["chatml"])], "x"], ENDS["chatml"])
    talk = Conversation(model, template="chatml")
    turn(talk, "a")
    turn(talk, "b")
    assert tok.decode(model.read[1], skip_special_tokens=False) == (
        "\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not talk.read_again


def test_an_answer_cut_short_is_ended_with_the_next_turn() -> None:
    tok = chat_tokenizer()
    model = ScriptedModel(tok, [tok.encode("cut of"), "x"])
    talk = Conversation(model, template="chatml")
    turn(talk, "a")
    turn(talk, "b")
    assert tok.decode(model.read[1], skip_special_tokens=False).startswith("<|im_end|>\n<|im_start|>user\nb")


@pytest.mark.parametrize("answer", [" trimmed ", f"{EOS[:-1]}", f"odd {EOS} token"])
def test_a_template_that_rewrites_goes_back_to_the_last_state_that_agrees(answer: str) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tok = chat_tokenizer()
    model = ScriptedModel(tok, ["fine", answer, "x"], CHATML[1])
    talk = Conversation(model, template=template)
    for text in ("a", "b", "c"):
        turn(talk, text)
    rendered = tok.apply_chat_template(talk.messages, False, template=template)
    assert tok.decode(state_of(talk), skip_special_tokens=False) == rendered
    read = tok.decode(model.read[2], skip_special_tokens=False)
    assert talk.read_again == (answer.strip() != answer or EOS in answer)
    assert read.startswith("user: b") == talk.read_again


def test_undo_goes_back_exactly() -> None:
    tok = chat_tokenizer()
    talk = Conversation(ScriptedModel(tok, ANSWERS, EOS), template="zephyr")
    turn(talk, "one")
    before, messages = state_of(talk), list(talk.messages)
    turn(talk, "two")
    assert talk.undo()
    assert (state_of(talk), talk.messages) == (before, messages)
    turn(talk, "three")
    rendered = tok.apply_chat_template(talk.messages, False, template="zephyr")
    assert tok.decode(state_of(talk), skip_special_tokens=False) + "\n" == rendered
    assert talk.undo()
    assert talk.undo()
    assert not talk.undo()
    assert talk.messages == []


def test_undo_further_than_the_states_that_are_kept() -> None:
    tok = chat_tokenizer()
    count = SNAPSHOTS + 5
    talk = Conversation(ScriptedModel(tok, ["x"] * (count + 1), EOS), template="zephyr")
    for number in range(count):
        turn(talk, str(number))
    assert len(talk._snapshots) == SNAPSHOTS + 1
    for _ in range(SNAPSHOTS + 2):
        assert talk.undo()
    turn(talk, "again")
    rendered = tok.apply_chat_template(talk.messages, False, template="zephyr")
    assert tok.decode(state_of(talk), skip_special_tokens=False) + "\n" == rendered


def test_reset_keeps_the_system_message() -> None:
    talk = Conversation(ScriptedModel(chat_tokenizer(), ANSWERS, EOS), template="zephyr", system="Be brief.")
    turn(talk, "one")
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    turn(talk, "two")
    assert len(talk.messages) == 3


def test_nothing_is_changed_until_a_turn_ends() -> None:
    model = ScriptedModel(chat_tokenizer(), ["one", "two", "three"], EOS)
    talk = Conversation(model, template="zephyr")
    with pytest.raises(ValueError, match="refused"):
        talk.say("hi", top_k=-1)
    with pytest.raises(ValueError, match="content is 3"):
        talk.say(3)
    events = talk.say("hi")
    next(events)
    assert talk.messages == []
    del events
    assert turn(talk, "hi") == "two"
    assert len(talk.messages) == 2


def test_an_interrupted_answer_counts_as_far_as_it_went() -> None:
    tok = chat_tokenizer()
    model = ScriptedModel(tok, ["a long answer", "x"], EOS)
    talk = Conversation(model, template="zephyr")
    events = talk.say("hi")
    text = str(next(events)) + str(next(events))
    rest = list(interrupt(events))
    assert rest[-1].generation is not None
    assert rest[-1].generation.finish_reason == "interrupted"
    assert talk.messages[-1] == {"role": "assistant", "content": text}
    turn(talk, "go on")
    rendered = tok.apply_chat_template(talk.messages, False, template="zephyr")
    assert tok.decode(state_of(talk), skip_special_tokens=False) + "\n" == rendered
    model.answers.append("y")
    assert list(interrupt(talk.say("not begun"))) == []
    assert len(talk.messages) == 4


def test_the_end_of_a_turn_ends_an_answer() -> None:
    tok = chat_tokenizer()
    model = ScriptedModel(tok, ["x"], EOS)
    model.config.eos_token_ids = (7,)
    turn(Conversation(model, template="chatml"), "hi")
    assert set(model.options[0]["eos"]) == {7, tok.token_id(EOS), tok.token_id("<|im_end|>")}
    model = ScriptedModel(tok, ["x"], EOS)
    model.config.vocab_size = 2  # a token that the model does not have ends nothing
    turn(Conversation(model, template="chatml"), "hi")
    assert model.options[0]["eos"] == (tok.token_id(EOS),)


def test_a_tokenizer_with_a_beginning_of_text_token() -> None:
    tok = Tokenizer(byte_fallback(), bos_token="<s>", eos_token="</s>")
    model = ScriptedModel(tok, ["the", "the", "the"])
    talk = Conversation(model)
    assert talk.is_plain
    turn(talk, "the")
    turn(talk, "the")
    assert [ids.count(1) for ids in model.read] == [1, 0]
    assert tok.decode(state_of(talk)) == "the\n the\nthe\n the"
    assert not talk.read_again


def test_a_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a tokenizer"):
        Conversation(ScriptedModel(None, []))


def test_a_template_that_fails_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="no system"):
        Conversation(
            ScriptedModel(chat_tokenizer(), []), system="x",
            template="{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
        )  # fmt: skip


# --- saved conversations ---------------------------------------------------------------------------------------


def test_a_saved_conversation_goes_on_without_being_read_again(tmp_path: Path) -> None:
    tok = chat_tokenizer()
    talk = Conversation(ScriptedModel(tok, ANSWERS, EOS), template="zephyr", system="Be brief.")
    turn(talk, "one")
    files = talk.save(tmp_path / "talk.json")
    assert [file.name for file in files] == ["talk.json", "talk.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {"talk.json", "talk.safetensors"}
    model = ScriptedModel(tok, ["x"], EOS)
    other = Conversation(model)
    other.load(tmp_path / "talk")
    assert (other.messages, state_of(other), other.template) == (talk.messages, state_of(talk), talk.template)
    turn(other, "two")
    assert not other.read_again
    assert tok.decode(model.read[0], skip_special_tokens=False) == "\n<|user|>\ntwo<|endoftext|>\n<|assistant|>\n"
    other.reset()
    assert other.messages[0]["content"] == "Be brief."


def test_nothing_said_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing has been said"):
        Conversation(ScriptedModel(chat_tokenizer(), []), template="zephyr", system="x").save(tmp_path / "talk")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    talk = Conversation(ScriptedModel(chat_tokenizer(), ["x"], EOS), template="zephyr")
    turn(talk, "one")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        talk.save(tmp_path / "nowhere" / "talk")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format is 'other'; expected 'mambax conversation 1'"),
        ({"template": 3}, "template is missing or of the wrong kind"),
        ({"covers": None}, "covers is missing or of the wrong kind"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: content is None"),
        ({"messages": 3}, "messages is int"),
        ({"template": "{{ ''.__class__.__mro__[0] }}"}, "reaches outside its sandbox"),
        ({"state": "0" * 64}, "not the state that talk.json was saved with"),
    ],
)
def test_a_damaged_conversation_changes_nothing(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    talk = Conversation(ScriptedModel(chat_tokenizer(), ["x", "y"], EOS), template="zephyr")
    turn(talk, "one")
    talk.save(tmp_path / "talk")
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    before = (list(talk.messages), state_of(talk), talk.template)
    with pytest.raises(ValueError, match=message):
        talk.load(tmp_path / "talk")
    assert before == (talk.messages, state_of(talk), talk.template)
    with pytest.raises(FileNotFoundError):
        talk.load(tmp_path / "nowhere")


# --- on a real model, and the example --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a tokenizer and no chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    tok = chat_tokenizer()
    config = mambax.MambaLMConfig(d_model=16, n_layer=2, d_state=4, vocab_size=tok.vocab_size + 5)
    model = mambax.from_config(config, backend="numpy")
    model.tokenizer = tok
    mambax.save_pretrained(model, folder)
    return folder


@pytest.mark.parametrize("template", ["chatml", "zephyr", "plain"])
def test_the_state_of_a_real_model_is_that_of_the_tokens(template: str, checkpoint: Path, tmp_path: Path) -> None:
    model = mambax.load(checkpoint, backend="numpy")
    talk = Conversation(model, template=template)
    options = {"max_new_tokens": 9}
    read: list[int] = []
    generate = model.generate_streaming

    def recorded(ids: list[int], *, state: Any, **rest: Any) -> Any:
        if state is None:
            read.clear()
        read.extend(ids)
        for event in generate(ids, state=state, **rest):
            read.extend([] if event.token is None else [event.token])
            yield event

    model.generate_streaming = recorded
    for text in SAYINGS[:2]:
        turn(talk, text, **options)
        assert not talk.read_again
    talk.save(tmp_path / "talk")
    other = Conversation(mambax.load(checkpoint, backend="numpy"))
    other.load(tmp_path / "talk")
    want = model(np.array([read])).state.arrays()
    got = other._snapshots[-1].state
    assert got is not None
    for name, array in got.arrays().items():
        assert np.linalg.norm(array - want[name]) <= 1e-5 * max(np.linalg.norm(want[name]), 1e-9), name
    assert turn(other, "x", **options) == turn(talk, "x", **options)


def example() -> Any:
    spec = importlib.util.spec_from_file_location("chat_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 60


def test_the_example(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = f"/save {tmp_path / 'talk'}"
    lines = [
        "/undo",
        "Hello",
        save,
        "more",
        "/undo",
        "/reset",
        f"/load {tmp_path / 'talk'}",
        "/load nowhere",
        "",
        "on",
    ]
    monkeypatch.setattr(builtins, "input", lambda _: lines.pop(0) if lines else (_ for _ in ()).throw(EOFError))
    example().main(str(checkpoint), backend="numpy")
    output = capsys.readouterr()
    assert not lines
    assert "(nothing has been said)" in output.out
    assert "(taken back)" in output.out
    assert "(saved)" in output.out
    assert "nowhere" in output.err
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"]
    assert saved["messages"][0]["content"] == "Hello"
