"""Every finding on rows: planted and found, and silent on clean rows."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import made_rows
import numpy as np
import pytest
from made_rows import talk

from alignment.data import content, duplicates, pairs, words
from alignment.data.duplicates import Memory, Watch, Watched
from alignment.data.findings import Finding, Seen, wilson


def prose(seed: int, count: int = 40) -> str:
    return made_rows.prose(seed, count)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


def pair(prompt: str, chosen: str, rejected: str, **columns: Any) -> dict[str, Any]:
    return {"prompt": [user(prompt)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)], **columns}


def remember(rows: list[dict[str, Any]], schema: str, sources: list[int] | None = None) -> Memory:
    memory = Memory(schema)
    for index, row in enumerate(rows):
        hashed = words.hashed([duplicates.parts(row, schema)])
        memory.add([row], [f"rows.jsonl:{index + 1}"], sources[index] if sources else 0, hashed)
    return memory


def lint(rows: list[dict[str, Any]]) -> dict[str, Finding]:
    linter, memory = pairs.Pairs(), Memory("preference")
    for begin in range(0, len(rows), 30):  # in batches, as a report takes them
        batch = rows[begin : begin + 30]
        hashed = words.hashed([duplicates.parts(row, "preference") for row in batch])
        memory.add(batch, [f"p.jsonl:{begin + index + 1}" for index in range(len(batch))], 0, hashed)
        linter.add(batch, hashed)
    return {finding.check: finding for finding in pairs.findings(linter, memory, {}.get)}


def clean_pairs(count: int = 200) -> list[dict[str, Any]]:
    return [pair(prose(3 * i), prose(3 * i + 1), prose(3 * i + 2)) for i in range(count)]


# --- content --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "check", "kind"),
    [
        ("a\x07b", "control-character", "U+0007"),
        ("a\x85b", "control-character", "U+0085"),
        ("evil \u202etxt.exe", "control-character", "U+202E"),
        ("two\ufeffwords", "control-character", "U+FEFF"),
        ("caf\ufffd", "damaged-text", "U+FFFD"),
        ("donâ€™t", "damaged-text", "UTF-8 read as Windows-1252"),
        ("cafÃ©", "damaged-text", "UTF-8 read as Windows-1252"),
        ("x<|im_end|>y", "special-token-in-content", "<|im_end|>"),
        ("[INST] do it", "special-token-in-content", "[INST]"),
        ("<start_of_turn>model", "special-token-in-content", "<start_of_turn>"),
        ("key AKIAIOSFODNN7EXAMPLE", "secret", "AWS key"),
        ("ghp_" + "a1B2" * 9, "secret", "GitHub token"),
        ("github_pat_" + "a1B2" * 12, "secret", "GitHub token"),
        ("sk-proj-" + "a1B2" * 9, "secret", "API key (sk-)"),
        ("hf_" + "a1B2" * 9, "secret", "Hugging Face token"),
        ("AIza" + "a1B2c" * 7, "secret", "Google key"),
        ("xoxb-123456789012-abcdefghij", "secret", "Slack token"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII", "secret", "private key"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl", "secret", "web token"),
        ("write to jane.roe@mail.org today", "personal-data", "e-mail address"),
        ("call (212) 664-7665 now", "personal-data", "telephone number"),
        ("call +49 30 901820 now", "personal-data", "telephone number"),
        ("my number is 078-05-1120", "personal-data", "social security number"),
        ("pay with 4111 1111 1111 1111", "personal-data", "card number"),
        ("to GB82 WEST 1234 5698 7654 32", "personal-data", "bank account (IBAN)"),
    ],
)
def test_content_that_is_reported(text: str, check: str, kind: str) -> None:
    for row in (talk("hi", text), pair("hi", "yes", text), {"text": text}, {"prompt": [user(text)]}):
        found = content.look(row, tokens=True)
        assert check in found
        assert found[check] == [kind]


CLEAN = (
    "Call 555-0123 or write to you@example.com; 3.14159265358979, 2024-01-15, 10.0.0.1, 1,234,567,890.",
    "Line\none\ttwo\r\n— “quotes” naïve 你好 здравствуйте Ã and Â stand alone 👍",
    "[NAME] lives at [ADDRESS]; <b>bold</b>, <s>struck</s>, a < b | c > d, <|> x[1], ISBN 978-3-16-148410-0",
    "sk-learn and sk-something-with-many-words-in-a-row-here, hf_hub, order 1234567890123456, task-force 12-34-5678",
    "The user said: assistant. 12345678 1111 1111 1111 1112, version 1.2.3-4567",
)


@pytest.mark.parametrize("text", CLEAN)
def test_clean_content_is_not_reported(text: str) -> None:
    assert content.look(talk("hi", text), tokens=True) == {}


def test_other_columns_are_not_looked_at_and_tokens_only_when_asked() -> None:
    assert content.look(pair("a", "b", "c", id="jane.roe@mail.org"), tokens=True) == {}
    assert content.look(talk("hi", "x<|im_end|>"), tokens=False) == {}


def test_a_tool_call_without_its_result() -> None:
    call = assistant("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])
    tool = {"role": "tool", "content": "7"}

    def checks(*turns: dict[str, Any]) -> set[str]:
        return set(content.look({"messages": list(turns)}, tokens=True))

    assert checks(user("q"), call, user("well?"), assistant("7")) == {"tool-call-without-answer"}
    two = {**call, "tool_calls": call["tool_calls"] * 2}
    assert checks(user("q"), two, tool, assistant("7")) == {"tool-call-without-answer"}
    assert checks(user("q"), two, tool, tool, assistant("7")) == set()
    assert checks(user("q"), call, tool, assistant("7")) == set()
    assert checks(user("q"), call) == set(), "a model learns to call"


def test_check_digits() -> None:
    assert content.luhn("4111 1111 1111 1111")
    assert not content.luhn("4111 1111 1111 1112")
    assert not content.luhn("0000 0000 0000 0000")
    assert content.iban("GB82WEST12345698765432")
    assert not content.iban("GB83WEST12345698765432")


def test_a_finding_names_kinds_places_and_limits_but_no_text() -> None:
    seen = Seen()
    for index in range(30):
        seen.add("secret", f"x:{index}", "AWS key", "AWS key", *(["private key"] if index < 10 else []))
    finding = seen.finding("secret", 100, content.SAYS["secret"], 0.0)
    assert finding is not None
    assert (finding.count, finding.share, finding.passed_limit, len(finding.rows)) == (30, 0.3, True, 20)
    assert "AWS key 30, private key 10" in finding.says
    assert finding.as_dict()["values"] == {"kinds": {"AWS key": 30, "private key": 10}}
    assert seen.finding("personal-data", 100, "") is None
    json.dumps(finding.as_dict())


def test_wilson_interval() -> None:
    """Values of Wilson's formula worked out by hand for 8 of 10."""
    share = wilson(8, 10)
    assert (share.value, round(share.low, 4), round(share.high, 4)) == (0.8, 0.4902, 0.9433)
    assert wilson(0, 0).as_dict() == {"value": None, "interval": None, "of": 0}
    assert wilson(0, 5).low == 0.0 and wilson(5, 5).high == 1.0


# --- words ----------------------------------------------------------------------------------------------------------


def test_words_without_case_and_punctuation_in_any_script() -> None:
    assert words.split("Don't stop, NOW!") == ["don", "t", "stop", "now"]
    assert words.split("Привет, мир") == ["привет", "мир"]
    assert words.split("我爱 Python3") == ["我", "爱", "python3"]


def test_grams_stay_inside_a_text_and_equal_an_oracle() -> None:
    texts = ["a b c d e", "b c d", "x", ""]
    found = words.hashed([[[text]] for text in texts])
    values, owner = words.grams(found, 3)
    assert owner.tolist() == [0, 0, 0, 1, 2, 3]
    assert values[1] == values[3], "b c d"
    assert len(set(values.tolist())) == 5
    assert words.digests(found)[0] == words.digests(words.hashed([[["A, b! c d (e)"]]]))[0]
    assert len(set(words.digests(found).tolist())) == 4
    assert found.lengths.tolist() == [5, 3, 1, 0]


def test_signatures_estimate_the_jaccard_similarity() -> None:
    """Against the exact similarity of the sets of shingles, within four standard errors."""
    for seed, kept in ((1, 0), (2, 50), (3, 80), (4, 100)):
        first = random.Random(seed).choices(made_rows.WORDS, k=100)
        second = first[:kept] + random.Random(seed + 99).choices(made_rows.WORDS, k=100 - kept)
        sets = [{tuple(side[i : i + 3]) for i in range(98)} for side in (first, second)]
        exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        signatures, _ = words.signatures(words.hashed([[[" ".join(first)], [" ".join(second)]]]), 2)
        estimate = words.similarity(signatures[0, 0], signatures[0, 1])
        assert abs(estimate - exact) <= 4 * max(0.02, np.sqrt(exact * (1 - exact) / words.HASHES))
    assert estimate == 1.0


def test_the_hashes_are_the_same_in_every_process() -> None:
    assert words.hashed([[["hello"]]]).words.tolist()[0] == 4511043874410912595
    signatures, keys = words.signatures(words.hashed([[["the same in every process"]]]), 1)
    assert (int(signatures.sum()), int(keys[0, 0])) == (2326561, 502188332839487274)


def test_batches_do_not_change_what_is_remembered() -> None:
    rows = [talk(prose(i), prose(i + 50)) for i in range(9)]
    single = remember(rows, "messages")
    whole = Memory("messages")
    whole.add(rows, single.where, 0, words.hashed([duplicates.parts(row, "messages") for row in rows]))
    for name in ("exact", "parts", "signatures", "sources"):
        assert np.array_equal(getattr(single, name), getattr(whole, name)), name
    assert all(np.array_equal(single.band(index), whole.band(index)) for index in range(words.BANDS))


# --- duplicates -----------------------------------------------------------------------------------------------------


def test_exact_and_near_duplicates() -> None:
    base = prose(1).split()
    edited = " ".join([*base[:20], "anders", *base[21:]])  # 3 of 38 shingles differ: similarity 35 / 41
    rows = [
        talk("hello there you", " ".join(base)),
        talk(prose(2), prose(3)),
        talk("hello there you", " ".join(base)),
        talk("hello there you", edited),
        talk("hello there you", " ".join(base).upper() + "!"),  # differs in form only
        talk("another question here", " ".join(base)),  # the same answer to another prompt is no duplicate
    ]
    memory = remember(rows, "messages")
    assert duplicates.first_of(memory.exact).tolist() == [0, 1, 0, 3, 4, 5]
    assert duplicates.near_first(memory).tolist() == [0, 1, 0, 0, 0, 5]


def test_clean_rows_are_no_duplicates() -> None:
    rows = [talk(prose(2 * i), prose(2 * i + 1)) for i in range(300)]
    rows += [talk(f"What is {i} plus {i}?", f"It is {2 * i}.") for i in range(300)]
    memory = remember(rows, "messages")
    assert np.array_equal(duplicates.first_of(memory.exact), np.arange(600))
    assert np.array_equal(duplicates.near_first(memory), np.arange(600))


def test_what_makes_rows_equal() -> None:
    one = pair("a b c", "d e f", "g h i", margin=1.0)
    assert duplicates.exact(one, "preference") == duplicates.exact({**one, "margin": 2.0}, "preference")
    swapped = {**one, "chosen": one["rejected"], "rejected": one["chosen"]}
    assert duplicates.exact(one, "preference") != duplicates.exact(swapped, "preference")
    row = {"prompt": [user("a")], "completion": [assistant("b")], "label": True}
    assert duplicates.exact(row, "unpaired") != duplicates.exact({**row, "label": False}, "unpaired")
    call = assistant("", tool_calls=[{"function": {"name": "f"}}])
    rows = [{"messages": [user("a"), call]}, {"messages": [user("a"), assistant("")]}]
    assert len({duplicates.exact(row, "messages") for row in rows}) == 2


# --- leaks ----------------------------------------------------------------------------------------------------------


def watch(texts: list[list[str]], rows: list[dict[str, Any]]) -> tuple[list[str], int]:
    found = Watch(Watched.of("set", [f"set:{i}" for i in range(len(texts))], texts))
    for row in rows:
        found.look(words.hashed([duplicates.parts(row, "messages")]))
    return found.known()


def test_evaluation_texts_in_training_rows() -> None:
    long, other = prose(1, 60), prose(2, 60)
    rows = [talk(prose(9), f"before {long} after"), talk("What, exactly, IS a hen?", "a bird")]
    half = " ".join([*long.split()[:40], *other.split()[:10]])  # 28 of 38 runs are known
    little = " ".join([*long.split()[:14], *other.split()[:40]])  # 2 of 42
    texts = [
        [long],
        [other],
        [half],
        [little],
        ["what exactly is a hen"],
        ["what exactly is a cat"],
        ["a bird"],
        ["id-1", other],
    ]
    known, some = watch(texts, rows)
    assert known == ["set:0", "set:2", "set:4"]
    assert some == 4, "the last one has a little"


def test_clean_training_rows_hold_no_evaluation_text() -> None:
    rows = [talk(prose(i), prose(i + 1000)) for i in range(100)]
    assert watch([[prose(i + 5000)] for i in range(100)] + [["hi"], ["yes"]], rows) == ([], 0)
    assert watch([["what is it"]], []) == ([], 0)


def test_leaked_prompts() -> None:
    train = remember([talk("What is a hen?", "x y z"), talk("Why?", "z")], "messages").parts[:, 0]
    held = remember([talk("what is a hen", "other"), talk("What is a fox?", "x y z")], "messages").parts[:, 0]
    assert duplicates.leaked(held, train).tolist() == [0]


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_clean_pairs_have_no_finding() -> None:
    assert lint(clean_pairs()) == {}
    assert lint([]) == {}


def test_near_equal_answers() -> None:
    rows = clean_pairs(60)
    text = prose(7, 100)
    rows[5] = pair("q", text, text.replace(text.split()[50], "anders", 1))
    assert lint(rows)["near-equal-answers"].rows == ("p.jsonl:6",)


def test_contradictory_pairs_and_votes() -> None:
    rows = clean_pairs(60)
    rows += [
        pair("q", "A one two", "B one two"),
        pair("Q?", "b one two", "A one two!"),
        pair("q", "A one two", "C one two"),
    ]
    rows += [pair("other q", "B one two", "A one two")]
    assert lint(rows)["contradictory"].rows == ("p.jsonl:61", "p.jsonl:62")
    votes = [pair("q", "a", "b", rater="1"), pair("q", "a", "b", rater="2"), pair("q", "b", "a", rater="3")]
    votes += [pair("p", "a", "b", rater="1"), pair("p", "a", "b", rater="2")]
    memory, linter = remember(votes, "preference"), pairs.Pairs()
    linter.add(votes, words.hashed([duplicates.parts(row, "preference") for row in votes]))
    agreement = pairs.summary(linter, memory)["agreement"]
    # Of three votes 2 : 1 one comparison of three agrees, of two equal ones the only one does: 2 of 4.
    assert agreement == {"pairs_with_several_votes": 2, "agreement": 0.5, "kappa": 0.0, "raters": 3}
    linter = pairs.Pairs()
    linter.add(clean_pairs(3) * 2, words.hashed([duplicates.parts(row, "preference") for row in clean_pairs(3) * 2]))
    assert "agreement" not in pairs.summary(linter, remember(clean_pairs(3) * 2, "preference")), "repeats are no votes"


def test_margins() -> None:
    rows = [{**row, "margin": 1.5} for row in clean_pairs(60)]
    assert lint(rows) == {}
    rows[3]["margin"], rows[4]["margin"] = -0.5, 0.0
    rows[5] = {key: value for key, value in rows[5].items() if key != "margin"} | {
        "score_chosen": 2,
        "score_rejected": 3,
    }
    found = lint(rows)
    assert found["negative-margin"].rows == ("p.jsonl:4", "p.jsonl:6")
    assert found["zero-margin"].rows == ("p.jsonl:5",)


def test_length_bias() -> None:
    rows = [pair(prose(3 * i), prose(3 * i + 1, 60), prose(3 * i + 2, 30)) for i in range(200)]
    found = lint(rows)["length-bias"]
    assert "longer" in found.says
    assert found.values["longer_wins"]["value"] == 1.0
    assert found.value == found.values["accuracy"]["value"] == 1.0
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert "shorter" in lint(turned)["length-bias"].says
    mixed = [row if i % 2 else turned[i] for i, row in enumerate(rows)]
    assert "length-bias" not in lint(mixed)
    assert "length-bias" not in lint(rows[:20]), "too few to say so"


def test_pairs_that_single_words_tell_apart() -> None:
    rows = [pair(prose(3 * i), prose(3 * i + 1), prose(3 * i + 2) + " sorry") for i in range(300)]
    assert lint(rows)["separable"].value == pytest.approx(1.0, abs=0.02)
    half = [
        pair(prose(3 * i), prose(3 * i + 1), prose(3 * i + 2) + (" sorry" if i % 3 == 0 else "")) for i in range(300)
    ]
    assert "separable" not in lint(half)


def test_the_classifier_is_judged_on_prompts_that_it_did_not_learn() -> None:
    """Each prompt has a word of its own in its chosen answers: known by heart it tells all, learnt it tells nothing."""
    rows = [
        pair(f"prompt number {i}", f"{prose(5 * i + j)} w{i}", f"{prose(5 * i + j + 3000)} v{i}")
        for i in range(60) for j in range(4)
    ]  # fmt: skip
    linter = pairs.Pairs()
    linter.add(rows, words.hashed([duplicates.parts(row, "preference") for row in rows]))
    accuracy = linter.bag_of_words(remember(rows, "preference").parts[:, 0])
    assert accuracy.high < 0.6
    assert accuracy.of == 240


def test_openings_that_tell() -> None:
    rows = clean_pairs(300)
    for row in rows[:100]:
        row["rejected"] = [assistant("I'm sorry, " + row["rejected"][0]["content"])]
        row["chosen"] = [assistant("Here is what " + row["chosen"][0]["content"])]
    for row in rows[100:200]:  # says nothing: as often chosen as rejected
        row["chosen"], row["rejected"] = (
            [assistant("Well I think " + row[name][0]["content"])] for name in ("chosen", "rejected")
        )
    found = lint(rows)["first-words-bias"]
    assert found.values["openings"] == [
        {"words": "here is what", "chosen": 100, "rejected": 0}, {"words": "i m sorry", "chosen": 0, "rejected": 100},
    ]  # fmt: skip


def test_openings_beyond_the_limit_are_forgotten_the_rare_ones_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "OPENINGS", 6)
    counters = Counter({"often": 9, "twice": 2, "once": 1, "too": 1}), Counter({"often": 8, "a": 1, "b": 1, "c": 1})
    pairs._forget_rare(counters)
    assert counters == (Counter({"often": 9, "twice": 2}), Counter({"often": 8}))


def test_forms_that_tell() -> None:
    rows = clean_pairs(200)
    for row in rows[:80]:
        row["chosen"] = [assistant("- one\n- two\n" + row["chosen"][0]["content"])]
    for index, row in enumerate(rows[80:]):  # bold as often on either side
        name = "chosen" if index % 2 else "rejected"
        row[name] = [assistant("**x** " + row[name][0]["content"])]
    found = lint(rows)["formatting-bias"]
    assert list(found.values["forms"]) == ["list"]
    assert found.values["forms"]["list"]["of"] == 80


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("1. a\n2. b", {"list"}), ("# Title\ntext", {"heading"}), ("a **b** c", {"bold"}),
        ("```py\n```", {"code block"}),
        ("| a | b |\n|---|---|", {"table"}), ("a\n\nb", {"paragraphs"}), ("see https://x.y", {"link"}),
        ("Yes!", {"exclamation mark"}), ("Right?", {"question at the end"}), ("ok 👍", {"emoji"}),
        ("plain - text", set()),
    ],
)  # fmt: skip
def test_forms(text: str, has: set[str]) -> None:
    assert {name for name, found in zip(pairs.FORMS, pairs.forms(text), strict=True) if found} == has
