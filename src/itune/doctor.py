"""What is looked at before the first step: whether the encoded examples teach what they should.

Needs torch. Nobody has to ask for it: what would train a wrong model stops the run, the rest is
said.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from itune import data, encoding, errors, families, formats, generation, recipes, samples

SAMPLE_ROWS = 64  # chosen: what is wrong with a template is wrong in every row or in every few
ROLES = ("assistant", "model", "gpt", "bot", "ai", "user", "human", "system")
LONG = 20  # characters from which on a prompt found in an answer's tokens is no coincidence


class Fault(NamedTuple):
    """A kind of fault: whether the model comes out wrong, what to say of it, how to mend it."""

    wrong: bool
    what: str
    cure: str


FAULTS = {
    "masked": Fault(
        True,
        "have no supervised token, so nothing is learnt from them",
        "Raise training.max_length, or take the rows out.",
    ),
    "bos": Fault(
        True,
        "begin with two beginning-of-sequence tokens",
        "Take one bos_token out of the model's chat template.",
    ),
    "stopless": Fault(
        True,
        "have an answer that ends without a stop token, so the model learns not to stop",
        "Let the chat template write eos_token after every answer.",
    ),
    "twice": Fault(
        True,
        "have a stop token within an answer, so the model learns to go on after it",
        "Let the chat template write eos_token once, at the end of an answer.",
    ),
    "unheard": Fault(
        True,
        "have an answer that ends with a token at which generation does not stop",
        "Let the chat template end every answer with the same token, or make it the eos_token.",
    ),
    "header": Fault(
        True,
        "have a role's header within the loss",
        "Let the chat template write that header when add_generation_prompt is set.",
    ),
    "prompt": Fault(
        True,
        "have the text of the prompt within the loss",
        "Let the chat template write each message once.",
    ),
    "pad": Fault(
        True,
        "are trained to write the pad token within an answer",
        "Set another pad_token in the tokenizer's tokenizer_config.json.",
    ),
    "pad stop": Fault(
        False,
        "end with the pad token, which other programs will not learn from",
        "Set another pad_token in the tokenizer's tokenizer_config.json.",
    ),
    "extra": Fault(
        False,
        "have text of the chat template within the loss, before the answer",
        "Look at it with --preview; if it should not be learnt, it belongs to the generation "
        "prompt of the chat template.",
    ),
    "empty": Fault(
        False,
        "have an empty answer, so the model learns to say nothing",
        "Take the rows out.",
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line for the user; `wrong`: it would train a wrong model."""

    text: str
    wrong: bool


@dataclass(frozen=True, slots=True)
class Report:
    """What was found in how many examples."""

    examples: int
    findings: tuple[Finding, ...]


def check(recipe: recipes.Recipe, encoder: encoding.Encoder, say: Callable[[str], None]) -> None:
    """Look at a recipe's training data and heed what is found; see `examine` and `heed`.

    Where a masked model fills in a choice there is neither role nor stop token to look at.
    """
    if encoder.family == families.MASKED:
        return
    stops = generation.settings(recipe.generation, encoder).eos_token_id
    _refuse_stops(recipe.data.train, encoder, stops)
    heed(examine(recipe.data.train, encoder, recipe.training, stops), say)


def _refuse_stops(
    sources: Sequence[recipes.Source], encoder: encoding.Encoder, stops: Collection[int]
) -> None:
    """Raise DataError where an answer may hold a token at which generation would stop."""
    known = {str(token): id_ for id_, token in encoder.tokenizer.added_tokens_decoder.items()}
    for source in sources:
        for name in source.allow_control_tokens:
            if known.get(name) in stops:
                raise errors.DataError(
                    f"{source.path}: allow_control_tokens: generation stops at {name!r}, so no "
                    "answer would go on after it. Take it off the list."
                )


def examine(
    sources: Sequence[recipes.Source],
    encoder: encoding.Encoder,
    training: recipes.Training,
    stops: Collection[int],
) -> Report:
    """Look at some rows of each source that has a template, in every wording.

    `stops`: the ids at which generation stops. Raises DataError for a broken row.
    """
    findings = []
    examined = 0
    for number, each in enumerate(sources):
        source = samples.Opened(number, each)
        if source.plain:
            continue
        first: dict[str, int] = {}
        counts: dict[str, int] = {}
        of = 0
        for made, messages in _sample(source, encoder, training):
            of += 1
            kept = () if made.truncated else answers(messages, training.train_on)
            for name in faults(made.tokens, kept, encoder, stops):
                first.setdefault(name, made.row)
                counts[name] = counts.get(name, 0) + 1
        examined += of
        findings += [
            Finding(
                f"{each.path}: {counts[name]} of {of} examples looked at {fault.what}, the "
                f"first in row {first[name] + 1}. {fault.cure}",
                fault.wrong,
            )
            for name, fault in FAULTS.items()
            if name in counts
        ]
    if examined and encoder.family == families.CAUSAL and not writes_stop(encoder):
        findings.append(
            Finding(
                "the model's chat template writes no stop token after an answer. itune trains "
                f"{encoder.tokenizer.eos_token!r} there; let the template write eos_token, so that "
                "programs which render a conversation do the same.",
                False,
            )
        )
    return Report(examined, tuple(findings))


def heed(report: Report, say: Callable[[str], None]) -> None:
    """Say what was found. Raises DataError when it would train a wrong model."""
    wrong = [finding.text for finding in report.findings if finding.wrong]
    if wrong:
        raise errors.DataError("\n".join(wrong))
    for finding in report.findings:
        say(f"warning: {finding.text}")
    if report.examples and not report.findings:
        say(f"checked {report.examples:,} examples: masks, roles and stop tokens are right")


def _sample(
    source: samples.Opened, encoder: encoding.Encoder, training: recipes.Training
) -> Iterator[tuple[data.Encoded, Sequence[formats.Message]]]:
    """Examples of the rows that training sees first, in every wording, and their messages."""
    wanted = sorted(source.first(training.seed, SAMPLE_ROWS))
    for made in source.encoded(wanted, encoder, training, visits=None):
        yield made, source.example(made.row, source.rows[made.row], made.wording).messages


# --- one example --------------------------------------------------------------------------


class Answer(NamedTuple):
    """An answer as the data has it, and the message before it."""

    text: str
    asked: str


def answers(messages: Sequence[formats.Message], train_on: str) -> list[Answer]:
    """The answers that are supervised."""
    found = [
        Answer(message.content, messages[k - 1].content if k else "")
        for k, message in enumerate(messages)
        if message.role == "assistant"
    ]
    return found[-1:] if train_on == "last" else found


def faults(
    tokens: encoding.Tokens,
    expected: Sequence[Answer],
    encoder: encoding.Encoder,
    stops: Collection[int],
) -> set[str]:
    """The names in FAULTS of what is wrong with an example.

    `expected`: its answers; where their number is not that of the supervised stretches, as in a
    conversation that was cut, texts are not compared.
    """
    found = set()
    bos = encoder.tokenizer.bos_token_id
    if bos is not None and tokens.ids[:2] == [bos, bos]:
        found.add("bos")
    if not any(tokens.supervised[1:]):
        return found | {"masked"}
    spans = list(_spans(tokens.supervised))
    for start, end in spans:
        found |= _in_stretch(tokens.ids[start:end], encoder, stops)
    if len(spans) == len(expected):
        for (start, end), answer in zip(spans, expected, strict=True):
            before, own = tokens.ids[:start], tokens.ids[start + encoder.opening : end]
            found |= _in_text(before, own, answer, encoder)
    return found


def _spans(supervised: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Start and end of each supervised stretch."""
    borders = np.flatnonzero(np.diff([False, *supervised, False])).tolist()
    yield from zip(borders[::2], borders[1::2], strict=True)


def _in_stretch(ids: Sequence[int], encoder: encoding.Encoder, stops: Collection[int]) -> set[str]:
    found = set()
    if ids[-1] not in stops:
        found.add("unheard" if ids[-1] in encoder.control else "stopless")
    if any(id_ in stops for id_ in ids[:-1]):
        found.add("twice")
    pad = encoder.tokenizer.pad_token_id
    # One token for both is common and harmless here: what is padding is known by its place.
    if pad is not None and pad != encoder.tokenizer.eos_token_id and pad in ids:
        found.add("pad" if pad in ids[:-1] else "pad stop")
    return found


def _in_text(
    before: Sequence[int], ids: Sequence[int], answer: Answer, encoder: encoding.Encoder
) -> set[str]:
    """What the supervised text holds besides the answer."""
    text, content = _decoded(encoder, ids), answer.text.strip()
    asked = answer.asked.strip()
    found = set()
    if not content:
        found.add("empty")
    if len(asked) >= LONG and asked in text and asked not in answer.text:
        found.add("prompt")
    written = text.partition(content)[0].strip() if content and content in text else ""
    if written:
        control = {id_ for id_ in encoder.control if id_ in ids[:-1] and id_ in before}
        bare = written.casefold().strip("#<|>[]: \n")
        role = any(bare == role or bare.startswith(f"{role}:") for role in ROLES)
        header = control or role or not opens_answer(encoder)
        found.add("header" if header else "extra")
    return found


def _decoded(encoder: encoding.Encoder, ids: Sequence[int]) -> str:
    return str(encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def opens_answer(encoder: encoding.Encoder) -> bool:
    """Whether the chat template writes anything for `add_generation_prompt`."""
    render, turns = encoder.tokenizer.apply_chat_template, [{"role": "user", "content": "a"}]
    plain, opened = (
        render(turns, tokenize=False, add_generation_prompt=each) for each in (False, True)
    )
    return bool(plain != opened)


def writes_stop(encoder: encoding.Encoder) -> bool:
    """Whether the chat template itself ends an answer with a control token."""
    answer = "\ue000"  # a private-use character, which no template writes itself
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    text = str(encoder.tokenizer.apply_chat_template(turns, tokenize=False))
    tail = text.rpartition(answer)[2]
    ids = encoder.tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]
    return any(id_ in encoder.control for id_ in ids)
