"""The quickstart world's facts, and the gold reward that knows them.

`score` has TRL's reward-function signature and returns one real number per reply: the sum of the
parts that `components` names. `correct` says whether the asked fact was answered rightly. Each
prompt row carries what the judge must know as columns:

- `kind`: a key of `FACTS`, or `talk` for small talk;
- `subject`: what is asked about (`France`, `3 plus 4`), or the topic of the small talk;
- `answer`: the right answer, empty for small talk;
- `style`: `plain`, or what the system message demands: `brief`, `cheerful`, `friend`;
- `finished` (optional): whether the reply ended with the end token; absent means that it did.

The parts are things that a reader would accept: the right fact and only that one, an answer to
what was asked, politeness, the style asked for, no repetition, a finished last sentence, and not
more words than needed.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Completion = str | Sequence[Mapping[str, Any]]


def _table(text: str) -> dict[str, str]:
    """Read `key=value` entries that are separated by commas."""
    entries = (entry.split("=") for entry in " ".join(text.split()).split(", "))
    return {entry[0]: entry[1] for entry in entries}


CAPITALS = _table("""
    France=Paris, Italy=Rome, Spain=Madrid, Germany=Berlin, Greece=Athens, Norway=Oslo,
    England=London, Egypt=Cairo, Japan=Tokyo, China=Beijing, Cuba=Havana, Peru=Lima
""")
YOUNG = _table("""
    dog=puppy, cat=kitten, cow=calf, sheep=lamb, goat=kid, pig=piglet, hen=chick, bear=cub
""")
COLOURS = _table("""
    grass=green, snow=white, coal=black, blood=red, a lemon=yellow, the sea=blue,
    chocolate=brown, a carrot=orange, milk=white, a banana=yellow, a frog=green, the sky=blue
""")
OPPOSITE_PAIRS = _table("""
    hot=cold, big=small, fast=slow, day=night, up=down, old=young
""")
FACTS: dict[str, dict[str, str]] = {
    "capital": CAPITALS,
    "young": YOUNG,
    "colour": COLOURS,
    "opposite": OPPOSITE_PAIRS | {right: left for left, right in OPPOSITE_PAIRS.items()},
    "sum": {f"{a} plus {b}": str(a + b) for a in range(1, 4) for b in range(1, 4)},
}
ANSWERS = {kind: {answer.lower() for answer in table.values()} for kind, table in FACTS.items()}

# What a reply to each topic of small talk must say one of.
TOPICS: dict[str, tuple[str, ...]] = {
    "greeting": ("hello", "hi", "good day"),
    "thanks": ("you are welcome", "my pleasure", "any time"),
    "wellbeing": ("i am fine", "i am well", "i am doing well"),
    "farewell": ("goodbye", "bye", "see you"),
    "sorrow": ("sorry to hear", "feel better", "cheer you up"),
    "triumph": ("congratulations", "well done", "proud of you"),
}
POLITE = (
    "glad to help", "good question", "glad you asked", "of course", "certainly",
    "gladly", "hope that helps", "thank you for asking", "with pleasure", "please",
)  # fmt: skip
RUDE = ("stupid", "silly", "boring", "duh", "annoying", "hurry", "lazy", "leave me alone")
CHEERFUL = ("hooray", "lovely", "wonderful", "great", "yay")

FREE_WORDS = {"plain": 14, "brief": 6, "cheerful": 16, "friend": 16}


def _words(text: str) -> str:
    """Lower-case words and numbers of `text`, with one space around each, for phrase look-up."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


def _count(words: str, phrases: Sequence[str]) -> int:
    """How many of the phrases occur in the spaced words."""
    return sum(f" {phrase} " in words for phrase in phrases)


def _named(kind: str, subject: str, words: str) -> set[str]:
    """The answers of this kind which the reply names, the question's own subject left out."""
    return ANSWERS[kind] & set(words.replace(f" {subject.lower()} ", "  ").split())


def _fact_is_right(kind: str, subject: str, answer: str, words: str) -> bool:
    """Exactly the right answer, neither beside another one nor denied."""
    return _named(kind, subject, words) == {answer.lower()} and " not " not in words


def _fact(kind: str, subject: str, answer: str, words: str) -> float:
    """The right fact and only that, a wrong one, or no answer at all."""
    if kind == "talk":
        return 0.0
    if _fact_is_right(kind, subject, answer, words):
        return 1.2
    return -0.6 if _named(kind, subject, words) else -1.4


def _relevance(kind: str, subject: str, style: str, words: str) -> float:
    """Whether the reply is about what was asked; naming the subject is needless when brief."""
    if kind == "talk":
        others = [phrase for topic, said in TOPICS.items() if topic != subject for phrase in said]
        on_topic = 1.2 if _count(words, TOPICS[subject]) else -1.0
        return on_topic - 0.5 * min(_count(words, others), 2)
    named = bool(_named(kind, subject, words))
    if f" {subject.lower()} " in words or (named and style == "brief"):
        return 0.4
    return 0.0 if named else -0.4


def _politeness(words: str) -> float:
    """Half a point for being polite at all (stuffing earns nothing), less for each rudeness."""
    return 0.5 * min(_count(words, POLITE), 1) - 0.8 * min(_count(words, RUDE), 2)


def _style(style: str, text: str, words: str) -> float:
    """Half a point where the style of the system message is kept, minus half where it is not."""
    if style == "brief":
        return max(0.5 - 0.15 * max(len(words.split()) - FREE_WORDS["brief"], 0), -1.0)
    if style == "cheerful":
        return 0.5 if "!" in text and _count(words, CHEERFUL) else -0.5
    if style == "friend":
        return 0.5 if " friend " in words else -0.5
    return 0.0


def _repetition(words: str) -> float:
    """Minus two times the share of word pairs that were said before."""
    said = words.split()
    pairs = list(pairwise(said))
    return -2.0 * (1.0 - len(set(pairs)) / len(pairs)) if pairs else 0.0


def _length(style: str, words: str) -> float:
    """A little for each word, more for each word above what the style needs, down to -2."""
    count = len(words.split())
    return max(-0.02 * count - 0.06 * max(count - FREE_WORDS[style], 0), -2.0)


def _finish(text: str, finished: bool) -> float:
    """Minus one for a reply without the end token, or whose last sentence is broken off."""
    return 0.0 if finished and text.rstrip().endswith((".", "!", "?")) else -1.0


def _text(completion: Completion) -> str:
    """The reply's text, from a plain string or from a list of messages."""
    if isinstance(completion, str):
        return completion
    return " ".join(str(message["content"]) for message in completion)


def components(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[dict[str, float]]:
    """The named parts of each reply's gold reward; the columns are those of the prompt rows."""
    finished = columns.get("finished") or [True] * len(completions)
    rows = zip(
        completions, columns["kind"], columns["subject"], columns["answer"], columns["style"],
        finished, strict=True,
    )  # fmt: skip
    parts = []
    for completion, kind, subject, answer, style, ended in rows:
        text = _text(completion)
        words = _words(text)
        parts.append(
            {
                "fact": _fact(kind, subject, answer, words),
                "relevance": _relevance(kind, subject, style, words),
                "politeness": _politeness(words),
                "style": _style(style, text, words),
                "repetition": _repetition(words),
                "length": _length(style, words),
                "finish": _finish(text, ended),
            }
        )
    return parts


def score(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float]:
    """The gold reward of each reply: the sum of its `components`."""
    return [sum(parts.values()) for parts in components(prompts, completions, **columns)]


def correct(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float]:
    """1.0 for the right fact, 0.0 for none or a wrong one, NaN where no fact was asked."""
    rows = zip(completions, columns["kind"], columns["subject"], columns["answer"], strict=True)
    return [
        float("nan") if kind == "talk" else float(_fact_is_right(kind, subject, answer, _words(_text(completion))))
        for completion, kind, subject, answer in rows
    ]
