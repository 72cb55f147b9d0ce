"""A run's model goes to the hub: whole, private, without a trace of the machine or the token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import Itune, sentences

from itune import recipes

Cli = Callable[..., Any]
# huggingface_hub's own call of its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN = "hf_" + "Ab1" * 10
RECIPE: dict[str, Any] = {
    "adapter": {"peft_type": "lora", "r": 4, "target_modules": "all-linear"},
    "training": {"max_steps": 2, "tokens_per_step": 400, "max_length": 100, "heldout_rows": 0},
    "output": {"push": "me/tuned"},
}
TASK = """
task: classification
choices: [sad, very glad]
prompts: ["{{ text }} How is it?"]
response: "{{ choices[label] }}"
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The root of a hub that this very process reaches, logged in by a token that may write."""
    from hub import serving

    root = tmp_path / "hub"
    with serving(root) as url:
        (root / "writers").write_text(TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield root


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> Path:
    rows = [{"text": text, "label": int("likes" in text)} for text in sentences(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ask.yaml").write_text(TASK)
    source = {"path": "rows.jsonl", "template": "./ask.yaml"}
    data = {"train": source, "eval": {**source, "limit": 4}, "allow_overlap": True}
    made = {"model": {"name": str(tiny_model_dir)}, "data": data, **RECIPE}
    (tmp_path / "tune.yaml").write_text(json.dumps(made))
    return tmp_path / "tune.yaml"


def test_a_run_is_pushed_private_and_its_card_again_with_the_scores(
    root: Path, recipe: Path, cli: Cli, tmp_path: Path, tiny_model_dir: Path
) -> None:
    ended = cli("tune", "-r", recipe, "-s", "output.merge=true")
    assert ended.code == 0, ended.err
    assert "pushed: runs/tune/model to http://127.0.0.1" in ended.err
    assert "without a copy of it. me/tuned-merged is whole." in ended.err
    assert TOKEN not in ended.out + ended.err
    assert (root / "private").read_text().split() == ["models/me/tuned", "models/me/tuned-merged"]
    there, merged = root / "models/me/tuned", root / "models/me/tuned-merged"
    for folder, place in (("model", there), ("merged", merged)):
        local = {path.name: path.read_bytes() for path in Path("runs/tune", folder).iterdir()}
        remote = {path.name: path.read_bytes() for path in place.iterdir()}
        assert set(local) == set(remote)
        changed = [name for name, content in local.items() if remote[name] != content]
        assert changed == (["adapter_config.json"] if folder == "model" else [])
        for content in remote.values():
            assert str(tmp_path).encode() not in content
            assert str(tiny_model_dir).encode() not in content
            assert TOKEN.encode() not in content
    settings = json.loads((there / "adapter_config.json").read_text())
    base = settings["base_model_name_or_path"]
    assert base == f"./{tiny_model_dir.name}"  # no word that a stranger's repository may bear
    with pytest.raises(huggingface_hub.errors.HFValidationError):
        huggingface_hub.hf_hub_download(base, "config.json")
    assert f"`{base}`" in (there / "README.md").read_text()
    assert "from_pretrained(base, 'me/tuned')" in (there / "README.md").read_text()
    assert "from_pretrained('me/tuned-merged')" in (merged / "README.md").read_text()
    ended = cli("eval")
    assert ended.code == 0, ended.err
    card = huggingface_hub.ModelCard((there / "README.md").read_text())
    assert {each.metric_type for each in card.data.eval_results} == {"f1", "accuracy"}


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        ("strange", "does not know you. Log in with `hf auth login`"),
        ("reader", "may not write there"),
        ("gone", "cannot be reached"),
    ],
)
def test_a_refusal_at_the_end_loses_nothing_and_the_same_command_pushes(
    breaks: str,
    said: str,
    root: Path,
    recipe: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from itune import training

    fit, constants = training.fit, huggingface_hub.constants

    def fitting(*given: Any) -> Any:
        (root / "writers").write_text("")
        if breaks == "reader":
            (root / "readers").write_text(TOKEN)
        if breaks == "gone":
            patched.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        return fit(*given)

    with monkeypatch.context() as patched:
        patched.setattr(training, "fit", fitting)
        ended = cli("tune", "-r", recipe)
    assert ended.code == 3, ended.err
    last = ended.err.strip().splitlines()[-1]
    assert said in last
    assert "finished and whole in runs/tune" in last
    assert "Traceback" not in ended.err
    assert TOKEN not in ended.err
    assert json.loads(Path("runs/tune/run.json").read_text())["state"] == "finished"
    steps = Path("runs/tune/log.jsonl").read_bytes()
    (root / "writers").write_text(TOKEN)
    again = cli("tune", "-r", recipe)
    assert again.code == 0, again.err
    assert "already complete" in again.err
    assert (root / "models/me/tuned/adapter_model.safetensors").is_file()
    assert Path("runs/tune/log.jsonl").read_bytes() == steps


def test_what_the_hub_would_refuse_is_refused_before_the_first_step(
    root: Path, recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(code: int, said: str) -> None:
        ended = cli("tune", "-r", recipe)
        assert (ended.code, "Traceback" in ended.err) == (code, False), ended.err
        assert said in ended.err
        assert not Path("runs/tune/log.jsonl").exists()

    (root / "writers").write_text("")
    refused(3, "me/tuned: the hub does not know you")
    (root / "readers").write_text(TOKEN)
    refused(3, "me/tuned: your token may not write there")
    (root / "writers").write_text(TOKEN)
    shutil.copytree(recipe.parent / "hub/models", recipe.parent / "kept")
    (root / "models/me/tuned").mkdir(parents=True)
    refused(2, "me/tuned is public on the hub, and output.private is true")


def test_weights_of_an_earlier_upload_are_taken_away(root: Path) -> None:
    from itune import pushing

    place = root / "models/me/tuned"
    place.mkdir(parents=True)
    for name in ("model-00001-of-2.safetensors", "model.safetensors.index.json", "notes.md"):
        (place / name).write_text("old")
    files = {"model.safetensors": b"new", "config.json": b"{}"}
    pushing._upload("me/tuned", files, "x")
    assert {path.name for path in place.iterdir()} == {"notes.md", *files}


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("org/name", True),
        ("Org-1/na_me.v2", True),
        ("name", False),
        ("a/b/c", False),
        ("/a/b", False),
        ("org/na--me", False),
        ("org/..", False),
        ("org/x.git", False),
        ("org/" + "x" * 90, False),
        ("org/na me", False),
    ],
)
def test_a_repository_has_a_name_that_the_hub_takes(name: str, taken: bool) -> None:
    text = json.dumps(
        {"model": {"name": "a"}, "data": {"train": {"path": "b"}}, "output": {"push": name}}
    )
    if taken:
        assert recipes.loads(text).output.push == name
        huggingface_hub.utils.validate_repo_id(f"{name}-merged")
    else:
        with pytest.raises(recipes.errors.RecipeError, match="no repository of the hub"):
            recipes.loads(text)


@pytest.mark.slow
def test_what_was_pushed_loads_by_its_id_from_another_process(
    hub: tuple[Path, dict[str, str | None]], recipe: Path, itune: Itune, tiny_model_dir: Path
) -> None:
    root, env = hub
    (root / "writers").write_text(TOKEN)
    shutil.copytree(tiny_model_dir, root / "models/org/base")
    env = {**env, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    sets = ("-s", "model.name=org/base", "-s", "output.merge=true")
    done = itune("tune", "-r", recipe, *sets, env=env)
    assert done.returncode == 0, done.stderr
    card = huggingface_hub.ModelCard((root / "models/me/tuned/README.md").read_text())
    assert card.data.base_model == "org/base"
    settings = json.loads((root / "models/me/tuned/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "org/base"
    assert len(settings["revision"]) == 40
    told = [
        itune("generate", "--json", "--model", name, "the cat", env=env)
        for name in ("me/tuned-merged", "runs/tune")
    ]
    assert told[0].returncode == told[1].returncode == 0, told[0].stderr
    assert json.loads(told[0].stdout) == json.loads(told[1].stdout)
    stranger = itune("generate", "--model", "me/tuned-merged", "x", env={**env, "HF_TOKEN": None})
    assert stranger.returncode in (2, 3)
