"""`loldu generate | predict | chat | merge | export-lora`: options and help. Their work is imported when called."""

from __future__ import annotations

from typing import Annotated

from launcher.inference.options import Answering, Classifying, Drawing, Kind
from launcher.options import Option


def generate(
    model: str,
    *,
    prompt: str | None = None,
    prompt_file: str | None = None,
    input: str = "",
    data: str | None = None,
    limit: int = 0,
    json: bool = False,
    how: Answering = Answering(max_tokens=256),  # noqa: B008 (frozen)
    drawing: Drawing = Drawing(),  # noqa: B008 (frozen)
) -> None:
    """Answer one prompt, or every record of a file; or draw pictures.

    Args:
        model: A model (folder, or hub name in the local cache), an adapter folder, or a run folder (runs/NAME).
        prompt: The instruction. Without --prompt, --prompt-file and --data, it is read from standard input.
        prompt_file: Text file with the instruction; - reads standard input.
        input: Input that belongs to the instruction, for templates with {input}.
        data: JSON, JSONL or parquet file of records. Each answer is shown next to the expected one.
        limit: Answer only the first N records; 0 means all.
        json: Write one JSON object per line: prompt, answer, tokens, complete; with --data also index, expected, match;
            with --prompts prompt, seed, file.
        how: The model and its sampling.
        drawing: The pictures.
    """
    from launcher.inference.generate import generate as run

    run(
        model, how, prompt=prompt, prompt_file=prompt_file, input=input, data=data, limit=limit, json=json,
        drawing=drawing,
    )  # fmt: skip


def predict(
    model: str,
    *,
    text: tuple[str, ...] = (),
    images: tuple[str, ...] = (),
    data: str | None = None,
    limit: int = 0,
    json: bool = False,
    how: Classifying = Classifying(),  # noqa: B008 (frozen)
) -> None:
    """Name the classes of texts or images, or predict their numbers, with a classifier.

    Args:
        model: A run folder (runs/NAME), an adapter folder, or a model with a classification head.
        text: The text to classify; two for a model of pairs of texts.
        images: Files of images.
        data: Records as for training (JSON, JSONL, CSV, parquet), or a folder or .zip of images by class. If they have
            labels, the share of right ones is shown at the end.
        limit: Classify only the first N records; 0 means all.
        json: Write one JSON object per line: class and probabilities, or value; with --data also index, expected,
            match; with --images image.
        how: The model.
    """
    from launcher.inference.predict import predict as run

    run(model, how, text=text, images=images, data=data, limit=limit, json=json)


def chat(
    model: tuple[str, ...] = (),
    *,
    system: str | None = None,
    server: str | None = None,
    model_id: Annotated[str | None, Option(name="model")] = None,
    api_key_file: str | None = None,
    how: Answering = Answering(),  # noqa: B008 (frozen)
) -> None:
    """Chat with a model in the terminal, or answer lines from a pipe.

    Args:
        model: A model (folder, or hub name in the local cache), an adapter folder, or a run folder (runs/NAME).
        system: System prompt: the role that the model plays. Needs a chat template.
        server: Chat with a model of a server instead (http://HOST:PORT), such as loldu serve.
        model_id: With --server: the model or adapter to chat with. Default: the first one, the base.
        api_key_file: With --server: file with the key that the server asks for. Default: the variable LOLDU_API_KEY.
        how: The model and its sampling.
    """
    if server is not None:
        if model:
            raise ValueError(f"--server has its own models: leave {model[0]} out, or give --model ID")
        from launcher.inference.server_chat import chat_with_server

        return chat_with_server(server, model_id, how, system=system, api_key_file=api_key_file)
    if model_id is not None or api_key_file is not None:
        option = "--model" if model_id is not None else "--api-key-file"
        raise ValueError(f"{option} belongs to --server URL: give the model's folder without an option")
    if len(model) != 1:
        raise ValueError(f"loldu chat takes one model, got {len(model)}: loldu chat MODEL, or loldu chat --server URL")
    from launcher.inference.chat import chat as run

    run(model[0], how, system=system)


def merge(
    adapter: str,
    *,
    out: str,
    base: str | None = None,
    dtype: str = "auto",
    quantize: Kind = "none",
    data: str | None = None,
    shard_gb: float = 5.0,
    check: bool = True,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Merge an adapter into its base model and write a plain Hugging Face model.

    Args:
        adapter: Adapter folder, or run folder (runs/NAME).
        out: Folder to write. It must not exist, or be empty.
        base: Base model to use instead of the one that the adapter or run names.
        dtype: Of the written weights: auto (each weight as in the base), float32, bfloat16 or float16.
        quantize: Quantise the merged linear layers to 8 or 4 bits. The loss before and after is printed.
        data: Records to measure that loss on (the first 200), instead of the run's held-out records.
        shard_gb: Maximum size of one weight file, in GB.
        check: Compare the logits of the merged model with those of base and adapter.
        device: Where the check runs: auto (a GPU if there is one), cpu, cuda, ...
        trust_remote_code: Run Python code from the model's folder, and copy it. Only for models that you trust.
    """
    from launcher.inference.merge import merge as run

    run(
        adapter, out=out, base=base, dtype=dtype, quantize=quantize, data=data, shard_gb=shard_gb, check=check,
        device=device, trust_remote_code=trust_remote_code,
    )  # fmt: skip


def export_lora(
    adapter: str,
    *,
    out: str,
    base: str | None = None,
    rank: int | None = None,
    tolerance: float = 1e-4,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Write an adapter as a LoRA adapter that stock PEFT and LoRA servers can load.

    Args:
        adapter: Adapter folder, or run folder (runs/NAME).
        out: Folder to write. It must not exist, or be empty.
        base: Base model to use instead of the one that the adapter or run names.
        rank: Highest rank of a layer in the LoRA adapter; above it, the best approximation is written and its error is
            measured. Default: the trained rank, which is exact.
        tolerance: Largest allowed difference between logits, in float32. Above it, nothing is written.
        device: Where to compute: auto (a GPU if there is one), cpu, cuda, ...
        trust_remote_code: Run Python code from the model's folder. Only for models that you trust.
    """
    from launcher.inference.export import export_lora as run

    run(
        adapter, out=out, base=base, rank=rank, tolerance=tolerance, device=device, trust_remote_code=trust_remote_code
    )  # fmt: skip
