"""A data report as lines for a terminal; the same mapping is printed as it is with `--json`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignment.data.findings import line

WIDTH = 110
LANGUAGES = 5  # that are printed; JSON has more
SHOWN = 4  # places of a finding that are printed; JSON has more


def lines(report: Mapping[str, Any]) -> list[str]:
    """The report of one stage."""
    unit = {"preference": "pairs", "text": "documents", "prompts": "prompts"}.get(report["schema"], "rows")
    found = [f"{report['stage']}  ({report['schema']})"]
    found += _entry("rows", _row_text(report, unit))
    if len(report["sources"]) > 1:
        for source in report["sources"]:
            found += _entry("", _source(source))
    for name in ("train", "eval"):
        if name in report["tokens"]:
            numbers = _token_text(report["tokens"][name], report["tokens"]["max_length"])
            for index, text in enumerate(numbers):
                found += _entry(("tokens" if name == "train" else "eval tokens") if not index else "", text)
    if "not_counted" in report["tokens"]:
        found += _entry("tokens", f"not counted: {report['tokens']['not_counted']}")
    for note in report["tokens"].get("notes", []):
        found += _entry("note", note)
    if "proof" in report:
        found += _entry("template", _proof_text(report["proof"]))
    if report.get("same_rows_as"):
        return [*found, *_entry("findings", f"those of {report['same_rows_as']}, which has the same rows")]
    if "pairs" in report:
        for index, text in enumerate(_pair_text(report["pairs"])):
            found += _entry("pairs" if not index else "", text)
    if not report["findings"]:
        found += _entry("findings", "none")
    for finding in report["findings"]:
        found += _finding(finding)
    return found


def _entry(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"  {label:<13}", subsequent_indent=" " * 15, break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _row_text(report: Mapping[str, Any], unit: str) -> str:
    rows = report["rows"]
    dropped = sum(rows["dropped"].values())
    text = f"{rows['in']:,} read, {rows['kept']:,} {unit} kept, {dropped:,} dropped{_taken(rows)}"
    if len(report["sources"]) == 1:
        text += f"; {report['sources'][0]['source']}, format {report['sources'][0]['format']}"
    if "eval_rows" in report:
        text += f"; {report['eval_rows']:,} held out"
    return text


def _taken(rows: Mapping[str, Any]) -> str:
    """What remedies took and changed."""
    said = []
    if rows["taken"]:
        said.append(f"{sum(rows['taken'].values()):,} of them as the recipe says: {_counts(rows['taken'])}")
    if rows["changed"]:
        said.append(_counts(rows["changed"]))
    return f" ({'; '.join(said)})" if said else ""


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{what} {count:,}" for what, count in counts.items())


def _source(source: Mapping[str, Any]) -> str:
    text = f"{source['source']}: {source['in']:,} read, {source['kept']:,} kept, format {source['format']}"
    words = {"dropped": "dropped: ", "changed": "", "findings": "found: "}
    return "; ".join([text, *(f"{said}{_counts(source[what])}" for what, said in words.items() if source[what])])


def _token_text(tokens: Mapping[str, Any], max_length: int | None) -> Iterator[str]:
    if not tokens["rows"]:
        yield "no row is left"
        return
    length = tokens["length"]
    of = f" (max_length {max_length:,})" if max_length is not None else ""
    trained = f", of which {_percent(tokens['trained_share'])} are trained" if tokens["trained"] else ""
    yield (
        f"{tokens['tokens']:,}{trained}; length: half up to "
        f"{length['p50']:,}, 95 % up to {length['p95']:,}, longest {length['max']:,}{of}"
    )
    lost = [
        f"{tokens[key]:,} {what}"
        for key, what in (("truncated", "cut"), ("overlong", "dropped as too long"), ("emptied", "emptied by the cut"))
        if tokens[key]
    ]
    said = [", ".join(lost) if lost else "none cut"]
    if "stop_trained" in tokens:
        said.append(
            f"{_percent(tokens['stop_trained'])} of {tokens['answers']:,} answers end with a trained stop token"
        )
    if "bos" in tokens:
        said.append("BOS tokens per row: " + ", ".join(f"{held} in {rows:,}" for held, rows in tokens["bos"].items()))
    if tokens["boundary_mismatches"]:
        said.append(f"{tokens['boundary_mismatches']:,} rows whose answer changes the last token of the prompt")
    yield "; ".join(said)
    costs = []
    if "padding" in tokens:
        costs.append(f"{_percent(tokens['padding'])} of a batch is padding")
    if "packing" in tokens:
        packing = tokens["packing"]
        gain = f"saves {_percent(packing['saves'])} of the positions" if packing["saves"] > 0 else "saves nothing"
        costs.append(
            f"packing into {packing['blocks']:,} blocks of {packing['of']:,} fills "
            f"{_percent(packing['filled'])}, {gain}"
        )
    found = tokens["per_character"]
    rates = ", ".join(f"{name} {rate:.2f}" for name, rate in list(found["languages"].items())[:LANGUAGES])
    yield "; ".join([*costs, f"tokens per character (of {found['rows']:,} rows): {rates}"])


def _proof_text(proof: Mapping[str, Any]) -> str:
    if proof["failed"]:
        return "NOT proved; see the findings"
    if not proof["rows"]:
        return "not proved: it takes none of the rows looked at"
    text = f"proved on {proof['rows']} rows: trained is what the assistant says, and the token that ends it"
    if proof["boundaries"]:
        text += f"; in {proof['boundaries']} of them the prompt ends a token early"
    if proof["skipped"]:
        text += f"; {proof['skipped']} could not be compared"
    return text


def _share(share: Mapping[str, Any]) -> str:
    if share["value"] is None:
        return "unknown"
    low, high = share["interval"]
    return f"{_percent(share['value'])} [{100 * low:.1f}, {100 * high:.1f}]"


def _pair_text(pairs: Mapping[str, Any]) -> Iterator[str]:
    longer = _share(pairs["longer_wins"])
    yield f"{pairs['pairs']:,} pairs over {pairs['prompts']:,} prompts; the longer answer wins in {longer}"
    yield (
        f"a classifier that sees lengths only is right in {_share(pairs['length_only_accuracy'])}, one that sees "
        f"single words in {_share(pairs['bag_of_words_accuracy'])}"
    )
    if "margin" in pairs:
        margin = pairs["margin"]
        yield (
            f"margin of {margin['rows']:,} pairs: 5 % below {margin['p5']:.3g}, half below {margin['p50']:.3g}, 95 % "
            f"below {margin['p95']:.3g}; {margin['negative']:,} negative, {margin['zero']:,} zero"
        )
    if "agreement" in pairs:
        found = pairs["agreement"]
        by = f" by {found['raters']:,} raters" if found["raters"] else ""
        yield (
            f"{found['pairs_with_several_votes']:,} pairs have several votes{by}; two votes agree in "
            f"{_percent(found['agreement'])} (kappa {found['kappa']:.2f})"
        )


def _finding(finding: Mapping[str, Any]) -> list[str]:
    mark = "!" if finding["limit_passed"] else "-"
    first = textwrap.wrap(
        line(finding), WIDTH, initial_indent=f"  {mark} {finding['check']:<24}  ", subsequent_indent=" " * 30,
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip
    places = finding["rows"][:SHOWN]
    if places:
        more = f", and {finding['count'] - len(places):,} more" if finding["count"] > len(places) else ""
        first += textwrap.wrap(
            _places(places) + more, WIDTH, initial_indent=" " * 30, subsequent_indent=" " * 30,
            break_on_hyphens=False, break_long_words=False,
        )  # fmt: skip
    return first


def _places(places: Sequence[str]) -> str:
    """`a.jsonl:3 (:1), :9 (:4), b.jsonl:7`: a file is named where it changes."""
    said, before = [], ""
    for place in places:
        text = ""
        for part in re.split(r"( \(|\))", place):
            file = re.match(r"(.*?)(?=:\d+$|\[\d+\]$)", part)
            name = file.group() if file else ""
            text += part.removeprefix(name) if name == before else part
            before = name or before
        said.append(text)
    return ", ".join(said)
