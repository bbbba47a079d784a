"""A server in its own process with an engine that needs no model: python serve_scripted.py DIR [option=value ...]."""

import builtins
import os
import signal
import sys
import threading
import time
from pathlib import Path

from scripted_engine import TINY, ScriptedEngine

from launcher.serving.limits import Limits
from launcher.serving.server import logging_to_stderr, run
from launcher.start import guarded

folder, options = sys.argv[1], dict(word.split("=") for word in sys.argv[2:])


def make_engine():
    engine = ScriptedEngine()
    engine.hold_at = int(options["hold_at"]) if "hold_at" in options else None
    if "release" in options:  # a file that releases held answers once it exists
        threading.Thread(target=release, args=(engine, Path(options["release"])), daemon=True).start()
    return engine, TINY


def release(engine, file):
    while not file.exists():
        time.sleep(0.01)
    engine.hold_at = None


class Late:
    """Signals this process while Python shuts down, when the handlers in Python are gone."""

    def __del__(self, kill=os.kill, me=os.getpid(), numbers=(signal.SIGTERM, signal.SIGINT), write=os.write):  # noqa: B008
        write(2, b"late\n")
        for number in numbers:
            kill(me, number)


def serve():
    with logging_to_stderr():
        return run(
            make_engine,
            folders=[Path(folder)],
            host="127.0.0.1",
            port=int(options.get("port", 0)),
            keys=(),
            limits=Limits(drain_s=float(options.get("drain_s", 30))),
        )


if "late" in options:
    builtins.late = Late()
sys.exit(guarded(serve))
