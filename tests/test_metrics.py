"""Every metric equals the library it stands for, on random text, and odd text has a value too."""

# ruff: noqa: RUF001 - Chinese punctuation is meant.

from __future__ import annotations

import random
import re
import string
import subprocess
import sys
import textwrap
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from itune import errors, metrics
from itune.metrics import squad, sufficient, user, words

Rows = tuple[list[str], list[list[str]]]

KEYS = {"rouge": {"rouge1", "rouge2", "rougeL", "rougeLsum"}, "squad": {"squad_em", "squad_f1"}}
ENGLISH = (
    'the a an cat cats sat on mat Mat, mat. it\'s 3.5 100% U.S. state-of-the-art well; (so) "ok" '
    "don't & &amp; <b> x_y the\nlines\n"
)
WIDE = (  # little Japanese and Korean: where they prevail, BLEU wants packages that are optional
    "café naïve Résumé straße ½ x² — “quoted” 今天天气很好，我们去公园。 日本語の 한국어를 "
    "हिन्दी Привет"
)
VOCABULARY = ENGLISH.split(" ")
WIDE_VOCABULARY = [*VOCABULARY, *WIDE.split(" ")]


def text(draw: random.Random, vocabulary: list[str], longest: int = 9) -> str:
    """Some words, in one case of nine none."""
    return " ".join(draw.choices(vocabulary, k=draw.randrange(longest)))


def case(seed: int, *, vocabulary: list[str] = VOCABULARY, most_references: int = 3) -> Rows:
    """Up to eight rows; many a prediction repeats a part of its reference."""
    draw = random.Random(seed)
    predictions, references = [], []
    for _ in range(draw.randint(1, 8)):
        golds = [text(draw, vocabulary) for _ in range(draw.randint(1, most_references))]
        mixed = [*golds[0].split(" ")[: draw.randrange(6)], text(draw, vocabulary, 4)]
        predictions.append(" ".join(mixed) if draw.random() < 0.8 else draw.choice(golds))
        references.append(golds)
    return predictions, references


def loaded(name: str, **options: Any) -> sufficient.SufficientMetric:
    metric = metrics.load(name, **options)
    assert isinstance(metric, sufficient.SufficientMetric)
    return metric


def value(name: str, rows: Rows, **options: Any) -> float:
    """The one value of a metric with one key, without evaluate's detour over Arrow."""
    metric = loaded(name, **options)
    found = metric.values(sufficient.total(metric.statistics(*rows)))
    assert len(found) == 1
    return float(found[metric.keys[0]])


def streams(references: list[list[str]]) -> list[list[str | None]]:
    """References as sacrebleu wants them: all first ones, all second ones; None for no more."""
    most = max(map(len, references))
    return [[golds[i] if i < len(golds) else None for golds in references] for i in range(most)]


# --- equal to the libraries ---


@pytest.mark.parametrize("name", ["bleu", "chrf", "ter"])
def test_equals_sacrebleu_to_the_last_bit(name: str) -> None:
    import sacrebleu

    corpus = getattr(sacrebleu, f"corpus_{name}")
    for seed in range(200):
        rows = case(seed)
        assert value(name, rows) == corpus(rows[0], streams(rows[1])).score, seed


def test_chinese_equals_sacrebleu_with_its_tokenizer_for_chinese() -> None:
    import sacrebleu

    vocabulary = ["今天", "天气", "很好", "，", "我们", "去公园", "GPU", "2024年", "。"]
    for seed in range(50):
        rows = case(seed, vocabulary=vocabulary, most_references=1)
        rows[1][0] = ["今天天气很好，我们去公园玩，再回家。" * 3]
        expected = sacrebleu.corpus_bleu(rows[0], streams(rows[1]), tokenize="zh").score
        assert value("bleu", rows) == expected, seed
        ter = sacrebleu.metrics.TER(normalized=True, asian_support=True)
        assert value("ter", rows) == ter.corpus_score(rows[0], streams(rows[1])).score, seed


def test_signature_is_that_of_sacrebleu() -> None:
    from sacrebleu.metrics.bleu import BLEU

    predictions, references = ["a b c d e"], [["a b c d f"]]
    metric, oracle = loaded("bleu"), BLEU()
    metric.compute(predictions=predictions, references=references)
    oracle.corpus_score(predictions, streams(references))
    assert metric.signature == str(oracle.get_signature())
    assert "tok:13a" in metric.signature


@pytest.mark.parametrize(
    ("sentence", "tokenizer"),
    [
        ("今天天气很好，我们去公园玩。", "zh"),
        ("อากาศดีมาก", "char"),
        ("The word 公园 means park, and is read quickly.", "13a"),
        ("Il fait très beau à Besançon", "13a"),
        ("", "13a"),
        ("—", "13a"),
    ],
)
def test_bleu_takes_the_tokenizer_of_the_script(sentence: str, tokenizer: str) -> None:
    metric = loaded("bleu")
    metric.compute(predictions=["nothing of it"], references=[[sentence]])
    assert f"|tok:{tokenizer}|" in metric.signature


@pytest.mark.parametrize(
    ("sentence", "language", "extra"),
    [
        ("今日はとても良い天気です。", "Japanese", "ja"),
        ("오늘은 날씨가 아주 좋다", "Korean", "ko"),
    ],
)
def test_japanese_and_korean_want_their_dictionary_and_say_so(
    sentence: str, language: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sacrebleu.tokenizers import tokenizer_ja_mecab, tokenizer_ko_mecab

    monkeypatch.setattr(tokenizer_ja_mecab, "MeCab", None)
    monkeypatch.setattr(tokenizer_ko_mecab, "MeCab", None)
    said = rf"references are {language}.*pip install 'sacrebleu\[{extra}\]', or ask for bleu:char"
    with pytest.raises(errors.UserError, match=said):
        loaded("bleu").check_references([[sentence]])
    with pytest.raises(errors.UserError, match=f"asked for {language}"):
        metrics.load(f"bleu:{extra}")
    by_letter = loaded("bleu:char")
    assert by_letter.compute(predictions=[sentence], references=[[sentence]]) == {
        "bleu:char": pytest.approx(100)
    }


@pytest.mark.parametrize(
    ("sentence", "script"),
    [
        ("今日はとても良い天気です。", "kana"),
        ("오늘은 날씨가 좋다", "hangul"),
        ("今天天气很好", "han"),
        ("Das Wort 오늘은 heißt heute, und 今 ist jetzt", "spaced"),
        ("สวัสดี", "unspaced"),
    ],
)
def test_script_of_texts(sentence: str, script: str) -> None:
    assert words.script([sentence, ""]) == script


@pytest.mark.parametrize("cut", metrics.BLEU_WORDS[:5])
def test_bleu_cuts_words_as_it_is_told(cut: str) -> None:
    import sacrebleu

    rows = case(3, vocabulary=WIDE_VOCABULARY)
    expected = sacrebleu.corpus_bleu(rows[0], streams(rows[1]), tokenize=cut).score
    assert value(f"bleu:{cut}", rows) == expected
    with pytest.raises(errors.UserError, match=r"'bleu:xx': bleu cuts no.*bleu:13a, bleu:intl"):
        metrics.load("bleu:xx")
    with pytest.raises(errors.UserError, match=r"f1 cuts no words that way. Known: f1\."):
        metrics.check("f1:zh")


def test_rouge_by_jieba_is_rouge_score_over_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from rouge_score import rouge_scorer, tokenizers

    def pairs(text: str) -> list[str]:
        return [text[i : i + 2] for i in range(0, len(text), 2)]

    class Pairs(tokenizers.Tokenizer):  # type: ignore[misc, unused-ignore]
        def tokenize(self, text: str) -> list[str]:
            return [word for word in pairs(text) if any(map(str.isalnum, word))]

    jieba = types.ModuleType("jieba")
    vars(jieba).update(lcut=pairs, setLogLevel=lambda _: None, __version__="0.0")
    monkeypatch.setitem(sys.modules, "jieba", jieba)
    said, gold = "今天天气很好，我们去公园。", "今天天气不错，我们去散步。"
    metric = loaded("rouge:jieba")
    found = metric.compute(predictions=[said], references=[[gold]])
    assert found is not None
    best = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Pairs()).score(
        gold, said
    )
    for kind, each in best.items():
        assert found[f"{kind}:jieba"] == pytest.approx(each.fmeasure, abs=1e-12)
    assert metric.signature_of("rougeL:jieba").startswith("rougeL|stem:no|tok:jieba-0.0|")
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(errors.UserError, match=r"pip install 'itune\[zh\]'"):
        metrics.load("rougeL:jieba")


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_english_equals_rouge_score(name: str) -> None:
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer([name])
    for seed in range(100):
        predictions, references = case(seed)
        predictions[0] += " naïve 今天"  # what decides is how the references are written
        pairs = zip(references, predictions, strict=True)
        expected = np.mean(
            [scorer.score_multi(golds, each)[name].fmeasure for golds, each in pairs]
        )
        assert value(name, (predictions, references)) == pytest.approx(expected, abs=1e-12), seed


def test_all_kinds_of_rouge_at_once_equal_each_alone() -> None:
    for seed in range(30):
        rows = case(seed, vocabulary=WIDE_VOCABULARY)
        together = loaded("rouge").compute(predictions=rows[0], references=rows[1])
        assert together == {name: value(name, rows) for name in KEYS["rouge"]}


def test_tokenizer_keeps_english_as_rouge_score_has_it() -> None:
    from rouge_score import tokenizers

    default, draw = tokenizers.DefaultTokenizer(), random.Random(3)
    for _ in range(2000):
        each = "".join(draw.choices(string.printable + "—“”½²…", k=draw.randrange(30)))
        assert words.words(each) == default.tokenize(each), repr(each)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Résumé naïve", ["résumé", "naïve"]),
        ("Re\u0301sume\u0301", ["résumé"]),
        ("今天 GPU很快。", ["今", "天", "gpu", "很", "快"]),
        ("Straße 12, x_y", ["straße", "12", "x", "y"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("한국어 말", ["한국어", "말"]),
        ("カタ・カナ", ["カ", "タ", "カ", "ナ"]),
    ],
)
def test_words_of_other_scripts_stay_whole(sentence: str, expected: list[str]) -> None:
    assert words.words(sentence) == expected


def test_identical_chinese_has_full_rouge_and_each_sentence_is_one() -> None:
    chinese = "今天天气很好。我们去公园玩！好吗？"
    metric = loaded("rouge")
    found = metric.compute(predictions=[chinese], references=[[chinese]])
    assert found == dict.fromkeys(metric.keys, 1.0)
    assert metric.signature_of("rougeL") == "rougeL|stem:no|tok:default+unicode|rouge_score:0.1.2"
    swapped = "我们去公园玩！今天天气很好。好吗？"
    assert value("rougeLsum", ([swapped], [[chinese]])) == 1.0
    assert value("rougeL", ([swapped], [[chinese]])) < 1.0


def test_f1_equals_scikit_learn() -> None:
    from sklearn.metrics import f1_score

    draw = random.Random(5)
    for seed in range(100):
        labels = [f"label {i}" for i in range(draw.randint(1, 5))]
        gold = draw.choices(labels, k=draw.randint(1, 30))
        answered = [each if draw.random() < 0.6 else draw.choice(labels) for each in gold]
        rows = answered, [[each] for each in gold]
        whole = f1_score(gold, answered, average="macro", zero_division=0)
        assert value("f1", rows, choices=labels) == pytest.approx(whole, abs=1e-12), seed
        asked = f1_score(gold, answered, labels=sorted(set(gold)), average="macro", zero_division=0)
        assert value("f1", rows) == pytest.approx(asked, abs=1e-12), seed
        odd = [each if draw.random() < 0.8 else "what?" for each in answered]
        asked = f1_score(gold, odd, labels=sorted(set(gold)), average="macro", zero_division=0)
        assert value("f1", (odd, rows[1])) == pytest.approx(asked, abs=1e-12), seed


def test_details_of_f1_equal_scikit_learn() -> None:
    from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

    draw = random.Random(8)
    for _ in range(30):
        labels = [f"label {i}" for i in range(draw.randint(2, 5))]
        gold = [*labels, *draw.choices(labels, k=draw.randint(1, 30))]
        odd = [each if draw.random() < 0.6 else draw.choice([*labels, "what?"]) for each in gold]
        found = loaded("f1").details(odd, [[each] for each in gold])
        micro = f1_score(gold, odd, labels=labels, average="micro", zero_division=0)
        assert found["micro"] == pytest.approx(micro, abs=1e-12)
        each = precision_recall_fscore_support(gold, odd, labels=labels, zero_division=0)
        for place, label in enumerate(labels):
            ours = found["classes"][label]
            theirs = [float(part[place]) for part in each]
            assert [ours[key] for key in ("precision", "recall", "f1", "rows")] == pytest.approx(
                theirs, abs=1e-12
            )
        table = confusion_matrix(gold, odd, labels=[*labels, "what?"])
        assert found["confusion"] == {"labels": labels, "counts": table[:-1].tolist()}


def test_matthews_correlation_equals_scikit_learn() -> None:
    from sklearn.metrics import matthews_corrcoef

    draw = random.Random(9)
    for _ in range(200):
        labels = [f"label {i}" for i in range(draw.randint(2, 4))]
        gold = draw.choices(labels, k=draw.randint(2, 20))
        odd = [each if draw.random() < 0.5 else draw.choice([*labels, "what?"]) for each in gold]
        if {*gold, *odd} == {gold[0]}:
            continue  # scikit-learn gives 0 with a warning
        rows, expected = (odd, [[each] for each in gold]), matthews_corrcoef(gold, odd)
        found = value("matthews_correlation", rows, choices=labels)
        assert found == pytest.approx(expected, abs=1e-12)
        known = [each if each in gold else "what?" for each in odd]
        expected = matthews_corrcoef(gold, known)
        assert value("matthews_correlation", rows) == pytest.approx(expected, abs=1e-12)


def test_an_odd_answer_makes_no_class_of_its_own() -> None:
    gold = [["yes"], ["no"], ["yes"], ["no"]]
    assert value("f1", (["yes", "no", "maybe", "perhaps"], gold)) == pytest.approx(2 / 3)


def test_choices_nobody_asked_for_or_answered_do_not_lower_f1() -> None:
    rows = ["yes", "no"], [["yes"], ["no"]]
    assert value("f1", rows, choices=["yes", "no", "unsure"]) == 1.0
    rows = ["yes", "unsure"], [["yes"], ["no"]]
    assert value("f1", rows, choices=["yes", "no", "unsure"]) == pytest.approx(1 / 3)
    assert value("f1", rows) == pytest.approx(1 / 2)


def test_choices_can_be_given_to_compute() -> None:
    metric = loaded("f1")
    rows = {"predictions": ["yes", "unsure"], "references": ["yes", "no"]}
    assert metric.compute(**rows, choices=["unsure"]) == {"f1": pytest.approx(1 / 3)}
    assert metric.compute(**rows) == {"f1": pytest.approx(1 / 2)}


def test_f1_counts_the_reference_that_was_answered() -> None:
    golds = [["yes", "sure"], ["yes", "sure"], ["no"]]
    assert value("f1", (["sure", "yes", "no"], golds)) == 1.0
    assert value("f1", (["no", "yes", "no"], golds)) == pytest.approx(2 / 3)


def test_f1_refuses_free_text() -> None:
    golds = [[f"an answer {i}"] for i in range(1001)]
    with pytest.raises(errors.UserError, match=r"1001 different labels.*squad_f1"):
        value("f1", ([""] * len(golds), golds))


def test_accuracy_equals_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score

    draw = random.Random(6)
    for _ in range(50):
        gold, answered = (draw.choices("abc", k=20) for _ in range(2))
        rows = answered, [[f" {each}\n"] for each in gold]
        assert value("accuracy", rows) == pytest.approx(accuracy_score(gold, answered), abs=1e-12)


def test_exact_match_forgives_spaces_around_and_nothing_else() -> None:
    answers = [" Paris\n", "paris", "Paris.", "", "the Paris", "Lyon"]
    golds = [["Paris"], ["Paris"], ["Paris"], [" "], ["Paris"], ["Paris", "Lyon "]]
    rows = loaded("exact_match").statistics(answers, golds)
    assert rows[:, 0].tolist() == [1, 0, 0, 1, 0, 1]


def official_squad(answer: str, gold: str) -> tuple[float, float]:
    """Exact match and F1 as the rules of SQuAD 1.1 are described, step by step."""

    def normal(each: str) -> str:
        each = "".join(letter for letter in each.lower() if letter not in set(string.punctuation))
        spaced, word = [], ""
        for letter in [*each, " "]:
            if letter.isalnum() or letter == "_":
                word += letter
            else:
                spaced.append(" " if word in {"a", "an", "the"} else word)
                spaced.append(letter)
                word = ""
        return " ".join("".join(spaced).split())

    left, right = normal(answer), normal(gold)
    same = sum((Counter(left.split()) & Counter(right.split())).values())
    if same == 0:
        return float(left == right), 0.0
    precision, recall = same / len(left.split()), same / len(right.split())
    return float(left == right), 2 * precision * recall / (precision + recall)


def test_equals_the_official_squad_on_text_with_spaces() -> None:
    vocabulary = [*VOCABULARY, "théâtre", "The", "a.", "-", "“the”", "an\tant"]
    for seed in range(300):
        predictions, references = case(seed, vocabulary=vocabulary)
        both = [
            [official_squad(each, gold) for gold in golds]
            for each, golds in zip(predictions, references, strict=True)
        ]
        found = loaded("squad").statistics(predictions, references)
        assert found[:, 0].tolist() == [max(em for em, _ in row) for row in both], seed
        assert found[:, 1].tolist() == [max(f1 for _, f1 in row) for row in both], seed


def test_squad_keeps_the_quirk_of_empty_answers() -> None:
    found = loaded("squad").statistics(["", "the", "a", ""], [[""], ["..."], ["cat"], ["cat"]])
    assert found[:, :2].tolist() == [[1, 0], [1, 0], [0, 0], [0, 0]]


def test_squad_counts_characters_of_chinese() -> None:
    rows = ["今天天气", "2008年", "“今天 天气。”"], [["今天天气好"], ["2008"], ["今天天气"]]
    found = loaded("squad").statistics(*rows)
    assert found[:, 0].tolist() == [0, 0, 1]
    assert found[:, 1] == pytest.approx([8 / 9, 2 / 3, 1])
    assert squad.tokens("The U.S. GPU", apart=True) == squad.tokens("The U.S. GPU", apart=False)


def test_perplexity_is_that_of_all_tokens_together() -> None:
    from itune.metrics.perplexity import Perplexity

    draw = np.random.default_rng(2)
    losses, lengths = draw.gamma(3, 5, size=20), draw.integers(1, 40, size=20)
    each = np.concatenate([np.full(n, nats / n) for nats, n in zip(losses, lengths, strict=True)])
    found = Perplexity().compute(predictions=losses.tolist(), references=lengths.tolist())
    assert found == {"perplexity": pytest.approx(np.exp(each.mean()), rel=1e-12)}
    for nats, tokens in ((float("nan"), 3), (1.0, 0)):
        with pytest.raises(errors.UserError, match="row 1 has a loss of"):
            Perplexity().compute(predictions=[1.0, nats], references=[3, tokens])
    with pytest.raises(errors.UserError, match="perplexity is measured on sources without"):
        metrics.check("perplexity")


def test_bits_per_byte_are_the_same_whatever_the_tokens_are() -> None:
    from itune.metrics.perplexity import BitsPerByte

    # Each byte foretold with probability 1/8: 3 bits, as one text or as pieces of any size.
    one = BitsPerByte().compute(predictions=[np.log(8) * 90], references=[90.0])
    many = BitsPerByte().compute(
        predictions=[np.log(8) * n for n in (12.5, 70, 7.5)], references=[12.5, 70, 7.5]
    )
    assert one == many == {"bits_per_byte": pytest.approx(3, rel=1e-12)}
    with pytest.raises(errors.UserError, match=r"bits_per_byte: row 0 .* over 0 bytes"):
        BitsPerByte().compute(predictions=[1.0], references=[0.0])


# --- the same for all of them ---


@pytest.mark.parametrize("name", metrics.names())
def test_keys_are_those_that_were_asked_for(name: str) -> None:
    metric = loaded(name)
    found = metric.compute(predictions=["a cat sat", "no"], references=["a cat sat", "yes"])
    assert set(found) == set(metric.keys) == KEYS.get(name, {name})
    assert all(type(each) is float for each in found.values())
    assert metric.signature
    for key in metric.keys:
        assert metric.signature_of(key)


@pytest.mark.parametrize("name", metrics.names())
def test_value_of_summed_statistics_is_what_evaluate_computes(name: str) -> None:
    for seed in range(4):
        predictions, references = case(seed, vocabulary=WIDE_VOCABULARY)
        metric = loaded(name)
        statistics = metric.statistics(predictions, references)
        assert len(statistics) == len(predictions)
        direct = metric.compute(predictions=predictions, references=references)
        assert direct == metric.values(sufficient.total(statistics))
        for some, golds in zip(predictions, references, strict=True):
            metric.add(prediction=some, reference=golds)
        assert metric.compute() == direct
        metric.add_batch(predictions=predictions[:1], references=references[:1])
        for some, golds in list(zip(predictions, references, strict=True))[1:]:
            metric.add_batch(predictions=[some], references=[golds])
        assert metric.compute() == direct


@pytest.mark.parametrize("name", metrics.names())
def test_values_of_many_sums_at_once_are_those_of_each(name: str) -> None:
    metric = loaded(name)
    statistics = metric.statistics(*case(7)).astype(float)
    sums = np.stack([statistics[:1].sum(0), statistics.sum(0), 3 * statistics.sum(0)] * 2)
    stacked = metric.values(sums.reshape(2, 3, -1))
    for key, found in stacked.items():
        assert found.shape == (2, 3)
        assert found.ravel().tolist() == [float(metric.values(each)[key]) for each in sums]


ODD: dict[str, Rows] = {
    "all empty": (["", ""], [[""], [""]]),
    "empty predictions": (["", ""], [["a cat"], ["a dog"]]),
    "empty references": (["a cat", "b"], [[""], [""]]),
    "only spaces": ([" \n\t ", "\n"], [["  "], ["\r\n"]]),
    "only punctuation": (["...", "!?"], [["—"], ["。"]]),
    "one row": (["a cat sat on the mat"], [["a cat sat on the mat"]]),
    "one class": (["yes"] * 5, [["yes"]] * 5),
    "one class, all wrong": (["no"] * 5, [["yes"]] * 5),
    "lines": (["a\nb\n\nc", "\n\n"], [["a\nb"], ["a\r\nb\u2028c"]]),
    "unicode": (["\u200d\ufeff👩‍👩‍👧", "e\u0301\x00\x1b[31m"], [["👩‍👩‍👧"], ["é"]]),
    "letters that fold": (["İstanbul ﬁ Ǆ", "ß"], [["istanbul fi ǆ"], ["SS"]]),
    "chinese": (["今天天气很好。", ""], [["今天天气不错。"], ["好"]]),
    "ragged": (["a", "b"], [["a"], ["c", "b", "", "a b c d"]]),
    "repeated": (["the " * 60], [["the " * 40]]),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", metrics.names())
def test_odd_text_has_a_value_within_the_bounds(name: str, odd: str) -> None:
    metric = loaded(name)
    found = metric.compute(predictions=ODD[odd][0], references=ODD[odd][1])
    assert set(found) == set(metric.keys)
    least, greatest = metric.bounds or (0, float("inf"))
    assert all(least <= each <= greatest + 1e-9 for each in found.values()), found


@pytest.mark.parametrize("name", metrics.names())
def test_an_empty_answer_counts_as_a_wrong_one(name: str) -> None:
    right = ["a cat sat on the mat 1", "a dog ran to the old red house 2"]
    golds = [[each] for each in right]
    best = loaded(name).compute(predictions=right, references=golds)
    half = loaded(name).compute(predictions=[right[0], ""], references=golds)
    for key, found in half.items():
        assert found > best[key] if name == "ter" else found < best[key]


@pytest.mark.parametrize("name", metrics.names())
def test_what_cannot_be_scored_is_a_fault_of_the_user(name: str) -> None:
    metric = loaded(name)
    with pytest.raises(errors.UserError, match="no rows"):
        metric.compute(predictions=[], references=[])
    with pytest.raises(errors.UserError, match="no rows"):
        metric.compute()
    with pytest.raises(errors.UserError, match="2 predictions, but references for 1"):
        metric.compute(predictions=["a", "b"], references=[["a"]])
    with pytest.raises(errors.UserError, match="row 1 has no reference"):
        metric.statistics(["a", "b"], [["a"], []])
    assert metric.compute(predictions=["a"], references=["a"])  # and still works


# --- evaluate's own interface ---


def test_metrics_combine() -> None:
    from itune.metrics.sufficient import evaluate

    both = evaluate.combine([loaded("accuracy"), loaded("bleu")])
    found = both.compute(predictions=["a b c d e"], references=["a b c d e"])
    assert found == {"accuracy": 1.0, "bleu": pytest.approx(100)}


def test_rows_in_files_give_the_same(tmp_path: Path) -> None:
    from itune.metrics.rouge import Rouge

    rows = case(11)
    kept = Rouge(keep_in_memory=False, cache_dir=str(tmp_path))
    found = kept.compute(predictions=rows[0], references=rows[1])
    assert found == loaded("rouge").compute(predictions=rows[0], references=rows[1])


def test_nothing_is_written_in_the_cache(tmp_path: Path) -> None:
    from itune.metrics.accuracy import Accuracy

    Accuracy(cache_dir=str(tmp_path / "cache")).compute(predictions=["a"], references=["a"])
    assert not (tmp_path / "cache").exists()


# --- names, files, imports ---


def test_names_are_all_the_classes_there_are() -> None:
    folder = Path(metrics.__file__).parent
    own = {"__init__", "perplexity", "sacre", "sufficient", "tables", "user", "words"}
    files = {path.stem for path in folder.glob("*.py")} - own
    assert {each.partition(":")[0] for each in metrics.METRICS.values()} == files
    assert len(metrics.names()) == 16


def test_an_unknown_name_hints_at_the_nearest() -> None:
    with pytest.raises(errors.UserError, match=r"'rouge-l'.* Did you mean 'rougeL'\?"):
        metrics.load("rouge-l")
    with pytest.raises(errors.UserError, match=r"'meteor'.*Known: accuracy, bleu"):
        metrics.load("meteor")


def test_asking_for_names_imports_nothing_heavy() -> None:
    code = "import sys; from itune import metrics; metrics.names(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"evaluate", "datasets", "numpy", "torch", "sacrebleu", "rouge_score", "sklearn"}
    assert not heavy & set(done.stdout.split())


def test_scoring_imports_neither_torch_nor_transformers_nor_loses_them() -> None:
    code = (
        "import sys; from itune import metrics\n"
        "metrics.load('f1').compute(predictions=['a'], references=['a'])\n"
        "print(*{'torch', 'transformers'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


OWN = """
import datasets
import evaluate

class {kind}(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="",
            features=datasets.Features({{"predictions": text, "references": {references}}}))

    def _compute(self, predictions, references):
        return {result}
"""


def own(name: str, result: str, references: str = "text") -> str:
    """Writes a metric of a user's; gives its path."""
    path = Path(f"{name}.py")
    path.write_text(OWN.format(kind=name.title(), result=result, references=references))
    return str(path.resolve())


def test_a_metric_of_the_users_is_computed_as_it_is() -> None:
    path = own("shorter", '{"length": sum(map(len, predictions)), "n": "x", "rows": [1, 2]}')
    metric = metrics.load(path)
    assert isinstance(metric, user.UserMetric)
    found = metric.compute(["ab", "c"], [["x"], ["y"]])
    assert found.keys() == {"length", "rows"}
    assert found["length"] == 3.0
    assert list(found["rows"]) == [1, 2]  # type: ignore[arg-type]
    with pytest.raises(errors.UserError, match="row 0 has 2 references"):
        metric.compute(["ab", "c"], [["x", "z"], ["y"]])


def test_a_metric_of_the_users_may_take_lists_of_references() -> None:
    path = own("most", '{"most": max(map(len, references))}', "datasets.List(text)")
    metric = metrics.load(path)
    assert isinstance(metric, user.UserMetric)
    assert metric.compute(["a"], [["x", "y"]]) == {"most": 2.0}


def test_a_metric_of_the_users_may_have_statistics() -> None:
    Path("longer.py").write_text(
        "import numpy as np\nfrom itune.metrics import sufficient\n\n"
        "class Longer(sufficient.MeanMetric):\n"
        "    '''Length.'''\n    keys = ('length',)\n    signature = 'length'\n"
        "    def scores(self, predictions, references):\n"
        "        return np.array([len(each) for each in predictions])\n"
    )
    metric = metrics.load(str(Path("longer.py").resolve()))
    assert isinstance(metric, sufficient.SufficientMetric)
    assert metric.compute(predictions=["ab", "abcd"], references=["", ""]) == {"length": 3.0}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("1 / 0", r"does not compute: ZeroDivisionError: division by zero\. Mend"),
        ('{"a": "b"}', "holds no number"),
        ("3", "gives 3, which holds no number"),
    ],
)
def test_a_broken_metric_of_the_users_says_so(result: str, message: str) -> None:
    metric = metrics.load(own("broken", result))
    assert isinstance(metric, user.UserMetric)
    with pytest.raises(errors.UserError, match=message):
        metric.compute(["a"], [["a"]])


def test_a_file_that_is_no_metric_says_so() -> None:
    with pytest.raises(errors.UserError, match="there is no such file"):
        metrics.load("nowhere.py")
    Path("empty.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(errors.UserError, match="does not load"):
        metrics.load(str(Path("empty.py").resolve()))


def test_the_example_of_the_documentation_works() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    begin = page.index("      import numpy as np")
    block = page[begin : page.index("\n\nFor one that is not a mean")]
    Path("mine.py").write_text(textwrap.dedent(block))
    metric = metrics.load(str(Path("mine.py").resolve()))
    assert isinstance(metric, sufficient.SufficientMetric)
    found = metric.compute(predictions=["a b", "a " * 11], references=["", ""])
    assert found == {"brevity": 0.5}
    rows = re.findall(r"^\| (`[^|]*`) \| (?:`|the one)", page, re.MULTILINE)
    asked = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert set(asked) == set(metrics.names()), "the table names every metric"
