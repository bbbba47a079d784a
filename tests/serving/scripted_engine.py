"""An engine without a model, for tests of the HTTP side: it answers with a text that tells model and prompt.

Answers grow a character per token, all running ones in turn, until they are held at `hold_at` tokens.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from pathlib import Path

from launcher.models.files import load_tokenizer
from launcher.serving.requests import Request, Token

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "model"
RUNNING = 64  # requests that are answered at a time


@dataclass
class Running:
    """A request, and the tokens of its answer that are still to come."""

    request: Request
    emit: object
    ids: list[int]
    made: int = 0


class ScriptedEngine:
    """See launcher/serving/requests.py. text: what it answers, by default model and prompt."""

    def __init__(self, text: str | None = None, base_id: str = "base"):
        self.base_id, self.context_length, self.text = base_id, 512, text
        self.tokenizer = load_tokenizer(TINY)
        self.adapters: dict[str, Path] = {}
        self.requests: dict[str, Running] = {}
        self.cancelled: list[str] = []
        self.most_running = 0
        self.hold_at: int | None = None
        self.pace_s = 0.0  # between two tokens
        self.fail: str | None = None  # an error for the next token
        self.lock, self.changed, self.ended = threading.RLock(), threading.Condition(), False
        self.thread = threading.Thread(target=self._work, daemon=True)

    def start(self):
        self.thread.start()

    def stop(self, drain_s):
        self.ended = True
        self.thread.join()

    def models(self):
        return [self.base_id, *self.adapters]

    def add_adapter(self, name, folder):
        if not (folder / "adapter_model.safetensors").is_file():
            raise ValueError(f"adapter {folder} has no adapter_model.safetensors: copy the whole folder")
        if (folder / "adapter_model.safetensors").read_bytes().startswith(b"bad"):
            raise ValueError(f"{folder / 'adapter_model.safetensors'} is damaged or cut short: copy it again")
        assert name not in self.adapters
        self.adapters[name] = folder

    def remove_adapter(self, name):
        with self.lock:
            del self.adapters[name]
            gone = [each for each in self.requests.values() if each.request.model == name]
            for each in gone:
                del self.requests[each.request.id]
                each.emit(Token(-1, "", finish="error", error=f"adapter {name} was removed"))

    def submit(self, request, emit):
        if request.model not in self.models():
            raise KeyError(request.model)
        text = (
            self.text
            if self.text is not None
            else f"{request.model}: {self.tokenizer.decode(request.prompt, skip_special_tokens=True)}"
        )
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        with self.lock:
            self.requests[request.id] = Running(request, emit, ids)

    def cancel(self, request_id):
        with self.lock:
            found = self.requests.pop(request_id, None)
            if found is not None:
                self.cancelled.append(request_id)
                found.emit(Token(-1, "", finish="cancelled"))

    def stats(self):
        return {"running": float(len(self.requests)), "waiting": 0.0, "tokens": 0.0}

    def _work(self):
        while not self.ended:
            with self.lock:
                running = [each for each in list(self.requests.values())[:RUNNING] if each.made != self.hold_at]
                self.most_running = max(self.most_running, len(running))
                for each in running:
                    self._step(each)
            if not running or self.pace_s:
                threading.Event().wait(self.pace_s or 0.002)

    def _step(self, running):
        sampling, token = running.request.sampling, running.ids[running.made]
        running.made += 1
        finish = (
            "stop" if running.made == len(running.ids) else "length" if running.made == sampling.max_tokens else None
        )
        text = "" if finish == "stop" else self.tokenizer.decode([token])
        if self.fail is not None:
            finish, text = "error", ""
        top = tuple((other, -1.0 - other) for other in range(sampling.logprobs or 0))
        if finish:
            self.requests.pop(running.request.id)
        known = None if sampling.logprobs is None else -math.log(2)
        running.emit(Token(token, text, known, top, finish, self.fail if finish == "error" else None))
