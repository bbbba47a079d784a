"""RoBERTa-base on a GLUE task with LoLDU: 18,432 trained parameters and a new head (arXiv 2410.13618, GLUE).

    accelerate launch recipes/roberta_glue_loldu.py --glue sst2      # mnli, mrpc, cola, qnli, qqp, rte, stsb
    accelerate launch recipes/roberta_glue_loldu.py --glue rte --model DIR --data FILE --eval-data FILE

Settings and their sources (the paper's tables, as transcribed; its body text was not available):
    rank 768 (full) on query and value, scale 1, the learning rates, epochs and lengths below: the paper's table of
    settings; rank and modules follow from its count 24 x 769 (it trains the scale too, we do not). Our choice, since
    not listed: batch 32, linear schedule with 6 % warm-up (RoBERTa's), the same learning rate for the head, the last
    evaluation rather than the best.
Expected results, from the paper's table: SST-2 94.8, MRPC 89.9, QNLI 92.9, RTE 81.3 accuracy; CoLA 63.8, STS-B 92.3
correlation; one seed. Machine, time and result of our run: not yet run.
"""

import argparse
import sys
from functools import partial

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig
from loldu import recipe

TASKS = {  # text columns, learning rate, epochs, length
    "mnli": (("premise", "hypothesis"), 3e-4, 10, 128),
    "sst2": (("sentence",), 4e-4, 10, 128),
    "mrpc": (("sentence1", "sentence2"), 3e-4, 20, 512),
    "cola": (("sentence",), 2e-4, 20, 128),
    "qnli": (("question", "sentence"), 2e-4, 10, 512),
    "qqp": (("question1", "question2"), 3e-4, 20, 512),
    "rte": (("sentence1", "sentence2"), 4e-4, 20, 512),
    "stsb": (("sentence1", "sentence2"), 2e-4, 30, 512),
}


def roberta_glue(task: str) -> Config:
    """The paper's run of one task, tested on the published validation split."""
    if task not in TASKS:
        raise ValueError(f"--glue must be one of {', '.join(TASKS)}, got {task}")
    columns, rate, epochs, length = TASKS[task]
    data, split = f"nyu-mll/glue:{task}", "validation_matched" if task == "mnli" else "validation"
    return Config(
        model=ModelConfig(model="FacebookAI/roberta-base"),
        data=DataConfig(data=data, eval_data=f"{data}:{split}", text_columns=columns, max_length=length),
        adapter=AdapterConfig(rank=768, targets=("query", "value"), modules_to_save=("classifier",)),
        optimizer=OptimizerConfig(
            learning_rate=rate, batch_size=32, epochs=epochs, schedule="linear", warmup_ratio=0.06, seed=42
        ),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--glue", default="sst2")
    chosen, sys.argv[1:] = parser.parse_known_args()
    if {"-h", "--help"} & {*sys.argv}:
        print(f"--glue {{{','.join(TASKS)}}}  (default: sst2), and the settings, which options replace:\n")
    raise SystemExit(recipe("roberta_glue_loldu", partial(roberta_glue, chosen.glue), None))
