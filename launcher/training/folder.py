"""The run folder: which run it holds, how far that run has got, and what it contains at the end."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launcher.config import Config
from launcher.files import (
    allow_by_umask,
    digest,
    disk_errors,
    read_json,
    read_or_empty,
    sync,
    user_path,
    write_atomically,
)
from launcher.models.denoiser import save_adapter
from launcher.processes import SLOW_S, Communicator, Ranks, agreed, nodes_without
from launcher.progress import growth, silent
from launcher.run_folder import foreign
from launcher.text import one_line, without_secrets
from launcher.training import checkpoint
from launcher.training.changes import changes
from launcher.training.ownership import Ownership

log = logging.getLogger(__name__)
CONFIG_BYTES = 64 << 20  # a longer config.json is damaged
ERROR_CHARACTERS = 2000  # of the error that a failed run leaves
CHECKSUMS = "SHA256SUMS"  # as sha256sum -c reads it


class State:
    """The run folder's `state` file: running, stopped, finished or failed; and `error`, why it failed. Written by rank
    0."""

    def __init__(self, ranks: Ranks, ownership: Ownership):
        self.ranks, self.ownership = ranks, ownership
        self.folder: Path | None = None  # known once it is claimed

    def write(self, state: str) -> None:
        if self.ranks.is_main and self.folder is not None and not self.ownership.lost:
            with disk_errors("the state of the run", self.folder, "give --output elsewhere"):
                write_atomically(self.folder / "state", state + "\n")
                (self.folder / "error").unlink(missing_ok=True)

    def failed(self, *, in_place_of_main: bool = False) -> None:
        """Write `failed`; raises nothing, since another error is being handled. in_place_of_main: rank 0 was killed.

        On a full disk there is no room for a new file, but the old one can still be overwritten.
        """
        if self.folder is None or self.ownership.lost or not (self.ranks.is_main or in_place_of_main):
            return
        try:
            write_atomically(self.folder / "state", "failed\n")
        except OSError:
            with suppress(OSError), open(self.folder / "state", "r+") as file:
                file.write("failed\n")
                file.truncate()

    def because(self, why: str, *, in_place_of_main: bool = False) -> None:
        """Write why the run failed, on one line without secrets; raises nothing. After `failed`, as it is called."""
        if self.folder is None or self.ownership.lost or not (self.ranks.is_main or in_place_of_main):
            return
        with suppress(OSError):
            write_atomically(self.folder / "error", one_line(without_secrets(why), ERROR_CHARACTERS) + "\n")


def prepare(
    config: Config, output: Path, identity: dict[str, Any], steps: int, comm: Communicator, ownership: Ownership
) -> tuple[Path, checkpoint.Checkpoint | None]:
    """Make and claim the run folder; returns it and the checkpoint to resume from, if any. Called by all ranks.

    Without --output the folder is a new one, with a number if another start has just taken the name. Raises
    ValueError for a folder that holds another run, or this run with settings that would change its learning curve.
    """

    def decide() -> tuple[str, str | None]:
        if config.run.output:
            folder = named_folder()
        else:
            ownership.claim(folder := _new_folder(output))
        if config.run.resume in ("auto", "never"):
            found = checkpoint.newest(folder / "checkpoints")
            if found is None and (folder / "config.json").exists():
                _same_run(identity, _saved_identity(folder), folder)
        else:
            found = _named_checkpoint(user_path(config.run.resume), folder)
        if found is not None:
            _same_run(identity, found.meta["identity"], found.folder)
            _same_curve(config, steps, found)
        # Later ones are damaged, or not wanted. In their places --keep-last would count them among the newest.
        here = folder / "checkpoints"
        own = found is not None and found.folder.resolve().parent == here.resolve()
        checkpoint.set_aside_after(here, found.step if found is not None and own else -1)
        return str(folder), None if found is None else str(found.folder)

    def named_folder() -> Path:
        if output.exists() and not _is_run(output) and any(foreign(output)):
            raise ValueError(f"{output} is not a run folder and not empty: give another --output")
        results = [output / f"{name}{end}" for name in ("adapter", "model") for end in ("", ".tmp")]
        checkpoint.refuse_links(output / "checkpoints", *results)
        with _folder_errors(output):
            output.mkdir(parents=True, exist_ok=True)
        ownership.claim(output)
        if config.run.resume == "never" and (output / "config.json").exists():
            aside = output.with_name(f"{output.name}-before-{time.strftime('%Y%m%d-%H%M%S')}")
            ownership.release()
            os.replace(output, aside)
            log.warning("--resume never: the run that was in %s is now in %s", output, aside)
            with _folder_errors(output):
                output.mkdir(parents=True, exist_ok=True)
            ownership.claim(output)
        return output

    made, resumed = comm.from_main("checkpoints", decide, SLOW_S)
    output, ranks = output.with_name(Path(made).name), comm.ranks
    several_nodes = ranks.local_world_size < ranks.world_size
    if several_nodes and (blind := nodes_without(output, comm, "the run folder", "--output DIR")):
        error = f"{', '.join(blind)} does not see the run folder {output} of rank 0, where checkpoints are saved"
        raise agreed(ValueError(f"{error}: give --output DIR on a file system that all nodes share"))
    return output, comm.each("checkpoint", lambda: checkpoint.load(Path(resumed)), SLOW_S) if resumed else None


def _new_folder(wanted: Path) -> Path:
    """Make a folder of this name, or with a number after it if the name is taken."""
    for number in itertools.count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        with _folder_errors(folder), suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("not reached")


@contextmanager
def _folder_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot make the run folder {folder}: {error.strerror}; give another --output") from error


def _same_curve(config: Config, steps: int, found: checkpoint.Checkpoint) -> None:
    """Log which settings differ from those that the run recorded.

    Raises ValueError, without --accept-changes, if they change the learning curve.
    """
    if steps < found.step:
        raise ValueError(
            f"{found.folder} is at step {found.step}, and this run would end at step {steps}: give --max-steps "
            f"{found.step} or more, or --resume with the path of an earlier checkpoint"
        )
    file = found.folder.parent.parent / "config.json"
    try:
        differ = changes(read_json(file, CONFIG_BYTES), config, steps)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        log.warning("%s is missing or damaged: the settings cannot be compared with those the run began with", file)
        return
    if differ.curve and not config.run.accept_changes:
        raise ValueError(
            f"resuming from {found.folder} with {', '.join(differ.curve)} would change the learning curve: give the "
            "settings that the run began with, --accept-changes to resume with the new ones, or another --output"
        )
    if told := differ.curve + differ.other:
        log.warning("resuming with changed settings: %s", ", ".join(told))


def _named_checkpoint(wanted: Path, output: Path) -> checkpoint.Checkpoint:
    """The checkpoint of --resume PATH.

    A checkpoint of another folder is where this run begins; once there are checkpoints here, the same command resumes
    from them. With a checkpoint of this folder the run goes back to it.
    """
    found, here = checkpoint.load(wanted), output / "checkpoints"
    if wanted.resolve().parent != here.resolve() and (newer := checkpoint.newest(here)) is not None:
        log.warning("resuming from %s, of the run that began at %s", newer.folder, wanted)
        return newer
    return found


def _saved_identity(output: Path) -> dict[str, Any]:
    try:
        identity = read_json(output / "config.json", CONFIG_BYTES)["identity"]
        if not isinstance(identity, dict):
            raise TypeError("not an object")
        return identity
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{output / 'config.json'} is damaged and no checkpoint tells which run this was: give another --output, "
            "or --resume never to set it aside"
        ) from None


def _is_run(folder: Path) -> bool:
    """Whether a folder has the files of a run: a model's folder has a config.json too."""
    if read_or_empty(folder / "state") in ("running", "stopped", "finished", "failed"):
        return True
    if any((folder / "checkpoints").glob("step-*/COMPLETE")):  # its config.json and state may be lost
        return True
    try:
        return isinstance(read_json(folder / "config.json", CONFIG_BYTES)["identity"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _same_run(identity: dict[str, Any], saved: dict[str, Any], where: Path) -> None:
    """Raises ValueError naming each thing that makes this another run than the saved one."""
    differ = [
        f"{name} was {_short(saved.get(name))}, now {_short(value)}"
        for name, value in identity.items()
        if saved.get(name) != value
    ]
    if differ:
        raise ValueError(
            f"{where} belongs to another run: {'; '.join(differ)}. Give another --output, or --resume never to set "
            "that run aside and start afresh"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 200 else text[:197] + "..."


def finished(config: Config, output: Path, resume: checkpoint.Checkpoint, steps: int) -> bool:
    """Whether nothing is left to do: the last step is saved, or that where --patience ended the run, and its result is
    there, unchanged."""
    patience = config.run.patience
    ended = resume.step >= steps or (patience and resume.meta["progress"].get("worse", 0) >= patience)
    if not ended or read_or_empty(output / "state") != "finished":
        return False
    damaged = _damaged(_final_folder(config, output))
    for text in damaged:
        log.warning("%s: made again from %s", text, resume.folder)
    return not damaged


def _final_folder(config: Config, output: Path) -> Path:
    return output / ("model" if config.adapter.method == "full" else "adapter")


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / CHECKSUMS)
    return {file.relative_to(folder).as_posix(): digest(file) for file in files}


def _damaged(folder: Path) -> list[str]:
    """What in a finished folder is not as it was written."""
    if not (folder / CHECKSUMS).is_file():
        return [f"{folder} is not whole"]
    lines = read_or_empty(folder / CHECKSUMS).splitlines()
    written, found = dict(line.split(maxsplit=1)[::-1] for line in lines if " " in line), _checksums(folder)
    differ = sorted(name for name in written.keys() | found.keys() if written.get(name) != found.get(name))
    why = {name: "differs from its checksum" if name in written else "has no checksum" for name in differ}
    return [f"{folder / name} {reason} in {CHECKSUMS}" for name, reason in why.items()]


def save_final(
    model: Any,
    whole: dict[str, Any],
    output: Path,
    config: Config,
    add_files: Callable[[Path], None] = lambda folder: None,
    show: Callable[[int], None] = silent,
) -> Path:
    """Write the final PEFT folder, or the whole model for full fine-tuning; an older one is renamed.

    add_files writes what else belongs into the folder. show is called with the number of bytes written.
    """
    final = _final_folder(config, output)
    partial = final.with_suffix(".tmp")
    with disk_errors("the trained parameters", output, "run the same command again with more space"):
        shutil.rmtree(partial, ignore_errors=True)
        total = sum(tensor.nbytes for tensor in whole.values())
        with growth(show, partial, total), warnings.catch_warnings(), _not_importing_deepspeed():
            warnings.filterwarnings("ignore", "Could not find a config file")  # of a pipeline, where PEFT looks for one
            save_adapter(model, partial, whole)
        add_files(partial)
        lines = (f"{checksum}  {name}\n" for name, checksum in _checksums(partial).items())
        (partial / CHECKSUMS).write_text("".join(lines))
        allow_by_umask(partial)
        for written in (*partial.rglob("*"), partial):
            sync(written)
        if final.exists():
            os.replace(final, final.with_suffix(f".before-{time.time_ns()}"))
        os.replace(partial, final)
        sync(output)
    return final


@contextmanager
def _not_importing_deepspeed() -> Iterator[None]:
    """Save a model without importing deepspeed, which accelerate does to see whether the model is one of its engines.

    That takes seconds, prints a warning, and fails where deepspeed is installed without a compiler. The model that is
    saved is a plain one under every engine.
    """
    from accelerate.utils import other

    real = other.is_deepspeed_available
    other.is_deepspeed_available = lambda: False
    try:
        yield
    finally:
        other.is_deepspeed_available = real
