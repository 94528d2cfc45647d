"""A source whose format is known: what the report, training, and conversion read rows from.

`open_source` looks at the first records, recognises the format, and hands out all records under our names; `rows_of`
turns one of them into rows of the schema.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from alignment.data import formats, sources
from alignment.data.files import Record
from alignment.recipe.algorithms import Schema
from alignment.recipe.described import described
from alignment.recipe.schema import Source

SAMPLE = 100  # records from which a source's format is recognised

Wanted = Callable[[dict[str, Any]], bool]


@dataclass(frozen=True)
class Opened:
    """A source and how it is read.

    Attributes:
        source: the source, looked up where it is another tool's description.
        name: the source as log and manifest name it.
        format: its format, `schema` the schema of the rows that are made of it.
        reading: how pairs are made of several answers.
        why: by what the format was recognised.
        records: all records, from the first, under our names of columns and roles.
    """

    source: Source
    name: str
    format: formats.Format
    schema: Schema
    reading: formats.Reading
    why: str
    records: Iterator[Record]

    @property
    def says(self) -> str:
        """The format, and what is made of it."""
        return formats.says(self.format, self.schema, self.reading)


def open_source(source: Source, schema: Schema | None, *, wanted: Wanted = lambda record: True) -> Opened:
    """Recognise a source.

    Args:
        schema: the schema that the rows must have; None for the one that suits the format best.
        wanted: which records count: those that will not be dropped whatever their format.

    Raises:
        DataError: unreadable, without records, without a column that `columns` names, or of no known format.
    """
    source = described(source)
    name, records = sources.identity(source), sources.read(source)
    head = list(itertools.islice(records, SAMPLE))
    sources.require_columns(head, source)
    adapted = [Record(sources.adapt(record.value, source), record.where) for record in head]
    sample = [record.value for record in adapted if wanted(record.value)] or [record.value for record in adapted]
    if schema is None:
        found, schema = formats.recognise(sample, named=source.format, source=name)
    else:
        found = formats.detect(sample, schema, named=source.format, source=name)
    why = "as the source says" if source.format is not None else formats.why(found, sample)
    rest = (Record(sources.adapt(record.value, source), record.where) for record in records)
    reading = formats.Reading(source.pairs, source.score)
    return Opened(source, name, found, schema, reading, why, itertools.chain(adapted, rest))


def rows_of(record: Record, opened: Opened) -> list[formats.Row]:
    """The rows of one record. Raises `Defect` where it has none."""
    return formats.convert(record.value, opened.format, opened.schema, opened.reading)
