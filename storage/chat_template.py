"""Chat templates: Jinja in an immutable sandbox, with the names that published templates use."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from storage.errors import InputError

_REFUSALS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A chat template that renders messages.

    Offers what transformers' `apply_chat_template` does (`messages`, `add_generation_prompt`, the special tokens,
    `raise_exception`, `tojson`, loop controls, generation tags) but for `strftime_now`: samples must not depend on
    the day they were made, and published templates fall back to a fixed date without it.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Keep the source; it is compiled at first use, so that the object stays small to send between processes."""
        self.source = source
        self.special_tokens = dict(special_tokens)

    def compile(self) -> jinja2.Template:
        """Return the compiled template.

        Raises:
            InputError: it is malformed.
        """
        try:
            return _compiled(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"the chat template is malformed at its line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """Return the text of `messages`, with the opening of an assistant turn after it when asked.

        Raises:
            InputError: the template is malformed or refuses the messages.
        """
        template = self.compile()
        try:
            return template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self.special_tokens
            )
        except _REFUSALS as error:
            raise InputError(f"the chat template refuses the messages: {error}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` renders its body; spans are found by comparing renderings."""

    tags = {"generation"}  # noqa: RUF012 - the type is jinja2's

    def parse(self, parser: Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


_cache: dict[str, jinja2.Template] = {}


def _compiled(source: str) -> jinja2.Template:
    if source not in _cache:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        _cache[source] = environment.from_string(source)
    return _cache[source]


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False, **_: Any
) -> str:
    """JSON without HTML escapes, as published templates expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)
