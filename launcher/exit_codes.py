"""Exit codes of commands and runs, and the error that ends a command with FAILED."""

DONE = 0
FAILED = 1
MISTAKE = 2  # of the user, reported in one line
STOPPED = 75  # the run was asked to stop and has saved; the same command resumes (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # by Ctrl-C, as shells report it


class Failed(RuntimeError):
    """A result that must not be used, reported in one line; not a mistake of the user."""
