"""`--engine vllm`, against a stand-in with vLLM's documented signatures: the own loop's answers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import sentences, tiny_tokenizer

from itune import configs, engines, errors, generation, recipes, vocabularies

STANDINS = Path(__file__).parent / "standins"
TEMPLATE = 'task: generation\nprompts: ["Say: {{ text }}"]\nresponse: "{{ said }}"\n'
RECIPE = """
model: {{name: {base}}}
data:
  train: {{path: said.jsonl, template: ./say.yaml}}
  eval: {{path: said.jsonl, template: ./say.yaml, limit: 5}}
  allow_overlap: true
training:
  {{max_steps: 2, tokens_per_step: 300, max_length: 96, heldout_rows: 0, learning_rate: 0.02}}
generation: {{max_new_tokens: 6}}
evaluation: {{resamples: 20, metrics: [rougeL]}}
adapter: {{peft_type: lora, r: 4, lora_alpha: 32, target_modules: all-linear}}
"""

Cli = Callable[..., Any]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in, as if it were installed; `STARTED` holds the engines so far."""
    monkeypatch.syspath_prepend(str(STANDINS))
    import vllm

    vllm.STARTED.clear()
    yield vllm
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose answers differ, and end at different places."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(17)
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    model.save_pretrained(folder)
    vocabularies.with_template(tiny_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on it that changes every answer."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=12, lora_alpha=24, target_modules="all-linear")
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    vocabularies.with_template(tiny_tokenizer()).save_pretrained(folder)
    return folder


def asked(folder: Path, n: int = 6) -> None:
    lines = [json.dumps({"prompt": text[: 10 + 5 * k]}) for k, text in enumerate(sentences(n))]
    (folder / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))


def serve(folder: Path) -> engines.Served:
    encoder = configs.encoder(recipes.Model(name=str(folder)))
    wanted = generation.settings({}, encoder)
    return engines.serve(
        engines.Engine("vllm"), str(folder), wanted, dtype="float32", family="causal"
    )


def answers(cli: Cli, model: Path, *options: str) -> list[dict[str, Any]]:
    out = Path(f"out{len(list(Path().glob('out*')))}.jsonl")
    few = ("-s", "generation.eos_token_id=[5, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50]")
    ended = cli("generate", "--model", model, "-i", "in.jsonl", "-o", out, *few, *options)
    assert ended.code == 0, ended.err
    found = [json.loads(line) for line in out.read_text().splitlines()]
    return [{k: v for k, v in each.items() if k != "asked"} for each in found]


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_answers_are_those_of_the_own_loop_in_their_order(
    which: str, cli: Cli, tmp_path: Path, vllm: Any, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(which)
    asked(tmp_path)
    own = answers(cli, model)
    assert not vllm.STARTED
    served = answers(cli, model, "--engine", "vllm:max_model_len=200")
    assert served == own
    ends = {each["stop"] for each in own}
    assert ends == {"stop", "length"} or (ends == {"stop"} and which == "adapter")
    assert len({each["response"] for each in own}) > 3
    (llm,) = vllm.STARTED
    assert llm.arguments["model"] == str(request.getfixturevalue("base"))
    assert llm.arguments["max_model_len"] == 200
    ((number, path, _),) = llm.calls
    assert number == 6
    assert (path, llm.room) == ((None, 0) if which == "base" else (str(model), 16))


def test_what_is_drawn_follows_from_the_seed_and_the_place(
    cli: Cli, tmp_path: Path, base: Path, vllm: Any
) -> None:
    asked(tmp_path)
    draw = ("--engine", "vllm", "-s", "generation.temperature=1.5", "-s", "generation.top_p=0.9")
    one, two = answers(cli, base, *draw), answers(cli, base, *draw)
    assert one == two
    first, second = (llm.calls[0][2] for llm in vllm.STARTED)
    assert first == second
    assert len({each.seed for each in first}) == 6
    assert (first[0].temperature, first[0].top_p, first[0].top_k) == (1.5, 0.9, 50)
    assert [each["response"] for each in one] != [each["response"] for each in answers(cli, base)]


def test_a_shorter_context_leaves_less_room(
    cli: Cli, tmp_path: Path, base: Path, vllm: Any
) -> None:
    asked(tmp_path, 2)
    short = answers(cli, base, "--engine", "vllm:max_model_len=64")
    most = max(params.max_tokens for params in vllm.STARTED[0].calls[0][2])
    assert max(each["tokens"] for each in short) <= most < 64
    out = cli("generate", "--model", base, "--engine", "vllm:max_model_len=8", "a long question")
    assert (out.code, "fills the 8 that the model reads" in out.err) == (2, True)


def test_a_long_file_is_answered_in_chunks(
    cli: Cli, tmp_path: Path, base: Path, vllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "CHUNK", 4)
    asked(tmp_path)
    assert answers(cli, base, "--engine", "vllm") == answers(cli, base)
    assert [number for number, _, _ in vllm.STARTED[0].calls] == [4, 2]


# --- eval -----------------------------------------------------------------------------------


@pytest.fixture
def run(cli: Cli, tmp_path: Path, base: Path) -> Path:
    (tmp_path / "say.yaml").write_text(TEMPLATE)
    rows = [{"text": text, "said": text[::-1]} for text in dict.fromkeys(sentences(60))]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(RECIPE.format(base=base))
    ended = cli("tune", "-r", "r.yaml")
    assert ended.code == 0, ended.err
    return tmp_path / "runs" / "r"


def scored(cli: Cli, *options: str) -> dict[str, Any]:
    ended = cli("eval", "--against", "base", "--json", *options)
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found["tasks"]


def test_a_run_and_its_base_are_scored_by_one_engine_and_kept_apart(
    cli: Cli, run: Path, vllm: Any
) -> None:
    own = scored(cli)
    assert scored(cli, "--engine", "vllm") == own
    (llm,) = vllm.STARTED
    assert [path for _, path, _ in llm.calls] == [None, str(run / "model")]
    for name in ("predictions.jsonl", "against.jsonl"):
        kept = [(run / "evals" / each / name).read_text() for each in ("all", "vllm")]
        assert kept[0] == kept[1]
    assert (run / "evals/all/predictions.jsonl").read_text() != (
        run / "evals/all/against.jsonl"
    ).read_text()
    # Asked again, both are known; in one folder another engine's answers are others.
    assert scored(cli, "--engine", "vllm") == own
    assert len(vllm.STARTED) == 1
    shutil.copytree(run / "evals/all", "mixed")
    ended = cli("eval", "--engine", "vllm", "-o", "mixed")
    assert "answers by another engine; asked anew" in ended.err
    assert len(vllm.STARTED) == 2


def test_what_an_engine_cannot_be_asked_is_refused_before_it_starts(
    cli: Cli, run: Path, vllm: Any, tiny_seq2seq_dir: Path, tiny_masked_dir: Path
) -> None:
    Path("mood.yaml").write_text(
        'task: classification\nchoices: [good, bad]\nprompts: ["{{ text }}"]\n'
        "response: \"{{ 'good' if said else 'bad' }}\"\n"
    )
    ask = ("generate", "--engine", "vllm", "--model")
    no_more = ("-s", "data.eval.path=said.jsonl", "-s", "data.eval.template=./mood.yaml")
    text = ("-s", "data.eval={path: lines.txt}")
    Path("lines.txt").write_text("some text\n" * 3)
    for line, said in [
        (("eval", "--engine", "vllm", *no_more), "picked by likelihood"),
        (("eval", "--engine", "vllm", *text), "lines.txt: plain text is measured by its loss"),
        (("eval", "--engine", "vllm", "-s", "generation.num_beams=2"), "num_beams: 2"),
        (("eval", "--engine", "vllm", "-p", "2"), "vLLM starts its own"),
        (("eval", "--engine", "vlmm"), "Did you mean 'vllm'?"),
        (("eval", "--engine", "vllm:dtype=float16"), "dtype: itune sets this itself"),
        (("eval", "--engine", "vllm:fast"), "fast: expected KEY=VALUE"),
        (("eval", "--engine", "vllm:quick=1"), "unexpected keyword argument 'quick'"),
        (("eval", "--engine", "vllm:tensor_parallel_size=8"), "too few GPUs"),
        (("eval", "--predictions", "x", "--metric", "f1", "--engine", "vllm"), "no meaning beside"),
        ((*ask, tiny_seq2seq_dir, "hi"), "a seq2seq model"),
        ((*ask, tiny_masked_dir, "hi"), "a masked language model"),
        (("generate", "--engine", "vllm", "--chat"), "--chat"),
        (("generate", "--engine", "vllm", "--explain", "hi"), "--explain"),
        (
            ("generate", "--engine", "vllm", "-s", "generation.no_repeat_ngram_size=2", "hi"),
            "no_repeat_ngram_size: 2",
        ),
        (("generate", "--engine", "vllm", "-s", "generation.num_beams=2", "hi"), "num_beams: 2"),
    ]:
        ended = cli(*line)
        assert ended.code == 2, (line, ended)
        assert said in ended.err, (line, ended.err)
        assert "Traceback" not in ended.err
    assert not vllm.STARTED


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [7]}, "trainable_token_indices"),
        ({"bias": "all"}, "bias: all"),
        ({"r": 600}, "rank 600"),
        ({"peft_type": "IA3"}, "a ia3 adapter"),
    ],
)
def test_adapters_that_it_would_misread_are_refused(
    changed: dict[str, Any], said: str, adapter: Path, tmp_path: Path, vllm: Any
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "other")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **changed}))
    with pytest.raises(errors.OptionError, match=said):
        serve(folder)
    assert not vllm.STARTED


def test_an_answer_that_was_not_finished_is_no_answer(base: Path, vllm: Any) -> None:
    served = serve(base)
    plain = {"stop_token_ids": [1], "detokenize": False, "temperature": 0.0, "max_tokens": 2}
    assert len(next(served.answers([[5, 6]], [plain]))) <= 2
    output = vllm.CompletionOutput(0, "", [5], "abort", None)
    made = [vllm.RequestOutput("0", [5, 6], [output])]
    served.llm.generate = lambda *rest, **options: made
    with pytest.raises(errors.ModelError, match="abort"):
        list(served.answers([[5, 6]], [plain]))
    # Where it leaves out the token that ended an answer, that is known all the same.
    output.finish_reason, output.stop_reason = "stop", 1
    assert list(served.answers([[5, 6]], [plain])) == [[5, 1]]


@pytest.mark.parametrize("command", [("generate", "hi", "--model"), ("eval", "-r", "x", "--model")])
def test_an_engine_that_is_not_installed_is_told_of(
    command: tuple[str, ...], cli: Cli, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    Path("x.yaml").write_text("data: {train: {path: a.jsonl}, eval: {path: a.jsonl}}\n")
    line = [each if each != "x" else "x.yaml" for each in command]
    ended = cli(*line, base, "--engine", "vllm")
    assert (ended.code, ended.out) == (3, "")
    assert ended.err.startswith("error: --engine vllm: not installed here")
