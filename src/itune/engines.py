"""Another engine for answers, by the name of `--engine`: vLLM, a run's LoRA served on its base.

Light: vLLM is imported when a model is served, and is no dependency of itune's.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from itune import errors, launchers, yamls

NAMES = ("vllm",)
CHUNK = 2048  # chosen: so many answers are the most that a kill loses; vLLM batches within them
# What itune decides, and what would run code or read pickles.
OURS = {
    *("model", "tokenizer", "skip_tokenizer_init", "generation_config", "revision", "dtype"),
    *("enable_lora", "max_lora_rank", "trust_remote_code", "load_format"),
}
# https://docs.vllm.ai: the values of `max_lora_rank`
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Fields of LoraConfig that vLLM refuses or, worse, leaves unread.
UNREAD = (
    *("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias"),
    *(
        "trainable_token_indices",
        "target_parameters",
        "layer_replication",
        "alora_invocation_tokens",
    ),
)
FOLLOWED = {
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("max_new_tokens", "min_new_tokens", "eos_token_id"),
}


@dataclass(frozen=True, slots=True)
class Engine:
    """What `--engine` names. options: arguments of vLLM's `LLM`, such as tensor_parallel_size."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def asked(given: str | None, processes: int | None = None) -> Engine | None:
    """The engine of `--engine NAME[:KEY=VALUE,...]`; None for itune's own.

    Raises OptionError for what cannot be, EnvironmentRefusal where it is not installed.
    """
    if given is None:
        return None
    name, _, rest = given.partition(":")
    if name not in NAMES:
        raise errors.OptionError(
            f"--engine {given}: no such engine.{errors.nearest(name, NAMES)} Left out, itune "
            "answers itself."
        )
    options = {}
    for item in filter(None, rest.split(",")):
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise errors.OptionError(f"--engine {given}: {item}: expected KEY=VALUE.")
        if key in OURS:
            raise errors.OptionError(
                f"--engine {given}: {key}: itune sets this itself. Leave it out."
            )
        options[key] = yamls.parse_value(value, f"--engine {given}", errors.OptionError)
    if (processes or 1) > 1 or launchers.started() > 1:
        raise errors.OptionError(
            "--engine vllm: in several processes? vLLM starts its own. Leave --processes and the "
            "launcher out; --engine vllm:tensor_parallel_size=N takes N GPUs."
        )
    if importlib.util.find_spec(name) is None:
        raise errors.EnvironmentRefusal(
            "--engine vllm: not installed here. It is bound to one build of torch, so give it an "
            "environment of its own: pip install vllm, then itune beside it."
        )
    return Engine(name, options)


# --- a served model -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """A model in an engine, told from one in this process by its type.

    config, generation_config: transformers' own of it. adapter: a LoRARequest; None for the base.
    """

    llm: Any
    config: Any
    generation_config: Any
    adapter: Any = None

    def adapted(self, location: str) -> Served:
        """The same engine with the adapter of a folder on it; it was served with room for that."""
        request = importlib.import_module("vllm.lora.request").LoRARequest
        return replace(self, adapter=request("tuned", 1, str(Path(location).absolute())))

    def answers(
        self, prompts: Sequence[Sequence[int]], sampling: Sequence[Mapping[str, Any]]
    ) -> Iterator[list[int]]:
        """The ids of each answer in order, with the token that ended it. sampling: see `sampling`.

        Raises ModelError for an answer that vLLM did not finish.
        """
        vllm = importlib.import_module("vllm")
        for start in range(0, len(prompts), CHUNK):
            among = slice(start, start + CHUNK)
            made = self.llm.generate(
                [vllm.TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts[among]],
                [vllm.SamplingParams(**each) for each in sampling[among]],
                use_tqdm=False,
                lora_request=self.adapter,
            )
            for each, given in zip(made, sampling[among], strict=True):
                yield _ids(each.outputs[0], given["stop_token_ids"])


def _ids(output: Any, stops: Sequence[int]) -> list[int]:
    ids = [int(each) for each in output.token_ids]
    if output.finish_reason not in ("stop", "length"):
        raise errors.ModelError(
            f"--engine vllm: an answer ended as {output.finish_reason!r}, neither stopped nor of "
            "full length. Look at what vLLM says above."
        )
    ended = bool(ids) and ids[-1] in stops
    if output.finish_reason == "stop" and not ended and isinstance(output.stop_reason, int):
        ids.append(output.stop_reason)
    return ids


def serve(
    engine: Engine,
    location: str,
    wanted: Any,
    *,
    dtype: str,
    family: str,
    revision: str | None = None,
    adapter: str | None = None,
) -> Served:
    """The model at a folder or hub id in an engine; an adapter's folder gives it on its base.

    wanted: the GenerationConfig that it will be asked with. dtype: as vLLM names it. adapter: the
    folder of one that `adapted` will put on it. Raises ModelError, OptionError: what cannot be
    served is refused before the engine starts.
    """
    from itune import locating, picking, weights

    _refuse_family(location, family)
    base, ours = location, adapter
    if (settings := locating.adapter_of(location)) is not None:
        base, ours = str(settings["base_model_name_or_path"]), location
        revision = settings.get("revision")
        weights.check(base)
    options: dict[str, Any] = {"enable_lora": False}
    if ours is not None:
        options = {"enable_lora": True, "max_lora_rank": _rank(ours)}
    if locating.adapter_of(base) is not None:
        raise errors.OptionError(
            f"--engine vllm: {base} is an adapter itself, and vLLM serves one on a whole model. "
            "Merge it (output.merge) and name its merged/ folder with --model."
        )
    config, generation = _configs(base, revision)
    if most := engine.options.get("max_model_len"):
        config.max_position_embeddings = min(config.max_position_embeddings, most)
    sampling(picking.resolved(Served(None, config, generation), wanted), 1, 0)
    load = importlib.import_module("vllm").LLM
    arguments = {
        "model": base,
        "revision": revision,
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "trust_remote_code": False,
        "load_format": "safetensors",
        **options,
        **engine.options,
    }
    made = Served(_loaded(location, lambda: load(**arguments)), config, generation)
    return made if ours is None or ours == adapter else made.adapted(ours)


def _loaded(location: str, call: Callable[[], Any]) -> Any:
    from itune import locating

    try:
        return locating.from_library(location, call)
    except TypeError as error:
        raise errors.OptionError(f"--engine vllm: {' '.join(str(error).split())}") from error


def _configs(base: str, revision: str | None) -> tuple[Any, Any]:
    """The config of a model and its generation config, as the loaded model would have them."""
    import transformers

    from itune import locating

    config = locating.from_library(
        base,
        lambda: transformers.AutoConfig.from_pretrained(
            base, revision=revision, trust_remote_code=False
        ),
    )
    try:
        found = transformers.GenerationConfig.from_pretrained(base, revision=revision or "main")
    except OSError:  # most small models have none
        found = transformers.GenerationConfig.from_model_config(config)
    return config, found


def _refuse_family(location: str, family: str) -> None:
    if family != "causal":
        raise errors.OptionError(
            f"--engine vllm: {location} is a {family} model, and decoders alone are served. Leave "
            "--engine out."
        )


def _rank(location: str) -> int:
    """The `max_lora_rank` for an adapter. Raises OptionError for one that vLLM does not read."""
    from itune import locating

    settings = locating.adapter_of(location) or {}
    kind, why = str(settings.get("peft_type", "")).lower(), ""
    unread = next((name for name in UNREAD if settings.get(name)), None)
    if kind != "lora":
        why = f"a {kind} adapter"
    elif unread is not None:
        why = f"an adapter with {unread}"
    elif settings.get("bias", "none") != "none":
        why = f"an adapter with bias: {settings['bias']}"
    elif int(settings["r"]) > RANKS[-1]:
        why = f"an adapter of rank {settings['r']}"
    if why:
        raise errors.OptionError(
            f"--engine vllm: {location} is {why}, which vLLM does not serve. Merge it "
            "(output.merge) and name its merged/ folder with --model, or leave --engine out."
        )
    return next(rank for rank in RANKS if rank >= int(settings["r"]))


# --- how tokens are picked ------------------------------------------------------------------


def sampling(fields: Mapping[str, Any], room: int, seed: int) -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams for one prompt.

    fields: a GenerationConfig's, resolved. room: the most tokens an answer may have; seed: where
    it is drawn. Raises OptionError for a field that vLLM does not have.
    """
    from itune import picking

    for name in sorted(picking.FOLLOWED - FOLLOWED):
        if fields.get(name) and fields[name] != picking.DEFAULTS.get(name):
            _refuse_field(f"{name}: {fields[name]}")
    if found := picking.refused(fields):
        _refuse_field(found)
    made: dict[str, Any] = {
        "max_tokens": room,
        "min_tokens": int(fields.get("min_new_tokens") or 0),
        "stop_token_ids": [int(each) for each in fields["eos_token_id"]],
        "ignore_eos": True,  # ours are all in stop_token_ids
        "detokenize": False,
        "repetition_penalty": float(fields["repetition_penalty"]),
        "temperature": 0.0,
    }
    if fields["do_sample"]:
        made |= {"temperature": float(fields["temperature"]), "seed": seed}
        made |= {name: fields[name] for name in ("top_k", "top_p", "min_p") if fields.get(name)}
    return made


def _refuse_field(found: str) -> None:
    raise errors.OptionError(
        f"--engine vllm: generation.{found}: vLLM has no such field. Leave one of them out."
    )
