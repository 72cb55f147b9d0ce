"""The likelihood of choices equals a plain loop over them, however it is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_model, tiny_tokenizer

from itune import encoding, likelihoods, vocabularies
from itune.formats import Message

CHOICES = ["glad", "sad", "not so sure about it", "x"]
PROMPTS = [
    [Message("user", "the cat sees the red ball at home. How is it?")],
    [Message("user", "why?")],
    [Message("system", "Be brief."), Message("user", "my sister likes some bread today. And?")],
    [Message("user", "a"), Message("assistant", "glad"), Message("user", "an old book? " * 9)],
]


@pytest.fixture(scope="module")
def encoder() -> encoding.Encoder:
    return encoding.Encoder(vocabularies.with_template(tiny_tokenizer()))


def gpt2() -> Any:
    torch.manual_seed(3)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=320, n_embd=48, n_layer=2, n_head=2, n_positions=512,
            bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def windowed() -> Any:
    """A model whose layers see the last 16 tokens only."""
    torch.manual_seed(4)
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=320, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, sliding_window=16,
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_model("causal"),
    "gpt2": gpt2,
    "windowed": windowed,
}


@torch.inference_mode()
def plainly(model: Any, encoder: encoding.Encoder) -> tuple[np.ndarray, np.ndarray]:
    """One forward pass for each prompt and choice: the sums with and without the stop token."""
    sums, own = np.zeros((2, len(PROMPTS), len(CHOICES)))
    for i, prompt in enumerate(PROMPTS):
        begin = len(encoder.prompt(prompt))
        for j, choice in enumerate(CHOICES):
            row = encoder.conversation([*prompt, Message("assistant", choice)], train_on="last")
            ids = torch.tensor([row.ids])
            told = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            each = told.gather(-1, ids[0, 1:, None])[begin - 1 :, 0].numpy()
            sums[i, j], own[i, j] = each.sum(), each[:-1].sum()
    return sums, own


@pytest.mark.parametrize("name", MODELS)
def test_likelihoods_are_those_of_a_plain_loop(name: str, encoder: encoding.Encoder) -> None:
    model = MODELS[name]().eval()
    found = likelihoods.chances(model, encoder, PROMPTS, CHOICES)
    sums, own = plainly(model, encoder)
    assert found.nats == pytest.approx(sums, abs=1e-4)
    assert found.own == pytest.approx(own, abs=1e-4)
    assert (found.nats.argmax(1) == sums.argmax(1)).all()
    assert (found.tokens > 1).all()
    if name != "windowed":
        assert found.why == ""


@pytest.mark.parametrize(("tokens", "logits"), [(1, 1 << 27), (130, 1 << 27), (16384, 320 * 9)])
def test_batches_of_any_size_give_the_same(
    tokens: int, logits: int, encoder: encoding.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("causal").eval()
    whole = likelihoods.chances(model, encoder, PROMPTS, CHOICES)
    monkeypatch.setattr(likelihoods, "BATCH_TOKENS", tokens)
    monkeypatch.setattr(likelihoods, "BATCH_LOGITS", logits)
    found = likelihoods.chances(model, encoder, PROMPTS, CHOICES)
    assert found.nats == pytest.approx(whole.nats, abs=1e-4)
    assert found.why == ""


def test_a_prompt_is_computed_once(
    encoder: encoding.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("causal").eval()
    monkeypatch.setattr(likelihoods, "_unshareable", lambda *_: "")
    seen = []
    model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    prompt = PROMPTS[3]
    likelihoods.chances(model, encoder, [prompt], CHOICES)
    length, answers = len(encoder.prompt(prompt)), sum(seen[1:])
    assert seen[0] == length
    assert 0 < answers < 4 * 30 < length * 3


@pytest.mark.parametrize("fault", ["raises", "answers otherwise"])
def test_a_cache_that_cannot_be_shared_is_found_by_trying(
    fault: str, encoder: encoding.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repeat(self: Any, times: int) -> None:
        if fault == "raises":
            raise NotImplementedError("no such thing")
        for layer in self.layers:
            layer.keys = layer.keys.repeat(times, 1, 1, 1).zero_()
            layer.values = layer.values.repeat(times, 1, 1, 1)

    monkeypatch.setattr(transformers.DynamicCache, "batch_repeat_interleave", repeat)
    model, said = tiny_model("causal").eval(), []
    found = likelihoods.chances(model, encoder, PROMPTS, CHOICES)
    assert found.nats == pytest.approx(plainly(model, encoder)[0], abs=1e-4)
    picked = likelihoods.choose(model, encoder, PROMPTS, CHOICES, say=said.append)
    assert picked == found.nats.argmax(1).tolist()
    expected = "NotImplementedError" if fault == "raises" else "answers otherwise (by "
    assert len(said) == 1
    assert "its whole prompt" in said[0]
    assert expected in said[0]


@pytest.mark.parametrize(
    ("decide", "size"),
    [
        ("likelihood", lambda _, __: 1),
        ("likelihood_per_token", lambda encoder, choice: len(encoder.text_ids(choice)) + 1),
        ("likelihood_per_byte", lambda _, choice: len(choice.encode())),
    ],
)
def test_a_choice_is_normalised_as_is_asked(
    decide: str, size: Callable[..., int], encoder: encoding.Encoder
) -> None:
    model, told = tiny_model("causal").eval(), {}
    picked = likelihoods.choose(
        model,
        encoder,
        PROMPTS,
        CHOICES,
        decide=decide,
        done=lambda *each: told.update({each[0]: each[1:]}),
    )
    sizes = [size(encoder, choice) for choice in CHOICES]
    expected = plainly(model, encoder)[0] / sizes
    assert picked == expected.argmax(1).tolist()
    assert {place: best for place, (best, _) in told.items()} == dict(enumerate(picked))
    assert np.array([told[place][1] for place in range(4)]) == pytest.approx(expected, abs=1e-4)
