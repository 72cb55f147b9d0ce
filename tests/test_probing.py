"""The probe: exact where it says so, down a level where a way is not exact, and without a trace."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_model

from itune import attention, batches, data, encoding, losses, objectives, probing

SMALL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
USUAL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": USUAL,
    "mistral": {**USUAL, "sliding_window": 6},
    "qwen3": USUAL,
    "gemma2": {**USUAL, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {**USUAL, "sliding_window": 6},
    "granite": {**USUAL, "logits_scaling": 3.0},
    "cohere": {**USUAL, "logit_scale": 0.25},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
    "biogpt": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "llama4_text": {},
    "roberta": {**USUAL, "max_position_embeddings": 64},
}


def made(kind: str, **changes: Any) -> Any:
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **KINDS[kind], **changes})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize(
    ("kind", "layout", "head"),
    [
        ("llama", probing.ROWS, losses.TARGETS),
        ("mistral", probing.ROWS, losses.TARGETS),
        ("qwen3", probing.ROWS, losses.TARGETS),
        ("gemma3_text", probing.ROWS, losses.TARGETS),
        ("gpt_neox", probing.ROWS, losses.TARGETS),
        ("gpt2", probing.ROWS, losses.TARGETS),
        ("opt", probing.ROWS, losses.TARGETS),
        ("biogpt", probing.ROWS, losses.TARGETS),
        ("gemma2", probing.MASK, losses.KEPT),  # a cap inside attention and one on the logits
        ("granite", probing.ROWS, losses.KEPT),  # logits divided
        ("cohere", probing.ROWS, losses.KEPT),  # logits multiplied
        ("bloom", probing.PADDING, losses.TARGETS),
        ("falcon", probing.PADDING, losses.TARGETS),
        ("mpt", probing.PADDING, losses.TARGETS),
        ("mamba", probing.PADDING, losses.TARGETS),
    ],
)
def test_each_kind_of_model_takes_the_leanest_exact_path(kind: str, layout: str, head: str) -> None:
    model = made(kind)
    path = probing.choose(model, 64)
    assert (path.layout, path.head) == (layout, head), path.why
    used = model.config._attn_implementation
    assert (used == attention.NAME) == (layout == probing.ROWS)
    assert "\n" not in path.why
    if layout == probing.PADDING:
        assert "off by" in path.why or "not possible" in path.why


@pytest.mark.parametrize("kind", ["opt", "biogpt", "bloom"])
def test_the_block_mask_is_refused_where_the_library_leaks(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise ValueError("broken on purpose")

    monkeypatch.setattr(attention, "_packed", broken)
    path = probing.choose(made(kind), 64)
    assert path.layout == probing.PADDING
    assert "block mask: off by" in path.why


def test_the_block_mask_is_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise ValueError("broken on purpose")

    monkeypatch.setattr(attention, "_packed", broken)
    path = probing.choose(made("llama"), 64)
    assert path.layout == probing.MASK
    assert "per-row attention: not possible, broken on purpose" in path.why


def test_attention_that_leaks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A band that is one too wide, and a row that sees the one before it."""

    def leaks(module: Any, query: Any, key: Any, value: Any, _mask: Any, **options: Any) -> Any:
        options = {"scale": options["scaling"], "enable_gqa": True}
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, **options
        )
        return out.transpose(1, 2), None

    monkeypatch.setattr(attention, "_packed", leaks)
    assert probing.choose(made("llama"), 64).layout == probing.MASK
    monkeypatch.undo()

    real = attention._Seen.band

    def wide(self: Any, length: int, like: Any) -> Any:
        window = None if self.window is None else self.window + 1
        return real(dataclasses.replace(self, window=window), length, like)

    monkeypatch.setattr(attention._Seen, "band", wide)
    model = made("mistral", sliding_window=20)
    assert probing.choose(model, 64).layout == probing.MASK
    # No row of the run is longer than the window, so none can see its edge.
    assert probing.choose(model, 20).layout == probing.ROWS


def test_a_border_within_the_rows_of_the_run_is_crossed_by_the_probe() -> None:
    """Chunks, as windows do, change nothing before a row is longer than they are."""
    sizes = {**USUAL, "intermediate_size_mlp": 48, "num_local_experts": 2}
    model = made("llama4_text", attention_chunk_size=20, **sizes)
    path = probing.choose(model, 64)
    assert path.layout == probing.MASK
    assert "per-row attention: off by" in path.why
    assert probing.choose(model, 20).layout == probing.ROWS


def test_a_mask_that_a_model_makes_itself_is_not_passed_over() -> None:
    attention.register()
    states = torch.ones(1, 2, 3, 4)
    segments = batches.Segments((3,), *3 * [torch.arange(3)])
    with pytest.raises(ValueError, match="own mask"):
        attention._packed(torch.nn.Module(), states, states, states, states, segments=segments)


def test_a_model_that_even_padding_changes_gets_one_row_at_a_time() -> None:
    """RoBERTa as a decoder counts its positions from beyond the padding's id."""
    model = made("roberta", pad_token_id=1, bos_token_id=0, is_decoder=True).eval()
    path = probing.choose(model, 60)
    assert (path.layout, path.head) == (probing.ALONE, losses.TARGETS)
    assert path.why.startswith("batches: one row at a time, fused loss at the targets (")
    rows = data.from_tokens([encoding.Tokens([5, 6, 7, 8, 9, 4], [True] * 6)])
    wanted = model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 4]])).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(wanted, torch.tensor([6, 7, 8, 9, 4]), reduction="sum")
    batch = path.collate(1)(rows, np.arange(1))
    found = losses.summed(model, batch, head=path.head)
    assert float(found.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_an_output_layer_that_is_adapted_makes_logits(options: dict[str, Any]) -> None:
    import peft

    model = peft.get_peft_model(
        made("llama", tie_word_embeddings=False), peft.LoraConfig(r=2, **options)
    )
    path = probing.choose(model, 64)
    assert path.head == losses.KEPT
    assert "no plain matrix" in path.why


def test_packing_off_is_padding() -> None:
    path = probing.choose(made("llama"), 64, packing=False)
    assert path.layout == probing.PADDING
    assert "training.packing is off" in path.why


def test_a_model_in_16_bits_packs_and_a_leak_in_it_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert probing.choose(made("llama").bfloat16(), 64).layout == probing.ROWS
    monkeypatch.setattr(attention, "_one_by_one", lambda q, *_: torch.zeros_like(q.transpose(1, 2)))
    monkeypatch.setattr(attention, "_WASTE", 0.0)
    assert probing.choose(made("opt").bfloat16(), 64).layout == probing.PADDING


def test_float32_is_held_to_float32_whatever_wraps_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Padding that is off by 2e-3 would pass as noise in 16 bits, and so would packing."""
    real = batches.padded

    def shifted(*arguments: Any) -> batches.Batch:
        made = real(*arguments)
        return dataclasses.replace(made, positions=made.positions * 3)

    monkeypatch.setattr(batches, "padded", shifted)

    @contextlib.contextmanager
    def plain() -> Any:
        yield

    path = probing.choose(made("llama"), 64, autocast=plain, packing=False)
    assert path.layout == probing.ALONE
    assert "padding: off by" in path.why
    path = probing.choose(made("llama"), 64, autocast=plain)
    assert path.why == "batches: per-row attention, fused loss at the targets"

    @contextlib.contextmanager
    def mixed() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            yield

    monkeypatch.undo()
    path = probing.choose(made("llama"), 64, autocast=mixed)
    assert (path.layout, path.head) == (probing.ROWS, losses.TARGETS), path.why


def test_the_probe_leaves_nothing_behind() -> None:
    model = tiny_model("causal").train()
    first = next(model.parameters())
    first.grad = torch.full_like(first, 2.0)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    probing.choose(model, 64)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(first.grad, torch.full_like(first, 2.0))
    assert all(p.grad is None for p in model.parameters() if p is not first)
    assert "forward" not in vars(model.lm_head)


# --- encoders ---------------------------------------------------------------------------------

ENCODER = {**USUAL, "max_position_embeddings": 64}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": ENCODER,
    "roberta": {**ENCODER, "pad_token_id": 1},  # positions from beyond the padding's id
    "xlm-roberta": {**ENCODER, "pad_token_id": 1},
    "electra": {**ENCODER, "embedding_size": 32},
    "modernbert": {**ENCODER, "local_attention": 8},  # a window to both sides
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "deberta-v2": {**ENCODER, "relative_attention": True, "pos_att_type": "c2p|p2c"},
    "fnet": ENCODER,  # mixes all places of a row, padding too
}


class Hidden:
    """Every third token is hidden, whatever the corpus says."""

    def example(self, corpus: data.Corpus, row: int) -> tuple[np.ndarray, np.ndarray]:
        ids = corpus.example(row)[0].astype(np.int64)
        targets = np.full(len(ids), -100)
        targets[::3], ids[::3] = ids[::3], 5
        return ids, targets

    def count(self, tokens: np.ndarray) -> np.ndarray:
        return -(-tokens // 3)


def encoder(kind: str) -> tuple[Any, batches.Collate, batches.Collate]:
    torch.manual_seed(3)
    fields = {**SMALL, **ENCODERS[kind]}
    config = transformers.AutoConfig.for_model(kind, **fields)
    model = transformers.AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
    padding = batches.masked(Hidden(), config.pad_token_id)
    return model, padding, batches.masked_flat(Hidden(), objectives.first_position(model))


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("bert", probing.ROWS),
        ("roberta", probing.ROWS),
        ("xlm-roberta", probing.ROWS),
        ("electra", probing.ROWS),
        ("modernbert", probing.ROWS),
        ("distilbert", probing.ROWS),
        ("deberta-v2", probing.PADDING),  # relative positions inside attention
        ("fnet", probing.ALONE),
    ],
)
def test_encoders_are_packed_where_that_is_exact(kind: str, layout: str) -> None:
    model, padding, packed = encoder(kind)
    path = probing.choose(model, 60, padding=padding, packed=packed)
    assert path.layout == layout, path.why
    model, padding, packed = encoder(kind)
    off = probing.choose(model, 60, packing=False, padding=padding, packed=packed)
    assert off.layout == (layout if layout == probing.ALONE else probing.PADDING)
    assert "training.packing is off" in off.why


@pytest.mark.parametrize("waste", [1.0, 3.0, 99.0])  # row by row, as it comes, side by side
@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_a_packed_encoder_gives_what_plain_transformers_gives_row_by_row(
    kind: str, waste: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _padding, packed = encoder(kind)
    model.eval()
    draw = np.random.default_rng(1)
    # Rows shorter and longer than the window of 4 to each side, one much longer than another.
    corpus = data.from_tokens(
        [
            encoding.Tokens(draw.integers(5, 64, n).tolist(), [True] * n)
            for n in (3, 40, 9, 1, 14, 40)
        ]
    )
    wanted = []
    for row in range(len(corpus)):
        ids, targets = (torch.from_numpy(x)[None] for x in Hidden().example(corpus, row))
        loss = model(input_ids=ids, labels=targets).loss
        wanted.append(loss * int((targets != -100).sum()))
    grads = torch.autograd.grad(sum(wanted), list(model.parameters()), allow_unused=True)
    attention.register()
    monkeypatch.setattr(attention, "_WASTE", waste)
    model.set_attn_implementation(attention.NAME)
    batch = packed(corpus, np.arange(len(corpus)))
    assert batch.ids.shape == (1, 107)
    for head in (losses.TARGETS, losses.FULL):
        loss = losses.summed(model, batch, head=head)
        assert float(loss.detach()) == pytest.approx(float(sum(wanted).detach()), rel=1e-6)
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        size = max(float(g.abs().max()) for g in grads if g is not None)
        for a, b in zip(found, grads, strict=True):
            assert (a is None) == (b is None)
            assert a is None or float((a - b).abs().max()) < 1e-5 * size
