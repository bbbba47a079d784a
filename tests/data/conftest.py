"""Real tokenizers and a real small model, made once per machine by the scripts beside the shared data."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "shared" / "data"
CACHE = Path.home() / ".cache" / "loldu-tests"


def made_by(script: str, *arguments: str) -> Path:
    """The folder a script makes and prints; skips the test if the script is absent or fails."""
    path = SCRIPTS / script
    if not path.exists():
        pytest.skip(f"needs the script {path}")
    done = subprocess.run(["bash", path, *arguments], capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"{script} {arguments[0]} failed: {done.stderr.strip()[-200:]}")
    return Path(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def real_tokenizer():
    """A function from a name to the tokenizer of that real model."""
    from transformers import AutoTokenizer

    loaded = {}

    def load(name: str):
        if name not in loaded:
            if name == "smollm2":
                folder = made_by("models/get-smollm2", str(CACHE / name), sys.executable)
            else:
                folder = made_by("tokenizers/get-tokenizer", name, str(CACHE / "tokenizers" / name))
            loaded[name] = tokenizer = AutoTokenizer.from_pretrained(folder)
            templates[name] = tokenizer.chat_template
        loaded[name].chat_template = templates[name]  # a test may have set another one
        return loaded[name]

    templates: dict = {}
    return load
