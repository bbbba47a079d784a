"""The command line of the clusters: submit, status, logs, cancel, launch, doctor, simulate-preempt. Parses, calls one
function each; what starts a recipe hands on the recipe's own options unread."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal

import tyro

from launcher.cluster.hostfile import Hosts
from launcher.cluster.slurm import Resources

Flat = tyro.conf.arg(name="")
Recipe = Annotated[str, tyro.conf.arg(metavar="RECIPE")]
Run = Annotated[str, tyro.conf.arg(metavar="RUN")]


def submit(
    recipe: Recipe,
    *,
    resources: Annotated[Resources, Flat, tyro.conf.UseAppendAction],
    name: str | None = None,
    dry_run: bool = False,
    recipe_options: tuple[str, ...] = (),
) -> int:
    """Run a recipe on Slurm: loldu submit RECIPE --nodes 2 --gpus-per-node 8 -- RECIPE OPTIONS

    Args:
        recipe: The recipe's file, or the name of one in recipes/. Its own options stand behind --
        resources: What the job needs.
        name: Name of the run; its folder is runs/NAME.
        dry_run: Print the script, and do nothing.
        recipe_options: What stands behind --
    """
    from launcher.cluster import slurm

    return slurm.submit(recipe, resources, recipe_options, name=name, dry_run=dry_run)


def status(runs: tyro.conf.Positional[tuple[str, ...]] = (), *, json: bool = False) -> int:
    """How runs stand: what they saved, and what Slurm says.

    Args:
        runs: Names, folders or job ids; without any, all of runs/.
        json: As JSON.
    """
    from launcher.cluster import slurm

    return slurm.status(runs, as_json=json)


def logs(
    run: Run,
    *,
    follow: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False,
    rank: int | None = None,
    lines: int = 20,
) -> int:
    """The ends of a run's logs, each line behind its rank and node.

    Args:
        run: Name, folder or job id.
        follow: Go on until the run ends.
        rank: Only this rank's log.
        lines: How many lines of each log to begin with.
    """
    from launcher.cluster.follow import logs as show

    return show(run, follow=follow, rank=rank, lines=lines)


def cancel(run: Run) -> int:
    """Ask a run to save and stop; a Slurm job does not come back.

    Args:
        run: Name, folder or job id.
    """
    from launcher.cluster import slurm

    return slurm.cancel(run)


def launch(
    recipe: Recipe,
    *,
    hosts: Annotated[Hosts, Flat, tyro.conf.UseAppendAction],
    name: str | None = None,
    recipe_options: tuple[str, ...] = (),
) -> int:
    """Run a recipe on the hosts of a file, over ssh: loldu launch --hostfile FILE RECIPE RECIPE OPTIONS

    Ctrl-C saves and stops everywhere, a second one ends all at once. Exit codes: 0 finished, 75 stopped and saved (run
    me again), 1 failed, 2 a mistake in what was asked.

    Args:
        recipe: The recipe's file, or the name of one in recipes/. All that follows are its own options.
        hosts: Where.
        name: Name of the run; its folder is runs/NAME.
        recipe_options: What stands behind the recipe.
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
    """Check this machine, the hosts of a file, or the nodes of the Slurm job it is typed in. Exit code 1: a problem.

    Args:
        hostfile: Hosts to check over ssh; without it this machine, or inside a Slurm job its nodes.
        ssh_port: Port of the hosts' ssh servers.
        ssh_config: ssh's configuration file, instead of the user's.
        folder: Folder that should be shared by all nodes, for runs and the factor cache.
        port: Port on which nodes must reach each other.
        quick: Leave out importing flash-attn, bitsandbytes and deepspeed, which takes longest.
        json: As JSON.
    """
    from launcher.cluster.doctor import doctor as examine

    return examine(
        hostfile, ssh_port=ssh_port, ssh_config=ssh_config, folder=folder, port=port, quick=quick, as_json=json
    )


def simulate_preempt(run: Run, *, how: Literal["warning", "requeue"] = "warning", timeout: float = 900.0) -> int:
    """Interrupt a live run as a cluster would, and report whether it saved, came back and went on.

    Args:
        run: Name, folder or job id.
        how: warning (the signal Slurm sends before the time limit or a preemption), or requeue (no warning at all).
        timeout: Seconds to wait for it to come back and gain a step.
    """
    from launcher.cluster.simulate_preempt import simulate

    return simulate(run, how=how, timeout_s=timeout)


NO_VALUE = ("--dry-run", "--no-dry-run", "--help", "-h")


def split_recipe_options(name: str, arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The own words of submit or launch, and the recipe's: behind the first --, for launch all behind RECIPE.

    Raises ValueError, with the line to type, for an option on the wrong side.
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
    """Raises ValueError where an own word is no option of the command, and for launch's hostfile among the recipe's."""
    kind: Any = Resources if name == "submit" else Hosts
    known = {f"--{field.name.replace('_', '-')}" for field in fields(kind)} | {"--name", *NO_VALUE}
    recipe: list[str] = []
    mine: list[str] = []
    strange: list[str] = []
    at = 0
    while at < len(own):
        flag, into, end = own[at].partition("=")[0].replace("_", "-"), recipe, at + 1
        if flag in known:
            into, end = mine, end + ("=" not in own[at] and flag not in NO_VALUE)
        elif flag.startswith("-"):
            into = strange
            while end < len(own) and not own[end].startswith("-"):
                end += 1
        into += own[at:end]
        at = end
    if name == "launch" and not strange and "--hostfile" in {word.partition("=")[0] for word in options}:
        raise ValueError("--hostfile stands before RECIPE: loldu launch --hostfile FILE RECIPE RECIPE OPTIONS")
    if not strange:
        return
    flag = strange[0].partition("=")[0]
    if near := difflib.get_close_matches(flag, known, n=1, cutoff=0.75):
        raise ValueError(f"loldu {name} has no option {flag}: did you mean {near[0]}? (loldu {name} --help)")
    if not recipe and len(strange) > 1 and not strange[-1].startswith("-"):
        recipe = [strange.pop()]  # it stood behind the strange option
    where, between = ("behind --", ["--"]) if name == "submit" else ("behind RECIPE", [])
    line = shlex.join(["loldu", name, *mine, *recipe, *between, *strange, *options])
    raise ValueError(f"loldu {name} has no option {flag}. A recipe's own options stand {where}; type:\n  {line}")
