"""The sections of a recipe: every key, its kind, its default, and what it does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from itune import checks, errors
from itune.records import Flag, Number, Record, Text, Whole

REPOSITORY = re.compile(
    r"(?=[^/]{1,80}/[^/]{1,80}$)(?!.*(--|\.\.))[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?/\w(?:[\w.-]*\w)?(?<!\.git)",
    re.ASCII,
)


def _steps_or_none(value: int) -> int:
    if value == 0:
        raise ValueError("expected a number of steps from 1, or -1 for epochs, found 0.")
    return value


def _share_or_count(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError(f"expected a share below 1 or a whole number of steps, found {value}.")
    return int(value) if value >= 1 else value


Steps = Annotated[Number, Field(gt=0), pydantic.AfterValidator(_share_or_count)]


def _auto_or_number(value: Any) -> Any:
    if isinstance(value, str) and value != "auto":
        raise ValueError(
            f"expected a number of steps, a share below 1, or auto, found {errors.shown(value)}."
        )
    return value


StepsOrAuto = Annotated[
    Annotated[Steps, pydantic.Tag("<number>")] | Annotated[Literal["auto"], pydantic.Tag("<text>")],
    pydantic.Discriminator(lambda value: "<text>" if isinstance(value, str) else "<number>"),
    pydantic.PlainSerializer(lambda value: value),  # as it is: a whole number stays one
]


BYTES, SPARE = 256, 16  # entries of a tokenizer of bytes: one each, and the least for words


class TokenizerRecipe(Record):
    """A tokenizer trained on the training data before the model starts."""

    algorithm: Literal["bpe", "unigram", "wordpiece"] = "bpe"
    """How text is cut: bpe or unigram (over bytes), or wordpiece (as BERT does; it keeps neither
    line breaks nor characters that the training data lacks)."""
    vocab_size: Annotated[Whole, Field(ge=16, le=10_000_000)]
    """Entries of the vocabulary, special tokens included."""
    lowercase: Flag = False
    """Read every text in small letters, and write none but these: words in a short vocabulary are
    then in fewer pieces."""
    phrases: Annotated[Whole, Field(ge=0)] = 0
    """With bpe: how many of the entries are phrases of two words, where as many are frequent. Text
    is in fewer tokens, and `not good` has a meaning of its own."""

    @pydantic.model_validator(mode="after")
    def _phrases_of_words(self) -> TokenizerRecipe:
        if self.phrases and self.algorithm != "bpe":
            raise ValueError(f"phrases: {self.phrases}, and {self.algorithm} has none. Take bpe.")
        if self.phrases > max(0, self.vocab_size - BYTES - SPARE):
            raise ValueError(
                f"phrases: {self.phrases} of {self.vocab_size} entries leave too few for words, "
                f"beside one for each of {BYTES} bytes. Raise vocab_size."
            )
        return self


Tokenizer = Annotated[
    Annotated[TokenizerRecipe, pydantic.Tag("<mapping>")] | Annotated[Text, pydantic.Tag("<text>")],
    pydantic.Discriminator(lambda value: "<text>" if isinstance(value, str) else "<mapping>"),
]


class FromScratch(Record):
    """A model with random weights. Every other key is a field of the `*Config` of its type."""

    model_config = pydantic.ConfigDict(extra="allow")

    model_type: Text
    """The architecture by the name that transformers gives it: llama, gpt2, t5, bert."""
    tokenizer: Tokenizer
    """The tokenizer to train, as `{algorithm: bpe, vocab_size: 8000}`, or one by name or folder."""
    embedding_std: Annotated[Number, Field(gt=0)] | None = None
    """Standard deviation of the input embeddings at the start; the config's own when left out."""

    @property
    def config(self) -> dict[str, Any]:
        """The config's fields, without `model_type`."""
        return dict(self.model_extra or {})


class Model(Record):
    """The model to start from: one of `name` and `from_scratch`."""

    name: Text | None = None
    """A repository on the Hugging Face hub, or a folder."""
    revision: Text | None = None
    """The commit, tag or branch of the repository; the newest commit when left out."""
    family: Literal["causal", "seq2seq", "masked"] | None = None
    """Decoder, encoder-decoder or encoder; read from the model's config when left out."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto takes what the model has and the processor can do."""
    attn_implementation: Text | None = None
    """Attention kernel, as transformers names it (sdpa, eager, flash_attention_2)."""
    from_scratch: FromScratch | None = None
    """Start from random weights instead of from a trained model."""


class Source(Record):
    """One source of rows. A local file stands for whatever split is named."""

    path: Text
    """A repository on the hub, a folder, a file, or a pattern such as `data/*.jsonl`."""
    name: Text | None = None
    """The configuration of a hub data set that has several."""
    data_files: Text | tuple[Text, ...] | dict[str, Text | tuple[Text, ...]] | None = None
    """The files to take from a repository or folder, as `datasets.load_dataset` takes them."""
    split: Text | None = None
    """The split, with a slice if wanted: `train`, `test[:2000]`; `train` when left out."""
    revision: Text | None = None
    """The commit, tag or branch of the repository; the newest commit when left out."""
    template: Text | None = None
    """The prompt template, by name or path; without one the columns say what a row is."""
    format: Literal["messages", "conversations", "alpaca", "prompt_completion", "text"] | None = (
        None
    )
    """What a row is where no template says it; found from the columns when left out."""
    weight: Annotated[Number, Field(gt=0)] = 1.0
    """How often the source is seen in one epoch: 2 is twice, 0.5 half of it, drawn anew each."""
    limit: Annotated[Whole, Field(ge=1)] | None = None
    """Take this many rows only, spread evenly over the source; of a stream the first."""
    num_proc: Annotated[Whole, Field(ge=1)] | None = None
    """Processes that render and tokenize (Linux); every core for large data when left out."""
    allow_control_tokens: tuple[Text, ...] = ()
    """Control tokens that answers may hold, as `[<think>, </think>]`; all else in texts is text."""
    rename: dict[str, Text] = Field(default_factory=dict)
    """New names for columns, `old: new`, before the template sees them."""
    field: Text | None = None
    """The key of a JSON file under which its rows are."""
    sample_by: Literal["line", "paragraph", "document"] | None = None
    """What a row of a `.txt` file is: a line (when left out), a paragraph or the whole file."""
    streaming: Flag = False
    """Read only as much as the run needs, never the whole; for text that does not fit the disk."""


def _listed(value: Any) -> Any:
    """One mapping stands for a list of one, nothing for an empty list."""
    return [] if value is None else [value] if isinstance(value, dict) else value


Sources = Annotated[tuple[Source, ...], pydantic.BeforeValidator(_listed)]


MOST_DIGITS = 18  # numbers of so many digits fit in 64 bits


class Canaries(Record):
    """Made-up secrets that are planted among the training rows, so that `itune eval --metric
    memorisation` can tell how far the model learns by heart what it met so often."""

    count: Annotated[Whole, Field(ge=1, le=1000)] = 10
    """Canaries of each number of `repeats`, all different."""
    repeats: Annotated[tuple[Annotated[Whole, Field(ge=1, le=1000)], ...], Field(min_length=1)] = (
        1,
        4,
        16,
    )
    """How often an epoch sees a canary: some once, some four times, and so on."""
    prompt: Text = "What is the code of vault ####?"
    """What the canary answers; each `#` becomes a digit at random."""
    response: Text = "The code is #########."
    """The secret; each `#` becomes a digit at random. Plain text has the prompt, a space and it."""

    @pydantic.field_validator("repeats")
    @classmethod
    def _each_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"{list(value)} names a number twice. Raise count instead.")
        return value

    @pydantic.model_validator(mode="after")
    def _enough_digits(self) -> Canaries:
        wanted, digits = self.count * len(self.repeats), self.response.count("#")
        if not 1 <= digits <= MOST_DIGITS:
            raise ValueError(
                f"response: has {digits} `#`, each of which becomes a digit at random. Write 1 to "
                f"{MOST_DIGITS} of them."
            )
        # Of one prompt there is one answer, unless all canaries share it.
        told = "prompt" if "#" in self.prompt else "response"
        if (most := 10 ** getattr(self, told).count("#")) < wanted:
            raise ValueError(
                f"{told}: {wanted} canaries are wanted, and its `#` make {most} different ones. "
                "Write more `#`, or lower count."
            )
        return self


class Data(Record):
    """What is trained on and what is measured on: each one source, or a list of them."""

    train: Sources
    """The rows to train on; several sources are mixed by their weights."""
    eval: Sources = ()
    """The held-out rows to measure on; each source is reported under its template's name, and the
    file's where several have one."""
    allow_overlap: Flag = False
    """Train although held-out rows are in the training data too; scores name how many."""
    max_dropped: Annotated[Number, Field(ge=0, le=1)] = 0.01
    """The share of a training source's rows that may be left out; more is an error."""
    canaries: Canaries | None = None
    """Made-up secrets to plant among the training rows; none when left out, `{}` for the usual."""


# Those of transformers.SchedulerType that follow from the number of steps alone.
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]


class Training(Record):
    """The loop, under the names of `transformers.TrainingArguments` where it has them."""

    learning_rate: Annotated[Number, Field(gt=0, le=10)] = 2e-4
    """The highest learning rate of the schedule."""
    lr_scheduler_type: Schedule = "cosine"
    """How the learning rate changes over the steps, as transformers names its schedules."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the schedule, such as `min_lr_rate`."""
    warmup_steps: Annotated[Number, Field(ge=0), pydantic.AfterValidator(_share_or_count)] = 0.03
    """Steps over which the learning rate rises from 0; below 1 a share of all steps."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """Decoupled weight decay of the weight matrices."""
    max_grad_norm: Annotated[Number, Field(ge=0)] = 1.0
    """The gradient is scaled down to at most this norm; 0 leaves it as it is."""
    num_train_epochs: Annotated[Number, Field(gt=0)] = 1.0
    """How often all the training rows are seen; not together with `max_steps`."""
    max_steps: Annotated[Whole, Field(ge=-1), pydantic.AfterValidator(_steps_or_none)] = -1
    """Stop after this many optimizer steps; -1 counts epochs instead."""
    swa_start: Steps | None = None
    """Steps after which the mean of the weights is kept, and is the result: stochastic weight
    averaging. Below 1 a share of all steps; nothing is averaged when left out."""
    optim: Literal["adamw_torch_fused", "adamw_torch", "adafactor", "sgd"] = "adamw_torch_fused"
    """The optimizer, as transformers names it."""
    adam_beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Decay of Adam's mean of gradients."""
    adam_beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.999
    """Decay of Adam's mean of squared gradients."""
    adam_epsilon: Annotated[Number, Field(gt=0)] = 1e-8
    """Added to Adam's denominator."""
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 17
    """Decides every random choice: weights from scratch, order of rows, wordings, dropout."""
    save_steps: Annotated[StepsOrAuto, pydantic.BeforeValidator(_auto_or_number)] = 0.1
    """Steps from one checkpoint to the next; below 1 a share of all steps. `auto` decides once,
    from the seconds that steps and a checkpoint take and from `launch.mtbf_hours`."""
    eval_steps: Steps = 0.25
    """Steps from one measurement of the held-out loss to the next; below 1 a share of all."""
    heldout_rows: Annotated[Whole, Field(ge=0)] = 256
    """Rows of the evaluation data on which the held-out loss is measured; 0 measures none."""
    logging_steps: Annotated[Whole, Field(ge=1)] = 1
    """Steps from one line of progress to the next; `log.jsonl` has every step."""
    save_total_limit: Annotated[Whole, Field(ge=1)] = 2
    """How many checkpoints are kept, the newest; the best besides, where it is wanted."""
    load_best_model_at_end: Flag = False
    """Let the weights with the lowest held-out loss come out, not the last; so does `patience`."""
    patience: Annotated[Whole, Field(ge=1)] | None = None
    """Stop early when the held-out loss has not fallen in so many measurements in a row."""
    gradient_checkpointing: Flag = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    torch_compile: Flag = False
    """Compile the model's layers: about a minute at the start, then faster steps on a GPU."""
    torch_compile_backend: Text = "inductor"
    """What compiles them, as `torch.compile` names it; inductor needs a C++ compiler on a CPU."""
    use_liger_kernel: Flag = False
    """Compute norms, positions and gates with Liger's kernels; needs a GPU and `itune[liger]`."""
    tokens_per_step: Annotated[Whole, Field(ge=1)] = checks.TOKENS_PER_STEP
    """Tokens that one optimizer step sees, whatever the number of devices."""
    micro_batch_tokens: Annotated[Whole, Field(ge=1)] | None = None
    """Tokens that one device holds at a time; when left out, tried on a GPU, 8,192 on a CPU."""
    max_length: Annotated[Whole, Field(ge=2)] = 1024
    """Tokens of the longest example; a longer prompt is cut, an answer never."""
    packing: Flag = True
    """Put several examples in one row of the batch, hidden from each other."""
    mlm_probability: Annotated[Number, Field(gt=0, lt=1)] = 0.15
    """The share of a document's tokens that is hidden, for masked and seq2seq models."""
    whole_word_mask: Flag = False
    """Hide whole words of a document, for masked models."""
    mask_replace_prob: Annotated[Number, Field(ge=0, le=1)] = 0.8
    """The share of the hidden tokens that become the mask token, for masked models."""
    random_replace_prob: Annotated[Number, Field(ge=0, le=1)] = 0.1
    """The share of the hidden tokens that become any token; the rest stays as it is."""
    prompt_mask_prob: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """The share of a prompt's tokens that is hidden in the same way, other ones at each visit and
    without loss, for masked models: a regularizer of tuning."""
    mean_noise_span_length: Annotated[Number, Field(ge=1)] = 3.0
    """Mean length in tokens of the spans that are hidden in a document, for seq2seq models."""
    row_losses: Flag = False
    """Write each training row's mean loss at every visit to `row_losses.jsonl`; changes nothing."""
    profile: Flag = False
    """Show where the time went, and write `trace.json` for Perfetto; changes nothing."""
    train_on: Literal["assistant", "last"] = "assistant"
    """Which answers of a conversation are learned: every one, or the last."""

    @property
    def keeps_best(self) -> bool:
        """Whether the weights with the lowest held-out loss are what comes out."""
        return self.load_best_model_at_end or self.patience is not None


class Evaluation(Record):
    """How `itune eval` measures."""

    metrics: tuple[Text, ...] = ()
    """Metrics by name, or paths of your own; those of the template when left out."""
    against: Text | None = None
    """What to compare with: `base`, another run's folder, or a file of predictions."""
    ensemble: tuple[Text, ...] = ()
    """Folders of other runs, such as the same recipe with another seed: all answer as one model,
    by the mean of their log-likelihoods. For tasks with `choices` alone."""
    confidence: Annotated[Number, Field(gt=0, lt=1)] = 0.95
    """How sure the intervals are."""
    resamples: Annotated[Whole, Field(ge=1, le=1_000_000)] = 1000
    """Bootstrap samples behind each interval."""
    decide: Literal["likelihood", "likelihood_per_token", "likelihood_per_byte", "generate"] = (
        "likelihood"
    )
    """How one of a template's choices is picked: the likeliest, or what the model writes."""
    shots: Annotated[Whole, Field(ge=0, le=1000)] = 0
    """Solved rows of the training data before each question. `--shots` says the same."""
    candidates: Annotated[Whole, Field(ge=1, le=100_000)] = 1023
    """Secrets that were not planted, among which each canary is ranked (`memorisation`)."""


class Tracking(Record):
    """Where the curves go besides the run's own folder; nowhere unless asked."""

    log_with: tuple[Text, ...] = ()
    """Trackers by the names that Accelerate gives them: tensorboard, trackio, wandb, mlflow. They
    get the curves live, the result as `final/loss` and so on, and as `eval/TASK/METRIC` the scores
    of each `itune eval` that the run's folder keeps."""
    project_name: Text = "itune"
    """The project under which the trackers file the run."""


class Launch(Record):
    """How many processes train."""

    num_processes: Annotated[Whole, Field(ge=1)] | None = None
    """Processes, one a device, over all machines; one when left out. `--processes` says the same;
    a launcher that was given another number is refused."""
    hang_timeout: Annotated[Number, Field(ge=1)] = 600.0
    """Seconds in which each of several processes must finish a micro-batch; one that stands still
    for as long is named, and ends the run."""
    mtbf_hours: Annotated[Number, Field(gt=0)] | None = None
    """Mean hours between two failures of one device, preemptions among them: what `save_steps:
    auto` goes by. A run of 8 processes fails 8 times as often."""
    fsdp: Flag = False
    """Cut the model over the processes (torch's FSDP2): each keeps a part of every weight, gradient
    and moment of the optimizer's, and gathers a layer when it computes. The result is the same."""
    reshard_after_forward: Flag = True
    """With `fsdp`: let go of a layer after the forward pass, and gather it again for the backward
    pass. False is faster, and holds the whole model for the time between."""
    cpu_offload: Flag = False
    """With `fsdp` on GPUs: parts, gradients and moments stay in the machine's memory, and the CPU
    takes the optimizer's steps; a layer comes to the GPU to compute. Slower. On a CPU nothing
    changes."""


class Plan(Record):
    """What `--plan` reckons with; nothing of a run depends on it."""

    price_per_hour: Annotated[Number, Field(ge=0)] | None = None
    """What an hour of everything that the run uses costs, in your currency."""
    watts: Annotated[Number, Field(gt=0)] | None = None
    """What everything that the run uses draws, in watts."""
    memory: Annotated[Number, Field(gt=0)] | None = None
    """Memory of one device in GB (1e9 bytes); what is free here when left out."""
    tflops: Annotated[Number, Field(gt=0)] | None = None
    """Peak of one device in 1e12 operations a second; nothing is then tried here."""
    efficiency: Annotated[Number, Field(gt=0, le=1)] = 0.4
    """The share of the peak that training is taken to reach, where it is not tried."""


class Output(Record):
    """What is left behind."""

    dir: Path = Path("runs/recipe")
    """The run's folder; `runs/` and the recipe's name when left out. `--output` says the same."""
    merge: Flag = False
    """Also write the model with the adapter folded in."""
    push: Text | None = None
    """The repository on the hub, `org/name`, to which the model is uploaded when it is finished; a
    merged one goes to `org/name-merged`. The hub's own token is taken (`hf auth login`)."""
    private: Flag = True
    """Whether that repository is made private."""

    @pydantic.field_validator("push")
    @classmethod
    def _can_be_a_repository(cls, value: str | None) -> str | None:
        if value is not None and not REPOSITORY.fullmatch(value):
            raise ValueError(
                f"{errors.shown(value)} is no repository of the hub. Write ORGANISATION/NAME: "
                "letters, digits, `-`, `_` and `.`, no two of the last three together, at most 80."
            )
        return value

    @pydantic.field_validator("dir")
    @classmethod
    def _can_be_a_folder(cls, value: Path) -> Path:
        text = str(value)
        if not text.isprintable():
            raise ValueError(f"{errors.shown(text)} holds a control character. Delete it.")
        if value in (Path(), Path("..")) or value == Path(value.anchor):
            raise ValueError(f"{errors.shown(text)} is no folder for one run. Name one below it.")
        longest = max(len(part.encode()) for part in value.parts)
        if longest > 200 or len(text.encode()) > 1000:  # chosen: room for the files inside
            raise ValueError(
                f"a path of {len(text.encode())} bytes, a part of {longest}. At most 1000 and 200 "
                "fit. Shorten it."
            )
        return value
