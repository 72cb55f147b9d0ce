"""What other programs call keys of a LoRA, a recipe and a template whose names are not alike."""

from __future__ import annotations

_RANK = ("rank", "lora_rank", "lora_r", "lora_dim")
LORA = {
    **dict.fromkeys(_RANK, "r"),
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    **dict.fromkeys(("lora_target", "lora_target_modules", "targets"), "target_modules"),
}

_STEP = " A step is measured in tokens: training.tokens_per_step."
_LENGTH = " Here it is training.max_length, in tokens."
_ADAPTER = ("peft_type", "lora_alpha", "lora_dropout", "target_modules")
_GENERATION = ("max_new_tokens", "num_beams", "do_sample", "temperature", "top_p", "top_k")
RECIPE = {
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs"), " Here it is training.num_train_epochs."),
    **dict.fromkeys(("steps", "num_steps", "total_steps"), " Here it is training.max_steps."),
    **dict.fromkeys(("lr", "learnrate"), " Here it is training.learning_rate."),
    **dict.fromkeys(
        ("batch_size", "per_device_train_batch_size", "micro_batch_size", "train_batch_size"), _STEP
    ),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accumulation_steps"), _STEP),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "cutoff_len", "block_size"), _LENGTH),
    **dict.fromkeys(("seq_len", "sequence_len", "context_length"), _LENGTH),
    **dict.fromkeys(("scheduler", "lr_scheduler"), " Here it is training.lr_scheduler_type."),
    **dict.fromkeys(("optimizer", "optimiser"), " Here it is training.optim."),
    **dict.fromkeys(
        ("gradient_clipping", "grad_clip", "clip_grad_norm"), " Here it is training.max_grad_norm."
    ),
    "warmup_ratio": " A share of all steps is a training.warmup_steps below 1.",
    "report_to": " Here it is tracking.log_with.",
    "output_dir": " Here it is output.dir.",
    "lora": " Write adapter: {peft_type: lora, r: 16}.",
    "peft": " Write adapter: {peft_type: lora, r: 16}.",
    **{key: f" Here it is adapter.{LORA[key]}." for key in _RANK},
    **{key: f" Here it is adapter.{key}." for key in _ADAPTER},
    **{key: f" Here it is generation.{key}." for key in _GENERATION},
    **dict.fromkeys(("dataset", "datasets", "train_file"), " Here it is data.train.path."),
    **dict.fromkeys(("base_model", "model_name_or_path", "model_id"), " Here it is model.name."),
    **dict.fromkeys(("bf16", "fp16", "precision", "torch_dtype"), " Here it is model.dtype."),
    **dict.fromkeys(("push_to_hub", "hub_model_id"), " Here it is output.push."),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), " Here it is training.eval_steps."),
    "save_strategy": " Here it is training.save_steps.",
    "resume_from_checkpoint": " The same command again goes on from the last checkpoint.",
    **dict.fromkeys(
        ("assistant_only_loss", "completion_only_loss", "train_on_inputs"),
        " Answers alone are learnt; training.train_on says which.",
    ),
}

_RESPONSE = ("answer", "answers", "completion", "label", "output", "target")
_PROMPTS = ("prompt", "instruction", "input", "question", "template", "wordings")
_CHOICES = ("classes", "labels", "options", "label_names", "answer_choices", "id2label")
TEMPLATE = {
    **dict.fromkeys(_RESPONSE, " Here it is response."),
    **dict.fromkeys(_PROMPTS, " Here it is prompts, a list of wordings."),
    **dict.fromkeys(_CHOICES, " Here it is choices, in the order of the labels."),
    **dict.fromkeys(("system_prompt", "system_message"), " Here it is system."),
    **dict.fromkeys(("metric", "score", "scores"), " Here it is metrics, a list."),
    "type": " Here it is task.",
}
