"""What is checked of a recipe as written, before its fields: secrets, contradictions, and `--set`.

These look at the document and not at the records, for they name lines, and must find their faults
beside those of the fields.
"""

from __future__ import annotations

import re
from typing import Any

from itune import elsewhere, errors, launchers, records, yamls

TRAINING_COMMANDS = ("pretrain", "tune")
SOURCES = (("data", "train"), ("data", "eval"))
STOPS: tuple[tuple[str, str], tuple[str, str]] = (
    ("training", "max_steps"),
    ("training", "num_train_epochs"),
)
TOKENS_PER_STEP = 16384

# What the types of models call their sizes; a model without any of it is built, and even trained.
SIZE = re.compile(
    r"(hidden|intermediate|embedding|vocab)_size|hidden_dim|emb_dim|embedding_dim|head_dim|dim"
    r"|num_(hidden_|encoder_|decoder_)?layers|(encoder|decoder)_layers|word_embed_proj_dim"
    r"|(\w+_)?attention_heads|num_(key_value_)?heads|(\w+_)?ffn_dim|max_position_embeddings"
    r"|n_(embd|layers?|heads?|positions|inner|ctx)|d_(model|kv|ff|head|inner)"
)
EPSILON = re.compile(r"(\w+_)?(eps|epsilon)")
DRAWN = re.compile(r"initializer_(range|factor)|(\w+_)?init_std")
SHARE = re.compile(r"\w*(dropout|pdrop|layerdrop)\w*")

# Names of keys whose values are secrets; not use_cls_token, eos_token, tokens_per_step.
SECRET_KEY = re.compile(
    r"(^|_)(api_?key|access_key|private_key|secret_key|secret|password|passwd|passphrase"
    r"|credentials?)$"
    r"|^((hub|hf|access|auth|use_auth|api|bearer|refresh|wandb|github|gitlab)_)?token$",
    re.IGNORECASE,
)


def check(document: yamls.Document, command: str) -> None:
    """Note every fault of the document that no single field shows."""
    if document.data.pop("name", None) is not None:
        document.fault(
            ("name",), "unknown key. A recipe is named by its file; the model's name is model.name."
        )
    _refuse_secrets(document, document.data, ())
    _check_model(document)
    _check_data(document, command)
    _check_training(document)
    _check_sharding(document)
    metrics = _section(document, "evaluation").get("metrics")
    if isinstance(metrics, list):
        records.metric_faults(document, ("evaluation", "metrics"), metrics, of_model=True)


def _refuse_secrets(document: yamls.Document, data: Any, key: yamls.Key) -> None:
    """Note each secret without its value, and take it out so that nothing else quotes it."""
    told = "secrets do not belong in a recipe. Set them in the environment (HF_TOKEN)."
    if isinstance(data, dict):
        for name in list(data):
            inside = (*key, name)
            column = bool(key) and key[-1] in ("rename", "data_files")
            if SECRET_KEY.search(name) and not column and data[name] is not None:
                document.fault(inside, told)
                del data[name]
            else:
                _refuse_secrets(document, data[name], inside)
    elif isinstance(data, list):
        for index, value in enumerate(data):
            _refuse_secrets(document, value, (*key, index))
    elif isinstance(data, str) and errors.masked(data) != data:
        document.fault(key, told)


def _section(document: yamls.Document, name: str) -> dict[str, Any]:
    """A section as written; empty where it is missing or no mapping, which is told elsewhere."""
    section = document.data.get(name)
    return section if isinstance(section, dict) else {}


def _both(document: yamls.Document, first: yamls.Key, second: yamls.Key) -> None:
    places = [
        document.overrides.get(key) or f"line {document.line(key)}" for key in (first, second)
    ]
    document.fault(
        second,
        f"given ({places[1]}) together with {yamls.dotted(first)} ({places[0]}). Keep one.",
    )


def _check_model(document: yamls.Document) -> None:
    model = _section(document, "model")
    given = [key for key in ("name", "from_scratch") if model.get(key) is not None]
    if len(given) == 2:
        _both(document, ("model", "name"), ("model", "from_scratch"))
    elif not given and isinstance(document.data.get("model"), dict):
        document.fault(("model",), "neither name nor from_scratch is given. Give one.")
    scratch = model.get("from_scratch")
    if isinstance(scratch, dict):
        _check_scratch(document, scratch)
    adapter = document.data.get("adapter")
    if isinstance(adapter, dict):
        _check_adapter(document, adapter)
    quantized = document.data.get("quantization")
    if isinstance(quantized, dict):
        if not isinstance(quantized.get("quant_method"), str):
            document.fault(
                ("quantization",),
                "quant_method is missing. Add one, such as quant_method: bitsandbytes.",
            )
        if adapter is None:
            document.fault(
                ("quantization",),
                "weights of few bits cannot be trained. Add an adapter, such as "
                "adapter: {peft_type: lora}, or take the section out.",
            )


def _check_adapter(document: yamls.Document, adapter: dict[str, Any]) -> None:
    kind = adapter.get("peft_type")
    if not isinstance(kind, str):
        document.fault(("adapter",), "peft_type is missing. Add one, such as peft_type: lora.")
    for name, value in adapter.items():
        # Of other methods `alpha` and the like may be fields.
        if name in elsewhere.LORA and str(kind or "lora").lower() == "lora":
            document.fault(("adapter", name), f"unknown key. Here it is {elsewhere.LORA[name]}.")
        elif isinstance(value, str) and len(value) < errors.LONGEST_VALUE:
            # peft takes a text as it is: "8" fails in its sums, and "false" counts as true.
            plain = yamls.resolve(value.strip())
            if isinstance(plain, int | float):
                wanted = "true or false" if isinstance(plain, bool) else "a number"
                document.fault(
                    ("adapter", name),
                    f"expected {wanted}, found the text {errors.shown(value)}. Take the quotes "
                    "off.",
                )


def _check_scratch(document: yamls.Document, scratch: dict[str, Any]) -> None:
    """Note numbers from which transformers makes a model all the same, or fails without a name."""
    for name, value in scratch.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if SIZE.fullmatch(name) and value < 1:
            wanted = "a whole number from 1"
        elif (EPSILON.fullmatch(name) or DRAWN.fullmatch(name)) and value < 0:
            wanted = "a number from 0"
        elif SHARE.fullmatch(name) and not 0 <= value <= 1:
            wanted = "a share from 0 to 1"
        elif name == "rope_theta" and value <= 0:
            wanted = "a number above 0"
        else:
            continue
        document.fault(("model", "from_scratch", name), f"expected {wanted}, found {value}.")


def _check_data(document: yamls.Document, command: str) -> None:
    data = _section(document, "data")
    if "train" in data and not data["train"]:
        document.fault(("data", "train"), "expected at least one source, found none. Add one.")
    for side in ("train", "eval"):
        sources = data.get(side)
        for index, source in enumerate(sources if isinstance(sources, list) else [sources]):
            if isinstance(source, dict):
                key = ("data", side, index) if isinstance(sources, list) else ("data", side)
                _check_template(document, key, source.get("template"), command)
                if source.get("template") and source.get("format"):
                    _both(document, (*key, "template"), (*key, "format"))


def _check_template(document: yamls.Document, key: yamls.Key, name: Any, command: str) -> None:
    if isinstance(name, str) and name and command in TRAINING_COMMANDS:
        try:
            records.find(name, "prompts", errors.TemplateError)
        except errors.TemplateError as error:
            document.fault((*key, "template"), str(error))


def _check_training(document: yamls.Document) -> None:
    training = _section(document, "training")
    steps, epochs = (training.get(key[-1]) for key in STOPS)
    if epochs is not None and isinstance(steps, int) and steps > 0:
        _both(document, *STOPS)
    tokens = training.get("tokens_per_step", TOKENS_PER_STEP)
    micro = training.get("micro_batch_tokens")
    if isinstance(micro, int) and isinstance(tokens, int) and micro > tokens:
        document.fault(
            ("training", "micro_batch_tokens"),
            f"{micro} is more than tokens_per_step, {tokens}. Lower it or leave it out.",
        )
    masked, other = (training.get(name) for name in ("mask_replace_prob", "random_replace_prob"))
    masked, other = 0.8 if masked is None else masked, 0.1 if other is None else other
    if (
        all(isinstance(share, int | float) for share in (masked, other))
        and masked + other > 1 + 1e-9
    ):
        document.fault(
            ("training", "random_replace_prob"),
            f"{other} and mask_replace_prob, {masked}, are shares of the same tokens, and more "
            "than all of them. Lower one.",
        )
    if training.get("save_steps") == "auto" and not _section(document, "launch").get("mtbf_hours"):
        document.fault(
            ("training", "save_steps"),
            "auto goes by how often a device fails, and launch.mtbf_hours does not say. Give it: "
            "some 50,000 for a GPU in a well-kept cluster, a few for one that is lent until "
            "somebody pays more.",
        )
    for name in ("patience", "load_best_model_at_end"):
        if training.get(name) and not (
            _section(document, "data").get("eval") and training.get("heldout_rows", 1)
        ):
            document.fault(
                ("training", name),
                "goes by the held-out loss, and none is measured. Give data.eval, and leave "
                "training.heldout_rows above 0.",
            )
        if training.get(name) and training.get("swa_start") is not None:
            _both(document, ("training", name), ("training", "swa_start"))


def _check_sharding(document: yamls.Document) -> None:
    """Note what does not go with a model that is cut over processes, and other names for it."""
    launch, training = _section(document, "launch"), _section(document, "training")
    for name in [key for key in launch if key in ("deepspeed", "deepspeed_config", "zero_stage")]:
        document.fault(("launch", name), f"itune runs no DeepSpeed. {launchers.ZERO}")
        del launch[name]
    if launch.get("fsdp") is not True:
        if launch.get("cpu_offload") is True:
            document.fault(
                ("launch", "cpu_offload"),
                "only parts of a model that is cut are kept in the machine's memory. Set "
                "launch.fsdp: true too, or take it out.",
            )
        return
    beside = {
        ("quantization",): "weights of few bits are not cut",
        ("training", "torch_compile"): "compiled layers are not cut",
        ("training", "optim"): "adafactor keeps moments of rows and columns, which are not cut",
        ("training", "swa_start"): "the mean of the weights is not cut",
    }
    unfit = (
        bool(_section(document, "quantization")),
        training.get("torch_compile") is True,
        training.get("optim") == "adafactor",
        training.get("swa_start") is not None,
    )
    for (key, why), found in zip(beside.items(), unfit, strict=True):
        if found:
            document.fault(key, f"beside launch.fsdp: {why}. Take one of the two out.")


# --- options over the file -----------------------------------------------------------------------


def override(document: yamls.Document, text: str) -> None:
    """Apply one `key=value`; what is wrong with it joins the faults."""
    name, sign, value = text.partition("=")
    name = name.strip()
    secret = SECRET_KEY.search(name.rpartition(".")[2])
    place = f"--set {errors.masked(errors.inert(f'{name}=...' if secret else text))}"
    if not sign or not all(name.split(".")):
        document.faults.append(f"{place}: expected key=value, such as training.max_steps=100.")
        return
    try:
        put(document, _key(document, name), yamls.parse_value(value, place, document.kind), place)
    except errors.UserError as error:
        document.faults.append(str(error))
    except ValueError as error:
        document.faults.append(f"{place}: {error}")


def _key(document: yamls.Document, name: str) -> yamls.Key:
    """The key of a dotted name; raises ValueError where the document has no place for it."""
    key: list[str | int] = []
    here = document.data
    parts = name.split(".")
    while parts:
        if here == []:  # a list of none becomes the first that is set
            here = None
        if isinstance(here, list):
            index = _index(here, parts[0], yamls.dotted(tuple(key)))
            key.append(index)
            here = here[index]
            del parts[: parts[0].isdigit()]  # the index of a list of one may be left out
        elif here is None or isinstance(here, dict):
            part = parts.pop(0)
            if part.isdigit() and int(part) and isinstance(here, dict) and tuple(key) in SOURCES:
                name, rest = yamls.dotted(tuple(key)), "".join(f".{each}" for each in parts)
                raise ValueError(
                    f"{name} is one source, not a list. Write {name}{rest}; several go in the "
                    "recipe, as a list."
                )
            if part != "0" or tuple(key) not in SOURCES:  # one mapping is a list of one
                key.append(part)
                here = here.get(part) if here else None
        else:
            raise ValueError(f"{yamls.dotted(tuple(key))} is {errors.shown(here)}, not a section.")
    return tuple(key)


def _index(values: list[Any], part: str, name: str) -> int:
    if part.isdigit() and int(part) < len(values):
        return int(part)
    if not part.isdigit() and len(values) == 1:
        return 0
    example = f"{name}.0" if part.isdigit() else f"{name}.0.{part}"
    raise ValueError(f"{name} is a list of {len(values)}. Give an index, from 0: {example}.")


def put(document: yamls.Document, key: yamls.Key, value: Any, place: str) -> None:
    """Set a value on behalf of an option, making the sections above it."""
    here = document.data
    for end, part in enumerate(key[:-1], start=1):
        if not isinstance(here, dict | list):
            break
        if isinstance(here, dict) and here.get(part) in (None, []):
            here[part] = {}
            document.overrides[key[:end]] = place
        here = here[part]
    if not isinstance(here, dict | list):
        return  # the holder's own fault will be reported
    document.put(key, value, place)
    for mine, other in (STOPS, STOPS[::-1]):  # the command line wins over the file
        if key == mine and value is not None and other not in document.overrides:
            document.data["training"].pop(other[-1], None)
