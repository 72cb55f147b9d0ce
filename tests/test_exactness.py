"""Loss and gradient of every way of computing against plain transformers, padded, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import tiny_model

from itune import batches, data, encoding, losses, models, probing

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LENGTHS = [37, 2, 25, 60, 5, 1, 18, 90, 44, 9]
# Micro-batches of one step: all in one; three unequal ones; very uneven; one without any target.
SPLITS: dict[str, list[list[int]]] = {
    "one": [[*range(10)]],
    "three": [[0, 1, 2, 3, 4], [5], [6, 7, 8, 9]],
    "uneven": [[7], [1, 5], [0, 2, 3, 4, 6, 8, 9]],
    "masked": [[5], [0, 1, 2, 3, 4, 6, 7, 8, 9]],  # the row of one token learns nothing
}
Grads = dict[str, torch.Tensor]


def corpus(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> data.Corpus:
    draw = np.random.default_rng(seed)
    return data.from_tokens(
        [
            encoding.Tokens(draw.integers(4, 320, n).tolist(), [k >= n // 2 for k in range(n)])
            for n in lengths
        ]
    )


def rows_of(made: data.Corpus) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, labels) an example, as transformers has labels: -100 where nothing is learnt."""
    found = []
    for k in range(len(made)):
        span = slice(int(made.starts[k]), int(made.starts[k + 1]))
        ids = torch.from_numpy(made.ids[span].astype(np.int64))
        found.append((ids, ids.masked_fill(~torch.from_numpy(made.supervised[span]), -100)))
    return found


def reference(model: Any, made: data.Corpus) -> tuple[float, Grads]:
    """The library's own loss over one padded batch of all rows, divided by its targets."""
    pairs = rows_of(made)
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([ids for ids, _ in pairs], batch_first=True)
    labels = pad([labels for _, labels in pairs], batch_first=True, padding_value=-100)
    mask = pad([torch.ones_like(ids) for ids, _ in pairs], batch_first=True)
    count = int((labels[:, 1:] != -100).sum())
    loss = model(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        num_items_in_batch=count,
        use_cache=False,
    ).loss
    loss.backward()
    return loss.item(), taken(model)


def taken(model: Any) -> Grads:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def ours(
    model: Any, made: data.Corpus, split: list[list[int]], layout: str, head: str
) -> tuple[float, Grads]:
    collate = probing.Path(layout, head, "").collate(0)
    total = 0.0
    for rows in split:
        loss = losses.summed(model, collate(made, np.array(rows)), head=head)
        loss = loss / int(made.targets.sum())
        loss.backward()
        total += loss.item()
    return total, taken(model)


def assert_alike(got: tuple[float, Grads], wanted: tuple[float, Grads], close: float) -> None:
    assert got[0] == pytest.approx(wanted[0], abs=close)
    assert got[1].keys() == wanted[1].keys()
    scale = max(float(g.abs().max()) for g in wanted[1].values())
    assert scale > 0
    for name, gradient in wanted[1].items():
        assert float((got[1][name] - gradient).abs().max()) / scale < close, name


def adapted(model: Any) -> Any:
    import peft

    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    return tuned.eval()


def prepared(layout: str, *, lora: bool = False) -> Any:
    model: Any = tiny_model("causal")
    if lora:
        model = adapted(model)
    if layout == probing.ROWS:
        assert probing.choose(model, max(LENGTHS)).layout == probing.ROWS
    return model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("head", [losses.TARGETS, losses.KEPT, losses.FULL])
@pytest.mark.parametrize("layout", [probing.ROWS, probing.MASK, probing.PADDING])
def test_every_way_gives_the_full_batch_s_loss_and_gradient(
    layout: str, head: str, lora: bool
) -> None:
    made, model = corpus(), prepared(layout, lora=lora)
    plain: Any = tiny_model("causal")
    if lora:
        torch.manual_seed(0)
        plain = adapted(plain)
        plain.load_state_dict(model.state_dict())
    wanted = reference(plain, made)
    for name, split in SPLITS.items():
        assert_alike(ours(model, made, split, layout, head), wanted, 2e-6), name


def test_a_mean_of_means_would_not_pass() -> None:
    """What these tests guard against: micro-batches that weigh alike whatever they hold."""
    made, model = corpus(), tiny_model("causal")
    wanted = reference(model, made)
    parts = [part for part in SPLITS["three"] if made.targets[part].sum()]
    for part in parts:
        batch = batches.padded(made, np.array(part), 0)
        (losses.summed(model, batch) / int(made.targets[part].sum()) / len(parts)).backward()
    with pytest.raises(AssertionError):
        assert_alike((wanted[0], taken(model)), wanted, 1e-3)


def test_float64_agrees_closer_than_float32_can() -> None:
    """The library rounds its logits to float32 for the loss, so the reference is plain torch."""
    made, model = corpus(), tiny_model("causal").double()
    count = int(made.targets.sum())
    total = 0.0
    for ids, labels in rows_of(made):
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits, labels[1:], reduction="sum") / count
        loss.backward()
        total += loss.item()
    wanted = (total, taken(model))
    for layout in (probing.PADDING, probing.MASK, probing.ROWS):
        if layout == probing.ROWS:
            assert probing.choose(model, max(LENGTHS)).layout == layout
        for head in (losses.TARGETS, losses.KEPT):
            assert_alike(ours(model, made, SPLITS["three"], layout, head), wanted, 1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_the_chunked_head_is_the_plain_loss(
    chunk: int, bias: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "fused", lambda: fused)
    draw = torch.Generator().manual_seed(1)
    wanted = torch.randint(0, 90, (50,), generator=draw)
    states = torch.randn(50, 16, generator=draw)
    weight, offset = torch.randn(90, 16, generator=draw), torch.randn(90, generator=draw)
    inputs = [x.requires_grad_() for x in ((states, weight, offset) if bias else (states, weight))]
    plain = F.cross_entropy(F.linear(*inputs), wanted, reduction="sum")
    expected = torch.autograd.grad(plain * 0.3, inputs)
    made = losses.head_loss(states, weight, offset if bias else None, wanted, chunk)
    assert made.item() == pytest.approx(plain.item(), rel=1e-6)
    for got, gradient in zip(torch.autograd.grad(made * 0.3, inputs), expected, strict=True):
        assert float((got - gradient).abs().max()) < 1e-6 * max(1, float(gradient.abs().max()))


def test_a_long_loss_in_16_bits_is_added_up_in_more() -> None:
    """bfloat16 has 8 digits: a sum of its own stands still where a chunk is 1/512 of it."""
    draw = torch.Generator().manual_seed(1)
    wanted = torch.randint(0, 40, (60_000,), generator=draw)
    states = torch.randn(60_000, 8, generator=draw).bfloat16()
    weight = torch.randn(40, 8, generator=draw).bfloat16()
    exact = [x.double().requires_grad_() for x in (states, weight)]
    plain = F.cross_entropy(F.linear(*exact), wanted, reduction="sum")
    expected = torch.autograd.grad(plain / 60_000, exact)
    inputs = [x.clone().requires_grad_() for x in (states, weight)]
    made = losses.head_loss(*inputs, None, wanted, 64)
    assert made.item() == pytest.approx(plain.item(), rel=1e-3)
    for got, gradient in zip(torch.autograd.grad(made / 60_000, inputs), expected, strict=True):
        assert got.dtype == torch.bfloat16
        assert float((got - gradient).norm() / gradient.norm()) < 0.005
        # 1/60,000 itself is 0.13 % off in 16 bits: then all of a gradient would be.
        assert float((got * gradient).sum() / gradient.square().sum()) == pytest.approx(1, abs=5e-4)


def test_a_frozen_head_gets_no_gradient_and_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(1)
    states = torch.randn(20, 8, generator=draw, requires_grad=True)
    weight, wanted = torch.randn(30, 8, generator=draw), torch.randint(0, 30, (20,), generator=draw)
    expected = torch.autograd.grad(
        F.cross_entropy(states @ weight.T, wanted, reduction="sum"), states
    )
    for fused in (False, True):
        monkeypatch.setattr(losses, "fused", lambda fused=fused: fused)
        loss = losses.head_loss(states, weight, None, wanted, 7)
        assert torch.allclose(torch.autograd.grad(loss, states)[0], expected[0], atol=1e-6)


@pytest.mark.parametrize("layout", [probing.ROWS, probing.PADDING])
def test_gradient_checkpointing_changes_nothing(layout: str) -> None:
    made, model = corpus(), prepared(layout)
    model.train()  # the tiny model has no dropout; the library recomputes in training mode alone
    off = ours(model, made, SPLITS["three"], layout, losses.TARGETS)
    models.recompute(model)
    assert model.is_gradient_checkpointing
    on = ours(model, made, SPLITS["three"], layout, losses.TARGETS)
    assert_alike(on, off, 1e-7)


def test_a_window_narrower_than_the_rows() -> None:
    torch.manual_seed(2)
    config = transformers.MistralConfig(**SMALL, sliding_window=8)
    model = transformers.MistralForCausalLM(config)
    made = corpus()
    wanted = reference(model, made)
    assert probing.choose(model, max(LENGTHS)).layout == probing.ROWS
    for split in SPLITS.values():
        assert_alike(ours(model, made, split, probing.ROWS, losses.TARGETS), wanted, 2e-6)


@pytest.mark.parametrize("layout", [probing.ROWS, probing.MASK, probing.PADDING])
@pytest.mark.parametrize("head", [losses.TARGETS, losses.KEPT, losses.FULL])
def test_experts_are_balanced_where_the_config_asks_for_it(layout: str, head: str) -> None:
    torch.manual_seed(2)
    config = transformers.MixtralConfig(
        **SMALL, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5
    )
    model, made = transformers.MixtralForCausalLM(config), corpus()
    wanted = reference(model, made)
    if layout == probing.ROWS:
        assert probing.choose(model, max(LENGTHS)).layout == layout
    batch = probing.Path(layout, head, "").collate(0)(made, np.arange(len(made)))
    loss = losses.summed(model, batch, head=head, balance=True) / int(made.targets.sum())
    loss.backward()
    assert_alike((loss.item(), taken(model)), wanted, 2e-6)
    plain = losses.summed(model, batch, head=head) / int(made.targets.sum())
    assert plain.item() < wanted[0] - 0.1, "a measured loss is of the tokens alone"


def test_a_batch_without_targets_gives_zero_and_every_gradient() -> None:
    made = data.from_tokens([encoding.Tokens([5, 6, 7], [False] * 3)])
    for head in (losses.TARGETS, losses.KEPT, losses.FULL):
        model = tiny_model("causal")
        loss = losses.summed(model, batches.padded(made, np.arange(1), 0), head=head)
        assert loss.item() == 0.0
        loss.backward()
        # Ranks that share a step wait for each other's gradients, so none may be missing.
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters()), head


def test_the_loss_of_each_target_adds_up_and_asking_for_it_changes_no_bit() -> None:
    made = corpus()
    batch = batches.padded(made, np.arange(len(made)), 0)
    for head in (losses.TARGETS, losses.KEPT, losses.FULL):
        model = tiny_model("causal")
        plain = losses.summed(model, batch, head=head)
        plain.backward()
        without = taken(model)
        each: losses.Each = []
        watched = losses.summed(model, batch, head=head, each=each)
        watched.backward()
        assert torch.equal(plain, watched)
        assert all(torch.equal(g, without[name]) for name, g in taken(model).items())
        assert float(torch.cat(each).sum()) == pytest.approx(plain.item(), rel=1e-6)
        alone = F.cross_entropy(
            tiny_model("causal")(input_ids=batch.ids[:1, :37]).logits[0, :-1][
                batch.places[batch.owners() == 0]
            ],
            batch.wanted[batch.owners() == 0],
            reduction="none",
        )
        assert torch.allclose(torch.cat(each)[batch.owners() == 0], alone, atol=1e-5)
