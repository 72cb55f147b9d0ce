"""The prompt template: what a row becomes, what is refused and in which words, which wording."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from itune import errors, templates

HEAD = "task: generation\nresponse: '{{ output }}'\n"
CLASSES = """\
task: classification
choices: [negative, positive]
prompts: ["{{ text }}"]
response: "{{ choices[label] }}"
"""
ROW = {"text": "A fine film.", "output": "Yes.", "answers": {"text": ["a", "b"], "items": ["c"]}}


def made(prompt: str = "{{ text }}", **keys: str) -> templates.Template:
    lines = [f"{key}: {value}" for key, value in keys.items()]
    return templates.loads("\n".join([HEAD, f"prompts:\n  - {prompt!r}", *lines]), "x.yaml")


def faults(text: str) -> list[str]:
    with pytest.raises(errors.TemplateError) as caught:
        templates.loads(text, "x.yaml")
    return str(caught.value).splitlines()


def refused(template: templates.Template, row: dict[str, Any]) -> str:
    with pytest.raises(errors.DataError) as caught:
        template.prompt(row, 0)
    return str(caught.value)


# --- what a row becomes -------------------------------------------------------------------------


def test_a_recipe_in_the_place_of_a_template_is_told_in_one_line() -> None:
    """`sentiment.yaml` where one stands, a recipe, is what `template: sentiment` finds first."""
    [said] = faults("model: {name: x}\ndata: {train: {path: a.csv, template: sentiment}}\n")
    assert said.startswith("x.yaml: a recipe, and a template is looked for here.")
    assert "path" in said


def test_a_row_becomes_a_prompt_and_an_answer() -> None:
    template = templates.loads(CLASSES, "prompts/sentiment.yaml")
    row = {"text": "A <b>fine</b> film & more.\n", "label": 1}
    assert template.name == "sentiment"
    assert template.prompt(row, 0) == "A <b>fine</b> film & more.\n"
    assert template.answer(row) == "positive"
    assert template.gold(row) == ["positive"]
    assert template.columns() == {"text", "label"}


def test_references_are_a_list_of_texts() -> None:
    template = made(references="answers.text")
    assert template.gold(ROW) == ["a", "b"]
    assert template.columns() == {"text", "output", "answers"}
    one = made(references="(output,) if output is string else output")
    assert one.gold(ROW) == ["Yes."]


@pytest.mark.parametrize("value", [None, "a", [1], [], {"a": 1}, ["a", None]])
def test_references_that_are_no_list_of_texts_are_told(value: Any) -> None:
    with pytest.raises(errors.DataError, match=r"^x\.yaml:6: references: expected .*, found"):
        made(references="found").gold({**ROW, "found": value})


def test_references_that_are_missing_are_told() -> None:
    with pytest.raises(errors.DataError, match="no column 'found'"):
        made(references="found").gold(ROW)
    with pytest.raises(errors.DataError, match="no attribute 'txt'"):
        made(references="answers.txt").gold(ROW)


def test_a_field_named_as_a_method_is_the_field() -> None:
    assert made("{{ answers.items[0] }}").prompt(ROW, 0) == "c"


def test_a_column_called_choices_is_the_row_s_where_the_template_has_none() -> None:
    template = made("{{ choices | join(', ') }}")
    assert template.prompt({"choices": ["x", "y"]}, 0) == "x, y"
    assert template.columns() == {"choices", "output"}


def test_choices_can_be_listed_in_a_prompt() -> None:
    text = CLASSES.replace("{{ text }}", "{{ text }} {{ choices | join(' or ') }}?")
    assert templates.loads(text).prompt({"text": "Good:"}, 0) == "Good: negative or positive?"


def test_a_condition_may_use_a_column_that_is_not_there() -> None:
    template = made("{{ text }}{% if more is defined %} {{ more }}{% endif %}")
    assert template.prompt(ROW, 0) == "A fine film."
    assert template.prompt({**ROW, "more": "x"}, 0) == "A fine film. x"


def test_a_template_is_plain_data_and_can_be_sent_to_another_process() -> None:
    template = templates.load("sentiment")
    again = pickle.loads(pickle.dumps(template))
    assert again == template
    assert again.prompt({"text": "x", "label": 0}, 0) == template.prompt({"text": "x"}, 0)


def test_a_chat_has_neither_prompts_nor_response() -> None:
    chat = templates.loads("task: chat\n", "chat.yaml")
    assert chat.prompts == ()
    assert chat.columns() == set()
    with pytest.raises(errors.TemplateError, match="a chat has no prompts"):
        chat.prompt({}, 0)
    with pytest.raises(errors.TemplateError, match="a chat has no response"):
        chat.answer({})


# --- rows that do not fit -----------------------------------------------------------------------

ROWS = {
    "{{ txt }}": "the row has no column 'txt'. Did you mean 'text'? It has answers, output, text.",
    "{{ zzz }}": "the row has no column 'zzz'. It has answers, output, text.",
    "{{ answers.txt }}": "'dict object' has no attribute 'txt'",
    "{{ answers.text.x }}": "attribute 'x'. Take one of the list, [0], or | map(attribute='x')",
    "{{ answers.text[9] }}": "list object has no element 9",
    "{{ answers }}": "an expression is a mapping of 2 keys, not text.",
    "{{ answers.text }}": "an expression is a list of 2, not text. Take one, or | join.",
    "{{ text.upper }}": "an expression is a function. Add its brackets.",
    "{{ none }}": "an expression is empty (null)",
    "{% if text == 'x' %}y{% endif %}": "the text is empty. The row has answers, output, text.",
    "{{ text + 1 }}": "can only concatenate str",
    "{{ 1 / 0 }}": "division by zero",
    "{{ 'ab' * 10 ** 9 }}": "the operator ** is for numbers",
    "{{ text * 1000000000 }}": "the operator * is for numbers",
    "{{ '%999999999d' % 1 }}": "the operator % is for numbers",
    "{% for i in range(90000) %}{{ text }}{% endfor %}": "the text is longer than 1000",
    "{% for i in range(900000) %}x{% endfor %}": "Range too big",
    "{{ text.ljust(999999999) }}": "access to attribute 'ljust' of 'str' object is unsafe",
    "{{ text.format }}": "is unsafe",
    "{{ answers.text.append('x') }}": "is unsafe",
    "{{ answers.update({}) }}": "is unsafe",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "recursion",
    "{{ lipsum() }}": "the row has no column 'lipsum'",
    "{{ cycler('x') }}": "the row has no column 'cycler'",
}


@pytest.mark.parametrize("prompt", ROWS)
def test_a_row_that_does_not_fit_is_told_with_the_template_s_line(prompt: str) -> None:
    told = refused(made(prompt), ROW)
    assert told.startswith("x.yaml:5: prompts.0: ")
    assert ROWS[prompt] in told
    assert "\n" not in told


def test_a_column_that_is_null_is_told_by_name() -> None:
    assert "column 'text' is empty (null) in this row" in refused(made(), {"text": None})


@pytest.mark.parametrize(
    "expression",
    [
        *("text | lower", "text | trim", "text | string", "text | replace('a', 'b')", "text | e"),
        *("text | int", "text | float", "text | list", "text | first", "text | map('lower')"),
        *("text | join(', ')", "[output, text] | join(', ')", "output ~ text", "text ~ ''"),
        "pairs | join(', ', attribute='n')",
    ],
)
def test_an_empty_cell_is_nowhere_the_word_none(expression: str) -> None:
    row = {"text": None, "output": "Yes.", "pairs": [{"n": None}]}
    assert "is empty (null)" in refused(made(f"{{{{ {expression} }}}}"), row)


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("text | int", "'A fine film.' is no number, and | int needs one"),
        ("text | float + 1", "'A fine film.' is no number, and | float needs one"),
        ("answers | lower", "an expression is a mapping of 2 keys, not text"),
        ("answers.text ~ '.'", "an expression is a list of 2, not text"),
    ],
)
def test_a_filter_makes_no_answer_out_of_what_is_none(expression: str, told: str) -> None:
    assert told in refused(made(f"{{{{ {expression} }}}}"), ROW)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("text | default('none', true)", "none"),
        ("'x' if text is none else text", "x"),
        ("text | int(7)", "7"),
        ("'2.0' | int ~ '|' ~ '1' | float", "2|1.0"),
        ("text | tojson", "null"),
        ("'ab' | upper", "AB"),
    ],
)
def test_what_stands_for_an_empty_cell_can_be_written(expression: str, text: str) -> None:
    assert made(f"{{{{ {expression} }}}}").prompt({"text": None}, 0) == text


@pytest.mark.parametrize(
    ("label", "told"),
    [
        (2, "label 2 is out of range: 2 choices have the labels 0 to 1."),
        (2, "Labels from 1 are written choices[LABEL - 1]."),
        (-1, "label -1 is out of range"),
        ("1", "label '1' is not a whole number. Write choices[label | int]."),
        ("positive", "'positive' is not a whole number. It is an answer already: write it without"),
        ("1.0", "label '1.0' is not a whole number. Write choices[label | int]."),
        ("n/a", "label 'n/a' is not a whole number. Write 0 to 1 in the rows; where they hold"),
        (1.0, "label 1.0 is not a whole number. Write choices[label | int]."),
        (0.5, "label 0.5 is not a whole number. Write 0 to 1 in the rows"),
        (None, "column 'label' is empty (null)"),
    ],
)
def test_a_label_out_of_range_is_told(label: Any, told: str) -> None:
    with pytest.raises(errors.DataError) as caught:
        templates.loads(CLASSES, "x.yaml").answer({"text": "x", "label": label})
    assert str(caught.value).startswith("x.yaml:4: response: ")
    assert told in str(caught.value)


def test_an_answer_that_is_no_choice_is_told() -> None:
    template = templates.loads(CLASSES.replace("{{ choices[label] }}", "{{ label }}"), "x.yaml")
    assert template.answer({"text": "x", "label": "positive"}) == "positive"
    with pytest.raises(errors.DataError, match="'good' is none of negative, positive"):
        template.answer({"text": "x", "label": "good"})


@pytest.mark.parametrize(
    ("label", "told"),
    [
        ("Positive", "Did you mean 'positive'? Mend the rows, or add it to choices (x.yaml:2)."),
        ("mixed", "none of negative, positive. Mend the rows, or add it to choices (x.yaml:2)."),
        (
            "positive ",
            "'positive ' is none of negative, positive. Take the blanks off: {{ ... | trim",
        ),
        ("1", "'1' is none of negative, positive. A number from 0 is written {{ choices[LABEL |"),
        ("7", "'7' is none of negative, positive. Mend the rows"),
    ],
)
def test_an_answer_that_is_no_choice_is_told_with_its_cure(label: str, told: str) -> None:
    template = templates.loads(CLASSES.replace("{{ choices[label] }}", "{{ label }}"), "x.yaml")
    with pytest.raises(errors.DataError) as caught:
        template.answer({"text": "x", "label": label})
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "told", "cure"),
    [
        (["Text ", "output"], "It has 'Text ', output.", "rename: {'Text ': text}"),
        (["Text (new)", "x"], "Did you mean 'Text (new)'?", "rename: {'Text (new)': text}"),
        (["a", "b"], "It has a, b.", "rename: {THE COLUMN: text}"),
        (["only", "output"], "It has only, output.", "rename: {only: text}"),
    ],
)
def test_a_missing_column_is_told_with_the_line_to_write(
    columns: list[str], told: str, cure: str
) -> None:
    with pytest.raises(errors.DataError) as caught:
        made().prompt(dict.fromkeys(columns, "x"), 0)
    assert told in str(caught.value)
    assert caught.value.cure == f" Write {cure} beside template in the recipe."


@pytest.mark.parametrize("prompt", ["{{ Guest wrote }}", "{{ done? }}"])
def test_a_column_s_name_that_is_no_jinja_is_told_with_its_cure(prompt: str) -> None:
    with pytest.raises(errors.TemplateError, match=r"letters, digits and _ alone.*rename"):
        made(prompt)


def test_an_empty_answer_is_told() -> None:
    with pytest.raises(errors.DataError, match="response: the text is empty"):
        made().answer({"output": " \n"})


# --- templates that are refused -----------------------------------------------------------------

P = "prompts: ['{{ text }}']\n"
FAULTS = {
    "task: sentiment\nresponse: x\n" + P: "x.yaml:1: task: expected one of classification, qa, "
    "translation, summarization, generation, chat, found 'sentiment'.",
    "task: qa\n" + P: "x.yaml:1: response: is missing.",
    "task: qa\nresponse: x\n": "x.yaml:1: prompts: is missing.",
    "response: x\n" + P: "x.yaml:1: task: is missing. Add it, one of classification, qa,",
    "task: qa\nresponse: x\nprompts: []\n": "x.yaml:3: prompts: is missing.",
    "task: classification\nresponse: x\n" + P: "x.yaml:1: choices: is missing.",
    "task: classification\nchoices: [a, a]\nresponse: x\n" + P: "x.yaml:2: choices: 'a' is given",
    "task: chat\n" + P: "x.yaml:2: prompts: a chat passes its messages on",
    "task: chat\nsystem: Be kind.\n": "x.yaml:2: system: a chat passes its messages on",
    HEAD + P + "respons: x\n": "x.yaml:4: respons: unknown key. Did you mean 'response'?",
    HEAD + P + "name: x\n": "x.yaml:4: name: unknown key.",
    HEAD + P + "answer: x\n": "x.yaml:4: answer: unknown key. Here it is response.",
    HEAD + P + "labels: [x]\n": "x.yaml:4: labels: unknown key. Here it is choices, in the order "
    "of the labels.",
    HEAD + P + "metrics: [rogue]\n": "x.yaml:4: metrics.0: unknown metric 'rogue'. Did you mean "
    "'rouge'?",
    HEAD + P + "system: 'Judge {{ text }}.'\n": "x.yaml:4: system: is the same for all rows.",
    HEAD + P + "references: '{{ answers }}'\n": "x.yaml:4: references: expected an expression",
    HEAD + P + "references: answers text\n": "x.yaml:4: references: ",
    HEAD + "prompts: '{{ text }}'\n": "x.yaml:3: prompts: expected a list, found '{{ text }}'. "
    'Write ["{{ text }}"].',
    HEAD + "prompts: ['Judge: {text}']\n": "x.yaml:3: prompts.0: '{text}' is no Jinja and would "
    "stay as it is. A column is {{ text }}.",
    HEAD + "prompts: [1]\n": "x.yaml:3: prompts.0: expected text, found 1. Put it in quotes.",
    HEAD + "prompts:\n  - a\n  - '{% if %}'\n": "x.yaml:5: prompts.1: Expected an expression",
    HEAD + "prompts:\n  - |\n    a\n    {{ b }\n": "x.yaml:6: prompts.0: unexpected '}'. A "
    "column is {{ name }}, with two braces on either side.",
    HEAD + "prompts: ['{{ text | nosuch }}']\n": "x.yaml:3: prompts.0: No filter named 'nosuch'",
    HEAD + "prompts: ['{{ text | random }}']\n": "No filter named 'random'",
    HEAD + "prompts: [\"{% include '/etc/passwd' %}\"]\n": "x.yaml:3: prompts.0: include is not "
    "available: a template reads no file.",
    HEAD + "prompts: [\"{% extends 'a' %}\"]\n": "extends is not available",
    HEAD + "prompts: [\"{% import 'a' as a %}\"]\n": "import is not available",
    HEAD + "prompts: [\"{% from 'a' import b %}\"]\n": "import is not available",
    HEAD + "prompts: ['{{ text.__class__ }}']\n": "__class__ is not allowed in a template.",
    HEAD + "prompts: ['{{ text[\"__class__\"] }}']\n": "__class__ is not allowed in a template.",
    HEAD + f"prompts: ['{{{{ {'(' * 5000} }}}}']\n": "x.yaml:3: prompts.0: ",
    HEAD + f"prompts: ['{'{% for i in a %}' * 99}{'{% endfor %}' * 99}']\n": "nested too deeply",
}


@pytest.mark.parametrize("text", FAULTS, ids=lambda text: text[-50:])
def test_a_bad_template_is_refused_when_it_is_read(text: str) -> None:
    lines = faults(text)
    assert any(FAULTS[text] in line for line in lines), lines
    assert all(line.startswith("x.yaml:") for line in lines)


def test_all_faults_are_told_at_once() -> None:
    lines = faults("task: qa\nsytem: x\nprompts: ['{% if %}', '{{ a.__b__ }}']\n")
    assert [line.split(": ")[1] for line in lines] == [
        "response",
        "sytem",
        "prompts.0",
        "prompts.1",
    ]


# Ways out of sandboxes that Jinja's own history knows, and their like: each is refused when it is
# read or when it meets a row, and touches nothing.
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ text['__cl' ~ 'ass__'] }}",
    "{{ text | attr('__class__') }}",
    "{{ text | attr('__cl' ~ 'ass__') }}",
    "{{ [text] | map(attribute='__class__') | list }}",
    "{{ '{0.__class__}'.format(text) }}",
    "{{ '{x.__class__}'.format_map({'x': text}) }}",
    "{{ ('%s' | format) }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ range.__init__ }}",
    "{% set f = text.format %}{{ f('x') }}",
    "{{ cycler.__init__.__globals__.os.popen('touch marker').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ open('/etc/passwd').read() }}",
    "{{ [].append.__self__ }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ (text | xmlattr) }}",
]


@pytest.mark.parametrize("prompt", ESCAPES)
def test_no_way_leads_out_of_the_sandbox(prompt: str) -> None:
    with pytest.raises((errors.TemplateError, errors.DataError)):
        made(prompt).prompt(ROW, 0)
    assert not Path("marker").exists()


# --- finding ------------------------------------------------------------------------------------


def test_a_template_is_found_here_then_in_prompts_then_among_the_shipped() -> None:
    assert templates.load("sentiment").choices == ("negative", "positive")
    Path("prompts").mkdir()
    Path("prompts/sentiment.yaml").write_text(HEAD + P, encoding="utf-8")
    assert templates.load("sentiment").task == "generation"
    assert templates.load("prompts/sentiment.yaml") == templates.load("sentiment")
    Path("sentiment.yaml").write_text("task: chat\n", encoding="utf-8")
    assert templates.load(Path("sentiment")).task == "chat"


def test_a_template_that_is_not_there_is_told_with_the_nearest() -> None:
    with pytest.raises(errors.TemplateError, match=r"^sentimant: no such prompt\. Did you mean"):
        templates.load("sentimant")


def test_a_template_in_a_folder_of_prompts_is_near_by_its_last_name(tmp_path: Path) -> None:
    file = tmp_path / "prompts" / "mine" / "verdict.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(CLASSES, encoding="utf-8")
    for typed in ("verdict", "verdcit"):
        with pytest.raises(errors.TemplateError, match=r"Did you mean 'mine/verdict'\?$"):
            templates.load(typed)
    assert templates.load("mine/verdict").name == "verdict"


# --- wordings -----------------------------------------------------------------------------------


@given(st.integers(1, 7), st.integers(0, 2**32), st.integers(0, 20), st.integers(0, 10**9))
def test_a_wording_follows_from_its_numbers_alone(n: int, seed: int, epoch: int, row: int) -> None:
    wording = templates.wording_of(n, seed, epoch, row)
    assert 0 <= wording < n
    assert wording == templates.wording_of(n, seed, epoch, row)
    assert {templates.wording_of(n, seed, epoch + i, row) for i in range(n)} == set(range(n))


@given(st.integers(1, 7), st.integers(0, 2**32), st.integers(0, 20), st.integers(0, 10**6))
def test_neighbours_share_the_wordings_evenly(n: int, seed: int, epoch: int, block: int) -> None:
    rows = range(block * n, (block + 1) * n)
    assert {templates.wording_of(n, seed, epoch, row) for row in rows} == set(range(n))


def test_wordings_do_not_follow_the_order_of_the_rows() -> None:
    """Data that alternates its labels must not give each label a wording of its own."""
    drawn = Counter((row % 2, templates.wording_of(2, 17, 0, row)) for row in range(4000))
    assert all(900 < count < 1100 for count in drawn.values())


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_many_wordings_at_once_are_those_of_each_row(n: int) -> None:
    for seed, epoch in ((0, 0), (17, 3), (2**32 - 1, 20)):
        each = [templates.wording_of(n, seed, epoch, row) for row in range(100)]
        together = templates.wording_of(n, seed, epoch, np.arange(100, dtype=np.uint64))
        assert together.tolist() == each


def test_wordings_are_the_same_on_every_machine() -> None:
    assert [templates.wording_of(3, 17, 0, row) for row in range(12)] == WORDINGS


# Written down from the first version: a change here changes what every run sees.
WORDINGS = [0, 1, 2, 1, 2, 0, 1, 0, 2, 2, 0, 1]
