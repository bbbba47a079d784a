"""Does an adapter's folder hold another tokenizer than its base? Compared is what prompts and answers depend on.

Files of other formatting, padding, truncation and the chat template make no other tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from launcher.files import read_json
from launcher.models.files import JSON_BYTES, TOKENIZER_FILES, has_tokenizer, load_tokenizer

SETTINGS = "tokenizer_config.json"
READ = (*TOKENIZER_FILES, SETTINGS, "special_tokens_map.json", "added_tokens.json", "merges.txt")  # by transformers
PARTS = ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder")  # of tokenizer.json


class BaseTokenizer:
    """A base's tokenizer, with which those of thousands of adapters are compared: equal files are read once."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        folder = Path(tokenizer.name_or_path)
        self._known: dict[str, str | None] = {_digest(folder): None} if has_tokenizer(folder) else {}

    def difference(self, folder: Path) -> str | None:
        """How the tokenizer in an adapter's folder differs, in words; None if it does not, or if there is none.

        Raises ValueError if it does not load. Code in the folder never runs.
        """
        if not has_tokenizer(folder):
            return None
        digest = _digest(folder)
        if digest not in self._known:
            own = own_tokenizer(folder, Path(self.tokenizer.name_or_path))
            self._known[digest] = difference(own, self.tokenizer)
        return self._known[digest]


def own_tokenizer(folder: Path, base: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in an adapter's folder. transformers 5 does not save `legacy` (Llama 2): then it is the base's."""
    own = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    saved, known = (found if isinstance(found := _json(at / SETTINGS), dict) else {} for at in (folder, base))
    if known.get("legacy") is None or "legacy" in saved:
        return own
    return type(own).from_pretrained(folder, legacy=known["legacy"], local_files_only=True)


def difference(own: Any, base: Any) -> str | None:
    """How `own` differs from `base`, in words; None if texts and token ids become each other in the same way."""
    mine, theirs = own.get_vocab(), base.get_vocab()
    if other := {token: place for token, place in mine.items() if theirs.get(token) != place}:
        token = min(other, key=other.__getitem__)
        there = f"is {theirs[token]} in the base's" if token in theirs else "is not in the base's"
        more = f", and so on for {len(other):,} tokens" if len(other) > 1 else ""
        return f"token {token!r:.60} is {other[token]} in it and {there}{more}"
    if lost := theirs.keys() - mine.keys():
        return f"it lacks {len(lost):,} tokens of the base's, as {min(lost, key=theirs.__getitem__)!r:.60}"
    special, known = _special(own), _special(base)
    for name in sorted(special.keys() | known.keys()):
        if special.get(name) != known.get(name):
            return f"its {name} is {special.get(name)!r:.60}, the base's {known.get(name)!r:.60}"
    for name in ("split_special_tokens", "clean_up_tokenization_spaces"):
        if bool(getattr(own, name, False)) != bool(getattr(base, name, False)):
            return f"its {name} is {getattr(own, name, False)}, the base's {getattr(base, name, False)}"
    if not (hasattr(own, "backend_tokenizer") and hasattr(base, "backend_tokenizer")):
        return f"it is read by {type(own).__name__} from files that are not the base's"
    parts, others = (json.loads(each.backend_tokenizer.to_str()) for each in (own, base))
    if parts["added_tokens"] != others["added_tokens"]:
        return "its added tokens have other properties"
    return next((f"its {name} is another" for name in PARTS if parts[name] != others[name]), None)


def _special(tokenizer: Any) -> dict[str, Any]:
    """The special tokens by their roles. Padding is one only for a chat template that writes it."""
    roles = dict(tokenizer.special_tokens_map)
    if "pad_token" not in str(tokenizer.chat_template):
        roles.pop("pad_token", None)
    return roles


def _digest(folder: Path) -> str:
    """sha256 of the tokenizer's files. Adapters have the chat template in a file of its own."""
    sha = hashlib.sha256()
    for name in READ:
        if (file := folder / name).is_file():
            content = file.read_bytes()
            if name == SETTINGS and isinstance(settings := _json(file), dict):
                content = json.dumps({**settings, "chat_template": None}, sort_keys=True).encode()
            sha.update(f"{name} {len(content)} ".encode() + content)
    return sha.hexdigest()


def _json(file: Path) -> Any:
    try:
        return read_json(file, JSON_BYTES)
    except (OSError, ValueError):  # `load_tokenizer` names it
        return None
