"""The command line: parse, then call one function. Nothing heavy is imported before the options are right."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from launcher.config import Config

Folder = Annotated[str, tyro.conf.Positional]
Dtype = Literal["float32", "bfloat16"]
MISTAKE = 2


def main(arguments: Sequence[str]) -> int:
    """The `loldu` command; returns its exit code."""
    commands, prog, rest = COMMANDS, "loldu", list(arguments)
    if rest[:1] == ["cache"]:
        commands, prog, rest = CACHE_COMMANDS, "loldu cache", rest[1:]
    return _guarded(
        lambda: tyro.extras.subcommand_cli_from_dict(dict(commands), args=rest, prog=prog, description=DESCRIPTION)
    )


def run_recipe(name: str, default: Callable[[], Config], tiny: Callable[[], Config], arguments: Sequence[str]) -> int:
    """Run a recipe. Its own base or data that cannot be had is replaced by the embedded default, said in a banner.

    What the user names is never replaced: an explicit --model or --data that is missing is an error.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Config):
        tiny: bool = False
        """Run the small Llama and the instructions that come with the project: minutes on a CPU, no network."""

    def parse(config: Config) -> Options:
        shown = Options(**{part: getattr(config, part) for part in ("model", "data", "adapter", "optimizer", "run")})
        return tyro.cli(Options, default=shown, args=list(arguments), prog=f"recipes/{name}.py", config=FLAT)

    def act() -> int:
        options = parse(tiny() if "--tiny" in arguments else default())
        own = default()
        named = {flag for flag in ("--model", "--data") if any(a.split("=")[0] == flag for a in arguments)}
        if not options.tiny and not named:
            from launcher.availability import unavailable

            reason = unavailable(own.model.model, own.data.data)
            if reason:
                banner = (
                    f"{reason}: running the embedded default instead (--tiny). Name your own with --model and --data."
                )
                if os.environ.get("RANK", "0") == "0":
                    print(f"{'=' * 80}\n{banner}\n{'=' * 80}", flush=True)
                options = parse(tiny())
        from launcher.training.run import run

        config = Config(**{part: getattr(options, part) for part in ("model", "data", "adapter", "optimizer", "run")})
        return run(config, name)

    return _guarded(act)


def factorize(
    *,
    model: str,
    rank: int = 64,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    exclude: tuple[str, ...] = (),
    normalize: bool = False,
    dtype: Dtype = "float32",
    cache: str | None = None,
    verify_base: bool = False,
) -> int:
    """Make and cache the frozen factors a run will need; with several processes they share the work.

    Args:
        model: Folder or hub name (already fetched) of the base model.
        rank: Trained numbers per weight.
        targets: Last parts of module names, or the one word all-linear.
        exclude: Modules to leave out.
        normalize: For runs with --options normalize_directions=true.
        dtype: The run's --dtype.
        cache: Folder of the cache, else the user's cache directory.
        verify_base: Read the weights again instead of trusting their files' size and time.
    """
    from launcher.factorization import commands

    return commands.factorize(
        model, rank, targets, exclude, normalize=normalize, dtype=dtype, cache_folder=cache, verify_base=verify_base
    )


def cache_ls(*, cache: str | None = None) -> int:
    """List the cached factors."""
    from launcher.factorization import commands

    return commands.cache_ls(cache)


def cache_verify(*, cache: str | None = None) -> int:
    """Check every cached file against its checksum; damaged ones are set aside."""
    from launcher.factorization import commands

    return commands.cache_verify(cache)


def cache_prune(*, cache: str | None = None, max_gb: float | None = None, older_than_days: float | None = None) -> int:
    """Remove the factors that were used longest ago.

    Args:
        cache: Folder of the cache.
        max_gb: Keep at most this much.
        older_than_days: Remove what was not used for so long.
    """
    from launcher.factorization import commands

    return commands.cache_prune(cache, max_gb, older_than_days)


DESCRIPTION = "Fine-tune large language models by training only the diagonal of a frozen matrix factorisation."
FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
COMMANDS: Mapping[str, Callable[..., int]] = {"factorize": factorize}
CACHE_COMMANDS: Mapping[str, Callable[..., int]] = {"ls": cache_ls, "verify": cache_verify, "prune": cache_prune}


def _guarded(act: Callable[[], Any]) -> int:
    """The user's mistakes become one line and exit code 2."""
    try:
        return int(act())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        return 130
