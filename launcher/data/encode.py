"""From checked records to the tensors of a step: token ids and loss masks, sample order, packing, batches.

Everything after `encode` is a pure function of small numbers (seed, step, lengths), so every rank computes the same
plan without talking to the others. A "row" is what batch_size counts: one sample, or with packing several together.

Shapes: S samples, T tokens of all samples together, B rows of a micro-batch, N tokens of its longest row.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from launcher.config import DataConfig
from launcher.data.bad_records import BadRecord, BadRecords
from launcher.data.chat import Rendered, Sample, many
from launcher.data.forms import Record
from launcher.data.templates import Template, check_template, frame, render, template_of

log = logging.getLogger(__name__)
CHUNK = 1000  # records tokenised at once: enough to keep a fast tokenizer busy, little memory
SHORT_SEGMENT = 256  # characters; the ids of shorter ones (headers of answers, which repeat) are kept


@dataclass(frozen=True)
class DataReport:
    """What became of the records; tokens are counted after cutting."""

    records: int
    kept: int
    truncated: int
    dropped: int
    tokens: int
    target_tokens: int
    max_length: int
    notes: tuple[str, ...] = ()  # what a user should know of these samples, for the log

    def log(self) -> None:
        """Warn of what a user should know of these samples."""
        for note in self.notes:
            log.warning("%s", note)

    @property
    def loss_share(self) -> float:
        return self.target_tokens / max(self.tokens, 1)

    def __str__(self) -> str:
        line = f"{self.kept:,} of {self.records:,} records, {self.tokens:,} tokens, {self.loss_share:.1%} carry loss"
        if self.truncated:
            line += f"; {self.truncated:,} lost the end of their answer at {self.max_length} tokens"
        if self.dropped:
            line += f"; {self.dropped:,} dropped, their prompt alone fills {self.max_length} tokens"
        return line


@dataclass(frozen=True, eq=False)
class Encoded:
    """All samples end to end; sample i is tokens offsets[i]:offsets[i + 1]."""

    ids: Tensor  # (T,) int32
    loss: Tensor  # (T,) bool: this token is predicted and counted; never a sample's first token
    offsets: Tensor  # (S + 1,) int64
    targets: Tensor  # (S,) int64, tokens of each sample that carry loss
    report: DataReport

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> list[int]:
        return self.offsets.diff().tolist()

    def digest(self) -> str:
        """sha256 of tokens, masks and borders: equal for equal data on every machine."""
        sha = hashlib.sha256()
        for tensor in (self.ids, self.loss, self.offsets):
            sha.update(tensor.numpy().astype(tensor.numpy().dtype.newbyteorder("<"), copy=False).tobytes())
        return sha.hexdigest()


def encode(records: Sequence[Record], tokenizer: Any, config: DataConfig, template: Template | None = None) -> Encoded:
    """Tokenise bos + prompt + answer + eos (a chat template writes its own marks).

    The whole text of a sample is tokenised at once, as `apply_chat_template(tokenize=True)` does, and the borders of
    the loss are mapped to tokens by their offsets. A token that lies on both sides of a border carries loss.
    A sample over max_length loses the end of its answer; one with no token of an answer left is dropped. Both are
    counted. template replaces the one that config names. Raises ValueError when nothing is left to learn, and for
    records that the template cannot carry, unless config.on_bad_record is skip.
    """
    assert records
    template = template or template_of(config, records[0], tokenizer)
    check_template(template, conversations="messages" in records[0])
    head, tail = frame(template, tokenizer)
    seen, bad = _Seen(tokenizer), BadRecords(config.on_bad_record)
    ids, loss, offsets, targets = array("i"), bytearray(), [0], []
    samples, truncated, shortest = 0, 0, None
    for start in range(0, len(records), CHUNK):
        with many("rendering the chat template"):
            rendered = [seen.add(one) for one in _render(records[start : start + CHUNK], template, tokenizer, bad)]
        for sample_ids, answers in _tokenise([each for one in rendered for each in one.samples], seen, head, tail):
            samples += 1
            needed = answers.index(True) + 1
            if needed > config.max_length:
                shortest = min(needed, shortest or needed)
                continue
            if len(sample_ids) <= config.max_length:
                seen.count_stop(sample_ids, answers)
            truncated += len(sample_ids) > config.max_length
            del sample_ids[config.max_length :], answers[config.max_length :]
            if config.loss_on == "all":
                answers = [False] + [True] * (len(answers) - 1)
            ids.extend(sample_ids)
            loss.extend(answers)
            offsets.append(len(ids))
            targets.append(sum(answers))
    left_out = bad.tell("the records", len(records))
    if not targets:
        raise ValueError(
            f"no sample is left: the prompt alone of all {samples} records fills --max-length {config.max_length}"
            f"; the shortest needs --max-length {shortest} for the first token of its answer"
        )
    report = DataReport(
        samples, len(targets), truncated, samples - len(targets), len(ids), sum(targets), config.max_length,
        (*([left_out] if left_out else []), *seen.notes(template)),
    )  # fmt: skip
    report.log()
    return Encoded(
        ids=torch.from_numpy(np.frombuffer(ids, dtype=np.int32)),
        loss=torch.from_numpy(np.frombuffer(loss, dtype=np.bool_)),
        offsets=torch.tensor(offsets),
        targets=torch.tensor(targets),
        report=report,
    )


def _render(records: Sequence[Record], template: Template, tokenizer: Any, bad: BadRecords) -> Iterator[Rendered]:
    for record in records:
        try:
            yield render(record, template, tokenizer)
        except BadRecord as error:
            bad.add(error)


class _Tokens(NamedTuple):
    """Of one text: ids, and for each token the characters [begins[i], ends[i]) it stands for."""

    ids: list[int]
    begins: np.ndarray
    ends: np.ndarray


def _tokenise(
    samples: list[Sample], seen: _Seen, head: list[int], tail: list[int]
) -> Iterator[tuple[list[int], list[bool]]]:
    """(token ids, whether each carries loss) of each sample."""
    tokens = seen.tokens([sample.text for sample in samples], [_borders(sample) for sample in samples])
    spans = []
    for sample, found in zip(samples, tokens, strict=True):
        # A token of no characters (the mark that SentencePiece puts before a text) belongs to what follows it.
        spans.append(
            [
                (
                    int(np.count_nonzero((found.ends <= start) & (found.begins < start))),
                    int(np.count_nonzero(found.begins < stop)),
                )
                for start, stop in sample.answers
            ]
        )
    joined = seen.check_prompts(samples, tokens, spans, free=bool(tail))
    for number, (sample, found, places) in enumerate(zip(samples, tokens, spans, strict=True)):
        if number in joined:
            prompt, answer = joined[number]
            found, places = _Tokens(prompt + answer, found.begins, found.ends), [(len(prompt), len(prompt + answer))]
        answers = [False] * (len(head) + len(found.ids)) + [True] * len(tail)
        for first, end in places:
            answers[len(head) + first : len(head) + end] = [True] * (end - first)
        whole = head + found.ids + tail
        if whole:
            answers[0] = False  # nothing stands before the first token to predict it from
        if True not in answers:
            raise ValueError(
                f"the sample that begins {sample.text!r:.50} has no token of an answer, although its text has one: "
                f"the tokenizer makes {len(whole)} tokens of the text; look at the template and its "
                "{% generation %} blocks"
            )
        yield whole, answers


def _borders(sample: Sample) -> list[int]:
    return sorted({place for span in sample.answers for place in span})


class _Seen:
    """What the tokenizer makes of texts, and what is to be told of the samples in the end."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.offsets = _untrimmed(tokenizer)
        self.stop = stop_ids(tokenizer)
        self.added = np.array(sorted(tokenizer.added_tokens_decoder), dtype=np.int64)
        self.segments: dict[str, list[int]] = {}
        self.dropped: Counter[str] = Counter()
        self.split, self.last_characters, self.all_characters = 0, 0, 0
        self.answers, self.joined, self.first_joined = 0, 0, ""
        self.whole, self.stopped = 0, 0

    def add(self, rendered: Rendered) -> Rendered:
        """Count what became of a record."""
        self.dropped += rendered.dropped
        if rendered.split:
            self.split += 1
            self.last_characters += len(rendered.samples[-1].text)
            self.all_characters += sum(len(sample.text) for sample in rendered.samples)
        return rendered

    def tokens(self, texts: list[str], borders: list[list[int]]) -> list[_Tokens]:
        if not texts:
            return []
        if self.offsets is None:
            return [self._by_prefixes(*each) for each in zip(texts, borders, strict=True)]
        found = self.offsets(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [
            _Tokens(ids, *np.array(offsets, dtype=np.int64).reshape(-1, 2).T)
            for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True)
        ]

    def _by_prefixes(self, text: str, borders: list[int]) -> _Tokens:
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
        return _Tokens(ids, begins, np.append(begins[1:], len(text))[: len(ids)])

    def check_prompts(
        self, samples: list[Sample], tokens: list[_Tokens], spans: list[list[tuple[int, int]]], *, free: bool
    ) -> dict[int, tuple[list[int], list[int]]]:
        """Find the answers before which generation would put other tokens than stand in the whole text.

        The tokenizer cuts a text at its added tokens first. So the part from the last of them to the answer, tokenised
        alone, proves the whole prompt. Where a text template leaves us free to choose, the prompt is tokenised as
        generation does: {sample: (ids of the prompt, ids of the answer)}. The others are counted.
        """
        checks = []
        for number, (sample, found, places) in enumerate(zip(samples, tokens, spans, strict=True)):
            added = np.flatnonzero(np.isin(found.ids, self.added))
            for (start, _), (first, _) in zip(sample.answers, places, strict=True):
                before = added[added < first]
                cut = int(before[-1]) if len(before) else 0
                begin = int(found.begins[cut]) if len(before) else 0
                checks.append((number, sample.text[begin:start], found.ids[cut:first], start))
        unknown = list({segment for _, segment, _, _ in checks if segment and segment not in self.segments})
        found_ids = self.tokenizer(unknown, add_special_tokens=False, verbose=False)["input_ids"] if unknown else []
        ids = dict(zip(unknown, found_ids, strict=True)) | {"": []}
        self.segments |= {segment: made for segment, made in ids.items() if len(segment) < SHORT_SEGMENT}
        apart = {}
        for number, segment, expected, start in checks:
            self.answers += 1
            if (self.segments[segment] if segment in self.segments else ids[segment]) == expected:
                continue
            text = samples[number].text
            if free and (answer := self._continued(text[start:])) is not None:
                apart[number] = self._ids(text[:start]), answer
                continue
            self.joined += 1
            self.first_joined = self.first_joined or f"{segment[-10:]!r} and {text[start : start + 20]!r}"
        return apart

    def _continued(self, text: str) -> list[int] | None:
        """The tokens of a text that continues another: without the mark that a tokenizer puts before a text."""
        for other in ("\n", "a", "."):
            alone, both = self._ids(other), self._ids(other + text)
            if both[: len(alone)] == alone:
                return both[len(alone) :]
        return None

    def count_stop(self, ids: list[int], answers: list[bool]) -> None:
        """Count a whole sample, and whether an answer of it ends in a token that ends generation."""
        self.whole += 1
        ends = (i for i in range(len(ids)) if answers[i] and not (i + 1 < len(ids) and answers[i + 1]))
        self.stopped += any(ids[i] in self.stop for i in ends)

    def notes(self, template: Template) -> Iterator[str]:
        if self.split:
            growth = self.all_characters / self.last_characters
            yield (
                f"the chat template rewrites earlier turns: {self.split:,} conversations became one sample for each "
                f"answer, as the model is served, {growth:.2f} times the text"
            )
        for what, count in sorted(self.dropped.items()):
            yield f"the chat template leaves out {what}: {count:,} times"
        if self.joined:
            yield (
                f"in {self.joined:,} of {self.answers:,} answers the tokenizer joins the end of the prompt with the "
                f"beginning of the answer (the first: {self.first_joined}), so generation starts from other tokens "
                "than training: let the template end with a line break, not with a space"
            )
        if self.whole and not self.stopped:
            names = ", ".join(repr(self.tokenizer.decode([token])) for token in sorted(self.stop)) or "none"
            yield (
                f"no answer ends in a token that stops generation ({names}), so the model would not learn to stop: "
                f"let the template {template.name} write one of them at the end of each answer"
            )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def stop_ids(tokenizer: Any) -> set[int]:
    """The tokens that end an answer: the tokenizer's eos, and those of the generation_config.json beside it."""
    try:
        config = json.loads((Path(tokenizer.name_or_path) / "generation_config.json").read_text(encoding="utf-8"))
        named = config.get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        named = None
    found = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return {token for token in found if isinstance(token, int)}


def _untrimmed(tokenizer: Any) -> Any:
    """The tokenizer, with offsets that include the blanks around a word; None where it has no offsets."""
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
