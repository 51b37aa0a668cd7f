"""A chat template without transformers: Jinja in a sandbox, set up as transformers sets it up.

A template is a program of whoever made the checkpoint. The sandbox keeps it from Python's internals and from
changing what it is given; that it ends is the caller's concern.

Source: https://huggingface.co/docs/transformers/chat_templating_writing
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any


def render(
    template: str, messages: Sequence[Mapping[str, str]], opening: bool, special: Mapping[str, str]
) -> str:
    """A conversation as a template writes it.

    Args:
        template: Jinja.
        messages: turns with "role" and "content".
        opening: whether the start of the assistant's next turn follows.
        special: "bos_token", "eos_token", ... -> text.

    Raises:
        jinja2.TemplateError: the template is none, or refuses the conversation. It may raise anything else.
    """
    given = [dict(message) for message in messages]
    text: str = _compiled(template).render(
        messages=given, tools=None, documents=None, add_generation_prompt=opening, **special
    )
    return text


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = functools.partial(_refuse, jinja2.exceptions.TemplateError)
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _refuse(kind: type[Exception], message: str) -> None:
    raise kind(message)


def _to_json(value: Any, indent: int | None = None, **settings: Any) -> str:
    """Jinja's own escapes what HTML would read."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **settings)


def _generation_tag() -> Any:
    """{% generation %} as what stands in it: whoever marks the assistant's text so writes it all the same."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation
