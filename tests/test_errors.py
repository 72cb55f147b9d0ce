"""The tree of errors, and what messages hint and quote."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from itune import errors

SECRETS = (
    "hf_abcDEFghi123JKLmno456",
    "hf_abcdefghijklmnopqrstuv",
    "sk-abcdefghijklmnopqrstuvwx",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "github_pat_11ABCDEFG0abcdefghijklmnop",
    "AKIAIOSFODNN7EXAMPLE",
    "https://me:hunter22@example.org/x.jsonl",
    "-----BEGIN RSA PRIVATE KEY-----",
)
WORDS = (
    "use_cls_token",
    "hf_transfer",
    "hf_datasets/reviews",
    "hf-internal-testing/tiny-random-gpt2",
    "<|eos_token|>",
    "https://example.org:8080/x.jsonl",
    "tokens_per_step",
)


def every(root: type[errors.ItuneError]) -> list[type[errors.ItuneError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in every(child))]


def test_exit_codes_are_those_of_the_design() -> None:
    codes = {kind.__name__: kind.exit_code for kind in every(errors.ItuneError)}
    user = ("User", "Recipe", "Template", "Data", "Model", "Option", "Run")
    assert codes == {
        "ItuneError": 1,
        **{f"{name}Error": 2 for name in user},
        "EnvironmentRefusal": 3,
        "Diverged": 4,
        "Interrupted": 75,
    }


def test_every_error_is_in_the_drawn_tree_with_its_code() -> None:
    drawn = errors.__doc__ or ""
    for kind in every(errors.ItuneError):
        assert kind.__name__ in drawn
        assert kind.__doc__


def test_nearest_gives_the_one_meant() -> None:
    known = ("learning_rate", "seed", "max_steps")
    assert errors.nearest("leraning_rate", known) == " Did you mean 'learning_rate'?"
    assert errors.nearest("Learning-Rate", known) == " Did you mean 'learning_rate'?"


def test_nearest_lists_all_when_none_is_near() -> None:
    assert errors.nearest("zzz", ["b", "a"]) == " Known: a, b."
    assert errors.nearest("zzz", []) == ""
    many = errors.nearest("zzz", [f"name-{i:02}" for i in range(30)])
    assert many.count("name-") == 20
    assert many.endswith("and 10 more.")


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_masked(secret: str) -> None:
    text = errors.masked(f"see {secret} there")
    assert "[secret]" in text
    assert "hunter22" not in text
    assert secret not in text


@pytest.mark.parametrize("word", WORDS)
def test_words_that_look_like_secrets_survive(word: str) -> None:
    assert errors.masked(word) == word


@given(st.text() | st.integers() | st.floats() | st.none() | st.booleans() | st.lists(st.text()))
def test_a_shown_value_is_short_and_cannot_drive_a_terminal(value: object) -> None:
    text = errors.shown(value)
    assert 0 < len(text) <= errors.LONGEST_VALUE
    assert text.isprintable()


def test_values_are_shown_as_yaml_has_them() -> None:
    assert errors.shown(None) == "nothing"
    assert errors.shown(True) == "true"
    assert errors.shown("a\nb\u202e") == r"'a\nb\u202e'"
    assert errors.shown({"a": 1}) == "a mapping of 1 key"
    assert errors.shown([1, 2]) == "a list of 2"
    assert "hf_" not in errors.shown(SECRETS[0])
