"""The command line of the clusters: submit, status, logs, cancel, launch, doctor, simulate-preempt. Parses, calls one
function each; what starts a recipe hands on the recipe's own options unread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

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
    json: bool = False,
) -> int:
    """Check this machine, the hosts of a file, or the nodes of the Slurm job it is typed in. Exit code 1: a problem.

    Args:
        hostfile: Hosts to check over ssh; without it this machine, or inside a Slurm job its nodes.
        ssh_port: Port of the hosts' ssh servers.
        ssh_config: ssh's configuration file, instead of the user's.
        folder: Folder that should be shared by all nodes, for runs and the factor cache.
        port: Port on which nodes must reach each other.
        json: As JSON.
    """
    from launcher.cluster.doctor import doctor as examine

    return examine(hostfile, ssh_port=ssh_port, ssh_config=ssh_config, folder=folder, port=port, as_json=json)


def simulate_preempt(run: Run, *, how: Literal["warning", "requeue"] = "warning", timeout: float = 900.0) -> int:
    """Interrupt a live run as a cluster would, and report whether it saved, came back and went on.

    Args:
        run: Name, folder or job id.
        how: warning (the signal Slurm sends before the time limit or a preemption), or requeue (no warning at all).
        timeout: Seconds to wait for it to come back and gain a step.
    """
    from launcher.cluster.preempt import simulate

    return simulate(run, how=how, timeout_s=timeout)


NO_VALUE = ("--dry-run", "--no-dry-run", "--help", "-h")


def split_recipe_options(name: str, arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The own words of submit or launch, and the recipe's: behind the first --, for launch all behind RECIPE."""
    words = list(arguments)
    if name == "launch":
        at = 0
        while at < len(words) and words[at].startswith("-") and words[at] != "--":
            at += 1 if "=" in words[at] or words[at] in NO_VALUE else 2
        options = words[at + 1 :]
        return words[: at + 1], tuple(options[1:] if options[:1] == ["--"] else options)
    if "--" in words:
        at = words.index("--")
        return words[:at], tuple(words[at + 1 :])
    return words, ()
