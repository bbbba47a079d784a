"""A server on a free port of this machine, with an engine that needs no model."""

from __future__ import annotations

import contextlib
import shutil

import pytest
from running_server import Server, write_adapter
from scripted_engine import ScriptedEngine

from launcher.serving.limits import Limits


@pytest.fixture
def start(tmp_path):
    """Start a server with these adapters (names) and settings."""
    with contextlib.ExitStack() as stack:

        def start(*adapters, limits=Limits(), engine=None, **settings):  # noqa: B008 (frozen)
            folder = tmp_path / "adapters"
            folder.mkdir(exist_ok=True)
            for name in adapters:
                write_adapter(folder / name, template="turns")
            server = Server(folder, engine or ScriptedEngine(), limits, **settings)
            stack.callback(server.stop)
            return server.start()

        yield start
        shutil.rmtree(tmp_path / "adapters", ignore_errors=True)
