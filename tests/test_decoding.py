"""Decoding in slots: the answers of `model.generate`, one prompt at a time, whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_tokenizer

from itune import (
    adapters,
    decoding,
    encoding,
    errors,
    folding,
    generation,
    picking,
    slots,
    stepping,
    vocabularies,
)

SIZE: dict[str, Any] = {
    "vocab_size": 320,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "gemma2": ("Gemma2", {"sliding_window": 6}),
}
OWN = [*KINDS, "gpt2"]


def made(kind: str) -> Any:
    torch.manual_seed(17)
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=1
        )
        model: Any = transformers.GPT2LMHeadModel(config)
    elif kind == "bloom":
        config = transformers.BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4)
        model = transformers.BloomForCausalLM(config)
    else:
        name, more = KINDS[kind]
        config = getattr(transformers, f"{name}Config")(**{**SIZE, **more})
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    # Spread so widely that answers differ, and that no two tokens are nearly as likely.
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def encoder() -> encoding.Encoder:
    return encoding.Encoder(vocabularies.with_template(tiny_tokenizer()))


def prompts(n: int = 7) -> list[list[int]]:
    """Of 6 to 24 tokens; all begin with the same five."""
    draw = torch.Generator().manual_seed(3)
    begin = torch.randint(3, 320, (5,), generator=draw).tolist()
    lengths = torch.randint(1, 20, (n,), generator=draw).tolist()
    return [begin + torch.randint(3, 320, (k,), generator=draw).tolist() for k in lengths]


def settings(encoder: encoding.Encoder, **fields: Any) -> Any:
    wanted = generation.settings({"max_new_tokens": 16, **fields}, encoder)
    wanted.eos_token_id = list(range(1, 30))  # so that answers end early, and at different places
    return wanted


@torch.inference_mode()
def alone(model: Any, asked: Sequence[Sequence[int]], wanted: Any) -> list[tuple[int, ...]]:
    """What `generate` answers to each prompt by itself."""
    return [
        tuple(
            model.generate(
                input_ids=torch.tensor([each]),
                attention_mask=torch.ones((1, len(each)), dtype=torch.long),
                generation_config=wanted,
            )[0, len(each) :].tolist()
        )
        for each in asked
    ]


@pytest.mark.parametrize("kind", OWN)
def test_greedy_answers_are_those_of_generate_one_at_a_time(
    kind: str, encoder: encoding.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked, wanted = made(kind), prompts(), settings(encoder)
    said: list[str] = []
    expected = alone(model, asked, wanted)
    assert len({len(each) for each in expected}) > 1, "answers end at different places"
    together = decoding.generate(model, encoder, asked, wanted, say=said.append)
    assert [each.ids for each in together] == expected
    # Few slots, and so little room that rows under way have to wait and are read again.
    monkeypatch.setattr(stepping, "BATCH_ROWS", 3)
    monkeypatch.setattr(stepping, "AHEAD", 2)
    monkeypatch.setattr(stepping, "room", lambda model: 60)
    tight = decoding.generate(model, encoder, asked, wanted, say=said.append)
    assert [each.ids for each in tight] == expected
    assert said == []


def test_a_model_whose_cache_takes_no_slots_is_decoded_by_the_library(
    encoder: encoding.Encoder,
) -> None:
    model, asked, wanted = made("bloom"), prompts(3), settings(encoder)
    said: list[str] = []
    found = decoding.generate(model, encoder, asked, wanted, say=said.append)
    assert [each.ids for each in found] == alone(model, asked, wanted)
    assert "its cache takes no slots" in said[0]


def test_a_cache_that_answers_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    assert slots.disagrees(model, [5, 6, 7]) == ""
    monkeypatch.setattr(slots.Slots, "_mask", lambda self, positions: None)
    assert "answers otherwise" in slots.disagrees(model, [5, 6, 7])


@pytest.mark.parametrize(
    "fields", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 4}]
)
def test_settings_that_are_followed_give_the_same_answers(
    fields: dict[str, Any], encoder: encoding.Encoder
) -> None:
    model, asked, wanted = made("llama"), prompts(4), settings(encoder, **fields)
    expected = alone(model, asked, wanted)
    assert expected != alone(model, asked, settings(encoder)), "the setting changes something"
    said: list[str] = []
    found = decoding.generate(model, encoder, asked, wanted, say=said.append)
    assert [each.ids for each in found] == expected
    assert said == []


def test_what_is_not_followed_is_left_to_the_library(encoder: encoding.Encoder) -> None:
    model, asked, wanted = made("llama"), prompts(3), settings(encoder, num_beams=2)
    said: list[str] = []
    found = decoding.generate(model, encoder, asked, wanted, say=said.append)
    assert "num_beams: 2" in said[0]
    assert [each.text for each in found] == [
        encoder.decode([k for k in ids if k not in wanted.eos_token_id])
        for ids in alone(model, asked, wanted)
    ]


def test_settings_resolve_as_the_library_resolves_them(encoder: encoding.Encoder) -> None:
    model = made("llama")
    model.generation_config.update(repetition_penalty=1.05, top_p=0.8, top_k=20)
    wanted = settings(encoder, temperature=0.7)
    theirs, _ = model._prepare_generation_config(wanted)
    ours = picking.resolved(model, wanted)
    for name in picking.FOLLOWED - {"eos_token_id"}:
        assert ours.get(name) == getattr(theirs, name), name


@pytest.mark.parametrize("fields", [{"temperature": 1.5}, {"temperature": 1.5, "top_h": 0.9}])
def test_a_seed_gives_a_row_the_same_answer_in_any_batch(
    fields: dict[str, Any], encoder: encoding.Encoder
) -> None:
    model, asked = made("llama"), [*prompts(3), prompts(3)[0]]
    wanted = settings(encoder, **fields)
    order = decoding.Order(seed=5)
    together = decoding.generate(model, encoder, asked, wanted, order=order)
    assert together[0].ids != together[3].ids, "the same prompt twice gets two answers"
    for k in (3, 1):
        one = decoding.generate(
            model, encoder, [asked[k]], wanted, order=decoding.Order(seed=5, keys=[k])
        )
        assert one[0].ids == together[k].ids
    other = decoding.generate(model, encoder, asked, wanted, order=decoding.Order(seed=6))
    assert [each.ids for each in other] != [each.ids for each in together]


def test_draws_follow_the_chances() -> None:
    fields = {**picking.DEFAULTS, "do_sample": True, "top_k": 2, "eos_token_id": [9]}
    picker = picking.Picker(fields, torch.device("cpu"))
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(4000, -1)
    scores = picker.scores(logits, [], [0] * 4000)
    found = torch.tensor(picker.pick(scores, [picking.draws(1, k) for k in range(4000)]))
    assert not (found == 0).any(), "top_k leaves two"
    expected = float(torch.tensor([1.0, 2.0]).softmax(0)[1])
    assert float((found == 2).float().mean()) == pytest.approx(expected, abs=0.03)


def test_an_adapter_is_folded_in_and_taken_out_to_the_bit(encoder: encoding.Encoder) -> None:
    settings_ = {"peft_type": "lora", "r": 4, "target_modules": "all-linear"}
    model = adapters.attach(made("llama"), settings_, base="none", seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    asked, wanted = prompts(3), settings(encoder)
    model.eval()
    expected = alone(model, asked, wanted)
    model.train()
    with folding.folded_in(model) as plain:
        assert any((p != before[n]).any() for n, p in model.named_parameters()), "it is folded in"
        assert not hasattr(plain, "peft_config") or plain is not model
    found = decoding.generate(model, encoder, asked, wanted)
    assert [each.ids for each in found] == expected
    assert model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_tokens_are_told_as_they_come(encoder: encoding.Encoder) -> None:
    model, wanted = made("llama"), settings(encoder)
    heard: list[int] = []
    order = decoding.Order(told=lambda place, token: heard.append(token))
    (found,) = decoding.generate(model, encoder, prompts(1), wanted, order=order)
    assert heard == list(found.ids[:-1] if found.stop == "stop" else found.ids)


@pytest.mark.parametrize("name", [*generation.FETCHED, *generation.BESIDES])
def test_a_field_that_gives_no_answer_is_refused_by_name(
    name: str, encoder: encoding.Encoder
) -> None:
    with pytest.raises(errors.RecipeError, match=f"generation.{name}: 2 "):
        generation.settings({name: 2}, encoder)


def test_own_stop_tokens_are_added_and_every_drawing_field_draws(
    encoder: encoding.Encoder,
) -> None:
    both = {encoder.stop_id, encoder.eos_id}
    for own in (7, [7]):
        assert generation.settings({"eos_token_id": own}, encoder).eos_token_id == sorted(
            {*both, 7}
        )
    for name in generation.SAMPLING:
        value = 5 if name == "top_k" else 0.5
        assert generation.settings({name: value}, encoder).do_sample, name
