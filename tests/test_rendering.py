"""What holds for every row, whatever the tokenizer and its template: prompt, ids, mask, safety."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shapes
import transformers
from conftest import sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from itune import chats, encoding, errors, formats, tokenizing

REWRITING = {"qwen3", "thinker"}  # those that show earlier answers otherwise than they were given
STOPLESS = {"words"}
LOSSLESS = {"byte-bpe", "tiktoken", "characters"}
every_kind = pytest.mark.parametrize("kind", shapes.KINDS)
every_shape = pytest.mark.parametrize("shape", shapes.SHAPES)


@functools.cache
def encoder(kind: str, shape: str) -> encoding.Encoder:
    return encoding.Encoder(shapes.tokenizer(kind, shape))


def talk(*texts: str, system: str | None = None) -> list[formats.Message]:
    head = [formats.Message("system", system)] if system is not None else []
    roles = ("user", "assistant")
    return head + [formats.Message(roles[i % 2], text) for i, text in enumerate(texts)]


def reference(one: encoding.Encoder, messages: list[formats.Message], *, prompt: bool) -> list[int]:
    """The ids that transformers gives for a conversation or its generation prompt."""
    ids = one.tokenizer.apply_chat_template(
        as_given(one, messages), add_generation_prompt=prompt, tokenize=True, return_dict=False
    )
    return list(ids)


def as_given(one: encoding.Encoder, messages: list[formats.Message]) -> list[dict[str, Any]]:
    """The messages in the form that the model's template reads."""
    if one.tokenizer.chat_template != shapes.PARTS:
        return [{"role": m.role, "content": m.content} for m in messages]
    return [{"role": m.role, "content": [{"type": "text", "text": m.content}]} for m in messages]


TALKS = {
    "one": talk("Is it the cat?", "No, a red ball."),
    "spaces": talk("  two  words \n", "an answer"),
    "numbers": talk("12345 + 67 =", "12412"),
    "lines": talk("First.\n\nSecond:\n", "1. one\n2. two"),
    "three": talk("the cat?", "a ball", "and now?", "a dog at home", "today?", "no"),
    "system": talk("the cat?", "a ball", "and now?", "a dog", system="Be kind."),
    "empty": talk("the cat?", "", "and now?", "a dog"),
}


def answers(messages: list[formats.Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message.role == "assistant"]


@every_shape
@every_kind
def test_prompt_ids_and_mask_of_every_turn(kind: str, shape: str) -> None:
    one = encoder(kind, shape)
    for name, messages in TALKS.items():
        if shape == "gemma" and name == "system":
            with pytest.raises(errors.DataError, match=r"System role.*user's turn"):
                one.conversation(messages)
        else:
            every_turn(one, messages, shape)


def every_turn(one: encoding.Encoder, messages: list[formats.Message], shape: str) -> None:
    last = one.conversation(messages, train_on="last")
    assert one.prompt(messages[:-1]) == reference(one, messages[:-1], prompt=True)
    whole(one, messages, last, answers(messages)[-1:], shape)
    several = len(answers(messages)) > 1
    if several and shape in REWRITING | STOPLESS:
        with pytest.raises(errors.DataError, match="train_on: last"):
            one.conversation(messages)
    else:
        tokens = one.conversation(messages, train_on="assistant")
        whole(one, messages, tokens, answers(messages), shape)


def whole(
    one: encoding.Encoder,
    messages: list[formats.Message],
    tokens: encoding.Tokens,
    learnt: list[int],
    shape: str,
) -> None:
    """Hold the three properties against what transformers gives."""
    assert not tokens.guarded
    mask = [False] * len(tokens.ids)
    for i in learnt:
        prompt = reference(one, messages[:i], prompt=True)
        assert tokens.ids[: len(prompt)] == prompt
        end = tokens.ids.index(one.stop_id, len(prompt))
        mask[len(prompt) : end + 1] = [True] * (end + 1 - len(prompt))
    assert tokens.supervised == mask
    assert tokens.ids[-1] == one.stop_id
    # A prompt may hold more than the conversation shows, and an end may be ours alone.
    if shape not in {"thinker", *STOPLESS} and not straddled(one, messages, learnt):
        assert tokens.ids == reference(one, messages, prompt=False)[: len(tokens.ids)]


def straddled(one: encoding.Encoder, messages: list[formats.Message], learnt: list[int]) -> bool:
    """Whether a token of the whole text reaches over the start of an answer."""
    text = one.tokenizer.apply_chat_template(as_given(one, messages), tokenize=False)
    encoded = one.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = {
        len(
            one.tokenizer.apply_chat_template(
                as_given(one, messages[:i]), add_generation_prompt=True, tokenize=False
            )
        )
        for i in learnt
    }
    return any(a < start < b for a, b in encoded["offset_mapping"] for start in starts)


@every_shape
def test_a_text_begins_once_and_each_answer_ends(shape: str) -> None:
    for kind in shapes.KINDS:
        one = encoder(kind, shape)
        ids = one.conversation(TALKS["three"], train_on="last").ids
        begin = one.tokenizer.bos_token_id
        assert begin is None or ids.count(begin) <= 1
        assert begin is None or begin not in ids[1:]
        assert one.stop_id in one.control


def test_a_token_that_would_straddle_the_start_of_an_answer_is_cut_there() -> None:
    one = encoder("byte-bpe", "words")
    messages = talk("the cat?", "an answer")
    tokens = one.conversation(messages)
    prompt = reference(one, messages[:1], prompt=True)
    assert tokens.ids[: len(prompt)] == prompt
    assert straddled(one, messages, [1])
    assert reference(one, messages, prompt=False)[: len(prompt)] != prompt
    learnt = [id_ for id_, flag in zip(tokens.ids, tokens.supervised, strict=True) if flag]
    assert one.tokenizer.decode(learnt) == "an answer</s>"


@pytest.mark.parametrize("kind", sorted(LOSSLESS))
@every_shape
def test_what_is_learnt_is_the_answer_and_its_stop_token(kind: str, shape: str) -> None:
    one = encoder(kind, shape)
    tokens = one.conversation(TALKS["lines"])
    learnt = [id_ for id_, flag in zip(tokens.ids, tokens.supervised, strict=True) if flag]
    thought = "<think>\n\n</think>\n\n" if shape == "qwen3" else ""
    space = " " if shape == "mistral" else ""
    stop = one.tokenizer.decode([one.stop_id])
    assert one.tokenizer.decode(learnt) == f"{space}{thought}1. one\n2. two{stop}"


@every_shape
def test_rendering_is_that_of_transformers(shape: str) -> None:
    one = encoder("byte-bpe", shape)
    for name, messages in TALKS.items():
        if shape == "gemma" and name == "system":
            continue
        for prompt in (False, True):
            for end in range(1, len(messages) + 1):
                expected = one.tokenizer.apply_chat_template(
                    as_given(one, messages[:end]), add_generation_prompt=prompt, tokenize=False
                )
                assert one.chat.render(messages[:end], prompt=prompt) == expected


@every_shape
def test_a_saved_tokenizer_renders_the_same_elsewhere(shape: str, tmp_path: Path) -> None:
    one = encoder("byte-bpe", shape)
    one.tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template is not None
    messages = TALKS["one"]
    given_ = as_given(one, messages[:1])
    ids = again.apply_chat_template(
        given_, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert one.prompt(messages[:1]) == list(ids)
    assert encoding.Encoder(again).conversation(messages) == one.conversation(messages)


# --- turns that templates refuse or lose --------------------------------------------------------


def test_turns_of_one_role_in_a_row_are_refused_with_the_cure() -> None:
    messages = [formats.Message("user", "a"), *TALKS["one"]]
    with pytest.raises(errors.DataError, match=r"must alternate.*Join the turns of one role"):
        encoder("byte-bpe", "gemma").conversation(messages)


def test_a_tool_s_turn_is_context() -> None:
    messages = [*talk("the cat?", "call", "x"), formats.Message("tool", "42"), *talk("", "ok")[1:]]
    del messages[2]
    one = encoder("byte-bpe", "qwen")
    tokens = one.conversation(messages)
    learnt = [id_ for id_, flag in zip(tokens.ids, tokens.supervised, strict=True) if flag]
    assert one.tokenizer.decode(learnt) == "call<|im_end|>ok<|im_end|>"
    assert tokens.ids == reference(one, messages, prompt=False)[: len(tokens.ids)]


def test_a_message_that_the_template_leaves_out_is_told() -> None:
    tokenizer = shapes.tokenizer("byte-bpe", "chatml")
    tokenizer.chat_template = shapes.CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
    with pytest.raises(errors.DataError, match=r"turn 1: .* leaves out what the system says"):
        encoding.Encoder(tokenizer).conversation(TALKS["system"])


def test_an_assistant_that_speaks_first_answers_nothing() -> None:
    one = encoder("byte-bpe", "chatml")
    messages = [formats.Message("assistant", "Welcome."), *TALKS["one"]]
    tokens = one.conversation(messages)
    assert not any(tokens.supervised[: tokens.ids.index(one.stop_id) + 1])
    with pytest.raises(errors.DataError, match="nothing to learn"):
        one.conversation(messages[:1])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.contnet }}{% endfor %}", "has no attribute 'contnet'"),
        ("{% for m in messages %}{{ m.content + tail }}{% endfor %}", "'tail' is undefined"),
        ("{% for m in messages %}{{ m.content }}", "chat template, line 1: "),
        ("{{ messages[0].content.__class__ }}", "is unsafe"),
        ("{% include 'a' %}", "no loader"),
    ],
)
def test_a_broken_chat_template_is_told(template: str, said: str) -> None:
    tokenizer = shapes.tokenizer("byte-bpe", "chatml")
    tokenizer.chat_template = template
    with pytest.raises(errors.TemplateError, match=said) as caught:
        encoding.Encoder(tokenizer)
    assert str(caught.value).startswith("the model's chat template")
    assert "\n" not in str(caught.value)


# --- text from data never becomes control -------------------------------------------------------

UNRULED = {"qwen3", "thinker"}  # templates that take texts apart at control strings
GUARDED = sorted(set(shapes.SHAPES) - {"plain-bos", "markers"})


def forgeries(shape: str) -> st.SearchStrategy[str]:
    """Texts of ordinary words and of control strings: whole, cut, one within the other."""
    _, bos, eos, special, added = shapes.SHAPES[shape]
    control = [token for token in (bos, eos, *special, *added) if token]
    cuts = [part for token in control for part in (token[:3], token[3:])]
    nested = [token[:3] + token + token[3:] for token in control]
    words = ["the cat", " ", "\n", "a", "<", ">", "user\n", "</think>", "<unk>", "[UNK]", "7"]
    parts = st.sampled_from([*control, *cuts, *nested, *words])
    return st.lists(parts, min_size=1, max_size=6).map("".join).filter(lambda text: text.strip())


def controls(one: encoding.Encoder, ids: list[int]) -> list[int]:
    return [id_ for id_ in ids if id_ in one.tokenizer.added_tokens_decoder and id_ in one.control]


@every_kind
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_text_never_becomes_a_control_token(kind: str, data: st.DataObject) -> None:
    stays_text(kind, data)


@pytest.mark.slow
@every_kind
@settings(max_examples=625, deadline=None)
@given(data=st.data())
def test_twenty_thousand_texts_never_become_a_control_token(kind: str, data: st.DataObject) -> None:
    """Four texts a conversation, 625 conversations a kind, nine kinds."""
    stays_text(kind, data)


def stays_text(kind: str, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(GUARDED))
    one = encoder(kind, shape)
    texts = data.draw(st.tuples(*[forgeries(shape)] * 4))
    messages = talk(*texts)
    tokens = one.conversation(messages, train_on="last")
    prompt = one.prompt(messages[:3])
    neutral = one.conversation(talk("a", "b", "c", "d"), train_on="last")
    assert controls(one, tokens.ids) == controls(one, neutral.ids)
    assert tokens.ids[: len(prompt)] == prompt
    assert tokens.supervised == [k >= len(prompt) for k in range(len(tokens.ids))]
    if kind in LOSSLESS and shape not in UNRULED | STOPLESS:
        text = one.tokenizer.apply_chat_template(as_given(one, messages), tokenize=False)
        assert text.startswith(one.tokenizer.decode(tokens.ids))
    if shape not in REWRITING | STOPLESS:
        every = one.conversation(messages)
        assert controls(one, every.ids) == controls(one, neutral.ids)
        assert sum(every.supervised) > sum(tokens.supervised)


@every_kind
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_document_holds_no_control_token_but_its_end(kind: str, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(GUARDED))
    one = encoder(kind, shape)
    text = data.draw(forgeries(shape))
    (tokens,) = one.documents([text])
    assert controls(one, tokens.ids) == [one.eos_id]
    assert tokens.ids == [*one.text_ids(text), one.eos_id] == one.document(text)
    if kind in LOSSLESS:
        assert one.tokenizer.decode(tokens.ids[:-1]) == text


# Of these the vocabulary has tokens that reach from one word into the next.
REACHING = {"phrases", "sp-first", "sp-normalizer"}


@every_kind
def test_a_long_text_in_stretches_has_the_ids_of_the_whole(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = encoder(kind, "chatml")
    lines = sentences(60)
    lines[20] = "so it ends <|im_end|> and begins\xa0 again  <unk> [UNK] \n\n x"
    lines[40] = "Größe über alles 12,345 words of naïve Ωμέγα 日本語 more"
    text = " ".join(lines)
    whole = one.texts.texts([text, "a cat"])
    monkeypatch.setattr(tokenizing, "LONG", 300)
    stretches = list(one.texts._stretches(text))
    assert "".join(stretches) == text
    assert (len(stretches) > 5) == (kind not in REACHING)
    assert one.texts.texts([text, "a cat"]) == whole
    assert [held for _, held in whole] == [True, False]


def test_documents_together_have_the_tokens_of_each_alone() -> None:
    one = encoder("byte-bpe", "chatml")
    texts = ["the cat sat", "a <|im_end|> b", "", " ".join(sentences(5))]
    assert one.pieces(texts, 7) == [one.pieces([text], 7)[0] for text in texts]
    for text, pieces in zip(texts, one.pieces(texts, 7), strict=True):
        assert [id_ for piece in pieces for id_ in piece.ids] == one.document(text)
        assert all(len(piece.ids) <= 7 and all(piece.supervised) for piece in pieces)


def test_a_guarded_row_says_so() -> None:
    one = encoder("byte-bpe", "chatml")
    assert not one.conversation(talk("the cat", "a < b | c")).guarded
    for messages in (talk("a <|im_end|> b", "c"), talk("a", "<|im_start|>")):
        assert one.conversation(messages).guarded
    assert [tokens.guarded for tokens in one.documents(["a", "<|im_end|>"])] == [False, True]


def test_an_answer_with_control_strings_leaves_its_prompt_as_it_is_served() -> None:
    one = encoder("byte-bpe", "chatml")
    messages = talk("the cat?\n\n", "no <|im_end|>")
    prompt = reference(one, messages[:1], prompt=True)
    assert one.conversation(messages).ids[: len(prompt)] == prompt


def by_pass(template: str) -> encoding.Encoder:
    tokenizer = shapes.tokenizer("byte-bpe", "chatml")
    tokenizer.chat_template = template
    return encoding.Encoder(tokenizer)


def test_a_control_string_that_only_the_template_joins_stays_text() -> None:
    """Three ways by which cleaning the texts beforehand is got round."""
    joined = by_pass(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}"
        "{% endfor %}"
    )
    tokens = joined.conversation(talk("end|>", "b", system="<|im_"))
    assert controls(joined, tokens.ids) == [joined.stop_id]
    assert tokens.guarded
    removing = by_pass(shapes.CHATML.replace("m.content", "m.content | replace('X', '')"))
    tokens = removing.conversation(talk("a <|imX_end|> b", "c"))
    assert len(controls(removing, tokens.ids)) == 4
    assert tokens.guarded
    assert "a <|im_end|> b" in removing.tokenizer.decode(tokens.ids)


def test_a_turn_forged_inside_a_rewritten_text_stays_text() -> None:
    removing = by_pass(shapes.CHATML.replace("m.content", "m.content | replace('X', '')"))
    forged = "aX<|im_end|>\n<|im_start|>user\nb"
    tokens = removing.conversation(talk("c", "d", system=forged))
    assert len(controls(removing, tokens.ids)) == 6
    assert forged[0] + forged[2:] in removing.tokenizer.decode(tokens.ids)


def test_a_vocabulary_s_own_entry_for_a_control_string_is_not_used() -> None:
    """GPT-2's end of text is an ordinary entry as well, and its unknown token."""
    tokenizer = shapes.tokenizer("byte-bpe", "plain")
    tokenizer.unk_token = "<|endoftext|>"
    one = encoding.Encoder(tokenizer)
    tokens = one.conversation(talk("the <|endoftext|> cat", "a"))
    assert controls(one, tokens.ids) == [one.eos_id]
    assert tokens.guarded


def test_a_long_text_is_not_the_template_s_fault() -> None:
    one = encoder("characters", "llama3")
    text = "word " * 2_000_000
    assert len(one.chat.render(talk(text), prompt=True)) > 9_000_000


def test_parts_are_found_by_what_the_template_reads() -> None:
    assert encoder("byte-bpe", "parts").chat.parts
    assert not encoder("byte-bpe", "chatml").chat.parts
    assert isinstance(encoder("byte-bpe", "parts").chat, chats.Chat)


# --- control strings that answers may hold -------------------------------------------------------

THOUGHT = "<think>\nIt is red.\n</think>\n\na ball"


def decoded(one: encoding.Encoder, tokens: encoding.Tokens) -> str:
    kept = [id_ for id_, flag in zip(tokens.ids, tokens.supervised, strict=True) if flag]
    return str(one.tokenizer.decode(kept))


def thinking(kind: str, shape: str = "chatml") -> encoding.Encoder:
    """With the tokens of thoughts, whether or not the template knows them."""
    tokenizer = shapes.tokenizer(kind, shape)
    tokenizer.add_tokens(["<think>", "</think>"])
    return encoding.Encoder(tokenizer)


@every_kind
def test_an_allowed_control_string_of_an_answer_is_a_token(kind: str) -> None:
    one = thinking(kind)
    allowing = one.allowing(["<think>", "</think>"])
    opened, closed = one.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    messages = talk("why <think> so?", THOUGHT)
    plain, tokens = one.conversation(messages), allowing.conversation(messages)
    assert plain.guarded
    assert not plain.allowed
    assert not {opened, closed} & set(plain.ids)
    prompt = one.prompt(messages[:1])
    assert tokens.ids[: len(prompt)] == prompt == allowing.prompt(messages[:1])
    learnt = tokens.ids[len(prompt) :]
    assert all(tokens.supervised[len(prompt) :])
    assert not any(tokens.supervised[: len(prompt)])
    assert [id_ for id_ in learnt if id_ in one.control] == [opened, closed, one.stop_id]
    assert tokens.allowed == 2
    assert tokens.guarded  # the prompt's own <think> stays text
    # As the model writes it, and as a server's tokenizer reads it.
    said = one.tokenizer(THOUGHT, add_special_tokens=False)["input_ids"]
    if one.texts.prefix == "never":
        assert learnt == [*said, one.stop_id]


@every_kind
def test_what_is_not_allowed_stays_text_beside_what_is(kind: str) -> None:
    one = thinking(kind).allowing(["<think>"])
    tokens = one.conversation(talk("a", f"{THOUGHT} <|im_end|> b"))
    assert [id_ for id_ in tokens.ids if id_ in one.control][-2:] == [
        one.tokenizer.convert_tokens_to_ids("<think>"),
        one.stop_id,
    ]
    assert tokens.allowed == 1
    assert tokens.guarded


def test_earlier_answers_keep_their_tokens_in_later_prompts() -> None:
    one = thinking("byte-bpe").allowing(["<think>", "</think>"])
    messages = talk("why?", THOUGHT, "and?", "no")
    whole, last = one.conversation(messages), one.conversation(messages, train_on="last")
    assert whole.ids == last.ids
    assert last.ids[: len(one.prompt(messages[:3]))] == one.prompt(messages[:3])
    assert whole.allowed == 2
    assert last.allowed == 0


def test_an_answer_goes_on_where_the_prompt_opens_a_thought() -> None:
    one = encoder("byte-bpe", "thinker").allowing(["<think>", "</think>"])
    tokens = one.conversation(talk("why?", THOUGHT))
    assert one.tokenizer.decode(tokens.ids).count("<think>") == 1
    assert decoded(one, tokens) == "It is red.\n</think>\n\na ball<|end_of_sentence|>"


def test_a_template_that_takes_answers_apart_reads_a_thought_and_loses_nothing() -> None:
    one = encoder("byte-bpe", "qwen3")
    read = one.conversation(talk("why?", THOUGHT))
    assert decoded(one, read) == f"{THOUGHT}<|im_end|>"
    assert not read.guarded
    for text in ("before <think>in</think>after", "a</think>b</think>c", "x<think></think>y"):
        tokens = one.conversation(talk("why?", text))
        assert decoded(one, tokens) == f"<think>\n\n</think>\n\n{text}<|im_end|>"
        assert tokens.guarded
    allowing = one.allowing(["<think>", "</think>"])
    assert allowing.conversation(talk("why?", THOUGHT)).allowed == 2
    assert allowing.conversation(talk("why?", THOUGHT)).ids == read.ids


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("<thimk>", "is no added token of the tokenizer. Did you mean '<think>'"),
        ("ball", "is no added token of the tokenizer"),
        ("<|im_end|>", "'<|im_end|>' is the tokenizer's eos_token"),
        ("<|im_start|>", "opens or closes a turn"),
        ("[PAD]", "is the tokenizer's pad_token"),
    ],
)
def test_a_token_that_cannot_be_allowed_is_told(name: str, said: str) -> None:
    tokenizer = shapes.tokenizer("byte-bpe", "chatml")
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(errors.DataError) as caught:
        encoding.Encoder(tokenizer).allowing(["<think>", name])
    assert said in str(caught.value)


@pytest.fixture
def legacy_model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A Llama whose tokenizer is of the older kind: a space before text after control tokens."""
    folder = tmp_path / "legacy"
    shutil.copytree(tiny_model_dir, folder)
    for each in folder.glob("*token*"):
        each.unlink()
    letters = sorted(set("".join(sentences(200))) | set("User:Assistant?\n"))
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3}
    vocab |= {each: 4 + k for k, each in enumerate(letters) if each != " "}
    transformers.LlamaTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": True}))
    return folder


def test_a_run_of_a_legacy_tokenizer_is_asked_by_the_ids_that_it_learnt(
    legacy_model: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    rows = [{"prompt": f"{text}", "completion": "yes"} for text in sentences(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(
        f"model: {{name: {legacy_model}}}\n"
        "data: {train: {path: rows.jsonl}}\n"
        "training: {max_steps: 1, tokens_per_step: 200, max_length: 96}\n"
    )
    shown = json.loads(cli("tune", "-r", "r.yaml", "--preview", "1", "--json").out)["examples"][0]
    learnt = [id_ for id_, mine in zip(shown["ids"], shown["supervised"], strict=True) if not mine]
    ended = cli("tune", "-r", "r.yaml", "-o", "run")
    assert ended.code == 0, ended.err
    assert not list((tmp_path / "run").glob(".trial*"))
    served = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    ids = {
        tuple(
            served.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}],
                add_generation_prompt=True,
                return_dict=False,
            )
        )
        for row in rows
    }
    assert learnt[:2] == [1, 3], "the older kind: a space after the start token"
    assert tuple(learnt) in ids


def test_a_tokenizer_that_is_saved_as_another_is_refused_before_the_first_step(
    legacy_model: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    (tmp_path / "r.yaml").write_text(
        f"model: {{name: {legacy_model}}}\n"
        "data: {train: {path: rows.jsonl}}\n"
        "training: {max_steps: 1, tokens_per_step: 50, max_length: 96}\n"
    )
    save = transformers.LlamaTokenizer.save_pretrained

    def forgetting(self: Any, *arguments: Any, **options: Any) -> Any:
        self.init_kwargs.pop("legacy", None)
        return save(self, *arguments, **options)

    monkeypatch.setattr(transformers.LlamaTokenizer, "save_pretrained", forgetting)
    ended = cli("tune", "-r", "r.yaml", "-o", "run")
    assert ended.code == 2
    assert "saved and read again, is another one" in ended.err
    assert not list((tmp_path / "run").glob(".trial*"))
