"""The likeliest of given choices: each prompt is computed once, and all choices go on from there.

Needs torch.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from itune import adapters, batches, data, encoding, families, formats, losses, signals

BATCH_TOKENS = 16384  # chosen: keeps the cache of a batch small beside a small model's weights
BATCH_LOGITS = 1 << 27  # chosen: 512 MB of float32
# How far both ways of computing may be apart, in nats: rounding alone, so less for float32.
APART = {torch.float32: 1e-3, torch.float64: 1e-6}
APART_ELSE = 0.3

Prompt = Sequence[formats.Message]


@dataclass(frozen=True)
class Chances:
    """Log-likelihoods of the choices after each prompt.

    nats [prompts, choices]: of a choice's tokens and the stop token after them, as an answer is
    trained on; own [prompts, choices]: without the stop token; tokens [prompts, choices]: how
    many there are, the stop token included; why: why each choice was computed with its whole
    prompt, or nothing where the prompt's cache was shared.
    """

    nats: np.ndarray
    own: np.ndarray
    tokens: np.ndarray
    why: str = ""


@dataclass(frozen=True)
class _Pair:
    """A prompt's ids, and of each choice the ids that follow them, its stop token the last."""

    prompt: list[int]
    answers: list[list[int]]
    begin: int = 0  # where the answer's masks begin in the prompt


def choose(
    model: Any,
    encoder: encoding.Encoder,
    prompts: Sequence[Prompt],
    choices: Sequence[str],
    *,
    decide: str = "likelihood",
    done: Callable[[int, int, np.ndarray], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[int]:
    """For each prompt the index of the choice that the model finds likeliest; the first of equals.

    decide: `likelihood` of a choice with its stop token, that `likelihood_per_token`, or
    `likelihood_per_byte` of the choice's text. `done(prompt, choice, nats)` is told of each one as
    soon as it is known; nats [choices]: by which it was picked.
    """
    picked: dict[int, int] = {}
    sizes = np.array([len(choice.encode()) or 1 for choice in choices])

    def note(places: Sequence[int], found: Chances) -> None:
        by = {
            "likelihood": found.nats,
            "likelihood_per_token": found.nats / found.tokens,
            "likelihood_per_byte": found.nats / sizes,
        }[decide]
        for place, nats in zip(places, by, strict=True):
            picked[place] = int(nats.argmax())
            if done is not None:
                done(place, picked[place], nats)

    encoder = encoder.answering(choices)
    if encoder.family == families.MASKED and decide == "likelihood":
        # Masks are filled in each by itself: the more there are, the less likely all together.
        decide = "likelihood_per_token"
    found = chances(model, encoder, prompts, choices, note)
    if found.why and say is not None:
        say(f"choices: each with its whole prompt, {found.why}")
    return [picked[place] for place in range(len(prompts))]


@torch.inference_mode()
def chances(
    model: Any,
    encoder: encoding.Encoder,
    prompts: Sequence[Prompt],
    choices: Sequence[str],
    note: Callable[[Sequence[int], Chances], None] | None = None,
) -> Chances:
    """The log-likelihood of every choice after every prompt.

    Where a probe shows that this model's cache can be shared by several continuations, a prompt
    is computed once, else once for each choice. `note(prompts, chances)` is told of each batch.
    """
    model.eval()
    encoder = encoder.answering(choices)
    shape = (len(prompts), len(choices))
    whole = Chances(np.zeros(shape), np.zeros(shape), np.zeros(shape, np.int64))
    lengths = [len(tokens.ids) for tokens in encoder.conversations(prompts, prompt=True)]
    order = sorted(range(len(prompts)), key=lambda i: (-lengths[i], i))
    ways = {families.SEQ2SEQ: _written, families.MASKED: _filled}
    way = ways.get(encoder.family) or (_adapted if adapters.prepends(model) else None)
    why: str | None = None if way is None else ""
    while order:
        signals.LISTENER.check()
        # A first guess at what fits, mended below by the choices' real lengths.
        size = max(1, BATCH_TOKENS // (len(choices) * (lengths[order[0]] + 8)))
        places, order = order[:size], order[size:]
        pairs = [_pair(encoder, prompts[i], choices) for i in places]
        if why is None:
            why = _unshareable(model, pairs)
        run = way or (_apart if why else _shared)
        found = run(model, pairs, encoder)
        for k, i in enumerate(places):
            whole.nats[i] = [each.sum() for each in found[k]]
            stops = encoder.family != families.MASKED
            whole.own[i] = [(each[:-1] if stops else each).sum() for each in found[k]]
            whole.tokens[i] = [len(each) for each in found[k]]
        if note is not None:
            note(places, Chances(whole.nats[places], whole.own[places], whole.tokens[places]))
    return Chances(whole.nats, whole.own, whole.tokens, why or "")


def _pair(encoder: encoding.Encoder, prompt: Prompt, choices: Sequence[str]) -> _Pair:
    rows = encoder.conversations(
        [[*prompt, formats.Message("assistant", choice)] for choice in choices], train_on="last"
    )
    begin = rows[0].supervised.index(True)  # what stands before an answer follows from the prompt
    answers = [list(itertools.compress(row.ids, row.supervised)) for row in rows]
    if encoder.family == families.MASKED:
        return _Pair(encoder.prompt(prompt), answers, begin)
    return _Pair(rows[0].ids[:begin], answers)


Found = list[list[np.ndarray]]  # for each prompt and choice: the log-likelihood of each token


def _unshareable(model: Any, pairs: Sequence[_Pair]) -> str:
    """Why the cache of this model cannot be shared; nothing where both ways agree on a sample."""
    sample = [_Pair(each.prompt, each.answers[:2]) for each in (pairs[0], pairs[-1])]
    sample[1] = _Pair(sample[1].prompt[-max(1, len(sample[1].prompt) // 2) :], sample[1].answers)
    try:
        shared = _shared(model, sample)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
        return f"as its cache cannot be shared ({type(error).__name__})"
    plain = _apart(model, sample)
    worst = max(
        float(np.abs(one - other).max())
        for mine, others in zip(shared, plain, strict=True)
        for one, other in zip(mine, others, strict=True)
    )
    allowed = APART.get(model.dtype, APART_ELSE)
    return f"as its cache, shared, answers otherwise (by {worst:.2g})" if worst > allowed else ""


def _filled(model: Any, pairs: Sequence[_Pair], encoder: encoding.Encoder) -> Found:
    """All choices read off one pass over the prompts, with logits at their masks alone."""
    width = max(len(each.prompt) for each in pairs)
    ids, mask = _block([each.prompt for each in pairs], width, left=False)
    ids = ids.masked_fill(mask == 0, int(encoder.tokenizer.pad_token_id or 0))
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    longest = [max(map(len, each.answers)) for each in pairs]
    places = [
        k * width + each.begin + i
        for k, (each, size) in enumerate(zip(pairs, longest, strict=True))
        for i in range(size)
    ]
    made = losses.logits_at(model, inputs, torch.tensor(places, device=model.device))
    out = []
    for each, place in zip(pairs, made.float().log_softmax(-1).split(longest), strict=True):
        table = place.double().cpu().numpy()
        out.append([table[np.arange(len(answer)), answer] for answer in each.answers])
    return out


def _written(model: Any, pairs: Sequence[_Pair], encoder: encoding.Encoder) -> Found:
    """Each choice written by the decoder after its prompt was read."""
    found = []
    for number in range(len(pairs[0].answers)):
        width = max(len(each.prompt) for each in pairs)
        ids, mask = _block([each.prompt for each in pairs], width, left=False)
        ids = ids.masked_fill(mask == 0, int(encoder.tokenizer.pad_token_id or 0))
        answers = [each.answers[number] for each in pairs]
        longest = max(map(len, answers))
        targets, real = _block(answers, longest, left=False)
        labels = targets.masked_fill(real == 0, batches.IGNORED)
        output = model(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            decoder_input_ids=families.decoder_inputs(model, labels.to(model.device)),
            use_cache=False,
        )
        picked = _picked(output.logits[:, -longest:], targets.to(model.device))
        found.append([row[: len(answer)] for row, answer in zip(picked, answers, strict=True)])
    return [list(row) for row in zip(*found, strict=True)]


def _adapted(model: Any, pairs: Sequence[_Pair], _encoder: Any = None) -> Found:
    """Each choice with its whole prompt, where an adapter sets tokens of its own before it."""
    found: Found = []
    for each in pairs:
        rows = data.from_tokens([_whole(each.prompt, answer) for answer in each.answers])
        batch = batches.padded(rows, np.arange(len(rows)), 0).to(model.device)
        nats: list[torch.Tensor] = []
        losses.summed(model, replace(batch, positions=None), head=losses.FULL, each=nats)
        sizes = [len(answer) for answer in each.answers]
        found.append([-part.double().cpu().numpy() for part in torch.cat(nats).split(sizes)])
    return found


def _whole(prompt: list[int], answer: list[int]) -> encoding.Tokens:
    return encoding.Tokens([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


def _apart(model: Any, pairs: Sequence[_Pair], _encoder: Any = None) -> Found:
    """Each choice computed with its whole prompt."""
    rows = [_whole(each.prompt, answer) for each in pairs for answer in each.answers]
    out: dict[int, np.ndarray] = {}
    corpus = data.from_tokens(rows)
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    for part in batches.micro_batches(order, corpus.lengths, BATCH_TOKENS, padded=True):
        batch = batches.padded(corpus, part, 0).to(model.device)
        columns = (batch.targets != batches.IGNORED).any(0).nonzero().squeeze(1)
        output = model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=columns,
        )
        targets = batch.targets[:, columns]
        picked = _picked(output.logits, targets.clamp(min=0))
        kept = (targets != batches.IGNORED).cpu().numpy()
        for k, row in enumerate(part):
            out[int(row)] = picked[k][kept[k]]
    found = iter(out[row] for row in range(len(rows)))
    return [[next(found) for _ in each.answers] for each in pairs]


def _shared(model: Any, pairs: Sequence[_Pair], _encoder: Any = None) -> Found:
    """Each prompt computed once; its cache is repeated for the choices that follow it."""
    width = max(len(each.prompt) for each in pairs)
    ids, mask = _block([each.prompt for each in pairs], width, left=True)
    ids, mask = ids.to(model.device), mask.to(model.device)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    first = output.logits[:, -1].float().log_softmax(-1)  # [prompts, vocabulary]
    cache, n_choices = output.past_key_values, len(pairs[0].answers)
    longest = max(len(answer) for each in pairs for answer in each.answers)
    size = BATCH_TOKENS // (len(pairs) * (width + longest))
    size = max(1, min(size, BATCH_LOGITS // (len(pairs) * longest * first.shape[-1])))
    found: Found = [[] for _ in pairs]
    for start in range(0, n_choices, size):
        last = start + size >= n_choices
        answers = [each.answers[start : start + size] for each in pairs]
        mine = cache if last else copy.deepcopy(cache)
        rest = _rest(model, mine, mask, answers)
        for k, (many, others) in enumerate(zip(answers, rest, strict=True)):
            begins = first[k, [answer[0] for answer in many]].cpu().numpy()
            found[k] += [np.append(one, other) for one, other in zip(begins, others, strict=True)]
    return found


def _rest(
    model: Any, cache: Any, mask: torch.Tensor, answers: Sequence[Sequence[list[int]]]
) -> list[list[np.ndarray]]:
    """Log-likelihoods of all tokens of the answers but their first; the cache is used up."""
    each = len(answers[0])
    flat = [answer for many in answers for answer in many]
    width = max(len(answer) for answer in flat) - 1
    if width == 0:
        return [[np.zeros(0)] * each for _ in answers]
    cache.batch_repeat_interleave(each)
    inputs, own = _block([answer[:-1] for answer in flat], width, left=False)
    targets, _ = _block([answer[1:] for answer in flat], width, left=False)
    before = mask.repeat_interleave(each, 0)
    output = model(
        input_ids=inputs.to(mask.device),
        attention_mask=torch.cat([before, own.to(mask.device)], 1),
        position_ids=before.sum(1, keepdim=True) + torch.arange(width, device=mask.device),
        past_key_values=cache,
        use_cache=True,
    )
    picked = _picked(output.logits, targets.to(mask.device))
    parts = [picked[k, : len(answer) - 1] for k, answer in enumerate(flat)]
    return [parts[k : k + each] for k in range(0, len(parts), each)]


def _block(
    rows: Sequence[Sequence[int]], width: int, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids padded to a width on one side, and the mask of what is no padding."""
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[k, span] = torch.tensor(row, dtype=torch.long)
        mask[k, span] = 1
    return ids, mask


def _picked(logits: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """The log-likelihood of each target, [rows, columns]."""
    chosen = logits.float().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    return np.asarray(chosen.double().cpu().numpy())
