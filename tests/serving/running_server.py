"""A running server for tests of the HTTP side, and the files of an adapter as that side reads them."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import httpx
import uvicorn
from scripted_engine import TINY, ScriptedEngine

from launcher.serving.answers import TokenTexts
from launcher.serving.app import create_app
from launcher.serving.catalogue import Catalogue, Served
from launcher.serving.limits import Limits
from launcher.serving.prompts import base_template
from launcher.serving.server import listen
from launcher.serving.service import Models, Service

CHAT = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)


def write_adapter(folder: Path, weights: bytes = b"numbers", template: str | None = None) -> Path:
    """The files of an adapter, as far as the HTTP side reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    if template is not None:
        fields = {"name": template, "with_input": "", "without_input": "", "jinja": CHAT, "date": "2024-07-26"}
        (folder / "prompt_template.json").write_text(json.dumps(fields))
    return folder


class Server:
    """A running server and its parts."""

    def __init__(self, folder: Path, engine: ScriptedEngine, limits: Limits, keys=(), hosts=None):
        self.folder, self.engine = folder, engine
        template = base_template("none", TINY, engine.tokenizer)
        base = Served(engine.base_id, engine.base_id, template, 0)
        self.catalogue = Catalogue(engine, [folder], base)
        self.service = Service(limits, Models(engine, self.catalogue, TokenTexts(engine.tokenizer)))
        self.app = create_app(self.service, keys=keys, hosts=hosts)
        self.socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(self.app, lifespan="off", ws="none", log_config=None, timeout_graceful_shutdown=1)
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, args=([self.socket],), daemon=True)
        self.client = httpx.Client(base_url=self.url, timeout=30)

    def start(self):
        self.engine.start()
        self.catalogue.refresh(first=True)
        self.catalogue.refresh()
        self.thread.start()
        until(lambda: self.uvicorn.started)
        return self

    def stop(self):
        self.client.close()
        self.uvicorn.should_exit = True
        self.thread.join(10)
        self.engine.stop(0)

    def post(self, path="/v1/chat/completions", **fields):
        return self.client.post(path, json=fields)

    def chat(self, model="base", question="hi", **fields):
        messages = [{"role": "user", "content": question}]
        return self.post(model=model, messages=messages, **{"temperature": 0, **fields})

    def events(self, **fields):
        """The JSON of each event of a streamed chat, and [DONE]."""
        fields = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "stream": True} | fields
        path = "/v1/completions" if "prompt" in fields else "/v1/chat/completions"
        if "prompt" in fields:
            del fields["messages"]
        with self.client.stream("POST", path, json=fields) as response:
            lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


def until(true, seconds=180.0):
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)
