"""`itune generate --explain`: how likely each token was, and what of the prompt drove it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import tiny_model, tiny_tokenizer
from test_reports import HOSTILE, Page

from itune import console, encoding, explaining, families, shades, vocabularies

Cli = Callable[..., Any]
PROMPT, ANSWER = "the cat sees the red ball. What?", "some bread"


def made(kind: str) -> tuple[Any, encoding.Encoder]:
    """A tiny model in float64, of outputs so spread that its tokens are unlike."""
    size = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(17)
    if kind in ("llama", "t5"):
        model: Any = tiny_model({"llama": "causal", "t5": "seq2seq"}[kind])
    elif kind == "bart":
        model = transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
                scale_embedding=True, decoder_start_token_id=1, **size,
            )
        )  # fmt: skip
    else:
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=128, **size)
        )
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    if kind == "lora":
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=2, init_lora_weights=False, fan_in_fan_out=True)
        )
    if kind == "prompt_tuning":
        settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(model, settings)
    family = "seq2seq" if model.config.is_encoder_decoder else "causal"
    encoder = families.encoder(family, vocabularies.with_template(tiny_tokenizer()))
    return model.double().eval(), encoder


def asked(encoder: encoding.Encoder) -> tuple[list[int], list[int]]:
    prompt = [0, *encoder.text_ids(PROMPT)]
    return prompt, [*encoder.text_ids(ANSWER), 1]


@torch.no_grad()
def likelihood(
    model: Any, prompt: list[int], answer: list[int], scales: list[float]
) -> list[float]:
    """Log-likelihood of each token of an answer, one call each, the prompt's vectors scaled.

    By a hook on the table of vectors, with neither a gradient nor `inputs_embeds`.
    """
    decodes = model.config.is_encoder_decoder
    by = torch.tensor(scales, dtype=torch.float64)[:, None]

    def scale(module: Any, given: tuple[torch.Tensor], found: torch.Tensor) -> torch.Tensor | None:
        ids = given[0][0].tolist()
        if ids[: len(prompt)] != prompt:
            return None  # what the decoder reads
        return torch.cat([found[:, : len(prompt)] * by, found[:, len(prompt) :]], 1)

    out = []
    reader = model.get_encoder() if decodes else model
    hook = reader.get_input_embeddings().register_forward_hook(scale)
    try:
        for k, token in enumerate(answer):
            if decodes:
                start = [model.config.decoder_start_token_id, *answer[:k]]
                logits = model(
                    input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([start])
                ).logits
            else:
                logits = model(input_ids=torch.tensor([[*prompt, *answer[:k]]])).logits
            chances = logits[0, -1].exp() / logits[0, -1].exp().sum()
            out.append(math.log(float(chances[token])))
    finally:
        hook.remove()
    return out


# The last two have norms in float32 in any case, so their steps are wide, and the answer coarse.
@pytest.mark.parametrize("kind", ["gpt2", "bart", "lora", "prompt_tuning", "llama", "t5"])
def test_it_is_what_differences_without_a_gradient_say(kind: str) -> None:
    model, encoder = made(kind)
    prompt, answer = asked(encoder)
    found = explaining.explained(model, encoder, prompt, answer)
    ones = [1.0] * len(prompt)
    assert found.logprobs == pytest.approx(likelihood(model, prompt, answer, ones), abs=1e-9)
    assert found.probabilities == pytest.approx([math.exp(each) for each in found.logprobs])
    step, apart = (1e-2, 5e-3) if kind in ("llama", "t5") else (1e-4, 1e-6)
    for place in range(len(prompt)):
        ends = [
            sum(likelihood(model, prompt, answer, [*ones[:place], 1 + by, *ones[place + 1 :]]))
            for by in (step, -step)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert found.scores[place] == pytest.approx(slope, abs=apart), place
    assert max(map(abs, found.scores)) > 10 * apart
    assert sum(map(abs, found.shares)) == pytest.approx(1)
    assert [share > 0 for share in found.shares] == [score > 0 for score in found.scores]
    assert all(p.grad is None for p in model.parameters())


def test_tokens_make_up_the_text_and_controls_are_told_apart() -> None:
    model, encoder = made("llama")
    prompt, answer = asked(encoder)
    found = explaining.explained(model, encoder, prompt, answer, drivers=False)
    assert "".join(each.text for each in found.prompt[1:]) == PROMPT
    assert "".join(each.text for each in found.answer[:-1]) == ANSWER
    assert [each.control for each in (found.prompt[0], found.prompt[1], found.answer[-1])] == [
        True, False, True,
    ]  # fmt: skip
    assert [each.id for each in found.answer] == answer
    assert found.shares == []
    assert set(found.plain()) == {"answer"}


def test_a_model_that_reads_ids_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder = made("llama")
    monkeypatch.setattr(model, "forward", lambda input_ids: None)
    with pytest.raises(explaining.errors.ModelError, match="--explain: LlamaForCausalLM reads"):
        explaining.explained(model, encoder, *asked(encoder))


def test_levels_go_by_the_largest_share() -> None:
    assert shades.levels([0.6, -0.6, 0.3, -0.05, 0.0, 0.07]) == [3, -3, 2, 0, 0, 1]
    assert shades.levels([0.0, 0.0]) == [0, 0]
    assert [shades.probability(each) for each in (1.0, 0.5, 0.00003)] == ["1.00", "0.50", "3e-05"]


@pytest.fixture
def ask(cli: Cli, tiny_model_dir: Path) -> Cli:
    def run(*options: object, model: Path = tiny_model_dir) -> Any:
        few = ("-s", "generation.max_new_tokens=4", "--model", model)
        return cli("generate", "--explain", *few, *options)

    return run


@pytest.mark.parametrize("family", ["causal", "seq2seq"])
def test_one_prompt_in_json(
    family: str, ask: Cli, tiny_model_dir: Path, tiny_seq2seq_dir: Path
) -> None:
    folder = tiny_model_dir if family == "causal" else tiny_seq2seq_dir
    ended = ask("the cat", "--json", model=folder)
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert len(told["explained"]["answer"]) == told["tokens"]
    assert all(0 < each["probability"] <= 1 for each in told["explained"]["answer"])
    assert sum(abs(each["share"]) for each in told["explained"]["input"]) == pytest.approx(1)
    assert "the cat" in "".join(each["text"] for each in told["explained"]["input"])
    plain = json.loads(ask("the cat", "--json", "--quiet", model=folder).out)
    assert plain == told


def test_a_pipe_has_signs(ask: Cli) -> None:
    ended = ask("the cat")
    assert ended.code == 0, ended.err
    assert "\x1b" not in ended.out
    assert ended.out.count("⟦+++⟧") + ended.out.count("⟦---⟧") >= 1
    assert "share" in ended.out


def test_no_token_forges_a_sign(capsys: pytest.CaptureFixture[str]) -> None:
    console.Screen().shaded("title", [console.Shade("⟦+++⟧\x1b[31m\n", True, "green", "--")])
    assert capsys.readouterr().out == "title\n⟪\\u27e6+++\\u27e7\\x1b[31m↵\n⟫⟦--⟧\n\n"


def test_several_prompts_have_probabilities_alone(ask: Cli, tmp_path: Path) -> None:
    ended = ask("a", "b")
    assert ended.out.count("probability of each token") == 2
    assert "what drove" not in ended.out
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert ask("-i", "in.jsonl", "-o", "out.jsonl").code == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [set(line["explained"]) for line in lines] == [{"answer"}, {"answer"}]
    refused = ask("-i", "in.jsonl", "-o", "out.html")
    assert refused.code == 2
    assert "--output out.html: a page is of prompts on the command line" in refused.err


def test_a_page_shows_hostile_texts_as_text(ask: Cli, tmp_path: Path) -> None:
    hostile = "\n".join(text[:100] for text in HOSTILE if "\ud800" not in text)
    for name, texts in (("plain", ["good", "fine"]), ("hostile", [hostile])):
        ended = ask(*texts, "-o", f"{name}.html")
        assert ended.code == 0, ended.err
        assert ended.out == ""
    html = (tmp_path / "hostile.html").read_text()
    page = Page(html)
    plain = Page((tmp_path / "plain.html").read_text())
    known = {tag for tag, _ in plain.tags}
    assert {tag for tag, _ in page.tags} - known <= {"table", "thead", "tbody", "tr", "th", "td"}
    attributes = {name for _, found in page.tags for name in found}
    assert attributes <= {
        "lang", "charset", "name", "content", "http-equiv", "class", "style", "title", "scope",
    }  # fmt: skip
    assert "http:" not in html
    assert "https:" not in html
    assert not set(page.text) & set("\x1b\x07\x00\u202e\u2066")
    assert "onerror=alert" in page.text.replace("\u21b5", "")


def test_a_talk_is_not_explained(ask: Cli) -> None:
    ended = ask("--chat")
    assert ended.code == 2
    assert "--chat: with --explain?" in ended.err
