"""Log-likelihoods of choices by lm-eval's own code and by itune's, on the rows of an evaluation.

    itune eval --run RUN --wordings first
    python benchmarks/lm_eval_equal.py RUN/evals/wordings-1 RUN/model [RUN/merged ...]

The rows become a task of lm-eval (`multiple_choice`, the model's chat template put on by lm-eval);
each further argument is a model to score, a folder with an adapter or a whole model. A choice ends
with the stop token, as an answer is trained. Needs `pip install lm_eval`. Prints for each model
both accuracies, how far the log-likelihoods are apart in nats, and how many rows are decided
otherwise; ends with 1 where any is. lm-eval counts white space at the end of a prompt to the
choice, for all choices of a row alike, so they are compared by what they have over the first.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from itune import configs, formats, likelihoods, locating, models, recipes

TASK = """\
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {rows}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def asked(folder: Path, stop: str) -> list[dict[str, Any]]:
    """The rows of an evaluation: prompt, choices with their stop token, place of the right one."""
    kept = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    choices = sorted({each for row in kept for each in row["references"]})
    return [
        {
            "prompt": row["prompt"],
            "choices": [choice + stop for choice in choices],
            "label": choices.index(row["references"][0]),
        }
        for row in kept
    ]


def of_lm_eval(rows: list[dict[str, Any]], folder: Path, base: str | None) -> np.ndarray:
    """Log-likelihoods in nats [rows, choices], by lm-eval."""
    with tempfile.TemporaryDirectory() as kept:
        written = Path(kept) / "rows.jsonl"
        written.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (Path(kept) / "choices.yaml").write_text(TASK.format(rows=written))
        model = HFLM(
            pretrained=base or str(folder),
            peft=str(folder) if base else None,
            tokenizer=str(folder),
            dtype="float32",
            device="cpu",
            batch_size=8,
        )
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=["choices"],
            task_manager=TaskManager(include_path=kept, include_defaults=False),
            apply_chat_template=True,
            log_samples=True,
            bootstrap_iters=0,
        )
    samples = sorted(found["samples"]["choices"], key=lambda each: each["doc_id"])
    return np.array([[float(answer[0][0]) for answer in each["resps"]] for each in samples])


def of_itune(rows: list[dict[str, Any]], folder: Path, stop: str) -> np.ndarray:
    """The same by itune."""
    wanted = recipes.Model(name=str(folder), dtype="float32")
    model = models.load(wanted, models.placement(wanted)).eval()
    encoder = configs.encoder(wanted)
    prompts = [[formats.Message("user", row["prompt"])] for row in rows]
    choices = [choice.removesuffix(stop) for choice in rows[0]["choices"]]
    return likelihoods.chances(model, encoder, prompts, choices).nats


def main() -> int:
    """Compare every model; 0 where all rows are decided alike."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    given = parser.parse_args()
    otherwise = 0
    for folder in given.models:
        encoder = configs.encoder(recipes.Model(name=str(folder)))
        stop = encoder.tokenizer.convert_ids_to_tokens(encoder.stop_id)
        rows = asked(given.evaluation, stop)
        settings = locating.adapter_of(str(folder))
        base = None if settings is None else settings["base_model_name_or_path"]
        theirs, ours = of_lm_eval(rows, folder, base), of_itune(rows, folder, stop)
        right = np.array([row["label"] for row in rows])
        apart = np.abs((theirs - theirs[:, :1]) - (ours - ours[:, :1])).max()
        other = int((theirs.argmax(1) != ours.argmax(1)).sum())
        print(
            f"{folder}: accuracy {(ours.argmax(1) == right).mean():.4f} by itune, "
            f"{(theirs.argmax(1) == right).mean():.4f} by lm-eval; log-likelihoods within "
            f"{apart:.1e} nats, {other} of {len(rows)} rows decided otherwise"
        )
        otherwise += other
    return int(otherwise > 0)


if __name__ == "__main__":
    sys.exit(main())
