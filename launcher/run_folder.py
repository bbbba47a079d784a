"""What a run, or the job that starts it, writes to its folder before its settings (config.json)."""

from __future__ import annotations

from pathlib import Path

BEGUN = frozenset({"state", "error", "control", "events", "job.sbatch", "job.json", "logs"})
PATTERNS = ("slurm-*", ".*.tmp", ".*.probe", ".owner-*")  # also a file that a killed start was about to rename


def foreign(folder: Path) -> list[Path]:
    """What is none of this. Raises OSError if the folder cannot be read."""
    return [path for path in folder.iterdir() if path.name not in BEGUN and not any(map(path.match, PATTERNS))]
