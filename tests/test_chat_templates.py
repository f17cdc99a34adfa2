"""Chat templates: agreement with transformers, messages, the sandbox."""

from __future__ import annotations

from typing import Any

import pytest
from vocabularies import EOS, chat_tokenizer

from mambax import chat

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>&'\" 日本"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": " Why? \n"},
]
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""  # of HuggingFaceH4/zephyr-7b-beta
TALKING = "{% for m in messages %}"
TEMPLATES = {
    "zephyr": ZEPHYR,
    "chatml": chat.NAMED_TEMPLATES["chatml"],
    "loop controls": TALKING + "{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "json": "{{ messages | tojson }} {{ messages | tojson(indent=2, sort_keys=true) }}",
    "namespace": "{% set ns = namespace(n=0) %}" + TALKING + "{% set ns.n = loop.index %}{% endfor %}{{ ns.n }}",
    "generation": "{% for m in messages %}\n  {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "tools": "{% if tools is not none %}{{ tools | length }}{% endif %}{{ documents is none }}",
    "whitespace": "  {% for m in messages %}\n    {{- m.role }}\n  {% endfor %}\n{# gone #}\n x ",
    "variables": "{{ bos_token is defined }}{{ eos_token }}{{ thinking }}",
    "macro": "{% macro f(m) %}<{{ m.role }}>{{ m.content | trim }}{% endmacro %}"
    + TALKING
    + "{{ f(m) }}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_give_what_transformers_gives(name: str, prompt: bool) -> None:
    transformers = pytest.importorskip("transformers")
    ours = chat_tokenizer(TEMPLATES[name])
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=chat_tokenizer()._backend, eos_token=EOS, chat_template=TEMPLATES[name]
    )
    options: dict[str, Any] = {"add_generation_prompt": prompt, "thinking": 3}
    assert ours.apply_chat_template(TALK, **options) == theirs.apply_chat_template(TALK, tokenize=False, **options)


def test_zephyr_is_the_format_of_mamba_chat() -> None:
    tok = chat_tokenizer()
    assert tok.apply_chat_template([{"role": "user", "content": "hi"}], template="zephyr") == (
        f"<|user|>\nhi{EOS}\n<|assistant|>\n"
    )
    for prompt in (True, False):
        named = tok.apply_chat_template(TALK, prompt, template="zephyr")
        assert named == tok.apply_chat_template(TALK, prompt, template=ZEPHYR)


def test_plain_text_follows_itself() -> None:
    assert chat_tokenizer().apply_chat_template(TALK[1:3], template="plain") == "Hi <b>&'\" 日本\nHello.\n"


def test_the_time_is_there() -> None:
    assert len(chat_tokenizer("{{ strftime_now('%Y') }}").apply_chat_template(TALK)) == 4


def test_a_template_is_found_by_name_or_given() -> None:
    tok = chat_tokenizer()
    with pytest.raises(ValueError, match="no chat template; pass template=, one of 'zephyr', 'chatml', 'plain'"):
        tok.apply_chat_template(TALK)
    with pytest.raises(ValueError, match="unknown chat template 'zefir'"):
        tok.apply_chat_template(TALK, template="zefir")
    tok.chat_template = "chatml"
    assert tok.chat_template == chat.NAMED_TEMPLATES["chatml"]
    assert tok.apply_chat_template(TALK).endswith("<|im_start|>assistant\n")
    tok.chat_template = None
    assert tok.chat_template is None


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages is str; expected a list"),
        ({"role": "user", "content": "hi"}, "messages is dict; expected a list"),
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] is 'hi'; expected"),
        ([{"content": "hi"}], r"messages\[0\]: role is None; expected one of 'system'"),
        ([TALK[1], {"role": "robot", "content": "hi"}], r"messages\[1\]: role is 'robot'; expected one of"),
        ([{"role": "user"}], r"messages\[0\]: content is None; expected text"),
        ([{"role": "user", "content": 3}], r"messages\[0\]: content is 3; expected text"),
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "expected text"),
    ],
)
def test_messages_are_checked(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat_tokenizer().apply_chat_template(messages, template="chatml")


def test_roles_of_a_template_and_calls_of_tools_are_messages() -> None:
    chat.check_messages([{"role": "robot", "content": "hi"}], "{% if m.role == 'robot' %}")
    chat.check_messages([{"role": "assistant", "tool_calls": [{}], "content": None}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__['os'] }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ ''['__cl' ~ 'ass__']['__mro__'] }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{% set ns = namespace(__html__=raise_exception) %}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{% set ns = namespace(a=1) %}{{ ns.__init__.__globals__ }}",
        "{% include 'secret' %}",
        "{% import 'os' as os %}",
        "{{ ([].__class__.__base__.__subclasses__)() }}",
        "{{ range(100000000) | list }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template: str, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    messages = [dict(message) for message in TALK]
    with pytest.raises(ValueError, match="chat template: "):
        chat_tokenizer(template).apply_chat_template(messages)
    assert not list(tmp_path.iterdir())
    assert messages == TALK


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system messages') }}", "no system messages"),
        ("{% for %}", "line 1 is not valid Jinja"),
        ("a\n{{ messages[0]. }}", "line 2 is not valid Jinja"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_what_is_wrong_with_a_template_is_said(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat_tokenizer(template).apply_chat_template(TALK)
