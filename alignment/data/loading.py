"""The rows of a list of sources: read, converted, checked, put right as the recipe says, and mixed.

What is left out is counted in the `Account` of its source: defects, which `data.limits` bound, and what remedies took.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from alignment.data import languages, remedies, sources
from alignment.data.checks import Defect, check_row
from alignment.data.holdout import hold_out
from alignment.data.opened import Opened, open_source, rows_of
from alignment.data.remedies import Account, Found, Numbers, Row, Rows, augmented
from alignment.errors import DataError
from alignment.recipe.algorithms import Schema
from alignment.recipe.schema import Data, DataLimits, Source

Say = Callable[[str], None]
Splits = dict[str, tuple[Rows, list[Account]]]

row_of: Callable[[Found], Row] = operator.attrgetter("row")
where_of: Callable[[Found], str] = operator.attrgetter("where")


@dataclass(frozen=True)
class Loading:
    """How the rows of sources are loaded.

    Attributes:
        data: the section whose remedies are applied; None for none.
        held_out: the sources are `data.eval`: of the remedies only `on_system` is applied.
    """

    schema: Schema
    seed: int
    strict: bool
    limits: DataLimits
    say: Say
    data: Data | None = None
    held_out: bool = False

    @property
    def remedies(self) -> Data | None:
        """The section whose remedies take and change whole rows."""
        return None if self.held_out else self.data


def load(wanted: Sequence[Source], how: Loading) -> tuple[Rows, list[Account]]:
    """The rows of the sources in their order, and what became of the others.

    Raises:
        DataError: a damaged file, wrong columns, or more defective rows than `limits` allow.
        StorageError: there is no room for the rows in the temporary folder.
    """
    if how.remedies is not None and how.remedies.filter is not None:
        languages.require(how.remedies.filter.languages or ())
    accounts: list[Account] = []
    counts: list[int | None] = []
    rows = Rows.of(
        found for index, source in enumerate(wanted) for found in _read(source, index, how, accounts, counts)
    )
    if how.remedies is not None:
        rows = remedies.thin(rows, accounts, how.remedies, how.seed)
    parts = [np.flatnonzero(rows.sources == index) for index in range(len(wanted))]
    for index, count in enumerate(counts):
        if count is not None:
            if count > len(parts[index]):
                how.say(f"{accounts[index].source}: {count:,} rows asked for, {len(parts[index]):,} there")
            parts[index] = parts[index][sources.take(range(len(parts[index])), count, how.seed, "rows", index)]
    rows = rows.pick(_mixed(parts, wanted, accounts, how))
    if how.remedies is not None and how.remedies.balance is not None:
        rows = remedies.balanced(rows, how.remedies.balance, accounts, how.seed)
    for account in accounts:
        _tell_remedies(account, how.say)
    if not rows:
        raise DataError(f"no row is left: {'; '.join(account.summary() for account in accounts)}")
    return rows, accounts


def _read(
    source: Source, index: int, how: Loading, accounts: list[Account], counts: list[int | None]
) -> Iterator[Found]:
    """The usable rows of one source; its account, and how many rows it asks for, are added to the lists."""
    opened = opened_for(source, how)
    account = Account(opened.name, opened.says)
    accounts.append(account)
    counts.append(opened.source.rows)
    count = 0
    for count, found in enumerate(usable(opened, index, how, account), 1):  # noqa: B007
        yield found
    how.say(f"{account.source}: {account.rows_in:,} rows, detected {account.format}: {opened.why}")
    if account.defective:
        share = account.defective / account.rows_in
        how.say(f"{account.source}: dropped {account.defective:,} ({share:.1%}): {account.summary()}")
    account.enforce(how.limits.dropped, how.strict)
    if not count:
        raise DataError(f"{account.source}: no usable row: {account.summary()}")


def _mixed(parts: list[Numbers], wanted: Sequence[Source], accounts: Sequence[Account], how: Loading) -> Numbers:
    """The places of the rows of a mixture, source by source."""
    if any(source.weight is not None for source in wanted):
        mixed = sources.mix([range(len(part)) for part in parts], [source.weight for source in wanted], how.seed)
        shares = ", ".join(f"{account.source} {len(part):,}" for account, part in zip(accounts, mixed, strict=True))
        how.say(f"mixture of {sum(map(len, mixed)):,} rows: {shares}")
        parts = [part[chosen] for part, chosen in zip(parts, mixed, strict=True)]
    return np.concatenate(parts)


def _tell_remedies(account: Account, say: Say) -> None:
    if account.taken:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in account.taken.items())
        say(f"{account.source}: left out {sum(account.taken.values()):,} as the recipe says: {counts}")
    if account.changed:
        say(f"{account.source}: " + ", ".join(f"{what} {count:,}" for what, count in account.changed.most_common()))


def opened_for(source: Source, how: Loading) -> Opened:
    """A source opened, its format recognised by the records that a filter of columns lets through."""
    wish = how.remedies.filter if how.remedies is not None else None
    return open_source(source, how.schema, wanted=partial(remedies.column_passes, wanted=wish))


def usable(opened: Opened, index: int, how: Loading, account: Account) -> Iterator[Found]:
    """The rows of one source that can be trained on, as they are read; the others are counted in its account."""
    wish = how.remedies.filter if how.remedies is not None else None
    names = remedies.looked_at(how.remedies) if how.remedies is not None else set()
    on_system = how.data.on_system if how.data is not None else "keep"
    for record in opened.records:
        account.rows_in += 1
        if not remedies.column_passes(record.value, wish):
            account.drop("filtered-column", record.where)
            continue
        try:
            rows = rows_of(record, opened)
            rows = [remedies.settle_system(row, on_system, record.where, account) for row in rows]
            for row in rows:
                check_row(row, opened.schema)
        except Defect as defect:
            account.drop(defect.reason, record.where, defect.detail)
            continue
        for row in rows:
            reason = remedies.filtered(row, wish) if wish is not None else None
            if reason is not None:
                account.drop(reason, record.where)
                continue
            columns = {name: record.value.get(name, row.get(name)) for name in names}
            yield Found(row, record.where, index, columns)


def load_splits(data: Data, how: Loading) -> Splits:
    """The rows of training (`train`) and, where there are such, of evaluation (`eval`), with all remedies applied.

    Raises:
        DataError: as `load_rows`, or a function of `augment` that fails.
    """
    rows, accounts = load(data.train, how)
    splits = {"train": (rows, accounts)}
    if data.eval:
        splits["eval"] = load(data.eval, replace(how, held_out=True))
    elif data.eval_fraction is not None:
        held = hold_out(rows, data.eval_fraction, how.seed)
        copies = [Account(account.source, account.format, account.rows_in) for account in accounts]
        splits = {"train": (rows.pick(np.delete(np.arange(len(rows)), held.places)), accounts)}
        splits["eval"] = (rows.pick(held.places), copies)
        how.say(held.says)
    if data.augment:
        before, accounts = splits["train"]
        after = augmented(before, data.augment, how.schema, accounts)
        splits["train"] = (after, accounts)
        how.say(f"data.augment: {len(before):,} rows became {len(after):,}")
    return splits
