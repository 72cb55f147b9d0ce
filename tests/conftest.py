"""What every test gets: no network, one thread, an empty folder, a seed, tiny models, the CLI."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = ROOT / "tests" / "offline"
SEED = 17

# Libraries read these once, when first imported: so they are set before any of them is.
CACHE = tempfile.TemporaryDirectory(prefix="itune-tests-")
os.environ.update(
    {
        "HF_HOME": CACHE.name,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_COLOR": "1",
        "COLUMNS": "120",
    }
)
for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "FORCE_COLOR"):
    os.environ.pop(name, None)
# `src` lets the started commands work from a checkout that is not installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(OFFLINE), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
)
sys.path.insert(0, str(OFFLINE))
if "sitecustomize" in sys.modules:  # one that the system has: ours must run all the same
    del sys.modules["sitecustomize"]
__import__("sitecustomize")
sys.path.remove(str(OFFLINE))


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that the test runs in, so that `runs/` lands nowhere else."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, whatever ran before it."""
    random.seed(SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are passed over where there is none."""
    # Keywords would do for a checkout in a folder of that name, too.
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


Itune = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def itune(tmp_path: Path) -> Itune:
    """`itune("tune", "--recipe", path)` in a process of its own: returncode, stdout, stderr.

    `env` adds variables, or removes those whose value is None. A command that takes longer than
    `timeout_s` is killed and fails the test.
    """

    def run(
        *arguments: object,
        cwd: Path = tmp_path,
        env: dict[str, str | None] | None = None,
        stdin: str | None = None,
        timeout_s: float = 240,
    ) -> subprocess.CompletedProcess[str]:
        changed = {**os.environ, **(env or {})}
        return subprocess.run(
            [sys.executable, "-m", "itune", *map(str, arguments)],
            cwd=cwd,
            env={name: value for name, value in changed.items() if value is not None},
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


class Ended(NamedTuple):
    """How a command ended that ran in this process."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """`cli("tune", "-r", path)` in this process, where the libraries are imported already."""

    def run(*arguments: object) -> Ended:
        import torch  # noqa: F401 - a preview keeps it out for good where it is not loaded

        from itune.cli import main

        monkeypatch.setattr(sys, "argv", ["itune", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        written = capsys.readouterr()
        return Ended(code, written.out, written.err)

    return run


def sentences(n: int) -> list[str]:
    """Small English text, the same at every call; what the tiny tokenizer is trained on."""
    draw = random.Random(SEED)
    who, does = ["the cat", "a small dog", "my sister"], ["sees", "likes", "never finds"]
    what, where = ["the red ball", "an old book", "some bread"], ["at home", "in the park", "today"]
    return [" ".join(map(draw.choice, (who, does, what, where))) + "." for _ in range(n)]


FRAGMENTS = (
    "\x1b[31m", "\x1b]8;;http://z\x07", "\x1b]0;title\x07", "\x1bP+q\x1b\\", "\x9b2J", "\r",
    "\x08", "\u202e", "\u2066", "\u200f", "\ufeff", "\u2028", "\U000e0041", "[bold red]",
    "[link=http://z]x[/]", "<script>alert(1)</script>", "<img src=x onerror=y>", "<!--", "&lt;",
    "</pre></article>", "{{ 7 * 7 }}", "`", "```\n", "](http://z)", "|", "\n\n# h\n", "\n---\n",
    "~~~", "==", "\n    code", "<http://z>", "\\",
)  # fmt: skip


def random_texts(n: int) -> list[str]:
    """Texts from random bytes, the same at every call; many hold what drives terminals or pages."""
    draw = random.Random(SEED)
    made = []
    for _ in range(n):
        found = draw.randbytes(draw.randrange(1, 24))
        text = found.decode(
            *draw.choice([("latin-1",), ("utf-8", "replace"), ("utf-16", "replace")])
        )
        for _ in range(draw.randrange(3)):
            at = draw.randrange(len(text) + 1)
            text = text[:at] + draw.choice(FRAGMENTS) + text[at:]
        made.append(text)
    return made


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens, so that any text can be encoded; no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(200), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=512,
    )


def tiny_model(family: str, positions: int = 512) -> PreTrainedModel:
    """Two layers of width 64 with random weights from a fixed seed: a Llama, a T5 or a BERT."""
    import torch
    import transformers

    torch.manual_seed(SEED)
    size = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if family == "causal":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=positions,
                **size,
            )
        )
    if family == "seq2seq":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=64,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=2,
                **size,
            )
        )
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=positions,
            **size,
        )
    )


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny tokenizer alone."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def saved(folder: Path, family: str) -> Path:
    """Model and tokenizer as `from_pretrained` reads them."""
    tiny_model(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama of 0.1M weights with the tiny tokenizer. Copy it before changing it."""
    return saved(tmp_path_factory.mktemp("causal"), "causal")


@pytest.fixture(scope="session")
def tiny_seq2seq_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a T5."""
    return saved(tmp_path_factory.mktemp("seq2seq"), "seq2seq")


@pytest.fixture(scope="session")
def tiny_masked_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a BERT."""
    return saved(tmp_path_factory.mktemp("masked"), "masked")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str | None]]]:
    """A hub on this machine: its root, to put repositories in, and the `env` to reach it with."""
    from hub import serving

    root = tmp_path / "hub"
    with serving(root) as url:
        yield (
            root,
            {
                "HF_ENDPOINT": url,
                "HF_HUB_OFFLINE": None,
                "HF_HOME": str(tmp_path / "hf-home"),
            },
        )
