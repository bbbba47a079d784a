"""What a tokenizer makes of texts: ids, and the characters that each token stands for.

Also found here, for the report: answers that the tokenizer joins with their prompt, and answers without an end.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from launcher.data.chat import Rendered, Sample
from launcher.data.encoded import Tally
from launcher.data.templates import Template
from launcher.files import read_json

SHORT_SEGMENT = 256  # characters; the ids of shorter ones (headers of answers, which repeat) are kept
MOST_SEGMENTS = 4096  # that are kept; without a chat template each is a separate prompt


class Tokens(NamedTuple):
    """Of one text: ids, and for each token the characters [begins[i], ends[i]) it stands for."""

    ids: list[int]
    begins: np.ndarray
    ends: np.ndarray


class Seen:
    """What the tokenizer makes of texts, and what to report about the samples in the end."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.offsets = _untrimmed(tokenizer)
        self.stop = stop_ids(tokenizer)
        self.added = frozenset(tokenizer.added_tokens_decoder)
        self.segments: dict[str, list[int]] = {}
        self.tally = Tally()  # of the part at work

    def add(self, rendered: Rendered) -> Rendered:
        """Count what became of a record."""
        tally = self.tally
        for what, count in rendered.dropped.items():
            tally.left_out[what] = tally.left_out.get(what, 0) + count
        if rendered.split:
            tally.split += 1
            tally.last_characters += len(rendered.samples[-1].text)
            tally.all_characters += sum(len(sample.text) for sample in rendered.samples)
        return rendered

    def tokens(self, texts: list[str], borders: list[list[int]]) -> list[Tokens]:
        if not texts:
            return []
        if self.offsets is None:
            return [self._by_prefixes(*each) for each in zip(texts, borders, strict=True)]
        found = self.offsets(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        # As Python's tuples, offsets take eight times the memory of their array: those of one text at a time.
        flat = itertools.chain.from_iterable
        return [
            Tokens(ids, *np.fromiter(flat(one.offsets), dtype=np.int64, count=2 * len(ids)).reshape(-1, 2).T)
            for ids, one in zip(found["input_ids"], found.encodings, strict=True)
        ]

    def _by_prefixes(self, text: str, borders: list[int]) -> Tokens:
        """For tokenizers without offsets: a border is where the tokens of the text before it end, which is checked."""
        ids = self._ids(text)
        begins = np.zeros(len(ids), dtype=np.int64)
        for border in borders:
            before = self._ids(text[:border])
            if ids[: len(before)] != before:
                raise ValueError(
                    "this tokenizer gives no offsets (it has no tokenizer.json), and it joins the end of a prompt with "
                    f"the beginning of its answer at {text[max(0, border - 10) : border + 10]!r}, so the loss has no "
                    "exact border: convert the tokenizer (transformers' AutoTokenizer saves a tokenizer.json)"
                )
            begins[len(before) :] = border
        return Tokens(ids, begins, np.append(begins[1:], len(text))[: len(ids)])

    def check_prompts(
        self, samples: list[Sample], tokens: list[Tokens], spans: list[list[tuple[int, int]]], *, free: bool
    ) -> dict[int, tuple[list[int], list[int]]]:
        """Find the answers whose prompt has other tokens in generation than in the whole text.

        The tokenizer cuts a text at its added tokens first. So the part from the last of them to the answer, tokenised
        alone, is enough to check the whole prompt. If a text template leaves us free to choose, the prompt is tokenised
        as generation does: {sample: (ids of the prompt, ids of the answer)}. The others are counted.
        """
        checks = []
        for number, (sample, found, places) in enumerate(zip(samples, tokens, spans, strict=True)):
            added = (
                [] if self.added.isdisjoint(found.ids) else [i for i, id in enumerate(found.ids) if id in self.added]
            )
            for (start, _), (first, _) in zip(sample.answers, places, strict=True):
                before = bisect.bisect_left(added, first)
                cut = added[before - 1] if before else 0
                begin = int(found.begins[cut]) if before else 0
                checks.append((number, sample.text[begin:start], found.ids[cut:first], start))
        if len(self.segments) > MOST_SEGMENTS:
            self.segments.clear()
        unknown = list({segment for _, segment, _, _ in checks if segment and segment not in self.segments})
        found_ids = self._all_ids(unknown) if unknown else []
        ids = dict(zip(unknown, found_ids, strict=True)) | {"": []}
        self.segments |= {segment: made for segment, made in ids.items() if len(segment) < SHORT_SEGMENT}
        apart = {}
        for number, segment, expected, start in checks:
            self.tally.answers += 1
            if (self.segments[segment] if segment in self.segments else ids[segment]) == expected:
                continue
            text = samples[number].text
            if free and (answer := self._continued(text[start:])) is not None:
                apart[number] = self._ids(text[:start]), answer
                continue
            self.tally.joined += 1
            self.tally.first_joined = self.tally.first_joined or f"{segment[-10:]!r} and {text[start : start + 20]!r}"
        return apart

    def _continued(self, text: str) -> list[int] | None:
        """The tokens of a text that continues another: without the mark that a tokenizer puts before a text."""
        for other in ("\n", "a", "."):
            alone, both = self._ids(other), self._ids(other + text)
            if both[: len(alone)] == alone:
                return both[len(alone) :]
        return None

    def count_stop(self, ids: np.ndarray, answers: np.ndarray) -> None:
        """Count the answers of a whole sample, and those that do not end in a token that ends generation."""
        ends = np.flatnonzero(answers & ~np.append(answers[1:], False))
        endless = [end for end in ends.tolist() if int(ids[end]) not in self.stop]
        self.tally.whole += len(ends)
        self.tally.endless += len(endless)
        if endless and not self.tally.first_endless:
            self.tally.first_endless = repr(self.tokenizer.decode(ids[: endless[0] + 1].tolist())[-30:])

    def notes(self, total: Tally, template: Template) -> Iterator[str]:
        if total.split:
            growth = total.all_characters / total.last_characters
            yield (
                f"the chat template rewrites earlier turns: {total.split:,} conversations became one sample for each "
                f"answer, as the model is served, {growth:.2f} times the text"
            )
        for what, count in sorted(total.left_out.items()):
            yield f"the chat template leaves out {what}: {count:,} times"
        if 2 * total.marked >= max(total.samples, 1):  # fewer may be talk about templates
            yield (
                f"{total.marked:,} prompts have the marks of a prompt template already ({total.first_mark!r}), and the "
                f"template {template.name} is put around them: for whole prompts give --prompt-template none, else "
                "take the marks out of the data"
            )
        if total.joined:
            yield (
                f"in {total.joined:,} of {total.answers:,} answers the tokenizer joins the end of the prompt with the "
                f"beginning of the answer (the first: {total.first_joined}), so generation starts from other tokens "
                "than training: let the template end with a line break, not with a space"
            )
        if total.endless:
            names = ", ".join(repr(self.tokenizer.decode([token])) for token in sorted(self.stop)) or "none"
            all_are = total.endless == total.whole
            yield (
                ("no answer ends" if all_are else f"{total.endless:,} of {total.whole:,} answers do not end")
                + f" in a token that stops generation ({names}), so the model would not learn to stop"
                + ("" if all_are else f" after them (the first ends in {total.first_endless})")
                + f": let the template {template.name} write one of them at the end of each answer"
            )

    def _ids(self, text: str) -> list[int]:
        return self._all_ids([text])[0]

    def _all_ids(self, texts: list[str]) -> list[list[int]]:
        found = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return found["input_ids"]


def stop_ids(tokenizer: Any) -> set[int]:
    """The tokens that end an answer: the tokenizer's eos, and those of the generation_config.json beside it."""
    try:
        config = read_json(Path(tokenizer.name_or_path) / "generation_config.json")
        named = config.get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        named = None
    found = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return {token for token in found if isinstance(token, int)}


def _untrimmed(tokenizer: Any) -> Any:
    """The tokenizer, with offsets that include the blanks around a word; None if it has no offsets."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    last = tokenizer.backend_tokenizer.post_processor
    if last is None or not _leave_whole(json.loads(last.__getstate__())):
        return tokenizer
    copied, backend = copy.deepcopy(tokenizer), json.loads(tokenizer.backend_tokenizer.to_str())
    _leave_whole(backend["post_processor"])
    copied._tokenizer = Tokenizer.from_str(json.dumps(backend))
    return copied


def _leave_whole(part: Any) -> bool:
    """Switch trimming off in a post-processor and those inside it; whether it was on anywhere."""
    if not isinstance(part, dict):
        return False
    trims = part.get("trim_offsets") is True
    if trims:
        part["trim_offsets"] = False
    return any([trims, *map(_leave_whole, part.get("processors", []))])
