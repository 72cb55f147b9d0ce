"""`report.html`: all that a run's files say, whatever texts they hold, without a network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import random_texts
from rich import cells
from test_commands import write

from itune import charts, console, contrasts, recipes, reports, runs, scoreboard

VOID = {"meta", "br", "link", "img", "input", "hr", "path"}
ESCAPE, BELL, NUL = "\x1b[31mred\x1b[0m", "\x07", "a\x00b"
BIDI = "safe\u202egnp.exe\u2066"
HOSTILE = (
    "<script>alert(1)</script>",
    "</p></article></main></body></html><h1>gone</h1>",
    "]]><!-- --> <![CDATA[ <style>*{display:none}</style>",
    "\"><img src=x onerror=alert(1)> ' onload='alert(2)",
    "{{ 777 * 777 }}{% raw %}",
    "javascript:alert(1)",
    ESCAPE + BELL + NUL + BIDI,
    "x" * 1_000_000,
    "\ud800 half of a pair",
    "",
)


class Page(HTMLParser):
    """What a browser would make of a page: texts, elements, their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = "".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def run_of(folder: Path, texts: tuple[str, ...], label: str = "sad") -> runs.Run:
    """A finished run with one evaluation whose every text is one of these."""
    folder.mkdir()
    run = runs.Run(folder)
    recipe = recipes.loads(
        "model: {name: some/base}\ndata: {train: {path: train.jsonl}}\n",
        str(folder / "recipe.yaml"),
    )
    (folder / "recipe.yaml").write_text(recipes.dump(recipe))
    manifest = {
        "command": "tune", "state": "finished", "created": "2026-01-01T10:00:00+00:00",
        "finished": "2026-01-01T11:00:00.000000+00:00", "itune": "0", "versions": {"torch": "2"},
        "python": "3", "hardware": {"machine": "m", "cores": 2}, "seed": 17, "loss": 0.5,
        "heldout_loss": None, "steps": 3, "tokens": 300, "supervised_tokens": 30,
        "seconds": 3.0, "waited": 0.1, "memory": {"process": 2_000_000_000, "device": 0},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(manifest))
    log = [
        {"step": step, "loss": loss, "learning_rate": 0.1, "grad_norm": 1.0, "seconds": step * 1.0}
        for step, loss in ((1, 3.0), (2, "nan"), (3, 1.0))
    ]
    write(folder / "log.jsonl", log)
    evals = folder / "evals" / "all"
    evals.mkdir(parents=True)
    lines = [
        {
            "task": texts[0],
            "row": row,
            "wording": 0,
            "prompt": text,
            "prediction": text,
            "references": [text[:50], "other"],
            "against": f"{text[:9000]} more",
        }
        for row, text in enumerate(texts)
    ]
    write(evals / "predictions.jsonl", lines)
    (evals / "scores.json").write_text(json.dumps(scores_of(texts, label, lines)))
    losses = [
        {"path": text, "row": row, "wording": 0, "loss": float(row), "tokens": 3, "step": 1}
        for row, text in enumerate(texts)
    ]
    write(folder / "row_losses.jsonl", losses)
    return run


def scores_of(texts: tuple[str, ...], label: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "signature": texts[0]}
    details = {
        "classes": {label: {"precision": 1.0, "recall": 0.5, "f1": 0.6, "rows": 4}},
        "confusion": {"labels": [label], "counts": [[3, 1]]},
    }
    changed = {"metric": "f1", "count": {"better": 1, "worse": 0, "same": 9}, "worse": []}
    better = [{**lines[0], "gain": 1.0, "references": list(lines[0]["references"])}]
    task = {
        "data": texts[0],
        "rows": len(texts),
        "scores": {"f1": {**score, "details": details}},
        "unparseable": {"count": 2, "share": 0.2},
        "wordings": [{"prompt": text, "scores": {"f1": 0.5}} for text in texts[:2]],
        "spread": {"f1": {"mean": 0.5, "worst": 0.5, "best": 0.5, "spread": 0.0}},
        "against": {
            "name": texts[0],
            "scores": {"f1": score},
            "difference": {
                "f1": {"value": 0.1, "low": 0.05, "high": 0.2, "p_value": 0.001, "p_holm": 0.002}
            },
            "changed": {**changed, "better": better},
        },
        "contamination": {"exact": 1, "ngram": 2},
    }
    return {"run": "r", "seconds": 1.0, "tokens_per_second": None, "tasks": {texts[0]: task}}


def test_whatever_models_and_data_hold_is_text_on_the_page(tmp_path: Path) -> None:
    plain = Page(reports.render(run_of(tmp_path / "plain", ("good",) * len(HOSTILE))))
    for first in HOSTILE[:-1]:
        texts = (first, *(text for text in HOSTILE if text != first))
        name = f"run-{HOSTILE.index(first)}"
        html = reports.render(run_of(tmp_path / name, texts, label=first[:100]))
        html.encode()  # no half pair is left
        page = Page(html)
        assert page.count("script") == page.count("img") == 0
        assert page.count("style") == page.count("main") == page.count("h1") == 1
        assert page.count("article") == plain.count("article"), "no text ends or begins a sample"
        attributes = {name for _, given in page.tags for name in given}
        assert not any(name.startswith("on") or name == "src" for name in attributes)
        links = [given["href"] for _, given in page.tags if "href" in given]
        assert all(str(link).startswith("#") for link in links)
        assert "603729" not in page.text, "no text is a template"
        for each in ("<script>alert(1)</script>", "]]><!-- -->", "{{ 777 * 777 }}{% raw %}"):
            assert each in page.text
        odd = {each for each in html if not each.isprintable()} - {"\n", "\t"}
        assert odd == set(), "nothing hides, turns the writing or drives a terminal"
        assert "\\x1b[31mred" in page.text
        assert "a\\x00b" in page.text
        assert "safe\\u202egnp" in page.text
        assert "1,000,000 characters in all" in page.text
        assert len(html) < 400_000


def test_the_page_needs_no_network_and_says_what_the_files_say(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", ("good", "bad day", "bad night"))
    html = reports.write(run).read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html), "nothing is fetched"
    assert "default-src 'none'" in html
    assert "prefers-color-scheme:dark" in html
    assert "@media print" in html
    assert "width=device-width" in html
    page = Page(html)
    for part in (
        "0.500 [0.400, 0.600]", "+0.100", "better", "1 rows whole, 2 more by a passage",
        "2 answers (20.0 %)", "confusion", "best less worst", "2 GB of the machine",
        "some/base", "max_length: 1024", "no model yet",
    ):  # fmt: skip
        assert part.lower() in re.sub(r"\s+", " ", page.text).lower(), part
    worst = re.findall(r"(good|bad day|bad night):\d", page.text)
    assert worst == ["bad night", "bad day", "good"]
    drawn = [given["d"] for tag, given in page.tags if tag == "path"]
    assert not any("nan" in str(each) for each in drawn)


def test_a_run_without_steps_or_scores_has_a_page(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", ("good", "bad"))
    for path in (run.dir / "log.jsonl", run.dir / "row_losses.jsonl"):
        path.unlink()
    (run.dir / "evals/all/scores.json").unlink()
    page = Page(reports.render(run))
    assert "No step was taken." in page.text
    assert "Worst rows" not in page.text


@pytest.mark.parametrize(
    ("text", "references", "marked"),
    [
        ("the red ball", ("the blue ball", "a cat"), ["red"]),
        ("the ball", ("the ball",), []),
        ("anything else", ("",), ["anything", "else"]),
        ("我很高兴", ("我不高兴",), ["很"]),
        ("", ("x",), []),
    ],
)
def test_words_are_marked_that_the_nearest_reference_has_not(
    text: str, references: tuple[str, ...], marked: list[str]
) -> None:
    parts = contrasts.marked(text, references)
    assert "".join(part.text for part in parts) == text
    found = [word for part in parts if part.marked for word in part.text.split()]
    assert found == marked


def test_no_peak_is_lost_in_a_long_curve() -> None:
    points = [(float(x), 1.0) for x in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    made = charts.curves([("loss", "ours", points)], x_name="step", y_name="loss")
    assert made is not None
    path = made.curves[0].path
    places = [tuple(map(float, each.split())) for each in path[1:].split(" L")]
    assert len(places) <= 2 * charts.POINTS
    top = made.y[-1]
    assert min(y for _, y in places) == pytest.approx(1000 * (10 - 9) / (10 - 0), abs=120)
    assert [x for x, y in places if y == min(y for _, y in places)] == [543.2]
    assert float(top.text) >= 9


def test_bins_hold_all_values() -> None:
    found = charts.binned([[1, 2, 2, 9, float("nan")], [5] * 7], 1)
    assert found is not None
    assert [sum(each) for each in found.counts] == [4, 7]
    assert charts.binned([[float("nan")]], 1) is None


def test_tune_writes_it_and_eval_renews_it(
    tmp_path: Path, tiny_model_dir: Path, cli: Callable[..., Any]
) -> None:
    write(tmp_path / "d.jsonl", [{"prompt": f"say {k}", "completion": f"{k}"} for k in range(40)])
    (tmp_path / "r.yaml").write_text(
        f"model: {{name: {tiny_model_dir}}}\n"
        "data: {train: {path: d.jsonl}, eval: {path: d.jsonl, limit: 4}, allow_overlap: true}\n"
        "training: {max_steps: 3, tokens_per_step: 100, max_length: 64}\n"
        "generation: {max_new_tokens: 4}\nevaluation: {resamples: 50}\n"
    )
    tuned = cli("tune", "-r", "r.yaml", "-o", "run")
    assert tuned.code == 0, tuned.err
    assert "a report in run/report.html" in tuned.err
    page = Page((tmp_path / "run/report.html").read_text())
    assert "Length of training examples" in page.text
    assert "held out" in page.text
    assert "AutoModelForCausalLM.from_pretrained('run/model')" in page.text
    assert "rougeL" not in page.text
    scored = cli("eval", "--run", "run", "--against", "base")
    assert scored.code == 0, scored.err
    assert "report: run/report.html" in scored.err
    page = Page((tmp_path / "run/report.html").read_text())
    assert page.count("article") >= 4
    assert "rougeL" in page.text
    assert "4 whole" in page.text


@pytest.mark.parametrize(
    ("state", "said"), [("diverged", "not finite"), ("interrupted", "goes on")]
)
def test_a_run_that_did_not_finish_says_so(state: str, said: str, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", ("good",))
    whole = Page(reports.render(run)).text
    run.update(state=state, steps=9)
    for key in (
        "finished",
        "memory",
        "loss",
        "heldout_loss",
        "tokens",
        "supervised_tokens",
        "seconds",
        "waited",
    ):
        manifest = json.loads((run.dir / "run.json").read_text())
        del manifest[key]
        (run.dir / "run.json").write_text(json.dumps(manifest))
    page = Page(reports.render(runs.Run(run.dir))).text
    assert "after step 3." in page
    assert said in page
    assert "3 of 9" in page
    assert "Gradient norm" in page
    assert "after step" not in whole
    assert "Learning rate learning rate" not in whole


def test_the_terminal_shows_the_rows_that_changed_most_in_80_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [
        {"prediction": text, "against": "\u65e5" * 40, "row": 123456 + k, "gain": 0.123456}
        for k, text in enumerate(["", "a\nb" * 50, ESCAPE * 9, "short"])
    ]
    changed = {"metric": "rougeL", "count": {"better": 4, "worse": 1, "same": 0}}
    against = {
        "name": "base",
        "scores": {},
        "difference": {},
        "changed": {**changed, "better": lines, "worse": [{**lines[3], "gain": -1.0}]},
    }
    task = {"rows": 5, "scores": {}, "wordings": [], "against": against}
    found = list(scoreboard.tables({"tasks": {"t": task}}, 0.95))
    titles = [table.title for table in found[2:]]
    assert titles == [f"{way} by rougeL, those that changed most" for way in ("better", "worse")]
    assert [len(table.rows) for table in found[2:]] == [3, 1]
    for table in found[2:]:
        console.Screen().table(table.title, table.columns, table.rows)
    out = capsys.readouterr().out
    assert max(cells.cell_len(line.rstrip()) for line in out.splitlines()) <= 80
    assert {"(empty)", "short", "+0.123", "-1"} <= set(out.split())
    assert "\x1b" not in out


def test_no_random_text_is_markup_on_the_page(tmp_path: Path) -> None:
    texts, at_once, size = random_texts(5000), 20, 12
    whole = [" ".join(texts[k : k + at_once]) for k in range(0, len(texts), at_once)]
    counts = []
    for start in range(0, len(whole), size):
        part = (*whole[start : start + size],)
        part += ("plain",) * (size - len(part))
        html = reports.render(run_of(tmp_path / str(start), part, label=part[0][:60]))
        assert {each for each in html if not contrasts.seen(each)} <= {"\n", "\t"}
        page = Page(html)
        counts.append(
            {tag: page.count(tag) for tag in ("article", "p", "pre", "h1", "h2", "style")}
        )
        assert not {"script", "img"} & {tag for tag, _ in page.tags}
        for text in part:
            assert "".join(contrasts.cut(text).split()) in "".join(page.text.split())
        assert "http" not in " ".join(
            str(value) for _, given in page.tags for value in given.values()
        )
    assert counts == [counts[0]] * len(counts), "no text begins or ends an element"
