"""Rows of CSV and TSV text, in which the first line names the columns."""

from __future__ import annotations

import csv
import io
import logging
import sys
from collections.abc import Iterator
from typing import Literal

log = logging.getLogger(__name__)
Quoting = Literal[0, 3]  # csv.QUOTE_MINIMAL or QUOTE_NONE


def csv_rows(text: str, delimiter: str, where: str) -> Iterator[dict[str, str]]:
    """A dict for each row. Raises ValueError naming the line of a mistake.

    In TSV files quotes are often plain text (GLUE's are written so). Read as CSV, a quote at the beginning of one row
    would swallow all rows up to the next quote.
    """
    csv.field_size_limit(sys.maxsize)
    if delimiter == "\t" and _quotes_are_text(text):
        log.warning("%s: a quote opens a text and does not close it in its line: quotes are read as text", where)
        return _rows(text, delimiter, csv.QUOTE_NONE, where)
    return _rows(text, delimiter, csv.QUOTE_MINIMAL, where)


def _quotes_are_text(text: str) -> bool:
    """Whether each line has all columns, and rows would be lost, or none be read, if quotes enclosed texts."""
    if '"' not in text:
        return False

    def counts(quoting: Quoting) -> list[int]:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=quoting, strict=True)
        return [len(row) for row in rows if row]

    try:
        lines = counts(csv.QUOTE_NONE)
    except csv.Error:
        return False
    if len(set(lines)) != 1 or lines[0] == 1:  # a text of one column may have any number of lines
        return False
    try:
        return len(counts(csv.QUOTE_MINIMAL)) < len(lines)
    except csv.Error:
        return True


def _rows(text: str, delimiter: str, quoting: Quoting, where: str) -> Iterator[dict[str, str]]:
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, quoting=quoting)
        names = rows.fieldnames or []
        if len(set(names)) < len(names) or not all(names):
            raise ValueError(f"{where}: the first line names the columns, each once; it has {', '.join(names)}")
        if len(names) == 1 and ";" in names[0]:
            raise ValueError(
                f"{where} separates its columns by ';' ({names[0]:.60}): save it with ',' (.csv) or with tabs (.tsv)"
            )
        for row in rows:
            if None in row or None in row.values():
                count = len(names) + len(row.get(None, [])) - list(row.values()).count(None)
                raise ValueError(
                    f"{where}, line {rows.line_num}, has {count} columns, and the first line names {len(names)} "
                    f"({', '.join(names)}): a text with {delimiter!r} or a line break is written in quotes"
                )
            yield row
    except csv.Error as error:
        raise ValueError(f"{where} is not CSV: {error}") from None
