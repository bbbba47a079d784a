"""`loldu eval`: the options and help; the work is imported when it is called."""

from __future__ import annotations

from typing import Annotated

from launcher.inference.options import Quantize
from launcher.options import Option


def evaluate(
    model: str,
    *,
    tasks: Annotated[tuple[str, ...], Option(name="tasks")],
    limit: int = 0,
    json: bool = False,
    adapter: str | None = None,
    base: str | None = None,
    compare: bool = True,
    prompt_template: str | None = None,
    max_tokens: int = 64,
    out: str | None = None,
    dtype: str = "auto",
    quantize: Quantize = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Evaluate a model, an adapter or a run on files and tasks, beside its base, with standard errors.

    A file of records gives the loss per token and the share of answers that match exactly; a file of questions with
    choices gives the accuracy by likelihood; other names are tasks of lm-evaluation-harness. With torchrun the
    processes share the samples.

    Args:
        model: A model (folder, or hub name in the local cache), an adapter folder, or a run folder (runs/NAME).
        tasks: Files of records or of questions with choices, YAML files and names of tasks of lm-evaluation-harness.
        limit: Use only the first N samples of each task; 0 means all.
        json: Print JSON alone on standard output.
        adapter: Adapter or run folder to load on top of the model.
        base: Base model to use instead of the one that the adapter or run names.
        compare: Evaluate the base beside the adapter.
        prompt_template: auto, short, alpaca, chat, none or a FILE. Default: the run's; without a run, the model's chat
            template, or alpaca if it has none.
        max_tokens: Maximum number of tokens in an answer; 0 generates none, which leaves out the exact match.
        out: JSON file of the results. Default: eval.json in the run folder, if there is one.
        dtype: auto (the run's, or the one of the model's files), float32, bfloat16 or float16.
        quantize: Precision of the base weights: auto (as in training), none, int8, nf4 or fp4.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...
        trust_remote_code: Run Python code from the model's folder, and what a task's YAML file names. Only for models
            and files that you trust.
    """
    from launcher.evaluation.run import Asked
    from launcher.evaluation.run import run as act

    act(
        Asked(
            model=model, tasks=tasks, limit=limit, json=json, adapter=adapter, base=base, compare=compare,
            prompt_template=prompt_template, max_tokens=max_tokens, out=out, dtype=dtype, quantize=quantize,
            device=device, trust_remote_code=trust_remote_code,
        )
    )  # fmt: skip
