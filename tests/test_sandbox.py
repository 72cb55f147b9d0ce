"""The box that templates run in: hostile ones end soon and small, honest ones pay little."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import shapes

from itune import encoding, errors, sandbox, templates

ROW: dict[str, Any] = {"text": "A fine film.", "words": ["a", "b", "c"], "output": "Yes."}
# MANY stands for range(99999).
LOOPS = "{% for a in MANY %}" * 3 + "{% endfor %}" * 3
TWICE = "{% macro m(x, n) %}{% if n %}{{ m(BODY, n - 1) }}{% else %}END{% endif %}{% endmacro %}"


def twice(body: str, end: str, start: str = "'ab'") -> str:
    """A macro that calls itself 40 times with a value of twice the size."""
    return TWICE.replace("BODY", body).replace("END", end) + "{{ m(" + start + ", 40) }}"


# Each would take for ever, or all memory, in Jinja's own sandbox or in one without its limits.
HOSTILE = {
    "nested loops": LOOPS,
    "a filtered loop": "{% for a in MANY if (MANY | list | length) == 0 %}{% endfor %}",
    "a loop in a condition": "{% for a in MANY if 'x' in (MANY | join('-')) %}{% endfor %}",
    "a recursive loop": "{% for a in range(99) recursive %}{{ loop(range(99)) }}{% endfor %}",
    "macros that call each other": "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}"
    "{% endif %}{% endmacro %}{{ a(60) }}",
    "a macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a large literal in loops": "{% set x %}{% for a in MANY %}"
    + "long " * 9999
    + "{% endfor %}{% endset %}",
    "a long product": "{{ 'a' * 2000000000 }}",
    "a long product of a list": "{{ ([0] * 2000000000) | length }}",
    "a wide format": "{{ '%999999999d' % 1 }}",
    "a wide format filter": "{{ '%999999999d' | format(1) }}",
    "a wide format method": "{{ '{:999999999}'.format(1) }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a tower of products": twice("x * x", "{{ x }}", "99999"),
    "lipsum": "{{ lipsum(n=200000) }}",
    "cycler": "{{ cycler('a').next() }}",
    "text added to itself": twice("x + x", "{{ x | length }}"),
    "text joined to itself": twice("x ~ x", "{{ x | length }}"),
    "text set to itself": "{% set a %}abcdefgh{% endset %}"
    + "{% set b %}{{ a }}{{ a }}{% endset %}{% set a %}{{ b }}{{ b }}{% endset %}" * 20,
    "a list of itself": twice("[x, x]", "{{ x | string | length }}"),
    "a list of itself compared": twice("[x, x]", "{{ 'y' if x == [x] else 'n' }}"),
    "a tuple of itself as a key": twice("(x, x)", "{{ {x: 1} | length }}"),
    "a mapping of itself": twice("{'a': x, 'b': x}", "{{ x | tojson }}"),
    "arguments of themselves": "{% macro m() %}{{ m(varargs, varargs) }}{% endmacro %}{{ m(1) }}",
    "a list added to itself": twice("x + x", "{{ x | length }}", "[1]"),
    "a join with a long glue": "{% set g = MANY | join('-') %}{{ MANY | join(g) }}",
    "a join of a long attribute": "{{ MANY | join(MANY | join, attribute='real') }}",
    "the method join": "{% set g = MANY | join('-') %}{{ g.join(g.split('-')) }}",
    "a replacement": "{% set g = MANY | join %}{{ g | replace('', g) }}",
    "the method replace": "{% set g = MANY | join %}{{ g.replace('1', g) }}",
    "a translation": "{% set g = MANY | join %}{{ g.translate({49: g}) }}",
    "a batch": "{{ [1] | batch(999999999, 'x') | list }}",
    "a slice": "{{ [1] | slice(999999999) | list }}",
    "a wide centre": "{{ 'a' | center(2000000000) }}",
    "a wide centre of bytes": "{{ 'a'.encode().center(2000000000) }}",
    "a wide indent": "{{ 'a\nb' | indent(2000000000) }}",
    "a wide indent of JSON": "{{ [1] | tojson(indent=2000000000) }}",
    "tabs": "{{ '\t'.expandtabs(2000000000) }}",
    "a far rounding": "{{ 5 | round(-999999999) }}",
    "a far rounding up": "{{ 5 | round(999999999, 'ceil') }}",
    "bytes of a number": "{{ (5).to_bytes(2000000000, 'big') }}",
    "a sum of lists": "{{ MANY | map('list') | sum(start=[]) }}",
    "a slow search": "{% set l = MANY | list %}{% for a in l %}{% if -1 in l %}{% endif %}"
    "{% endfor %}",
    "a slow selection": "{% set l = MANY | list %}{{ l | reject('in', l) | list | length }}",
    "__class__": "{{ ''.__class__.__mro__ }}",
    "in pieces": "{% set c = '__cl' ~ 'ass__' %}{{ text[c] }}{{ messages[0].content[c] }}",
    "__init__": "{{ cycler.__init__.__globals__ }}",
    "append": "{{ words.append('x') }}{{ messages.append('x') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as a %}",
    "from": "{% from '/etc/passwd' import a %}",
    "extends": "{% extends '/etc/passwd' %}",
    "too long": "{{ text }}" * 30000,
    "too deep": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
}
LARGEST_GROWTH = 500  # MB that one of them may add to the memory of this process


def hostile(name: str) -> str:
    return HOSTILE[name].replace("MANY", "range(99999)")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limit, sooner."""
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_prompt_is_ended(name: str) -> None:
    before = peak()
    document = {"task": "generation", "response": "x", "prompts": [hostile(name)]}
    with pytest.raises((errors.TemplateError, errors.DataError)) as caught:
        templates.loads(str(document), "x.yaml").prompt(ROW, 0)
    assert all(line.startswith("x.yaml:1: prompts.0: ") for line in str(caught.value).splitlines())
    assert peak() - before < LARGEST_GROWTH


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_chat_template_is_ended(name: str) -> None:
    tokenizer = shapes.tokenizer("characters", "chatml")
    tokenizer.chat_template = hostile(name)
    before = peak()
    with pytest.raises(errors.TemplateError, match=r"^the model's chat template"):
        encoding.Encoder(tokenizer)
    assert peak() - before < LARGEST_GROWTH


def test_nothing_of_a_row_can_act() -> None:
    """A column may hold an object with methods, an image for example, which could write files."""

    class Picture:
        def save(self, path: str) -> str:
            Path(path).write_text("x", encoding="utf-8")
            return path

    document = {"task": "generation", "response": "x", "prompts": ["{{ image.save('marker') }}"]}
    with pytest.raises(errors.DataError, match="'save' of 'Picture' object is unsafe"):
        templates.loads(str(document), "x.yaml").prompt({"image": Picture()}, 0)
    assert not Path("marker").exists()


def test_an_honest_template_is_far_from_its_limits() -> None:
    document = {
        "task": "generation",
        "response": "x",
        "prompts": ["{% for w in words %}{{ loop.index }}. {{ w | upper }}\n{% endfor %}"],
    }
    long = templates.loads(str(document), "x.yaml")
    assert long.prompt({"words": ["word"] * 50_000}, 0).count("WORD") == 50_000
    assert sandbox.BUDGET.steps < sandbox.STEPS / 4
    assert not sandbox.BUDGET.active


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ words | join(', ') }}", "a, b, c"),
        ("{{ pairs | join('+', attribute='n') }}", "1+2"),
        ("{{ text | replace('fine', 'bad') | replace('m', 'n', 1) }}", "A bad filn."),
        ("{{ text.replace('fine', 'bad').split() | join('_') }}", "A_bad_film."),
        ("{{ ', '.join(words) }}", "a, b, c"),
        ("{{ 2.345 | round(1) }} {{ 7 | round }}", "2.3 7"),
        ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
        ("{{ pairs | sum(attribute='n') }} {{ [1, 2] | sum }}", "3 3"),
        ("{{ text ~ 1 ~ words[0] }}", "A fine film.1a"),
        ("{% for k, v in {'x': [1, 2]}.items() %}{{ k }}{{ v[1] }}{% endfor %}", "x2"),
        ("{{ 'b' in words }} {{ words == ['a', 'b', 'c'] }} {{ 2 * 3 % 4 }}", "True True 2"),
        ("{{ (words + ['d'])[-1] }}{{ words[1:] | first }}", "db"),
        ("{% macro m(x) %}{{ x }}{{ caller() }}{% endmacro %}{% call m(1) %}y{% endcall %}", "1y"),
        ("{{ pairs | selectattr('n', 'gt', 1) | map(attribute='n') | list | first }}", "2"),
        ("{{ day.strftime('%Y') }}", "2024"),
    ],
)
def test_what_templates_need_works(source: str, text: str) -> None:
    import datetime

    row = {**ROW, "pairs": [{"n": 1}, {"n": 2}], "day": datetime.date(2024, 2, 29)}
    document = {"task": "generation", "response": "x", "prompts": [source]}
    assert templates.loads(str(document), "x.yaml").prompt(row, 0) == text
