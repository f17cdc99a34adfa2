"""Chat templates: a conversation as the text that a model was trained on.

Templates come with checkpoints, from people one does not know. They run in Jinja's immutable sandbox, with the
functions that ``transformers`` gives them and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

Message = Mapping[str, Any]
"""``{"role": "user", "content": "..."}``; further keys are passed on to the template."""

ROLES = ("system", "developer", "user", "assistant", "tool")

NAMED_TEMPLATES = {
    # HuggingFaceH4/zephyr-7b-beta, which mamba-chat was trained with
    "zephyr": (
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # for models that only continue text: one message after another, each on its own line
    "plain": "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}",
}
"""Formats known by name, for checkpoints that do not carry theirs."""


def render(source: str, messages: Sequence[Message], **variables: Any) -> str:
    """A conversation as text.

    Args:
        source: the Jinja template.
        messages: the conversation; checked by :func:`check_messages`.
        variables: what else the template sees: ``add_generation_prompt``, ``bos_token``, ``tools``, ...

    Raises:
        ValueError: for messages that are not ones, and for a template that cannot be compiled, fails, refuses the
            conversation, or reaches for what the sandbox forbids.
    """
    import jinja2

    check_messages(messages, source)
    defaults = {"tools": None, "documents": None, "add_generation_prompt": False}
    try:
        template = _compile(source)
        return template.render(messages=[dict(message) for message in messages], **(defaults | variables))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template: line {error.lineno} is not valid Jinja: {error.message}") from error
    except jinja2.exceptions.SecurityError as error:
        raise ValueError(f"chat template: refused, it reaches outside its sandbox: {error}") from error
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"chat template: it does not take this conversation: {reason}") from error


def check_messages(messages: Sequence[Message], source: str = "") -> None:
    """Check that messages are a conversation.

    Args:
        messages: mappings with a role and a text content; content may be missing beside ``tool_calls``.
        source: a template; roles that it names are allowed too.

    Raises:
        ValueError: with the number of the message, what was expected and what was found.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(
            f"messages is {type(messages).__name__}; expected a list such as "
            '[{"role": "user", "content": "Hello"}]'
        )
    if not messages:
        raise ValueError("messages is empty; expected at least one message")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise ValueError(f'{where} is {message!r}; expected {{"role": ..., "content": ...}}')
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not (role in ROLES or (role and role in source)):
            raise ValueError(f"{where}: role is {role!r}; expected one of {', '.join(map(repr, ROLES))}")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"{where}: content is {content!r}; expected text")


@cache
def _compile(source: str) -> Any:
    """A template, compiled with what ``transformers`` gives to one."""
    from jinja2 import ext, sandbox

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, _generation_tag()]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_namespace_class()
    )
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _generation_tag() -> type:
    """The Jinja extension for ``{% generation %}``: it marks what the assistant said, and changes nothing here."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012 Jinja declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return GenerationTag


def _namespace_class() -> type:
    """Jinja's namespace without names that Python itself would look up on it."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")

    class TemplateNamespace(Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may set the name self
            values = dict(*args[1:], **kwargs)
            for name in values:
                check(name)
            Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            Namespace.__setitem__(self, name, value)

    return TemplateNamespace
