"""`--plan`: what a run will cost, held against runs that were made and against plain arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

ROWS = [
    {"prompt": f"What is {a} and {b}?", "completion": str(a + b)}
    for a in range(8)
    for b in range(8)
]
NOTHING_TRIED = ("-s", "plan.tflops=100", "-s", "plan.memory=80")


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A recipe that tunes a tiny model on sums."""
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = tmp_path / "sums.yaml"
    path.write_text(
        f"model: {{name: {tiny_model_dir}}}\ndata: {{train: {{path: sums.jsonl}}}}\n"
        "training: {tokens_per_step: 256, num_train_epochs: 2}\n"
    )
    return path


def planned(cli: Any, *arguments: object) -> dict[str, Any]:
    ended = cli(*arguments, "--plan", "--json")
    assert ended.code == 0, ended.err
    assert "would be refused" not in ended.err
    return json.loads(ended.out)


# --- what is said ---------------------------------------------------------------------------------


def test_a_plan_counts_what_the_run_then_has(cli: Any, recipe: Path, tmp_path: Path) -> None:
    """Steps, tokens and parameters are those of the run, which tells its plan beside its end."""
    found = planned(cli, "tune", "-r", recipe, "-s", "adapter={peft_type: lora}")
    assert not (tmp_path / "runs").exists()
    assert found["fits"] is True
    assert found["cost"] is None
    assert found["how"] == "tried here, the whole model"

    ended = cli("tune", "-r", recipe, "-s", "adapter={peft_type: lora}", "--output", "run")
    assert ended.code == 0, ended.err
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    for name in ("parameters", "trainable", "steps", "tokens"):
        assert found[name] == run[name], name
    assert run["planned"]["seconds"] == found["seconds"]
    assert "as planned, and as it was:" in ended.err


def test_an_hour_has_a_price_and_a_power(cli: Any, recipe: Path) -> None:
    """Cost and energy are the hours times what an hour takes; time follows from peak and share."""
    given = ("tune", "-r", recipe, "-s", "plan.memory=80", "-s", "plan.efficiency=0.5")
    found = planned(
        cli, *given, "-s", "plan.tflops=1e-9", "-s", "plan.price_per_hour=36", "-s", "plan.watts=10"
    )
    assert found["seconds"] == pytest.approx(found["flops"] / (1000 * 0.5), rel=0.001)
    assert found["cost"] == pytest.approx(found["seconds"] / 100, rel=0.001)
    assert found["energy_wh"] == pytest.approx(found["seconds"] / 360, abs=0.1)


def test_a_table_says_it_in_80_columns(cli: Any, recipe: Path) -> None:
    """Every line of the table fits an 80-column terminal."""
    ended = cli("tune", "-r", recipe, "--plan", *NOTHING_TRIED)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert [line.split()[0] for line in lines if line[:1].strip()] == [
        "tune:", "what", "model", "steps", "computing", "memory", "disk", "time",
    ]  # fmt: skip
    assert max(map(len, map(str.rstrip, lines))) <= 80


LARGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
         "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip


@pytest.fixture
def large(tmp_path: Path, tiny_tokenizer_dir: Path) -> Path:
    """The folder of a model of 70.6 billion parameters, without them."""
    import shutil

    folder = tmp_path / "large"
    shutil.copytree(tiny_tokenizer_dir, folder)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(
        json.dumps({**config, **LARGE, "max_position_embeddings": 8192})
    )
    return folder


QLORA = (
    "-s", "adapter={peft_type: lora, r: 16}",
    "-s", "quantization={quant_method: bitsandbytes, load_in_4bit: true}",
)  # fmt: skip


@pytest.mark.slow
def test_a_large_model_is_planned_from_its_config(cli: Any, recipe: Path, large: Path) -> None:
    """Nothing in a plan is a constant; what is counted is what the config's own numbers give."""
    small = planned(cli, "tune", "-r", recipe, *NOTHING_TRIED, *QLORA[:2])
    found = planned(cli, "tune", "-r", recipe, "-s", f"model.name={large}", *NOTHING_TRIED, *QLORA)
    width, wide, layers, words = 8192, 28672, 80, 128256
    keys = width // 8  # 8 of 64 heads
    matrices = [(width, width)] * 2 + [(width, keys)] * 2 + [(width, wide)] * 3
    whole = layers * (sum(a * b for a, b in matrices) + 2 * width) + 2 * words * width + width
    lora = layers * sum(16 * (a + b) for a, b in matrices)
    assert found["parameters"] == whole + lora
    assert found["trainable"] == lora
    # Half a byte each and a scale for 64; embeddings, head and norms in float32.
    in_bits = layers * sum(a * b for a, b in matrices)
    weights = in_bits * (0.5 + 4 / 64) + 4 * (whole - in_bits + lora)
    assert found["memory_bytes"]["weights"] == pytest.approx(weights, rel=0.001)
    same = {"steps", "tokens", "fits", "cost", "energy_wh", "processes", "micro_batch_tokens"}
    for name in set(small) - same - {"memory_bytes", "computing", "how", "available_bytes"}:
        assert found[name] > small[name] or name == "heldout_seconds", name


@pytest.mark.slow
def test_a_micro_batch_of_long_rows_is_tried_before_a_larger_one_of_short_rows() -> None:
    """Attention that drops out holds a number for every two tokens of a row."""
    from itune import plans, trying

    lengths = np.array([16] * 16 + [240] + [8] * 4 + [230])
    rows = [np.arange(16), np.array([16]), np.arange(17, 21), np.array([21])]
    none = np.zeros(1, np.int64)
    plan = plans.Plan(none, none, none, [0], [22], np.arange, lengths, 256, 1, padded=False)
    plan.step = lambda _: SimpleNamespace(ranks=[rows])
    assert trying.heaviest(plan).tolist() == [16]  # 240 tokens, where sixteen rows have 256
    assert trying.most_tokens(plan) == 256


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_what_would(cli: Any, recipe: Path, large: Path) -> None:
    """The change that is named makes it fit, and the figure is that of the plan with it."""
    given = ("tune", "-r", recipe, "-s", f"model.name={large}", "-s", "plan.tflops=100")
    ended = cli(*given, "--plan", "-s", "plan.memory=80")
    assert ended.code == 3
    assert "are needed on each device and 80.00 GB are there (optimizer" in ended.err
    line, cut = ended.err.splitlines()[-2:]
    told, _, figure = cut.removeprefix("error:").strip().rpartition(": ")
    assert told == "launch.num_processes=32 and launch.fsdp=true"
    assert float(figure.split()[0]) == pytest.approx(56.9, abs=0.5)
    changes, _, figure = line.removeprefix("error:").strip().rpartition(": ")
    assert "quantization" in changes
    sets = [part for change in changes.split(" and ") for part in ("-s", change)]
    found = planned(cli, *given, "-s", "plan.memory=80", *sets)
    assert found["memory_bytes"]["peak"] / 1e9 == pytest.approx(float(figure.split()[0]), abs=0.3)
    assert found["fits"]

    ended = cli(*given, "--plan", "-s", "plan.memory=8")
    assert ended.code == 3
    assert "That is too much: even with" in ended.err


@pytest.mark.parametrize("family", ["seq2seq", "masked"])
def test_every_family_has_a_plan(
    cli: Any, request: pytest.FixtureRequest, recipe: Path, tmp_path: Path, family: str
) -> None:
    """Encoders and encoder-decoders are tried and counted as decoders are."""
    texts = [f"The {n}th day was as long as the {n + 1}th, but colder." for n in range(64)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    model = request.getfixturevalue(f"tiny_{family}_dir")
    given = (
        ("tune", "-r", recipe)
        if family == "seq2seq"
        else ("pretrain", "-s", "data.train.path=texts.jsonl")
    )
    found = planned(cli, *given, "-s", f"model.name={model}")
    assert found["how"] == "tried here, the whole model"
    assert found["seconds"] > 0
    assert found["memory_bytes"]["activations"] > 0


# --- a model that is cut --------------------------------------------------------------------------

CUT = (*NOTHING_TRIED, "-s", "launch.fsdp=true", "-s", "launch.num_processes")


def test_a_process_keeps_its_part_of_a_cut_model(cli: Any, recipe: Path) -> None:
    """Half of weights, gradients and moments; what it gathers comes on top."""
    whole = planned(cli, "tune", "-r", recipe, *NOTHING_TRIED)["memory_bytes"]
    two = planned(cli, "tune", "-r", recipe, *CUT[:-1], f"{CUT[-1]}=2")["memory_bytes"]
    for part in ("weights", "optimizer", "gradients"):
        # Rows that do not come out even are filled up; buffers are whole in each process.
        assert two[part] == pytest.approx(whole[part] / 2, rel=0.02), part
    assert min(two["gathered"], two["communication"]) > 0
    assert "gathered" not in whole


def test_what_is_gathered_is_the_same_over_any_number_of_processes(tiny_model_dir: Path) -> None:
    """With what no layer has, two layers are, or all of them and one; parts may be elsewhere."""
    import torch
    import transformers

    from itune import models, portions, recipes, sections

    config = transformers.AutoConfig.from_pretrained(tiny_model_dir)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    layers = model.model.layers
    layer = sum(p.nbytes for p in layers[0].parameters())
    every = sum(p.nbytes for p in model.parameters())
    root = every - len(layers) * layer
    place = models.Placement(torch.device("cuda"), torch.float32, "")

    def kept(processes: int, **launch: Any) -> dict[str, int]:
        made = recipes.Recipe.model_construct(
            model=sections.Model(name=str(tiny_model_dir)), adapter=None, quantization=None,
            training=sections.Training(), launch=sections.Launch(fsdp=True, **launch),
        )  # fmt: skip
        return portions.kept(made, model, place, processes)

    for processes in (2, 8):
        found = kept(processes)
        assert found["gathered"] == root + 2 * layer
        # A layer's gradients and the numbers in which they are summed, or those of the root.
        assert found["communication"] == root + max(2 * layer, root)
        assert found["trained"] == pytest.approx(every / processes, rel=0.01)
    assert kept(2, reshard_after_forward=False)["gathered"] == root + (len(layers) + 1) * layer

    away = kept(2, cpu_offload=True)
    assert (away["weights"], away["optimizer"]) == (sum(b.nbytes for b in model.buffers()), 0)
    assert away["gathered"] == kept(2)["gathered"]


def test_what_has_to_be_whole_before_it_is_cut_is_counted() -> None:
    """As much of it as nothing else needs at another time."""
    from types import SimpleNamespace

    import torch

    from itune import costing

    made: Any = SimpleNamespace(place=SimpleNamespace(device=torch.device("cuda")))
    for whole, loading in ((100, 70), (30, None)):
        fixed = {"weights": 10, "whole": whole}
        parts = costing._Made._parts(made, fixed, {"activations": 20}, 0.0)
        assert (parts.get("loading"), parts["peak"]) == (loading, max(whole, 30))


@pytest.mark.slow
def test_where_a_model_does_not_fit_it_may_be_cut(
    cli: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the processes that there are, or over more; the figure is that of the plan with it."""
    from itune import forecasting, memory

    monkeypatch.setattr(memory, "held", lambda *_: 0)  # what this process holds is no constant
    given = ("tune", "-r", recipe, "-s", "plan.tflops=100")
    cut = planned(cli, *given, "-s", "plan.memory=80", *CUT[4:-1], f"{CUT[-1]}=8")
    room = f"plan.memory={cut['memory_bytes']['peak'] * 1.001 / 1e9}"
    for processes, said in ((8, ""), (2, "launch.num_processes=8 and ")):
        ended = cli(*given, "--plan", "-s", room, "-s", f"launch.num_processes={processes}")
        assert ended.code == 3
        figure = forecasting.gigabytes(cut["memory_bytes"]["peak"])
        assert f"error:   {said}launch.fsdp=true: {figure}" in ended.err.splitlines(), ended.err


# --- the step without memory ----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["whole", "lora", "recomputed"])
def test_bytes_of_a_step_are_those_that_torch_gives_out(way: str, tmp_path: Path) -> None:
    """The peak is that of torch's own record of a real step, within a fiftieth."""
    import contextlib

    import numpy as np
    import torch
    import transformers

    from itune import batches, losses, models, sections, simulating

    def made() -> Any:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=128, intermediate_size=352, num_hidden_layers=4, vocab_size=4096,
                num_attention_heads=4, num_key_value_heads=2,
            )
        )  # fmt: skip
        if way == "lora":
            import peft

            chosen = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
            model = peft.get_peft_model(model, chosen)
        if way == "recomputed":
            models.recompute(model)
        return model.train()

    lengths = (90, 40, 77, 120, 64)
    ids = [np.arange(5, 5 + n) for n in lengths]
    batch = batches.segmented(
        batches._batch(
            np.concatenate(ids)[None],
            np.concatenate([np.arange(n) for n in lengths])[None],
            np.concatenate([np.append(each[1:], batches.IGNORED) for each in ids])[None],
            lengths,
        )
    )
    from itune import attention

    attention.register()
    with torch.device("meta"):
        outline = made()
    outline.set_attn_implementation(attention.NAME)
    found = simulating.held(
        outline, [batch], sections.Training(), head=losses.TARGETS, autocast=contextlib.nullcontext
    )

    real = made()
    real.set_attn_implementation(attention.NAME)
    with torch.profiler.profile(profile_memory=True) as profile:
        losses.summed(real, batch, head=losses.TARGETS).backward()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    given = [e["args"] for e in events if e["name"] == "[memory]"]
    before = given[0]["Total Allocated"] - given[0]["Bytes"]
    peak = max(each["Total Allocated"] for each in given) - before
    assert sum(found.bytes.values()) == pytest.approx(peak, rel=0.02)
    assert all(p.grad is None and p.is_meta for p in outline.parameters())


def test_operations_of_a_step_are_six_a_token_and_parameter() -> None:
    """Two forward and four backward for each weight of a matrix, as counted by hand."""
    import contextlib

    import numpy as np
    import torch
    import transformers

    from itune import batches, losses, sections, simulating

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=512,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    tokens = 32
    ids = np.arange(5, 5 + tokens)
    batch = batches._batch(
        ids[None], np.arange(tokens)[None], np.append(ids[1:], batches.IGNORED)[None], (tokens,)
    )
    found = simulating.held(
        model, [batch], sections.Training(), head=losses.FULL, autocast=contextlib.nullcontext
    )
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 128) + 512 * 64
    attention = 2 * 2 * tokens * tokens * 64 * 2  # queries by keys, and by values, in two layers
    # Nothing is before the embeddings, so that the first layer's inputs have a gradient too.
    expected = 6 * tokens * matrices + attention * (1 + 2.5)
    assert found.flops[0] == pytest.approx(expected, rel=0.02)


def test_a_model_that_cannot_be_gone_through_is_named(
    cli: Any, recipe: Path, tmp_path: Path
) -> None:
    """A model that changes its own weights going forward is told of in one line."""
    import transformers
    from conftest import tiny_tokenizer

    config = transformers.SwitchTransformersConfig(
        vocab_size=320, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    folder = tmp_path / "switch"
    transformers.SwitchTransformersForConditionalGeneration(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    ended = cli("tune", "-r", recipe, "-s", f"model.name={folder}", "--plan", *NOTHING_TRIED)
    assert ended.code == 2
    assert "a step of SwitchTransformersForConditionalGeneration cannot be gone" in ended.err
