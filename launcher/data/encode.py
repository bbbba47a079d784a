"""From checked records to token ids and loss masks: prompts and answers, of which the answers carry loss.

Everything after this is a pure function of small numbers (seed, step, lengths), so every rank computes the same plan
without talking to the others.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from launcher.config import DataConfig
from launcher.data.bad_records import BadRecord, BadRecords
from launcher.data.chat import Rendered, Sample, many
from launcher.data.crew import Tick
from launcher.data.encoded import DataReport, Encoded, Part, Tally, encoded, groups
from launcher.data.forms import Record
from launcher.data.templates import Template, check_template, frame, lacking, own_mark, render, template_of
from launcher.data.tokens import Seen, Tokens, stop_ids
from launcher.progress import silent


def encode(
    records: Sequence[Record],
    tokenizer: Any,
    config: DataConfig,
    template: Template | None = None,
    tick: Tick = silent,
) -> Encoded:
    """Tokenise bos + prompt + answer + eos, unless the texts have them (a chat template writes its own marks), all in
    memory.

    The whole text of a sample is tokenised at once, as `apply_chat_template(tokenize=True)` does, and the borders of
    the loss are mapped to tokens by their offsets. A token that crosses a border carries loss.
    A sample over max_length loses the end of its answer; one with no token of an answer left is dropped. Both are
    counted. template replaces the one that config names; tick gets the number of records that are done. Raises
    ValueError when nothing is left to learn, and for records that the template cannot carry, unless
    config.on_bad_record is skip.
    """
    assert records
    return encoded(Encoder(records[0], tokenizer, config, template), records, tick)


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
        self.seen = Seen(tokenizer)

    def part(self, records: Sequence[Record]) -> Part:
        """The samples of these records."""
        seen, config, bad = self.seen, self.config, BadRecords(self.config.on_bad_record)
        seen.tally = tally = Tally()
        ids, loss = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.bool_)]
        with many("rendering the chat template"):
            rendered = [seen.add(one) for one in _render(records, self.template, self.tokenizer, bad)]
        for mark in (mark for record in records if (mark := own_mark(record, self.template))):
            tally.marked, tally.first_mark = tally.marked + 1, tally.first_mark or mark
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


def _render(records: Sequence[Record], template: Template, tokenizer: Any, bad: BadRecords) -> Iterator[Rendered]:
    for record in records:
        try:
            yield render(record, template, tokenizer)
        except BadRecord as error:
            bad.add(error)


def _tokenise(
    samples: list[Sample], seen: Seen, head: list[int], tail: list[int]
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
            found, places = Tokens(prompt + answer, found.begins, found.ends), [(len(prompt), len(prompt + answer))]
        begin, end = lacking(found.ids, head, tail)
        whole = np.array(begin + found.ids + end, dtype=np.int32)
        answers = np.zeros(len(whole), dtype=np.bool_)
        answers[len(begin) + len(found.ids) :] = True
        for first, stop in places:
            answers[len(begin) + first : len(begin) + stop] = True
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
