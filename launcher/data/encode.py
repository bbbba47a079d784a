"""From checked records to the tensors of a step: token ids and loss masks, sample order, packing, batches.

Everything after `encode` is a pure function of small numbers (seed, step, lengths), so every rank computes the same
plan without talking to the others. A "row" is what batch_size counts: one sample, or with packing several together.

Shapes: S samples, T tokens of all samples together, B rows of a micro-batch, N tokens of its longest row.
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from launcher.config import DataConfig
from launcher.data.bad_records import SHOWN, BadRecord, BadRecords
from launcher.data.chat import Rendered, Sample, many
from launcher.data.crew import Tick
from launcher.data.forms import Record
from launcher.data.templates import Template, check_template, frame, render, template_of
from launcher.files import read_json
from launcher.progress import silent

log = logging.getLogger(__name__)
CHUNK = 1000  # records tokenised at once: enough to keep a fast tokenizer busy, little memory
IDS_AT_ONCE = 1 << 22
MOST_CLASSES = 1 << 22  # of a vocabulary whose tokens are counted in a table
CHARACTERS_AT_ONCE = 1 << 20  # that a tokenizer gets in one call; it takes up to 400 bytes of memory for each
SHORT_SEGMENT = 256  # characters; the ids of shorter ones (headers of answers, which repeat) are kept
MOST_SEGMENTS = 4096  # that are kept; without a chat template each is a separate prompt


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
    known_digest: str | None = field(default=None, kw_only=True)  # of a file that was verified

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> list[int]:
        return self.offsets.diff().tolist()

    def digest(self) -> str:
        """sha256 of tokens, masks and borders: equal for equal data on every machine."""
        if self.known_digest is not None:
            return self.known_digest
        sha = hashlib.sha256()
        for tensor in (self.ids, self.loss, self.offsets):
            sha.update(little_endian(tensor.numpy()))
        return sha.hexdigest()

    def distinct_ids(self) -> Tensor:
        """The tokens that occur, ascending, int64."""
        seen = torch.zeros(0, dtype=torch.bool)
        if len(self.ids) and int(self.ids.max()) > MOST_CLASSES:  # ids with holes, which no table can count
            return self.ids.unique().long()
        for part in self.ids.split(IDS_AT_ONCE):
            here = torch.bincount(part) > 0
            short, long = sorted((seen, here), key=len)
            long[: len(short)] |= short
            seen = long
        return seen.nonzero().flatten()


def little_endian(numbers: np.ndarray) -> Any:
    """The bytes of an array, the same on every machine, without a copy if they are that already."""
    return np.ascontiguousarray(numbers, numbers.dtype.newbyteorder("<")).view(np.uint8).data


def encode(
    records: Sequence[Record],
    tokenizer: Any,
    config: DataConfig,
    template: Template | None = None,
    tick: Tick = silent,
) -> Encoded:
    """Tokenise bos + prompt + answer + eos (a chat template writes its own marks), all in memory.

    The whole text of a sample is tokenised at once, as `apply_chat_template(tokenize=True)` does, and the borders of
    the loss are mapped to tokens by their offsets. A token that crosses a border carries loss.
    A sample over max_length loses the end of its answer; one with no token of an answer left is dropped. Both are
    counted. template replaces the one that config names; tick gets the number of records that are done. Raises
    ValueError when nothing is left to learn, and for records that the template cannot carry, unless
    config.on_bad_record is skip.
    """
    assert records
    return encoded(Encoder(records[0], tokenizer, config, template), records, tick)


def encoded(encoder: Encodes, records: Sequence[Record], tick: Tick = silent) -> Encoded:
    """What an encoder makes of these records, in memory. Raises its errors."""
    parts = []
    for start in range(0, len(records), CHUNK):
        parts.append(encoder.part(records[start : start + CHUNK]))
        tick(min(start + CHUNK, len(records)))
    report = encoder.report([part.tally for part in parts], len(records))
    report.log()
    lengths, targets, ids, loss = (torch.from_numpy(np.concatenate([part[i] for part in parts])) for i in (0, 1, 2, 3))
    return Encoded(
        ids=ids,
        loss=loss,
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        targets=targets,
        report=report,
    )


@dataclass
class Tally:
    """Counts of some records, for the report and the log. JSON data."""

    samples: int = 0
    kept: int = 0
    tokens: int = 0
    target_tokens: int = 0
    truncated: int = 0
    shortest: int | None = None  # tokens up to the first of the answer, of the samples that are dropped
    bad: list[str] = field(default_factory=list)  # the first records that the template refuses
    bad_kinds: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)  # what the chat template does not write
    split: int = 0  # conversations that became several samples
    last_characters: int = 0
    all_characters: int = 0
    answers: int = 0
    joined: int = 0  # answers that the tokenizer joins with their prompt
    first_joined: str = ""
    whole: int = 0  # answers of samples that were not cut
    endless: int = 0  # those that do not end in a token that stops generation
    first_endless: str = ""

    def add(self, later: Tally) -> None:
        """Add the counts of the records after these."""
        found = [shortest for shortest in (self.shortest, later.shortest) if shortest is not None]
        self.shortest = min(found, default=None)
        self.bad = (self.bad + later.bad)[:SHOWN]
        self.first_joined = self.first_joined or later.first_joined
        self.first_endless = self.first_endless or later.first_endless
        for name in ("bad_kinds", "left_out"):
            setattr(self, name, dict(Counter(getattr(self, name)) + Counter(getattr(later, name))))
        for name in (
            "samples", "kept", "tokens", "target_tokens", "truncated", "split", "last_characters", "all_characters",
            "answers", "joined", "whole", "endless",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(later, name))


class Part(NamedTuple):
    """The samples of some records, end to end."""

    lengths: np.ndarray  # (S,) int64
    targets: np.ndarray  # (S,) int64
    ids: np.ndarray  # (T,) int32
    loss: np.ndarray  # (T,) bool
    tally: Tally


class Encodes(Protocol):
    """Turns records into samples, part by part; the parts do not depend on each other."""

    report_type: type[DataReport]

    def __init__(self, first: Record, tokenizer: Any, config: DataConfig): ...

    @classmethod
    def key(cls, first: Record, tokenizer: Any, config: DataConfig) -> list[Any]:
        """What the tokens depend on beside the records, the tokenizer and max_length, loss_on and on_bad_record of
        config. JSON data."""
        ...

    def part(self, records: Sequence[Record]) -> Part:
        """The samples of these records."""
        ...

    def report(self, tallies: Iterable[Tally], records: int) -> DataReport:
        """The report of all parts, in order. Raises ValueError if nothing is left to learn."""
        ...


class Encoder:
    """Prompts and answers, of which the answers carry loss."""

    report_type = DataReport

    @classmethod
    def key(cls, first: Record, tokenizer: Any, config: DataConfig) -> list[Any]:
        template = template_of(config, first, tokenizer)
        return [template, frame(template, tokenizer), sorted(stop_ids(tokenizer))]

    def __init__(self, first: Record, tokenizer: Any, config: DataConfig, template: Template | None = None):
        self.template = template or template_of(config, first, tokenizer)
        check_template(self.template, conversations="messages" in first)
        self.tokenizer, self.config = tokenizer, config
        self.head, self.tail = frame(self.template, tokenizer)
        self.seen = _Seen(tokenizer)

    def part(self, records: Sequence[Record]) -> Part:
        """The samples of these records."""
        seen, config, bad = self.seen, self.config, BadRecords(self.config.on_bad_record)
        seen.tally = tally = Tally()
        ids, loss = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.bool_)]
        with many("rendering the chat template"):
            rendered = [seen.add(one) for one in _render(records, self.template, self.tokenizer, bad)]
        samples = [each for one in rendered for each in one.samples]
        for sample_ids, answers in itertools.chain.from_iterable(
            _tokenise(samples[group], seen, self.head, self.tail) for group in groups([len(s.text) for s in samples])
        ):
            tally.samples += 1
            needed = int(answers.argmax()) + 1
            if needed > config.max_length:
                tally.shortest = min(needed, tally.shortest or needed)
                continue
            if len(sample_ids) <= config.max_length:
                seen.count_stop(sample_ids, answers)
            tally.truncated += len(sample_ids) > config.max_length
            if config.loss_on == "all":
                answers[1:] = True
            ids.append(sample_ids[: config.max_length])
            loss.append(answers[: config.max_length])
        lengths = np.array([len(each) for each in ids[1:]], dtype=np.int64)
        targets = np.array([np.count_nonzero(each) for each in loss[1:]], dtype=np.int64)
        tally.kept, tally.tokens, tally.target_tokens = len(lengths), int(lengths.sum()), int(targets.sum())
        tally.bad, tally.bad_kinds = bad.first, dict(bad.kinds)
        return Part(lengths, targets, np.concatenate(ids), np.concatenate(loss), tally)

    def report(self, tallies: Iterable[Tally], records: int) -> DataReport:
        """The report of all parts, in order. Raises ValueError for bad records and if nothing is left to learn."""
        total = Tally()
        for tally in tallies:
            total.add(tally)
        bad = BadRecords(self.config.on_bad_record, total.bad, Counter(total.bad_kinds))
        left_out, most = bad.tell("the records", records), self.config.max_length
        if not total.kept:
            raise ValueError(
                f"no sample is left: the prompt alone of all {total.samples} records fills --max-length {most}"
                f"; the shortest needs --max-length {total.shortest} for the first token of its answer"
            )
        notes = (*([left_out] if left_out else []), *self.seen.notes(total, self.template))
        return DataReport(
            total.samples, total.kept, total.truncated, total.samples - total.kept, total.tokens, total.target_tokens,
            most, notes,
        )  # fmt: skip


def groups(sizes: Sequence[int], most: int = CHARACTERS_AT_ONCE) -> Iterator[slice]:
    """Neighbours of at most this size together; one that is larger is alone."""
    start = total = 0
    for at, size in enumerate(sizes):
        if at > start and total + size > most:
            yield slice(start, at)
            start, total = at, 0
        total += size
    if start < len(sizes):
        yield slice(start, len(sizes))


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
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(token ids, whether each carries loss) of each sample: (N,) int32 and bool."""
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
        whole = np.array(head + found.ids + tail, dtype=np.int32)
        answers = np.zeros(len(whole), dtype=np.bool_)
        answers[len(head) + len(found.ids) :] = True
        for first, end in places:
            answers[len(head) + first : len(head) + end] = True
        answers[:1] = False  # there is nothing before the first token to predict it from
        if not answers.any():
            raise ValueError(
                f"the sample that begins {sample.text!r:.50} has no token of an answer, although its text has one: "
                f"the tokenizer makes {len(whole)} tokens of the text; look at the template and its "
                "{% generation %} blocks"
            )
        yield whole, answers


def _borders(sample: Sample) -> list[int]:
    return sorted({place for span in sample.answers for place in span})


class _Seen:
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

    def tokens(self, texts: list[str], borders: list[list[int]]) -> list[_Tokens]:
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
            _Tokens(ids, *np.fromiter(flat(one.offsets), dtype=np.int64, count=2 * len(ids)).reshape(-1, 2).T)
            for ids, one in zip(found["input_ids"], found.encodings, strict=True)
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
