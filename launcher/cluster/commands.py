"""The cluster commands: submit, launch, status, logs, cancel, doctor, simulate-preempt. Each calls one function.

submit and launch pass the recipe's own options to the recipe without parsing them.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal

from launcher.cluster.hostfile import Hosts
from launcher.cluster.slurm import Resources
from launcher.options import Option


def submit(
    recipe: str,
    *,
    resources: Annotated[Resources, Option(repeated=True)],
    name: str | None = None,
    dry_run: bool = False,
    recipe_options: tuple[str, ...] = (),
) -> int:
    """Run a recipe on Slurm: loldu submit RECIPE --nodes 2 --gpus-per-node 8 -- RECIPE OPTIONS

    Args:
        recipe: A recipe by name, a Python file, or a YAML or JSON file of settings, as for loldu train. Put its
            options after --
        resources: The resources of the job.
        name: Name of the run; its folder is runs/NAME.
        dry_run: Print the job script and submit nothing.
        recipe_options: Everything after --
    """
    from launcher.cluster import slurm

    return slurm.submit(recipe, resources, recipe_options, name=name, dry_run=dry_run)


def status(runs: tuple[str, ...] = (), *, json: bool = False) -> int:
    """Show the state of runs: steps, loss, last checkpoint, and the state of the Slurm job.

    Args:
        runs: Names, folders or job ids; default: all runs in runs/.
        json: Print JSON.
    """
    from launcher.cluster import slurm_status

    return slurm_status.status(runs, as_json=json)


def logs(
    run: str,
    *,
    follow: Annotated[bool, Option(short="-f")] = False,
    rank: int | None = None,
    lines: int = 20,
) -> int:
    """Print the last lines of a run's logs, each with its rank and node.

    Args:
        run: Name, folder or job id.
        follow: Keep printing new lines until the run ends.
        rank: Print only the log of this rank.
        lines: Number of last lines of each log.
    """
    from launcher.cluster.follow import logs as show

    return show(run, follow=follow, rank=rank, lines=lines)


def cancel(run: str) -> int:
    """Ask a run to save a checkpoint and stop. A Slurm job is cancelled and not requeued.

    Args:
        run: Name, folder or job id.
    """
    from launcher.cluster import slurm_status

    return slurm_status.cancel(run)


def launch(
    recipe: str,
    *,
    hosts: Annotated[Hosts, Option(repeated=True)],
    name: str | None = None,
    recipe_options: tuple[str, ...] = (),
) -> int:
    """Run a recipe on several hosts over ssh: loldu launch --hostfile FILE RECIPE RECIPE OPTIONS

    Ctrl-C saves a checkpoint and stops on all hosts; a second Ctrl-C ends all processes at once. Exit codes: 0
    finished, 75 stopped and saved (the same command resumes), 1 failed, 2 invalid options or hosts.

    Args:
        recipe: A recipe by name, a Python file, or a YAML or JSON file of settings, as for loldu train. Its options
            follow it.
        hosts: The hosts and how to reach them.
        name: Name of the run; its folder is runs/NAME.
        recipe_options: Everything after the recipe.
    """
    from launcher.cluster.launch import launch as start

    return start(recipe, hosts, recipe_options, name=name)


def doctor(
    *,
    hostfile: str | None = None,
    ssh_port: int | None = None,
    ssh_config: str | None = None,
    folder: str = ".",
    port: int = 29500,
    quick: bool = False,
    json: bool = False,
) -> int:
    """Check this machine, the hosts of a hostfile, or the nodes of the current Slurm job. Exit code 1: a problem.

    Args:
        hostfile: Hosts to check over ssh; default: this machine, or inside a Slurm job the nodes of that job.
        ssh_port: Port of the ssh servers.
        ssh_config: Configuration file for ssh, instead of ~/.ssh/config.
        folder: Folder for runs and the factor cache, which all nodes should share.
        port: Port on which the nodes must reach each other.
        quick: Skip importing flash-attn, bitsandbytes and deepspeed, the slowest check.
        json: Print JSON.
    """
    from launcher.cluster.doctor import doctor as examine

    return examine(
        hostfile, ssh_port=ssh_port, ssh_config=ssh_config, folder=folder, port=port, quick=quick, as_json=json
    )


def simulate_preempt(run: str, *, how: Literal["warning", "requeue"] = "warning", timeout: float = 900.0) -> int:
    """Interrupt a running job as a cluster would, and report whether it saved, restarted and resumed.

    Args:
        run: Name, folder or job id.
        how: warning (the signal that Slurm sends before the time limit or a preemption), or requeue (without warning).
        timeout: Seconds to wait until the run has restarted and trained a step.
    """
    from launcher.cluster.simulate_preempt import simulate

    return simulate(run, how=how, timeout_s=timeout)


NO_VALUE = ("--dry-run", "--no-dry-run", "--help", "-h")


def split_recipe_options(name: str, arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Split arguments into those of submit or launch, and those of the recipe.

    The recipe's options follow the first -- (submit), or RECIPE (launch). Raises ValueError with the line to type for
    an option on the wrong side.
    """
    words = list(arguments)
    if name == "launch":
        at = 0
        while at < len(words) and words[at].startswith("-") and words[at] != "--":
            at += 1 if "=" in words[at] or words[at] in NO_VALUE else 2
        own, options = words[: at + 1], words[at + 1 :]
        options = options[1:] if options[:1] == ["--"] else options
    else:
        at = words.index("--") if "--" in words else len(words)
        own, options = words[:at], words[at + 1 :]
    if not {"-h", "--help"} & set(own):
        _check_sides(name, own, options)
    return own, tuple(options)


def _check_sides(name: str, own: Sequence[str], options: Sequence[str]) -> None:
    """Raises ValueError for an unknown option among own, and for --hostfile among the options of the recipe."""
    kind: Any = Resources if name == "submit" else Hosts
    known = {f"--{field.name.replace('_', '-')}" for field in fields(kind)} | {"--name", *NO_VALUE}
    recipe: list[str] = []
    mine: list[str] = []
    unknown: list[str] = []
    at = 0
    while at < len(own):
        flag, into, end = own[at].partition("=")[0].replace("_", "-"), recipe, at + 1
        if flag in known:
            into, end = mine, end + ("=" not in own[at] and flag not in NO_VALUE)
        elif flag.startswith("-"):
            into = unknown
            while end < len(own) and not own[end].startswith("-"):
                end += 1
        into += own[at:end]
        at = end
    if name == "launch" and not unknown and "--hostfile" in {word.partition("=")[0] for word in options}:
        raise ValueError("--hostfile must come before RECIPE: loldu launch --hostfile FILE RECIPE RECIPE OPTIONS")
    if not unknown:
        return
    flag = unknown[0].partition("=")[0]
    if near := difflib.get_close_matches(flag, known, n=1, cutoff=0.75):
        raise ValueError(f"loldu {name} has no option {flag}: did you mean {near[0]}? (loldu {name} --help)")
    if not recipe and len(unknown) > 1 and not unknown[-1].startswith("-"):
        recipe = [unknown.pop()]  # it followed the unknown option
    where, between = ("after --", ["--"]) if name == "submit" else ("after RECIPE", [])
    line = shlex.join(["loldu", name, *mine, *recipe, *between, *unknown, *options])
    raise ValueError(f"loldu {name} has no option {flag}. Options of the recipe go {where}; type:\n  {line}")
