"""How likely each token of an answer was, and which tokens of its prompt drove it.

Needs torch. The model reads prompt and answer once, as text that is there. A token's probability is
the model's own, before temperature and whatever else picks tokens. What drives an answer is told by
gradient times input, to first order: how much the answer's log-likelihood would fall, in nats, if
the vector that a token of the prompt is read as were shrunk, for each part of it that goes. Such
scores are signed, and have no sum that they must come to.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from itune import encoding, errors, families, previewing


@dataclass(frozen=True, slots=True)
class Token:
    """A token as text. control: it has a meaning of its own, and is no text."""

    text: str
    id: int
    control: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """An answer's tokens with their log-probabilities in nats, and its prompt's with their scores.

    The token that ended the answer is one of it. Without a look at the prompt `scores` is empty.
    """

    prompt: Sequence[Token]
    answer: Sequence[Token]
    logprobs: Sequence[float]
    scores: Sequence[float] = ()

    @property
    def probabilities(self) -> list[float]:
        """Of each token of the answer, from 0 to 1."""
        return [math.exp(each) for each in self.logprobs]

    @property
    def shares(self) -> list[float]:
        """The scores over the sum of their sizes: signed, and of sizes that sum to 1."""
        whole = sum(map(abs, self.scores))
        return [each / whole if whole else 0.0 for each in self.scores]

    def plain(self) -> dict[str, Any]:
        """The explanation as `--json` gives it."""
        told: dict[str, Any] = {
            "answer": [
                {"text": token.text, "id": token.id, "probability": found}
                for token, found in zip(self.answer, self.probabilities, strict=True)
            ]
        }
        if self.scores:
            found = zip(self.prompt, self.scores, self.shares, strict=True)
            told["input"] = [
                {"text": token.text, "id": token.id, "score": score, "share": share}
                for token, score, share in found
            ]
        return told


def explained(
    model: Any,
    encoder: encoding.Encoder,
    prompt: Sequence[int],
    answer: Sequence[int],
    *,
    drivers: bool = True,
) -> Explanation:
    """What is to be told of an answer. drivers: of its prompt too, which takes a backward pass.

    prompt, answer: their ids, the answer's as `decoding.Completion` has them, at least one.
    Raises ModelError for a model that is not asked by vectors.
    """
    apart = encoder.family == families.SEQ2SEQ
    prompt_tokens, answer_tokens = _tokens(encoder, prompt, answer, apart=apart)
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad() if drivers else torch.no_grad():
            reader = model.get_encoder() if apart else model  # an encoder may scale its vectors
            vectors = _vectors(reader, prompt).detach().requires_grad_(drivers)
            read = _by_decoder if apart else _by_causal
            logits = read(model, vectors, list(answer))
            exact = torch.promote_types(logits.dtype, torch.float32)
            found = logits.to(exact).log_softmax(-1)
            wanted = torch.tensor([list(answer)], device=found.device).T
            each = found.gather(-1, wanted)[:, 0]
            scores = _scores(each, vectors) if drivers else []
    finally:
        model.train(was_training)
    return Explanation(prompt_tokens, answer_tokens, each.tolist(), scores)


def _vectors(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """What the model reads tokens as, [tokens, size]."""
    found: torch.Tensor = model.get_input_embeddings()(
        torch.tensor([list(ids)], device=model.device)
    )
    return found[0]


def _scores(each: torch.Tensor, vectors: torch.Tensor) -> list[float]:
    """Gradient times input of a sum, one number for each vector."""
    (slope,) = torch.autograd.grad(each.sum(), vectors)
    slope, vectors = slope.cpu().double(), vectors.detach().cpu().double()
    return (slope * vectors).sum(-1).tolist()


def _by_causal(model: Any, vectors: torch.Tensor, answer: list[int]) -> torch.Tensor:
    """Logits of each token of an answer that follows its prompt, [tokens, vocabulary]."""
    given = torch.cat([vectors, _vectors(model, answer[:-1])]) if answer[1:] else vectors
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    _refuse_without_vectors(plain)
    known = inspect.signature(plain.forward).parameters
    # Of a long prompt's logits over a large vocabulary none but the last are of use.
    few = {"logits_to_keep": len(answer)} if "logits_to_keep" in known else {}
    seen = torch.ones((1, len(given)), dtype=torch.long, device=given.device)
    output = model(inputs_embeds=given[None], attention_mask=seen, use_cache=False, **few)
    return output.logits[0, -len(answer) :]  # type: ignore[no-any-return]


def _by_decoder(model: Any, vectors: torch.Tensor, answer: list[int]) -> torch.Tensor:
    """The same of an encoder-decoder, whose decoder writes the answer as a text of its own."""
    _refuse_without_vectors(model.get_base_model() if hasattr(model, "get_base_model") else model)
    start = model.generation_config.decoder_start_token_id
    start = model.config.decoder_start_token_id if start is None else start
    output = model(
        inputs_embeds=vectors[None],
        attention_mask=torch.ones((1, len(vectors)), dtype=torch.long, device=vectors.device),
        decoder_input_ids=torch.tensor([[start, *answer[:-1]]], device=vectors.device),
        use_cache=False,
    )
    return output.logits[0, -len(answer) :]  # type: ignore[no-any-return]


def _refuse_without_vectors(model: Any) -> None:
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise errors.ModelError(
            f"--explain: {type(model).__name__} reads token ids alone, so there is nothing to "
            "derive by. Leave --explain out."
        )


def _tokens(
    encoder: encoding.Encoder, prompt: Sequence[int], answer: Sequence[int], *, apart: bool
) -> tuple[list[Token], list[Token]]:
    """Prompt and answer as text: one text, unless they are two that stand `apart`."""

    def shown(ids: Sequence[int]) -> list[Token]:
        tokens = encoding.Tokens(list(ids), [False] * len(ids))
        found = previewing.stretches(encoder, tokens, single=True)
        return [Token(each.text, id_, each.control) for each, id_ in zip(found, ids, strict=True)]

    if apart:
        return shown(prompt), shown(answer)
    both = shown([*prompt, *answer])
    return both[: len(prompt)], both[len(prompt) :]
