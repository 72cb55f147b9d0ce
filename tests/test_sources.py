"""Rows from every kind of source, what their columns are taken for, and the cache of tokens."""

from __future__ import annotations

import bz2
import dataclasses
import errno
import fcntl
import gc
import gzip
import json
import lzma
import multiprocessing
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest

from itune import (
    cache,
    cases,
    data,
    encoding,
    errors,
    formats,
    joining,
    launching,
    preparing,
    recipes,
)
from itune import sources as sources_

ROWS = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(6)]


def written(path: str, rows: list[dict[str, Any]] = ROWS) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def source(path: str, **keys: Any) -> recipes.Source:
    return recipes.Source(path=path, **keys)


def rows_of(path: str, **keys: Any) -> list[dict[str, Any]]:
    return list(sources_.read(source(path, **keys)).data)


def training(**keys: Any) -> recipes.Training:
    return recipes.Training(**{"max_length": 64, **keys})


CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def encoder() -> encoding.Encoder:
    from conftest import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    return encoding.Encoder(tokenizer)


# --- kinds of files -----------------------------------------------------------------------


def made(kind: str) -> str:
    """A file or folder of ROWS."""
    table = datasets.Dataset.from_list(ROWS)
    if kind == "json":
        Path("rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind in ("csv", "tsv"):
        table.to_csv(f"rows.{kind}", sep="\t" if kind == "tsv" else ",")
    elif kind == "parquet":
        table.to_parquet("rows.parquet")
    elif kind == "arrow":
        table.save_to_disk("kept")
        next(Path("kept").glob("*.arrow")).rename("rows.arrow")
    elif kind == "zip":
        with zipfile.ZipFile("rows.jsonl.zip", "w") as file:
            file.write(written("rows.jsonl"), "inner.jsonl")
    elif kind != "jsonl":
        content = Path(written("rows.jsonl")).read_bytes()
        packers: dict[str, Callable[[bytes], Any]] = {
            "gz": gzip.compress,
            "bz2": bz2.compress,
            "xz": lzma.compress,
            "zst": lambda b: pyarrow.compress(b, "zstd", asbytes=True),
        }
        Path(f"rows.jsonl.{kind}").write_bytes(packers[kind](content))
        Path("rows.jsonl").unlink()
        return f"rows.jsonl.{kind}"
    else:
        written("rows.jsonl")
    return f"rows.jsonl.{kind}" if kind == "zip" else f"rows.{kind}"


KINDS = ["jsonl", "json", "csv", "tsv", "parquet", "arrow", "gz", "bz2", "xz", "zst", "zip"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_file_gives_the_same_rows(kind: str) -> None:
    path = made(kind)
    assert rows_of(path) == ROWS
    assert rows_of(path, split="test[2:4]", limit=1) == ROWS[2:3]


def test_a_limit_takes_rows_from_all_over_a_sorted_file(encoder: encoding.Encoder) -> None:
    path = written("sorted.jsonl")
    rows = sources_.read(source(path, limit=3))
    assert [row["prompt"] for row in rows.data] == ["say 0", "say 2", "say 4"]
    assert [rows.place(index) for index in range(3)] == [f"{path}:{n}" for n in (1, 3, 5)]
    assert rows_of(path, limit=3, streaming=True) == ROWS[:3], "a stream has no middle"
    (task,) = data.tasks([source(path, limit=3)], encoder, max_prompt=64)
    assert [case.row for case in task.cases] == [0, 2, 4]
    corpus = data.corpus([source(path, limit=3)], encoder, training())
    assert [corpus.number(index) for index in range(len(corpus))] == [0, 2, 4]


def test_text_is_rows_by_line_paragraph_or_document() -> None:
    Path("a.txt").write_text("one\ntwo\n\nthree\n", encoding="utf-8")
    assert [row["text"] for row in rows_of("a.txt")] == ["one", "two", "", "three"]
    assert len(rows_of("a.txt", sample_by="paragraph")) == 2
    assert len(rows_of("a.txt", sample_by="document")) == 1
    with pytest.raises(errors.DataError, match=r"sample_by is for \.txt, not \.jsonl"):
        rows_of(written("a.jsonl"), sample_by="line")


def test_a_field_of_a_json_file_holds_the_rows() -> None:
    Path("a.json").write_text(json.dumps({"version": 1, "data": ROWS}), encoding="utf-8")
    assert rows_of("a.json", field="data") == ROWS


def test_a_list_in_a_file_of_lines_is_read_and_told() -> None:
    Path("a.jsonl").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    rows = sources_.read(source("a.jsonl"))
    assert list(rows.data) == ROWS
    assert rows.notes == ("a.jsonl: a JSON list, read as one although its name says lines",)


def test_patterns_and_folders_give_their_files_in_order() -> None:
    written("in/b.jsonl", ROWS[3:])
    written("in/deep/a.jsonl", ROWS[:3])
    assert rows_of("in") == ROWS[3:] + ROWS[:3]
    assert rows_of("in/**/*.jsonl") == ROWS[3:] + ROWS[:3]
    assert rows_of("in", data_files="deep/*.jsonl") == ROWS[:3]
    assert rows_of("in", data_files={"test": ["b.jsonl"]}, split="test[:1]") == ROWS[3:4]


def test_a_folder_whose_names_tell_splits_apart_gives_the_split() -> None:
    written("in/train-0.jsonl", ROWS[:4])
    written("in/test.jsonl", ROWS[4:])
    assert rows_of("in") == ROWS[:4]
    assert rows_of("in", split="test") == ROWS[4:]
    assert sources_.read(recipes.Source(path="in")).notes == ()
    for name in ("extra", "more/old"):
        written(f"in/{name}.jsonl", ROWS)
    rows = sources_.read(recipes.Source(path="in"))
    assert len(rows.data) == 4
    said = "in: extra.jsonl, more/old.jsonl not read, as other files there name their split"
    assert rows.notes == (said,)


def test_what_was_saved_to_disk_is_read_with_slices_of_its_splits() -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk("one")
    assert rows_of("one", split="train[50%:]") == ROWS[3:]
    both = datasets.DatasetDict({"train": table, "test": table.select([5])})
    both.save_to_disk("both")
    assert rows_of("both", split="test") == ROWS[5:]
    assert rows_of("both", split="train[:1]+test") == [ROWS[0], ROWS[5]]
    with pytest.raises(errors.DataError, match=r"both: no split 'tset'\. Did you mean 'test'"):
        rows_of("both", split="tset")


def test_columns_are_renamed_but_never_over_another() -> None:
    path = written("a.jsonl")
    assert rows_of(path, rename={"prompt": "q"})[0] == {"q": "say 0", "completion": "it is 0"}
    with pytest.raises(errors.DataError, match="there is a column 'completion' already"):
        rows_of(path, rename={"prompt": "completion"})


def test_a_file_that_changes_is_read_anew_although_its_time_says_nothing() -> None:
    path = written("a.jsonl")
    state = Path(path).stat()
    assert rows_of(path) == ROWS
    changed = [{**row, "prompt": row["prompt"].upper()} for row in ROWS]
    written(path, changed)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert Path(path).stat().st_size == state.st_size
    assert rows_of(path) == changed


# --- formats ------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": TURNS}, "conversations (column messages)"),
        ({"messages": TURNS, "text": "a b"}, "conversations (column messages)"),
        ({"conversations": SHAREGPT}, "conversations (column conversations)"),
        ({"instruction": "a", "output": "b"}, "instructions"),
        ({"instruction": "a", "input": "", "output": "b"}, "instructions"),
        ({"prompt": "a", "completion": "b"}, "prompts and completions"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompts and completions"),
    ],
)
def test_a_format_is_found_from_the_columns(row: dict[str, Any], told: str) -> None:
    how = formats.reading(None, None, list(row), "x.jsonl", "tune")
    assert str(how.told).startswith(told)
    example = how.example(row)
    assert [(each.role, each.content) for each in example.messages] == [
        ("user", "a"),
        ("assistant", "b"),
    ]
    assert example.references == ("b",)


def test_an_input_stands_below_the_instruction() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert formats.alpaca(row).messages[0].content == "Add.\n\n1 2"


def test_text_beside_messages_is_for_pretraining_to_choose() -> None:
    with pytest.raises(errors.DataError, match=r"format: messages or format: text"):
        formats.reading(None, None, ["messages", "text"], "x", "pretrain")
    assert formats.reading(None, "text", ["messages", "text"], "x", "pretrain").is_text


def test_of_a_prompt_and_completion_the_completion_alone_is_learnt(
    encoder: encoding.Encoder,
) -> None:
    rows = [{"prompt": [*TURNS, TURNS[0]], "completion": [TURNS[1]]}]
    found = data.corpus([source(written("a.jsonl", rows))], encoder, training())
    ids, learnt = found.example(0)
    assert encoder.tokenizer.decode(ids[learnt]) == "b</s>"


def test_rows_without_a_template_are_scored_as_conversations(encoder: encoding.Encoder) -> None:
    (task,) = data.tasks([source(written("a.jsonl"))], encoder, max_prompt=64)
    assert (task.name, task.template.task, task.rows) == ("a", "chat", 6)
    assert task.cases[2].references == ("it is 2",)
    Path("b.txt").write_text("one\n", encoding="utf-8")
    assert data.tasks([source("b.txt")], encoder, max_prompt=64) == []


# --- what becomes of rows -----------------------------------------------------------------


def test_rows_are_counted_by_what_becomes_of_them(encoder: encoding.Encoder) -> None:
    long = {"prompt": "a", "completion": "the cat sees " * 40}
    cut = {"prompt": "the cat sees " * 40, "completion": "b"}
    path = written("a.jsonl", [*ROWS, ROWS[0], long, cut])
    found = data.corpus([source(path)], encoder, training())
    counts = found.counts
    assert (counts.read, counts.rows, counts.dropped, counts.too_long) == (9, 8, 1, 1)
    assert (counts.truncated, counts.duplicated, counts.empty) == (1, 1, 0)
    assert found.lengths.max() <= 64
    assert counts.supervised == int(np.asarray(found.supervised).sum())
    twice = data.corpus([source(path), source(path)], encoder, training())
    assert twice.counts.duplicated == 1 + 9
    with pytest.raises(errors.DataError, match=r"1 of 9 rows would be left out"):
        data.corpus([source(path)], encoder, training(), max_dropped=0.1)
    data.corpus([source(path)], encoder, training(), max_dropped=0.12)


def test_empty_lines_of_text_are_counted_and_left_out(encoder: encoding.Encoder) -> None:
    Path("a.txt").write_text("one\n\n\ntwo\n", encoding="utf-8")
    counts = data.corpus([source("a.txt")], encoder, training(), max_dropped=0).counts
    assert (counts.read, counts.rows, counts.empty, counts.duplicated) == (4, 2, 2, 0)


def test_a_mixture_is_seen_by_its_weights_and_gives_each_example_whole(
    encoder: encoding.Encoder,
) -> None:
    one, other = written("a.jsonl", ROWS[:4]), written("b.jsonl", ROWS[4:])
    both = data.corpus([source(one), source(other, weight=4)], encoder, training())
    assert isinstance(both.ids, joining.Joined)
    for part, first in ((one, 0), (other, 4)):
        alone = data.corpus([source(part)], encoder, training())
        for k in range(len(alone)):
            for mixed, single in zip(both.example(first + k), alone.example(k), strict=True):
                assert mixed.tolist() == single.tolist()
    shares = both.shares(seed=1)
    assert [share["rows"] for share in shares] == [4, 8]
    assert sum(share["tokens_share"] for share in shares) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("streaming", [False, True])
def test_several_processes_prepare_what_one_does(
    streaming: bool, encoder: encoding.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "BATCH", 7)
    path = written(
        "a.jsonl", [{"prompt": f"say {i}", "completion": "a" * (i + 1)} for i in range(99)]
    )
    made = []
    for n in (1, 3):
        monkeypatch.setenv("HF_DATASETS_CACHE", str(Path(f"cache{n}").absolute()))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", f"cache{n}")
        given = source(path, num_proc=n, streaming=streaming, weight=2)
        part = preparing.prepared(given, encoder, training(), visits=None, command="tune")
        assert part.known["too_long"] > 5
        files = sorted(each for each in part.folder.iterdir())
        made.append({each.name: each.read_bytes() for each in files})
    assert made[0] == made[1]
    assert len(made[0]) == 9, sorted(made[0])


def test_a_broken_row_is_named_whichever_process_meets_it(
    encoder: encoding.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "BATCH", 5)
    rows = [{"prompt": "a", "completion": "b" if i not in (23, 40) else ""} for i in range(50)]
    given = source(written("a.jsonl", rows), num_proc=3)
    with pytest.raises(errors.DataError, match=r"^a\.jsonl:24: column 'completion'"):
        data.corpus([given], encoder, training())
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("steps", [-1, 3])
def test_a_stream_is_read_as_far_as_the_run_needs(steps: int, encoder: encoding.Encoder) -> None:
    rows = [{"text": f"the cat sees {i}"} for i in range(2000)]
    streamed = source(written("a.jsonl", rows), streaming=True)
    asked = training(max_steps=steps, tokens_per_step=100)
    found = data.corpus([streamed], encoder, asked, command="pretrain")
    whole = data.corpus([source("a.jsonl")], encoder, asked, command="pretrain")
    assert len(found) == (2000 if steps < 0 else preparing.TEXTS)
    assert found.example(7)[0].tolist() == whole.example(7)[0].tolist()
    limited = source("a.jsonl", streaming=True, limit=10)
    assert len(data.corpus([limited], encoder, asked, command="pretrain")) == 10


def test_tokens_are_mapped_and_not_read(encoder: encoding.Encoder) -> None:
    found = data.corpus([source(written("a.jsonl"))], encoder, training())
    ids, learnt = found.example(1)
    for view, whole in ((ids, found.ids), (learnt, found.supervised)):
        assert isinstance(whole, np.memmap)
        assert np.shares_memory(view, whole)
    assert found.highest == int(np.asarray(found.ids).max())


def mapped() -> int:
    """Bytes of files that are mapped and in memory, as Linux counts them; 0 elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile"))


def test_rows_that_were_read_do_not_stay_in_memory() -> None:
    rows = [{"prompt": "a" * 1_000_000, "completion": str(i)} for i in range(30)]
    found = sources_.read(source(written("a.jsonl", rows)))
    assert list(found.data) == rows
    held = mapped()
    preparing.release(found.data)
    if sys.platform.startswith("linux"):
        assert mapped() < held - 15_000_000
    assert list(found.data) == rows


# --- contents in parts ---------------------------------------------------------------------------


def parted(*parts: object) -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": list(parts)},
            {"role": "assistant", "content": [{"type": "text", "text": "a ball"}]},
        ]
    }


def test_texts_in_parts_are_joined_as_a_chat_template_joins_them(
    encoder: encoding.Encoder,
) -> None:
    row = parted({"type": "text", "text": "the cat"}, {"type": "text", "text": " and?"})
    messages = formats.conversation(row).messages
    assert [each.content for each in messages] == ["the cat and?", "a ball"]
    path = written("parts.jsonl", [row])  # through Arrow, which fills in keys that a part lacks
    made = data.corpus([source(path)], encoder, training())
    assert made.example(0)[0].tolist() == encoder.conversation(messages).ids


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image", "url": "a.png"}, "parts.jsonl:1: turn 1, part 2: 'image', and text"),
        ({"type": "audio", "audio": "a"}, "parts.jsonl:1: turn 1, part 2: 'audio', and text"),
        ({"type": "text", "text": None}, "turn 1, part 2: expected a text"),
    ],
)
def test_a_part_that_is_no_text_is_told(
    encoder: encoding.Encoder, part: dict[str, object], said: str
) -> None:
    path = written("parts.jsonl", [parted({"type": "text", "text": "see"}, part)])
    with pytest.raises(errors.DataError, match=said):
        data.corpus([source(path)], encoder, training())


# --- the cache ----------------------------------------------------------------------------

SAY = "task: generation\nprompts: ['{{ prompt }}', 'Q: {{ prompt }}']\nresponse: '{{ completion }}'"


def name_of(
    encoder: encoding.Encoder, given: recipes.Source, visits: int | None = 1, **keys: Any
) -> str:
    rows = sources_.read(given)
    how = cases.reading(rows)
    wanted = visits if how.wordings > 1 else None
    return preparing.Job(rows, how, encoder, training(**keys), wanted).fingerprint()


def changed_tokenizer(**keys: Any) -> encoding.Encoder:
    from conftest import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = keys.get("chat_template", CHAT)
    if "token" in keys:
        tokenizer.add_tokens([keys["token"]])
    return encoding.Encoder(tokenizer)


CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "max_length": lambda: {"max_length": 63},
    "train_on": lambda: {"train_on": "last"},
    "allow_control_tokens": lambda: {"allow_control_tokens": ("<mask>",)},
    "seed": lambda: {"seed": 18},
    "rename": lambda: {"rename": {"completion": "answer"}},
    "limit": lambda: {"limit": 5},
    "split": lambda: {"split": "train[:5]"},
    "template": lambda: {"template": Path("say.yaml").write_text(SAY.replace("Q:", "Ask:"))},
    "data": lambda: {"data": written("a.jsonl", [*ROWS[:5], ROWS[0]])},
    "tokenizer": lambda: {"encoder": {"token": "zebra"}},
    "chat template": lambda: {"encoder": {"chat_template": CHAT.replace(": ", ":")}},
}


OWN = ("rename", "limit", "split", "allow_control_tokens")


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_misses_the_cache(change: str) -> None:
    Path("say.yaml").write_text(SAY)
    written("a.jsonl")
    given = source("a.jsonl", template="./say.yaml")
    before = name_of(changed_tokenizer(), given)
    assert name_of(changed_tokenizer(), given) == before
    keys = CHANGES[change]()
    encoder = changed_tokenizer(**keys.pop("encoder", {}))
    own = {key: keys.pop(key) for key in OWN if key in keys}
    keys = {key: keys[key] for key in keys if key not in ("template", "data")}
    assert name_of(encoder, given.model_copy(update=own), **keys) != before


def test_what_decides_nothing_misses_nothing(encoder: encoding.Encoder) -> None:
    path = written("a.jsonl")
    before = name_of(encoder, source(path))
    assert name_of(encoder, source(path, weight=3), seed=5, learning_rate=0.1) == before
    assert name_of(encoder, source(written("b.jsonl"))) == before
    Path("c.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    text = source("c.txt")
    other = source("c.txt", sample_by="paragraph")
    assert name_of(encoder, text) != name_of(encoder, other)


def test_the_version_is_part_of_the_name(
    encoder: encoding.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = source(written("a.jsonl"))
    before = name_of(encoder, given)
    preparing._code.cache_clear()
    monkeypatch.setattr("itune.__version__", "99")
    assert name_of(encoder, given) != before
    preparing._code.cache_clear()


def test_a_second_time_renders_nothing(
    encoder: encoding.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = source(written("a.jsonl"))
    first = data.corpus([given], encoder, training(max_length=61))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("rendered again")

    monkeypatch.setattr(encoding.Encoder, "conversations", refuse)
    monkeypatch.setattr(formats.Reading, "example", refuse)
    again = data.corpus([given], encoder, training(max_length=61))
    assert np.asarray(again.ids).tolist() == np.asarray(first.ids).tolist()
    with pytest.raises(AssertionError, match="rendered again"):
        data.corpus([given], encoder, training(max_length=60))


def test_what_was_half_written_is_made_anew() -> None:
    def torn(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.entry("test", "torn", torn)
    left = cache.root() / "test" / "torn"  # as a kill in an older version might leave it
    left.mkdir(parents=True)
    (left / "a").write_text("half")

    def whole(folder: Path) -> int:
        assert not list(folder.iterdir())
        return 7

    folder, said = cache.entry("test", "torn", whole)
    assert (folder, said) == (left, 7)
    assert [path.name for path in folder.iterdir()] == [cache.DONE]


TWO = """
import os, sys, time
from pathlib import Path
from itune import cache

def make(folder):
    with Path("made").open("a") as file:
        file.write("x")
    (folder / "a").write_text(str(os.getpid()))
    Path(f"began-{sys.argv[1]}").touch()
    while not all(Path(f"here-{k}").exists() for k in "01"):
        time.sleep(0.01)
    return os.getpid()

Path(f"here-{sys.argv[1]}").touch()
folder, said = cache.entry("test", "two", make)
assert (folder / "a").read_text() == str(said)
"""


def test_two_processes_do_the_work_once() -> None:
    both = [subprocess.Popen([sys.executable, "-c", TWO, str(k)]) for k in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert Path("made").read_text() == "x"


def test_what_nobody_used_for_a_month_is_removed_when_something_is_made() -> None:
    def put(name: str, days: float) -> Path:
        folder = cache.root() / "test" / name
        folder.mkdir(parents=True)
        (folder / cache.DONE).write_text("1")
        when = time.time() - days * 24 * 3600
        os.utime(folder, (when, when))
        return folder

    young, old, used, foreign = put("young", 29), put("old", 31), put("used", 31), put("other", 31)
    cache.entry("test", "used", lambda folder: pytest.fail("it was there"))
    mark = foreign.with_name(".other.used")
    with mark.open("a") as other:  # another process at work since long ago
        fcntl.flock(other, fcntl.LOCK_SH)
        os.utime(mark, (0, 0))
        cache.entry("test", "new", lambda folder: 2)
        assert not old.exists()
        assert all(each.is_dir() for each in (young, used, foreign))
    os.utime(used.with_name(".used.used"), (0, 0))  # this process still uses it
    cache.entry("test", "newer", lambda folder: 3)
    assert not foreign.exists()
    assert all(each.is_dir() for each in (young, used, cache.root() / "test" / "new"))
    assert cache.entry("test", "old", lambda folder: 4)[1] == 4


def test_a_disk_that_locks_for_reading_what_may_be_read_alone_keeps_a_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As NFS does: flock becomes a lock of bytes there, which asks how the file was opened."""
    real = fcntl.flock

    def asking(file: Any, how: int) -> None:
        if how & fcntl.LOCK_SH and not file.readable():
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", asking)
    assert cache.entry("test", "on-nfs", lambda folder: 1)[1] == 1
    assert cache._mark(cache.root() / "test" / "on-nfs") in cache._marks


def test_what_is_mapped_while_rows_are_read_is_marked_as_used(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "marked as used"}\n')
    before = set((cache.root() / "rows").glob(".*.used"))
    rows_of(str(path))
    (mark,) = set((cache.root() / "rows").glob(".*.used")) - before
    os.utime(mark, (0, 0))
    rows_of(str(path))
    assert time.time() - mark.stat().st_mtime < cache.UNUSED


# --- several processes --------------------------------------------------------------------

RANK = """
import os, sys, time
from pathlib import Path
from itune import errors, launching
wanted = sys.argv[1]
try:
    with launching.first_prepares(Path()):
        if os.environ["LOCAL_RANK"] == "0":
            time.sleep(0.3)
            if wanted == "fail":
                raise errors.DataError("broken")
            if wanted == "die":
                os._exit(9)
            Path("prepared").touch()
        else:
            assert Path("prepared").exists()
except errors.ItuneError as error:
    if os.environ["LOCAL_RANK"] == "0":
        time.sleep(1)  # a slow one, which has yet to tell why
        Path("told").touch()
    print(error, "after it told why" if Path("told").exists() else "before it told why")
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("wanted", "code", "says"),
    [("work", 0, ""), ("fail", 3, "it says why. after it told why"), ("die", 3, "process died")],
)
def test_the_others_wait_for_the_first_and_notice_its_end(
    wanted: str, code: int, says: str
) -> None:
    def start(rank: int) -> subprocess.Popen[str]:
        env = {**os.environ, "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "RANK": str(rank)}
        line = [sys.executable, "-c", RANK, wanted]
        return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, text=True)

    second, first = start(1), start(0)
    said, _ = second.communicate(timeout=60)
    first.communicate(timeout=60)
    assert second.returncode == code
    assert says in said


def test_an_earlier_start_is_not_taken_for_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = Path("mark")
    launching._write(mark, "another", "done")
    with pytest.raises(errors.EnvironmentRefusal, match="never began"):
        launching._wait(mark, "this", seconds=0)


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_a_csv_file_may_have_any_usual_separator(sign: str, tmp_path: Path) -> None:
    text = f"Frage{sign}Antwort\nWas ist grün?{sign}Das Gras\n"
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    rows = sources_.read(recipes.Source(path="a.csv"))
    assert rows.data.to_list() == [{"Frage": "Was ist grün?", "Antwort": "Das Gras"}]
    assert bool(rows.notes) == (sign != ",")


# pandas' reader is left open by `datasets`, as below.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("name, first;age\nAnn, B;3\nBob;4\n", {"name, first": "Bob", "age": "4"}),
        ("name, first;age\nAnn, B;3\nBob;4", {"name, first": "Bob", "age": "4"}),
        ("id;text, long;x\n1;a, b;2\n1;a, b;3\n", {"id": "1", "text, long": "a, b", "x": "3"}),
        ("text;x,label\na,1\nb;b,0\n", {"text;x": "b;b", "label": "0"}),
        ('a,b;c\n"1;2",3\n4,5;6\n', {"a": "4", "b;c": "5;6"}),
    ],
)
def test_cells_are_separated_by_what_cuts_each_row_alike(text: str, row: dict[str, str]) -> None:
    assert rows_of(text_file("a.csv", text))[-1] == row
    assert rows_of(text_file("b.csv", text), streaming=True)[-1].keys() == row.keys()
    gc.collect()


# --- tables -------------------------------------------------------------------------------


def text_file(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(text.encode())
    return name


def test_a_cell_stands_for_its_text() -> None:
    head = "zip,price,power,word,label,share,gap\n"
    path = text_file("a.csv", f"{head}007,1.50,1e3,NA,1,0.5,1\n012,2.00,2e3,None,0,1.0,\n")
    rows = sources_.read(recipes.Source(path=path, template="sentiment"))
    first, second = rows.data.to_list()
    assert first == {
        "zip": "007", "price": "1.50", "power": "1e3", "word": "NA",
        "label": 1, "share": 0.5, "gap": "1",
    }  # fmt: skip
    assert second["word"] == "None"
    assert second["gap"] is None
    # What a format makes of columns is text, so no column of it is a number.
    path = text_file("b.csv", "prompt,completion\n1 + 1,2\n2 + 2,4\n")
    rows = sources_.read(recipes.Source(path=path))
    assert [row["completion"] for row in rows.data] == ["2", "4"]


def test_true_and_false_of_a_table_are_texts() -> None:
    path = text_file("a.csv", "text,label,flag,kind\nup,true,True,TRUE\ndown,false,False,other\n")
    rows = sources_.read(recipes.Source(path=path, template="sentiment"))
    assert rows.data[1] == {"text": "down", "label": "false", "flag": False, "kind": "other"}
    assert rows.notes == (
        "a.csv: true and false in 'label' are texts: a template asks {% if label == 'true' %}",
    )


# --- JSON ---------------------------------------------------------------------------------

DATED = [
    {"day": "2024-01-11", "at": {"from": "2024-01-11T10:00:00Z"}, "made": 1700000000, "n": None},
    {"day": "2024-01-12", "at": {"from": "2024-01-12"}, "made": 1700000001, "n": "x"},
]


@pytest.mark.parametrize("shape", ["lines", "list", "field", "second"])
def test_texts_of_json_that_look_like_dates_stay_texts(shape: str) -> None:
    field = None
    if shape == "lines":
        path = text_file("a.jsonl", "".join(f"{json.dumps(row)}\n" for row in DATED))
    elif shape == "second":  # texts first, and dates alone where datasets reads on after 10 MiB
        other = json.dumps({"day": "some day", "at": {"from": "x" * 1000}, "made": 1, "n": "x"})
        lines = [other] * 11_000 + [json.dumps(DATED[0])] * 11_000
        path = text_file("a.jsonl", "".join(f"{line}\n" for line in lines))
    else:
        field = "rows" if shape == "field" else None
        path = text_file("a.json", json.dumps({"rows": DATED} if field else DATED, indent=1))
    rows = sources_.read(recipes.Source(path=path, field=field, template="sentiment"))
    assert rows.data.to_list()[-2:] == ([DATED[0]] * 2 if shape == "second" else DATED)
    part = recipes.Source(path=path, field=field, template="sentiment", split="train[1:2]")
    assert sources_.read(part).data.to_list() == rows.data.to_list()[1:2]


def test_a_stream_of_dates_is_refused() -> None:
    path = text_file("a.jsonl", "".join(f"{json.dumps(row)}\n" for row in DATED))
    with pytest.raises(errors.DataError, match="'day' holds texts that look like dates"):
        sources_.read(recipes.Source(path=path, streaming=True, template="sentiment"))


def test_dated_rows_with_a_late_column_are_refused() -> None:
    rows = [DATED[0]] * 10_000 + [{**DATED[0], "late": 1}]
    path = text_file("a.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(errors.DataError, match=r"a\.jsonl row 10001: column 'late' is in none"):
        sources_.read(recipes.Source(path=path, template="sentiment"))


def test_whole_numbers_among_fractions_are_told() -> None:
    path = text_file("a.jsonl", '{"n": 3, "m": 1}\n{"n": 2.5, "m": 2}\n')
    rows = sources_.read(recipes.Source(path=path, template="sentiment"))
    (note,) = rows.notes
    assert note.startswith("a.jsonl: whole numbers and others in 'n': 3 is read as 3.0")
    assert rows.place(1) == "a.jsonl:2"


# --- quotes -------------------------------------------------------------------------------


def test_quotes_of_a_tsv_that_enclose_no_cells_are_text() -> None:
    path = text_file("a.tsv", 'text\tlabel\n"Hello he said\t1\nplain\t0\nand "more" here"\t1\n')
    rows = sources_.read(recipes.Source(path=path))
    texts = ['"Hello he said', "plain", 'and "more" here"']
    assert [row["text"] for row in rows.data] == texts
    assert rows.notes == ("a.tsv: its quotes are read as text, as they do not enclose cells",)
    path = text_file("b.tsv", 'text\tlabel\n"a\tb"\t1\n"say ""hi"""\t0\n')
    rows = sources_.read(recipes.Source(path=path))
    assert [row["text"] for row in rows.data] == ["a\tb", 'say "hi"']
    assert rows.notes == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n3,4,5\n", r"a\.csv:3: 3 cells, expected 2 .*\(a, b\)"),
        ("a,b\n1,2\n3\n", r"a\.csv:3: 1 cell, expected 2"),
        ("a,b\n1,2,\n", r"a\.csv:2: 3 cells"),
        ('a,b\n1,2\n"3,4\n5,6\n', r"a\.csv:3: a quote opens in this row and none closes it"),
        ('a,b\n"he said "hi" there",2\n', r"a\.csv:2: text after the quote"),
        ('a,b\n"x,2\ny",3\n"p "q",2\n', r"a\.csv:4: text after the quote"),
        ('a,b\n1,"x\ny "z" w"\n', r"a\.csv:3: text .*, in the row that begins in line 2\."),
        ("a,b\n1,2\n,\n3,4\n, \n", r"a\.csv:3: a row of empty cells alone.*; 2 such rows\."),
        ("a,a\n1,2\n", r"a\.csv:1: two columns are called 'a'\. Rename one\.$"),
        ("1,1\n1,2\n", r"two columns .*The first line is taken for the names of the columns"),
        ("a,b\n", r"a\.csv: 0 rows, only the names of columns"),
    ],
)
def test_a_broken_row_of_a_table_is_named(text: str, said: str) -> None:
    with pytest.raises(errors.DataError, match=said):
        rows_of(text_file("a.csv", text))


def test_a_folder_of_texts_says_that_each_line_is_a_row() -> None:
    text_file("t/a.txt", "one\ntwo\n")
    text_file("t/b.txt", "three\n")
    [note] = sources_.read(recipes.Source(path="t")).notes
    assert note == "t: 2 files, each line of them a row; sample_by: document makes one of each file"
    assert sources_.read(recipes.Source(path="t", sample_by="document")).notes == ()


def test_a_row_of_a_table_is_at_the_line_that_it_begins_in() -> None:
    text_file("t/a.csv", 'prompt;completion\n\n"one\ntwo";x\nthree;y\n')
    text_file("t/b.csv", "prompt;completion\nfour;z\n")
    rows = sources_.read(recipes.Source(path="t"))
    places = [rows.place(index) for index in range(3)]
    assert places == ["t/a.csv:3", "t/a.csv:5", "t/b.csv:2"]


def test_files_of_a_table_are_one_table() -> None:
    text_file("t/a.csv", "a,b\n1,x\n")
    text_file("t/b.csv", "a,b\nw,y\n")
    rows = sources_.read(recipes.Source(path="t", template="sentiment"))
    assert rows.data.to_list() == [{"a": "1", "b": "x"}, {"a": "w", "b": "y"}]
    text_file("t/c.csv", "a,c\nw,y\n")
    with pytest.raises(errors.DataError, match=r"t/c\.csv: its columns \(a, c\) are not those of"):
        rows_of("t")


# pandas' reader is left open by `datasets`, and found by whichever test comes next.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stream_of_a_table_has_its_separator() -> None:
    path = text_file("a.csv", "prompt;completion\nWas, bitte?;Nichts\n")
    rows = sources_.read(recipes.Source(path=path, streaming=True))
    assert list(rows.each()) == [{"prompt": "Was, bitte?", "completion": "Nichts"}]
    gc.collect()


# --- names and folders that mislead ---------------------------------------------------------


def test_a_file_whose_name_looks_like_a_pattern_is_that_file() -> None:
    Path(written("rows.jsonl")).rename("rows[1].jsonl")
    assert rows_of("rows[1].jsonl") == ROWS
    assert rows_of("rows[1].jsonl", streaming=True) == ROWS


def test_other_names_of_lines_and_a_mac_s_archive_are_read() -> None:
    Path(written("rows.jsonl")).rename("rows.ndjson")
    assert rows_of("rows.ndjson") == ROWS
    with zipfile.ZipFile("rows.jsonl.zip", "w") as file:
        file.write("rows.ndjson", "rows.jsonl")
        file.writestr("__MACOSX/._rows.jsonl", b"\0")
    assert rows_of("rows.jsonl.zip") == ROWS


def test_what_a_path_leads_to_is_told() -> None:
    Path("gone.jsonl").symlink_to("nowhere.jsonl")
    Path("cut.parquet").write_bytes(b"PAR1 and no more")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    text_file("pointer.parquet", pointer)
    text_file("rows.zip", "PK")
    text_file("pretty.jsonl", json.dumps(ROWS[0], indent=1))
    text_file("two/a.jsonl", '{"prompt": "a", "completion": "b"}\n')
    text_file("two/b.jsonl", '{"question": "a"}\n')
    text_file("odd.jsonl", '{"prompt": "a"}\n{"prompt": 5}\n')
    datasets.Dataset.from_list(ROWS).save_to_disk("saved")
    next(Path("saved").glob("*.arrow")).unlink()
    for path, said in {
        "gone.jsonl": "leads to nowhere.jsonl, which is not there",
        "cut.parquet": r"cut\.parquet: is no whole \.parquet file",
        "pointer.parquet": "git lfs pull",
        "pretty.jsonl": "goes on in the next line",
        "two": "do not have the same columns",
        "odd.jsonl": r"odd\.jsonl:2: .*expected a text, as most rows have, found a number \(5\)",
        "saved": "not a whole one",
        "one/two/three": "no such file or folder",
        "https://example.com/rows.jsonl": "Fetch it first",
        "json": "the name of a kind of file",
        "rows.zip": "does not say what is packed in it",
    }.items():
        with pytest.raises(errors.DataError, match=said):
            rows_of(path)
    renamed = {"prompt": "x", "completion": "x"}
    with pytest.raises(errors.DataError, match="two columns would be called the same"):
        rows_of(written("rows.jsonl"), rename=renamed)


def test_rows_alike_are_counted_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("slow.yaml").write_text(
        "task: generation\nprompts: ['{{ prompt }}{{ missing }}']\nresponse: '{{ completion }}'\n"
    )
    rows = sources_.read(source(written("rows.jsonl"), template="./slow.yaml"))
    how = cases.reading(rows)
    with pytest.raises(errors.DataError, match=r" 6 such rows of 6: also 2, 3, 4, 5, \.\.\.\.$"):
        cases.placed(rows, how, 0, rows.data[0], 0)
    monkeypatch.setattr(cases, "SECONDS", -1.0)
    with pytest.raises(errors.DataError, match=r" 1 such row of 1 looked at\.$"):
        cases.placed(rows, how, 0, rows.data[0], 0)


def test_a_stream_that_breaks_is_told_in_one_line() -> None:
    text_file("broken.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comp')
    with pytest.raises(errors.DataError, match=r"broken\.jsonl: cannot be read: JSON parse error"):
        sources_.read(source("broken.jsonl", streaming=True))
    text_file("good.jsonl", '{"prompt": "a", "completion": "b"}\n' * 3)
    rows = sources_.read(source("good.jsonl", streaming=True))
    stop = dataclasses.replace(rows, data=_two_then_broken())
    with pytest.raises(errors.DataError, match=r"good\.jsonl: cannot be read on after row 2: torn"):
        list(stop.each())


def _two_then_broken() -> Any:
    yield from ({"prompt": "a"}, {"prompt": "b"})
    raise ValueError("torn")


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("a|b|c\ngood, so|1|x\nbad|0|y\n", ["a", "b", "c"]),
        ("name, first;age\nAda;3\nBo;4\n", ["name, first", "age"]),
        ('a;b\n"x;y";"1,5"\n2,5;z\n', ["a", "b"]),
        ('a,b\n"x;y","w;z"\nv,u\n', ["a", "b"]),
        ("text\nno sign here\n", ["text"]),
    ],
    ids=["bars", "comma in a name", "semicolons", "commas", "one column"],
)
def test_what_separates_columns_is_what_rows_agree_upon(text: str, columns: list[str]) -> None:
    path = text_file("a.csv", text)
    source = recipes.Source(path=path, template="sentiment")
    assert sources_.read(source).columns == columns
