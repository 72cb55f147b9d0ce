"""Every family through the four commands and the one loop, from a tiny config."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import sentences, tiny_model, tiny_tokenizer

from itune import (
    batches,
    configs,
    data,
    encoding,
    errors,
    families,
    formats,
    likelihoods,
    losses,
    models,
    objectives,
    recipes,
    vocabularies,
)

USUAL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
FEW_HEADS = {**USUAL, "num_key_value_heads": 2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("seq2seq", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
    "bert": ("masked", USUAL),
    "gpt2": ("causal", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "bart": (
        "seq2seq",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 128,
        },
    ),
    "roberta": ("masked", USUAL),
    "modernbert": ("masked", USUAL),
    "llama": ("causal", FEW_HEADS),
    "qwen2": ("causal", FEW_HEADS),
    "qwen3": ("causal", {**FEW_HEADS, "head_dim": 8}),
    "mistral": ("causal", FEW_HEADS),
    "gemma": ("causal", {**FEW_HEADS, "head_dim": 8}),
    "phi": ("causal", USUAL),
    "opt": (
        "causal",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 128,
        },
    ),
    "gpt_neox": ("causal", USUAL),
}
QUICK = ("t5", "bert", "gpt2")
TEMPLATE = """
task: classification
choices: [sad, very glad]
prompts: ["{{ text }} How is it?", "Mood of: {{ text }}"]
response: "{{ choices[label] }}"
metrics: [accuracy]
"""
TRAINING = {"max_steps": 3, "tokens_per_step": 400, "max_length": 64, "learning_rate": 5e-3}


def folder_with(folder: Path, kind: str, fields: dict[str, Any], algorithm: str = "bpe") -> None:
    texts, rows = sentences(80), sentences(60)
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(texts[k : k + 4])}) + "\n" for k in range(0, 80, 4))
    )
    labels = [int("likes" in text) for text in rows]
    (folder / "moods.jsonl").write_text(
        "".join(
            json.dumps({"text": text, "label": label}) + "\n"
            for text, label in zip(rows, labels, strict=True)
        )
    )
    (folder / "mood.yaml").write_text(TEMPLATE)
    scratch = {
        "model_type": kind,
        "tokenizer": {"algorithm": algorithm, "vocab_size": 330},
        **fields,
    }
    source = {"path": "text.jsonl"}
    pretrain = {
        "model": {"from_scratch": scratch},
        "data": {"train": source, "eval": {**source, "limit": 4}, "allow_overlap": True},
        "training": {**TRAINING, "save_steps": 1},
    }
    task = {"path": "moods.jsonl", "template": "./mood.yaml"}
    tune = {
        "model": {"name": "runs/base"},
        "data": {"train": task, "eval": {**task, "limit": 6}, "allow_overlap": True},
        "training": TRAINING,
        "evaluation": {"against": "base"},
        "generation": {"max_new_tokens": 4},
    }
    (folder / "pretrain.yaml").write_text(json.dumps(pretrain))
    (folder / "tune.yaml").write_text(json.dumps(tune))


def weights(folder: Path) -> bytes:
    (path,) = folder.glob("*.safetensors")
    return path.read_bytes()


def log(run: str) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@pytest.mark.parametrize(
    "kind",
    [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in CONFIGS],
)
def test_every_architecture_goes_through_the_four_commands(
    kind: str, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, fields = CONFIGS[kind]
    folder_with(tmp_path, kind, fields)
    ended = cli("pretrain", "-r", "pretrain.yaml", "-o", "runs/base")
    assert ended.code == 0, ended.err
    killed_and_resumed(cli, monkeypatch)
    assert log("runs/killed") == log("runs/base")
    assert weights(tmp_path / "runs/killed/model") == weights(tmp_path / "runs/base/model")
    scores = cli("eval", "--run", "runs/base", "--json")
    assert scores.code == 0, scores.err
    assert json.loads(scores.out)["tasks"]["text"]["rows"] > 0

    ended = cli("tune", "-r", "tune.yaml", "-o", "runs/tuned")
    assert ended.code == 0, ended.err
    assert all(np.isfinite(loss) for _, loss, _ in log("runs/tuned"))
    reloaded_without_itune(tmp_path / "runs/tuned/model", family)
    scores = cli("eval", "--run", "runs/tuned", "--json")
    assert scores.code == 0, scores.err
    task = json.loads(scores.out)["tasks"]["mood"]
    assert task["rows"] == 6
    assert task["against"]["name"] == "base"

    asked = cli("generate", "--run", "runs/tuned", "the cat sees some bread.", "--json")
    if family == "masked":
        assert asked.code == 2
        assert "fills in masks and writes no text" in asked.err
    else:
        assert asked.code == 0, asked.err
        assert 0 < json.loads(asked.out)["tokens"] <= 4


def killed_and_resumed(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from itune import training

    real = training._Loop._step

    def dies_in_step_three(self: Any, step: Any) -> Any:
        if self.at.step == 2:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(training._Loop, "_step", dies_in_step_three)
    cli("pretrain", "-r", "pretrain.yaml", "-o", "runs/killed")
    monkeypatch.setattr(training._Loop, "_step", real)
    ended = cli("pretrain", "-r", "pretrain.yaml", "-o", "runs/killed")
    assert "resuming after step 2 of 3" in ended.err, ended.err


def reloaded_without_itune(folder: Path, family: str) -> None:
    """What transformers loads from the folder answers as what itune loads, to the last bit."""
    named = recipes.Model(name=str(folder))
    assert configs.family_of(named) == family
    ours = models.load(named, models.placement(named)).eval()
    auto = getattr(transformers, models.CLASSES[family])
    theirs = auto.from_pretrained(folder, dtype=ours.dtype).eval()
    ids = torch.arange(5, 25)[None]
    more = {"decoder_input_ids": ids} if family == "seq2seq" else {}
    with torch.no_grad():
        a, b = (model(input_ids=ids, **more).logits for model in (ours, theirs))
    assert float((a - b).abs().max()) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["unigram", "wordpiece"])
@pytest.mark.parametrize("kind", ["t5", "bert", "gpt2"])
def test_every_tokenizer_goes_with_every_family(
    kind: str, algorithm: str, tmp_path: Path, cli: Any
) -> None:
    folder_with(tmp_path, kind, CONFIGS[kind][1], algorithm)
    whole = ("-s", "training.whole_word_mask=true") if kind == "bert" else ()
    ended = cli("pretrain", "-r", "pretrain.yaml", "-o", "runs/base", *whole)
    assert ended.code == 0, ended.err
    ended = cli("tune", "-r", "tune.yaml", "-o", "runs/tuned")
    assert ended.code == 0, ended.err


# --- which family -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "family"),
    [
        ("llama", {}, "causal"),
        ("t5", {}, "seq2seq"),
        ("bart", {}, "seq2seq"),
        ("bert", {}, "masked"),
        ("bert", {"architectures": ["BertModel"]}, "masked"),
        ("bert", {"is_decoder": True}, "causal"),
        ("roberta", {"architectures": ["RobertaForCausalLM"]}, "causal"),
        ("modernbert", {}, "masked"),
        ("camembert", {"architectures": ["CamembertForMaskedLM"]}, "masked"),
    ],
)
def test_the_family_is_read_from_the_config(kind: str, fields: dict[str, Any], family: str) -> None:
    assert families.family(transformers.AutoConfig.for_model(kind, **fields)) == family


def test_a_field_that_the_model_reads_is_known_though_its_config_does_not_declare_it() -> None:
    def config(kind: str, **fields: Any) -> Any:
        scratch = recipes.FromScratch(model_type=kind, tokenizer="x", **fields)
        return configs.config_of(recipes.Model(from_scratch=scratch))

    assert config("deberta-v2", conv_kernel_size=3, position_buckets=16).conv_kernel_size == 3
    with pytest.raises(errors.ModelError, match="mean 'conv_kernel_size'"):
        config("deberta-v2", conv_kernel_sise=3)
    with pytest.raises(errors.ModelError, match="head_dim: GPTNeoXConfig has no such field"):
        config("gpt_neox", head_dim=32)
    with pytest.raises(errors.ModelError, match="_name_or_path"):
        config("llama", _name_or_path="x")


NGRAMS = "qwen4_exp_text"


@pytest.mark.skipif(NGRAMS not in transformers.CONFIG_MAPPING, reason="transformers has none yet")
def test_a_config_that_needs_an_end_token_is_made_before_there_is_a_tokenizer() -> None:
    fields = {"num_hidden_layers": 1, "layer_types": ["linear_attention"], "ple_layer_ids": [1]}
    scratch = recipes.FromScratch(model_type=NGRAMS, tokenizer={"vocab_size": 500}, **fields)
    assert configs.family_of(recipes.Model(from_scratch=scratch)) == "causal"


def test_a_model_of_no_family_is_refused() -> None:
    with pytest.raises(errors.ModelError, match="neither a causal, a seq2seq nor a masked"):
        families.family(transformers.AutoConfig.for_model("vit"))


# --- what is encoded --------------------------------------------------------------------------


def conversation(answer: str) -> list[formats.Message]:
    return [formats.Message("user", "the cat sees it."), formats.Message("assistant", answer)]


def test_an_encoder_decoder_reads_the_prompt_and_learns_the_answer_and_its_end() -> None:
    encoder = families.encoder("seq2seq", vocabularies.with_template(tiny_tokenizer(), "seq2seq"))
    made = encoder.conversation(conversation("some bread"))
    begin = made.supervised.index(True)
    assert made.supervised == [False] * begin + [True] * (len(made.ids) - begin)
    assert encoder.tokenizer.decode(made.ids[:begin]) == "the cat sees it."
    assert encoder.tokenizer.decode(made.ids[begin:]) == "some bread</s>"
    assert made.ids[:begin] == encoder.prompt(conversation("some bread")[:1])


def test_the_number_of_masks_tells_nothing_of_the_answer() -> None:
    tokenizer = vocabularies.with_template(tiny_tokenizer(), "masked")
    encoder = families.encoder("masked", tokenizer).answering(["sad", "a long old answer"])
    short, long = (
        encoder.conversation(conversation(answer)) for answer in ("sad", "a long old answer")
    )
    assert len(short.ids) == len(long.ids)
    assert sum(short.supervised) < sum(long.supervised)
    corpus = data.from_tokens([short, long])
    batch = collated(encoder, corpus, None)
    assert torch.equal(batch.ids[0], batch.ids[1])  # what the model reads is the same
    assert batch.ids[0].tolist() == encoder.prompt(conversation("sad")[:1])
    with pytest.raises(errors.DataError, match="fills in one of a template's choices"):
        families.encoder("masked", tokenizer).conversation(conversation("sad"))
    with pytest.raises(errors.DataError, match="none of the template's choices"):
        encoder.conversation(conversation("glad"))


def collated(encoder: encoding.Encoder, corpus: data.Corpus, model: Any) -> batches.Batch:
    collate = objectives.collate(encoder, model, recipes.Training())
    assert collate is not None
    return collate(corpus, np.arange(len(corpus)))


# --- the loss and the choices against plain transformers -----------------------------------------


def answers(family: str, n: int = 6) -> tuple[encoding.Encoder, data.Corpus]:
    tokenizer = vocabularies.with_template(tiny_tokenizer(), family)
    choices = ["sad", "a long old answer"]
    encoder = families.encoder(family, tokenizer).answering(choices)
    rows = [
        [formats.Message("user", text), formats.Message("assistant", choices[k % 2])]
        for k, text in enumerate(sentences(n))
    ]
    return encoder, data.from_tokens(encoder.conversations(rows))


@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4, 5]], [[0], [1, 2, 3], [4, 5]]])
def test_the_step_of_a_t5_is_the_full_batch_whatever_the_accumulation(
    split: list[list[int]],
) -> None:
    model = tiny_model("seq2seq").eval()
    encoder, corpus = answers("seq2seq")
    pairs = []
    for k in range(len(corpus)):
        ids, learnt = (torch.from_numpy(np.array(x)) for x in corpus.example(k))
        pairs.append((ids[~learnt].long(), ids[learnt].long()))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([a for a, _ in pairs], batch_first=True, padding_value=2)
    mask = pad([torch.ones_like(a) for a, _ in pairs], batch_first=True)
    labels = pad([b for _, b in pairs], batch_first=True, padding_value=-100)
    theirs = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    theirs.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for head in (losses.TARGETS, losses.FULL):
        model.zero_grad()
        collate = objectives.collate(encoder, model, recipes.Training())
        assert collate is not None
        total, count = 0.0, int(corpus.targets.sum())
        for rows in split:
            loss = losses.summed(model, collate(corpus, np.array(rows)), head=head) / count
            loss.backward()
            total += float(loss.detach())
        assert total == pytest.approx(float(theirs.detach()), abs=2e-6)
        size = max(float(grad.abs().max()) for grad in wanted.values())
        for name, parameter in model.named_parameters():
            if name in wanted:
                assert parameter.grad is not None
                assert float((parameter.grad - wanted[name]).abs().max()) < 2e-6 * size + 1e-7


@pytest.mark.parametrize("kind", ["m2m_100", "blenderbot", "bart"])
def test_a_decoder_reads_what_the_library_lets_it_read(kind: str) -> None:
    """M2M100 (NLLB) and Blenderbot shift their labels within their forward alone."""
    sizes = {**CONFIGS["bart"][1], "vocab_size": 320, "pad_token_id": 2}
    config = transformers.AutoConfig.for_model(
        kind, **sizes, bos_token_id=0, eos_token_id=1, decoder_start_token_id=1
    )
    torch.manual_seed(1)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    encoder, corpus = answers("seq2seq")
    batch = collated(encoder, corpus, model)
    theirs = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.targets).loss
    ours = losses.summed(model, batch, head=losses.FULL) / int(corpus.targets.sum())
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=2e-6)
    if kind == "m2m_100":
        config.decoder_start_token_id = None
        with pytest.raises(errors.ModelError, match="decoder_start_token_id"):
            collated(encoder, corpus, model)


def test_the_loss_of_masks_is_plain_transformers() -> None:
    model = tiny_model("masked").eval()
    encoder, corpus = answers("masked")
    batch = collated(encoder, corpus, model)
    theirs = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.targets).loss
    for head in (losses.TARGETS, losses.FULL):
        ours = losses.summed(model, batch, head=head) / int(corpus.targets.sum())
        assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=2e-6)


@pytest.mark.parametrize("family", ["seq2seq", "masked"])
def test_choices_are_as_likely_as_their_loss_says(family: str) -> None:
    model = tiny_model(family).eval()
    encoder, _ = answers(family)
    choices = ["sad", "a long old answer"]
    prompts = [[formats.Message("user", text)] for text in sentences(3)]
    made: list[int] = []
    hook = losses.output_layer(model).register_forward_hook(
        lambda _, __, logits: made.append(logits[..., 0].numel())
    )
    found = likelihoods.chances(model, encoder, prompts, choices)
    hook.remove()
    longest = int(found.tokens.max())
    if family == "masked":
        assert made == [longest * len(prompts)], "logits of masks alone"
    for k, prompt in enumerate(prompts):
        for c, choice in enumerate(choices):
            row = encoder.conversation([*prompt, formats.Message("assistant", choice)])
            batch = collated(encoder, data.from_tokens([row]), model)
            logits = model(**batch.inputs()).logits
            wanted = -F.cross_entropy(
                logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"
            )
            assert found.nats[k, c] == pytest.approx(float(wanted.detach()), abs=1e-3)
            assert found.tokens[k, c] == int((batch.targets != -100).sum())


# --- documents -----------------------------------------------------------------------------------


def documents(family: str, lengths: list[int], **fields: Any) -> tuple[Any, data.Corpus]:
    recipe = recipes.TokenizerRecipe(algorithm="bpe", vocab_size=330)
    tokenizer = vocabularies.train(recipe, lambda: iter(sentences(100)), family)
    encoder = families.encoder(family, tokenizer)
    training = recipes.Training(**fields)
    text = " ".join(sentences(400))
    pieces = [encoder.pieces([text], n)[0][0] for n in lengths]
    plain = data.from_tokens(pieces)
    corpus = dataclasses.replace(plain, plain=(True,))
    objective = objectives.of(encoder, training)
    return objective, objectives.counted(corpus, objective, encoder.room)


def test_masked_tokens_follow_berts_rule_and_change_with_the_visit() -> None:
    objective, corpus = documents("masked", [900, 300, 3])
    fates = {"mask": 0, "same": 0, "other": 0}
    for visit in range(8):
        for row in range(len(corpus)):
            ids, targets = objective.example(corpus, row + visit * len(corpus))
            raw = corpus.example(row)[0]
            places = np.flatnonzero(targets != -100)
            assert len(places) == corpus.targets[row]
            assert (targets[places] == raw[places]).all()
            assert not {0, len(raw) - 1} & set(places.tolist()), "the frame is never hidden"
            assert (np.delete(ids, places) == np.delete(raw, places)).all()
            for a, b in zip(ids[places], raw[places], strict=True):
                fates["mask" if a == objective.mask_id else "same" if a == b else "other"] += 1
    total = sum(fates.values())
    assert corpus.targets.tolist() == [135, 45, 1]
    assert fates["mask"] / total == pytest.approx(0.8, abs=0.04)
    assert fates["other"] / total == pytest.approx(0.1, abs=0.03)
    first, second = (objective.example(corpus, k * len(corpus))[0] for k in (0, 1))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, objective.example(corpus, 0)[0])


def test_a_part_of_a_prompt_is_hidden_in_training_alone() -> None:
    encoder, corpus = answers("masked")
    settings = recipes.Training(prompt_mask_prob=0.3)
    objective = objectives.of(encoder, settings)
    corpus = dataclasses.replace(corpus, plain=(False,))
    plain = objectives.Masks.of(encoder, recipes.Training())
    thinned = objectives.thinned(corpus, settings)
    control, hidden, places = sorted(encoder.control), 0, 0
    for visit in range(20):
        for row in range(len(corpus)):
            ids, targets = objective.example(thinned, row + visit * len(corpus))
            whole, wanted = plain.example(corpus, row)
            assert (targets == wanted).all(), "the same is learnt"
            fixed = np.isin(whole, control)
            assert (ids[fixed] == whole[fixed]).all(), "the frame and the answer's masks stay"
            hidden += int((ids == encoder.tokenizer.mask_token_id)[~fixed].sum())
            places += int((~fixed).sum())
            assert (objective.example(corpus, row)[0] == whole).all(), "not where it is measured"
    assert hidden / places == pytest.approx(0.3 * 0.8, abs=0.02)
    first, second = (objective.example(thinned, k * len(corpus))[0] for k in (0, 1))
    assert not np.array_equal(first, second)
    assert objectives.changing(thinned, objective)
    assert not objectives.changing(corpus, objective)


def test_nothing_is_hidden_from_a_decoder(tmp_path: Path, cli: Any) -> None:
    folder_with(tmp_path, *("gpt2", CONFIGS["gpt2"][1]))
    for more in ((), ("--preview", "1"), ("--plan",)):
        for key in ("prompt_mask_prob", "mlm_probability"):
            found = cli("pretrain", "-r", "pretrain.yaml", "-s", f"training.{key}=0.1", *more)
            assert found.code == 2
            assert f"training.{key}: 0.1, and the model is causal" in found.err


@pytest.mark.parametrize(
    ("key", "value", "able"),
    [
        ("mlm_probability", 0.2, {"masked", "seq2seq"}),
        ("whole_word_mask", True, {"masked"}),
        ("mask_replace_prob", 0.7, {"masked"}),
        ("random_replace_prob", 0.0, {"masked"}),
        ("prompt_mask_prob", 0.1, {"masked"}),
        ("mean_noise_span_length", 2.0, {"seq2seq"}),
    ],
)
def test_what_hides_a_part_of_a_text_is_for_some_families_alone(
    key: str, value: float, able: set[str]
) -> None:
    training = recipes.Training.model_validate({key: value})
    assert training != recipes.Training()
    for family in families.ENCODERS:
        if family in able:
            families.refuse_idle(family, training)
        else:
            with pytest.raises(errors.RecipeError, match=f"training.{key}: .* the model is"):
                families.refuse_idle(family, training)
        families.refuse_idle(family, recipes.Training())


@pytest.mark.parametrize("algorithm", ["bpe", "unigram", "wordpiece"])
def test_a_tokenizer_reads_small_letters_where_that_is_asked(algorithm: Any) -> None:
    for lowercase in (False, True):
        wanted = recipes.TokenizerRecipe(algorithm=algorithm, vocab_size=330, lowercase=lowercase)
        # Once: a unigram tokenizer trained again on the same texts may be another.
        made = vocabularies.train(wanted, lambda: iter(sentences(100)), "masked")
        same = made("The CAT Likes")["input_ids"] == made("the cat likes")["input_ids"]
        assert same is lowercase


def test_phrases_are_tokens_beside_the_words_of_a_plain_tokenizer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = ["I don't like it, not a good film.", "A good film? I don't like it at all."] * 9

    def made(**more: Any) -> Any:
        wanted = recipes.TokenizerRecipe(algorithm="bpe", lowercase=True, **more)
        return vocabularies.train(wanted, lambda: iter(texts), "masked")

    plain, built = made(vocab_size=500), made(vocab_size=512, phrases=12)
    found = set(built.get_vocab()) - set(plain.get_vocab())
    assert found == {"ĠaĠgood", "ĠiĠdon", "ĠitĠat", "'tĠlike"}
    assert "4 of 12 were found" in capsys.readouterr().err
    made(vocab_size=500, phrases=4)
    assert capsys.readouterr().err == ""
    words = "like, good. film\nall 12!"
    assert built.tokenize(words) == plain.tokenize(words)
    assert built.tokenize("I don't like it!") == ["ĠiĠdon", "'tĠlike", "Ġit", "!"]
    for text in ("Not A good film: 10", "  two  spaces\n", "schön 漢字 don't", ""):
        for tokenizer in (plain, built):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.lower().strip()
    with pytest.raises(ValueError, match="unigram has none"):
        recipes.TokenizerRecipe(algorithm="unigram", vocab_size=500, phrases=12)
    with pytest.raises(ValueError, match="too few for words"):
        recipes.TokenizerRecipe(vocab_size=500, phrases=240)


def test_whole_words_are_hidden_whole() -> None:
    objective, corpus = documents(
        "masked", [400], whole_word_mask=True, mask_replace_prob=1, random_replace_prob=0
    )
    ids, targets = objective.example(corpus, 0)
    raw = corpus.example(0)[0]
    word = np.cumsum(objective.begins[raw])
    hidden = ids == objective.mask_id
    assert int((targets != -100).sum()) == corpus.targets[0] == round(0.15 * 398)
    assert hidden[targets != -100].all()
    for number in set(word[hidden].tolist()):
        inside = (word == number) & (np.arange(len(raw)) < len(raw) - 1)
        assert hidden[inside].all(), "a word is hidden in part"


def test_spans_are_those_of_t5() -> None:
    objective, corpus = documents("seq2seq", [512, 60, 2, 3])
    sentinel = set(objective.sentinels.tolist())
    for row in range(len(corpus)):
        read, written = objective.example(corpus, row)
        raw = corpus.example(row)[0][:-1].tolist()
        assert read[-1] == written[-1] == objective.end
        assert len(written) == corpus.targets[row]
        # Put the spans back where their sentinels stand: it is the text again.
        spans: dict[int, list[int]] = {}
        for id_ in written[:-1].tolist():
            if id_ in sentinel:
                spans[id_] = current = []
            else:
                current.append(id_)
        whole = [x for id_ in read[:-1].tolist() for x in spans.get(id_, [id_])]
        assert whole == raw
    hidden = round(511 * 0.15)
    assert corpus.targets[0] == hidden + min(round(hidden / 3), len(sentinel)) + 1


def test_each_visit_of_a_row_has_a_number_of_its_own() -> None:
    _, corpus = documents("masked", [50, 40, 30])
    source = recipes.Source(path="x", weight=2)
    corpus = dataclasses.replace(corpus, sources=(source,), wordings=(1,))
    epoch = objectives.visits(corpus, seed=1)
    seen = np.concatenate([epoch(0), epoch(1)])
    assert sorted(seen.tolist()) == list(range(12))
    assert objectives.Repeated(corpus.lengths)[seen].sum() == 4 * corpus.lengths.sum()


@pytest.mark.parametrize(
    ("hidden_size", "able", "said"),
    [
        (512, True, "bfloat16 on CPU"),
        (512, False, "float32 on CPU"),
        (128, True, "float32 on CPU"),
    ],
)
def test_bfloat16_is_for_who_has_it_and_gains_by_it(
    hidden_size: int, able: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer of 128 has 0.3M weights and one of 512 has 3.7M; what they hold is not read."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(models, "cpu_has_bfloat16", lambda: able)
    recipe = f"""
model: {{from_scratch: {{model_type: llama, vocab_size: 1024, tokenizer: named,
  num_hidden_layers: 1, hidden_size: {hidden_size}, intermediate_size: {2 * hidden_size},
  num_attention_heads: 4}}}}
data: {{train: {{path: texts.jsonl}}}}
"""
    place = models.placement(recipes.loads(recipe, command="pretrain").model)
    assert place.why.startswith(said)
    assert said.startswith(str(place.dtype).removeprefix("torch."))
