"""The model's chat template, rendered as transformers renders it, but bounded and told of typos.

The template comes with the model, so from the hub. It runs in the sandbox of `sandbox.py`; what it
prints must be there, where transformers prints nothing for a misspelt field.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
from collections.abc import Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.utils

from itune import errors, formats, sandbox

Messages = Sequence[formats.Message]


class _Unset(jinja2.Undefined):
    """What a template may ask after, and may not print; but a token that the tokenizer lacks is
    an empty text, as templates of many models count on."""

    __slots__ = ()

    def __str__(self) -> str:
        if str(self._undefined_name).endswith("_token"):
            return ""
        return str(self._fail_with_undefined_error())


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks an answer for other programs; what is in it is rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_inside")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _inside(self, caller: Any) -> Any:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, for public names only."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"{name!r} is no name for a namespace")
        super().__setitem__(name, value)


class _Refusal(jinja2.TemplateError):
    """What a template says with raise_exception."""


def _raise(message: str) -> NoReturn:
    raise _Refusal(message)


def _today(pattern: str) -> str:
    return datetime.datetime.now().strftime(str(pattern)[:100])


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """The filter of transformers, which escapes nothing for HTML."""
    return json.dumps(
        x,
        ensure_ascii=ensure_ascii,
        indent=sandbox.small_indent(indent),
        separators=separators,
        sort_keys=sort_keys,
    )


def _printed(value: Any) -> Any:
    if type(value) is str:
        sandbox.BUDGET.spend(0, len(value))
    elif not isinstance(value, jinja2.Undefined):
        sandbox.BUDGET.spend(0, sandbox.BUDGET.weigh(value))
    return value


@functools.lru_cache(maxsize=1)
def _environment() -> sandbox.Environment:
    made = sandbox.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=_Unset,
        finalize=_printed,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    made.filters["tojson"] = sandbox.metered(_tojson)
    made.globals |= {
        "raise_exception": _raise,
        "strftime_now": _today,
        "dict": dict,
        "namespace": _Namespace,
    }
    return made


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise errors.TemplateError(
            f"the model's chat template, line {error.lineno}: {error.message}. "
            "Mend chat_template in its tokenizer."
        ) from error
    except sandbox.COMPILER_FAULTS as error:
        raise errors.TemplateError(
            "the model's chat template is nested too deeply. Mend chat_template in its tokenizer."
        ) from error


def _broken(error: Exception) -> errors.TemplateError:
    said = errors.inert(str(error)).rstrip(".")
    return errors.TemplateError(
        f"the model's chat template: {said}. Mend chat_template in its tokenizer."
    )


class Chat:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.source: str = tokenizer.get_chat_template()
        self.tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        _compiled(self.source)
        self.parts = self._wants_parts()

    def _wants_parts(self) -> bool:
        """Whether the template reads a content only as a list of parts, as those of models that
        see pictures do."""
        probe = [formats.Message("user", "\ue000")]
        for parts in (False, True):
            try:
                if "\ue000" in self._rendered(probe, prompt=True, parts=parts):
                    return parts
            except sandbox.Exhausted as error:
                raise _broken(error) from error
            except (jinja2.TemplateError, sandbox.Refused, *sandbox.PYTHON_FAULTS):
                continue
        return False

    def turns(self, messages: Messages) -> list[dict[str, Any]]:
        """The messages as transformers takes them."""
        return _turns(messages, self.parts)

    def _rendered(self, messages: Messages, *, prompt: bool, parts: bool) -> str:
        with sandbox.BUDGET as budget:
            # Long texts are not the template's fault: it may write each a few times over.
            budget.most += 20 * sum(len(message.content) for message in messages)
            return _compiled(self.source).render(
                messages=_turns(messages, parts),
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
                **self.tokens,
            )

    def render(self, messages: Messages, *, prompt: bool) -> str:
        """The text of a conversation; with `prompt`, up to where the next answer begins.

        Raises DataError where the template refuses the conversation, TemplateError where it is
        broken or would never end.
        """
        try:
            return self._rendered(messages, prompt=prompt, parts=self.parts)
        except _Refusal as error:
            self._refuse(messages, error)
        except (jinja2.TemplateError, sandbox.Refused, *sandbox.PYTHON_FAULTS) as error:
            raise _broken(error) from error

    def _refuse(self, messages: Messages, error: Exception) -> NoReturn:
        roles = [message.role for message in messages]
        cure = "Take the row out, or join its turns"
        if "system" in roles and self._takes([m for m in messages if m.role != "system"]):
            cure = "It takes no system message: put that text into the user's turn"
        elif any(a == b for a, b in itertools.pairwise(roles)):
            cure = "Join the turns of one role that follow each other"
        said = errors.inert(str(error)).rstrip(".")
        raise errors.DataError(
            f"the model's chat template refuses a conversation of {', '.join(roles)}: {said}. "
            f"{cure}."
        ) from error

    def _takes(self, messages: Messages) -> bool:
        try:
            self._rendered(messages, prompt=False, parts=self.parts)
        except (jinja2.TemplateError, sandbox.Refused, *sandbox.PYTHON_FAULTS):
            return False
        return True


def _turns(messages: Messages, parts: bool) -> list[dict[str, Any]]:
    if not parts:
        return [{"role": m.role, "content": m.content} for m in messages]
    return [{"role": m.role, "content": [{"type": "text", "text": m.content}]} for m in messages]
