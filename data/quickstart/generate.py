"""Write the quickstart world: corpus, demonstrations, preference pairs and prompts.

    python data/quickstart/generate.py              # writes the files beside this script
    python data/quickstart/generate.py --out DIR
    python data/quickstart/generate.py --check      # exit status 1 if a file differs

Everything follows from `SEED`. Replies are drawn with flaws (`Flaws`) of deliberately mixed quality,
for the pairs much as for the demonstrations, so that the pairs are close to what a model trained on
the demonstrations says. The label of a pair is drawn from a Bradley-Terry
model of the gold reward: P(a is chosen) = sigmoid((gold(a) - gold(b)) / TEMPERATURE).

Half of the facts of each kind (`Fact.seen`) stand in demonstrations and pairs; the corpus states
all. Of each fact's questions one wording is set aside for the held-out files, and the evaluation
prompts use wordings of their own.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import gold
import phrases as say

HERE = Path(__file__).resolve().parent
SEED = 20
TEMPERATURE = 1.4
ROWS = {
    "corpus": 6000,
    "sft": 4000,
    "sft-eval": 300,
    "preferences": 12000,
    "preferences-eval": 3000,
    "prompts": 2000,
    "eval": 640,
}
# How often a fact of each kind is told for one telling of another: opposites are learned last.
CORPUS_COPIES = {"capital": 3, "young": 2, "colour": 2, "opposite": 4, "sum": 3}
LOG_SHARE = 0.8  # of the corpus' texts
TALK_SHARE = 0.25

Row = dict[str, Any]
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Fact:
    """One fact of the world; `index` rotates which wording of its question is set aside."""

    kind: str
    subject: str
    answer: str
    seen: bool
    index: int


@dataclass(frozen=True)
class Flaws:
    """What one reply gets right and wrong, drawn apart from the words it is written in."""

    content: str  # right | wrong | unknown | both | other
    other: str  # the wrong answer, where one is named
    aside: Fact  # the fact that an off-topic reply talks about
    form: int
    opener: str
    fillers: tuple[str, ...]
    repeats: int
    styled: bool
    cut: int


@dataclass(frozen=True)
class Quality:
    """How often replies of one kind of text have which flaw."""

    content: tuple[float, ...]  # right, wrong, unknown, both, other
    openers: tuple[float, ...]  # polite, rude, none
    fillers: tuple[float, ...]  # 0 to 3
    repeats: tuple[float, ...]  # 0 to 2
    styled: float
    cut: tuple[float, ...]  # 0 to 3 words


# What the base model reads is worse than the demonstrations, as the internet is; these are mixed on purpose.
CORPUS = Quality(
    content=(0.86, 0.04, 0.04, 0.02, 0.04),
    openers=(0.15, 0.35, 0.5),
    fillers=(0.35, 0.25, 0.22, 0.18),
    repeats=(0.78, 0.13, 0.09),
    styled=0.3,
    cut=(0.88, 0.05, 0.04, 0.03),
)
MIXED = Quality(
    content=(0.91, 0.02, 0.03, 0.02, 0.02),
    openers=(0.17, 0.36, 0.47),
    fillers=(0.4, 0.25, 0.2, 0.15),
    repeats=(0.82, 0.12, 0.06),
    styled=0.35,
    cut=(0.88, 0.06, 0.04, 0.02),
)
# What a pair is about is mostly manner: a scorer this small cannot know every fact.
PAIRS = replace(MIXED, content=(0.945, 0.01, 0.025, 0.01, 0.01))
GOOD = Quality(
    content=(1, 0, 0, 0, 0), openers=(0, 0, 1), fillers=(1, 0, 0, 0), repeats=(1, 0, 0), styled=1, cut=(1, 0, 0, 0)
)


@dataclass(frozen=True)
class Query:
    """A prompt with what the judge must know about it."""

    messages: Messages = field(compare=False)
    kind: str
    subject: str
    answer: str
    style: str
    seen: bool

    def row(self) -> Row:
        """The prompt as a row of `prompts.jsonl` and `eval.jsonl`."""
        columns = {name: getattr(self, name) for name in ("kind", "subject", "answer", "style")}
        return {"prompt": self.messages, **columns, "seen": self.seen}

    def gold(self, reply: str) -> float:
        """The gold reward of a finished reply, rounded so that files do not depend on a CPU."""
        columns = {name: [value] for name, value in self.row().items() if name != "prompt"}
        return round(gold.score([self.messages], [reply], **columns)[0], 4)


def split_facts() -> list[Fact]:
    """All facts, half of each kind seen; a fact and its mirror (3 + 4, 4 + 3) stay together."""
    rng = Random(f"{SEED} facts")
    facts = []
    for kind, table in gold.FACTS.items():
        keys = sorted({_mirror_key(kind, subject) for subject in table})
        seen = set(rng.sample(keys, len(keys) // 2))
        for index, (subject, answer) in enumerate(table.items()):
            known = _mirror_key(kind, subject) in seen
            facts.append(Fact(kind, subject, answer, known, index))
    return facts


def _mirror_key(kind: str, subject: str) -> str:
    if kind == "sum":
        return " plus ".join(sorted(subject.split(" plus ")))
    if kind == "opposite":
        return min(subject, gold.FACTS[kind][subject])
    return subject


class World:
    """The facts and the draws of questions and replies over them."""

    def __init__(self) -> None:
        self.facts = split_facts()
        self.seen = [fact for fact in self.facts if fact.seen]
        self.unseen = [fact for fact in self.facts if not fact.seen]
        # Wrong answers are right answers of other seen facts: a held-out fact's answer must not
        # be met in demonstrations and pairs as a wrong one only.
        self.wrong = {kind: sorted({fact.answer for fact in self.seen if fact.kind == kind}) for kind in gold.FACTS}

    def pick(self, facts: list[Fact], rng: Random, kind: str = "") -> Fact:
        """A fact of a uniformly drawn kind, so that no kind rules by its size."""
        kind = kind or rng.choice(list(gold.FACTS))
        return rng.choice([fact for fact in facts if fact.kind == kind])

    def question(self, fact: Fact, rng: Random, use: str, follow: bool = False) -> str:
        """A wording of the fact's question; `use` is train, held (set aside) or eval."""
        group = say.FOLLOW_UPS if follow else say.QUESTIONS[fact.kind]
        wordings = say.EVAL_FOLLOW_UPS if follow else say.EVAL_QUESTIONS[fact.kind]
        if use != "eval":
            aside = fact.index % len(group)
            wordings = [w for i, w in enumerate(group) if (i == aside) == (use == "held")]
        text = rng.choice(wordings).format(s=fact.subject)
        return text[0].upper() + text[1:]

    def remark(self, topic: str, rng: Random, use: str) -> str:
        """Something that a user says in small talk; the last two wordings are set aside."""
        said = say.REMARKS[topic]
        return rng.choice({"train": said[:-2], "held": said[-2:]}.get(use, say.EVAL_REMARKS[topic]))

    def draw_flaws(self, kind: str, subject: str, answer: str, rng: Random, quality: Quality) -> Flaws:
        """Draw the quality of one reply; most replies have one flaw or two."""
        content = rng.choices(["right", "wrong", "unknown", "both", "other"], quality.content)[0]
        other = rng.choice([a for a in self.wrong.get(kind, ["so"]) if a not in (answer, subject)])
        openers = [rng.choice(say.POLITE_OPENERS), rng.choice(say.RUDE_OPENERS), ""]
        count = rng.choices([0, 1, 2, 3], quality.fillers)[0]
        return Flaws(
            content=content,
            other=other,
            aside=self.pick([fact for fact in self.seen if fact.subject != subject], rng),
            form=rng.randrange(60),
            opener=rng.choices(openers, quality.openers)[0],
            fillers=tuple(rng.sample(say.FILLERS, count)),
            repeats=rng.choices([0, 1, 2], quality.repeats)[0],
            styled=rng.random() < quality.styled,
            cut=rng.choices([0, 1, 2, 3], quality.cut)[0],
        )

    def render(self, kind: str, subject: str, answer: str, style: str, flaws: Flaws) -> str:
        """The words of a reply with these flaws."""
        is_talk = kind == "talk"
        core = _talk_core(subject, flaws) if is_talk else _fact_core(kind, subject, answer, style, flaws)
        parts = [flaws.opener] if flaws.opener else []
        if style == "cheerful" and flaws.styled:
            parts = [say.CHEERS[flaws.form % len(say.CHEERS)], *parts]
        if style == "friend" and flaws.styled:
            core = core[:-1] + ", my friend" + core[-1]
        parts += [core] * (1 + flaws.repeats)
        if not (style == "brief" and flaws.styled):
            parts += flaws.fillers
        text = " ".join(parts)
        words = text.split(" ")
        return text if len(words) <= flaws.cut + 1 or not flaws.cut else " ".join(words[: -flaws.cut])

    def reply(self, query: Query, rng: Random) -> str:
        """One reply of mixed quality."""
        flaws = self.draw_flaws(query.kind, query.subject, query.answer, rng, MIXED)
        return self.render(query.kind, query.subject, query.answer, query.style, flaws)

    def query(self, rng: Random, use: str, facts: list[Fact], fact: Fact | None = None) -> Query:
        """A conversation of one to three user turns, often with a system message."""
        style = rng.choices(list(say.SYSTEM), [0.46, 0.18, 0.18, 0.18])[0]
        systems = say.EVAL_SYSTEM[style] if use == "eval" else say.SYSTEM[style]
        system = rng.choice(systems)
        messages = [{"role": "system", "content": system}] if system else []
        turns = rng.choices([0, 1, 2], [0.88, 0.1, 0.02])[0]
        previous = None
        for _ in range(turns):
            previous = self.pick(facts, rng, fact.kind if fact and rng.random() < 0.5 else "")
            messages += self.exchange(previous, style, rng, use)
        if fact is None and rng.random() < TALK_SHARE:
            # Nobody greets after a question was answered.
            topics = [t for t in gold.TOPICS if not (previous and t in say.OPENING_TOPICS)]
            topic = rng.choice(topics)
            messages.append({"role": "user", "content": self.remark(topic, rng, use)})
            return Query(messages, "talk", topic, "", style, True)
        asked = fact or self.pick(facts, rng)
        follow = previous is not None and previous.kind == asked.kind and rng.random() < 0.7
        content = self.question(asked, rng, use, follow)
        messages.append({"role": "user", "content": content})
        return Query(messages, asked.kind, asked.subject, asked.answer, style, asked.seen)

    def exchange(
        self, fact: Fact, style: str, rng: Random, use: str, follow: bool = False, quality: Quality = GOOD
    ) -> Messages:
        """A question about the fact and its answer."""
        flaws = self.draw_flaws(fact.kind, fact.subject, fact.answer, rng, quality)
        answer = self.render(fact.kind, fact.subject, fact.answer, style, flaws)
        question = self.question(fact, rng, use, follow)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _talk_core(topic: str, flaws: Flaws) -> str:
    if flaws.content == "unknown":
        return say.UNKNOWN[flaws.form % len(say.UNKNOWN)]
    if flaws.content == "other":
        return state(flaws.aside, flaws.form)
    if flaws.content in ("wrong", "both"):
        others = [name for name in gold.TOPICS if name != topic]
        topic = others[flaws.form % len(others)]
    said = say.REPLIES[topic]
    return said[flaws.form % len(said)]


def _fact_core(kind: str, subject: str, answer: str, style: str, flaws: Flaws) -> str:
    if flaws.content == "unknown":
        return say.UNKNOWN[flaws.form % len(say.UNKNOWN)]
    if flaws.content == "other":
        return state(flaws.aside, flaws.form)
    if flaws.content == "wrong":
        answer = flaws.other
    if flaws.content == "both":
        answer = f"{answer} or {flaws.other}"
    brief = style == "brief" and flaws.styled
    forms = say.SHORT_ANSWERS if brief else say.ANSWERS[kind]
    text = forms[flaws.form % len(forms)].format(s=subject, a=answer)
    return text[0].upper() + text[1:]


def state(fact: Fact, form: int) -> str:
    """The fact as a plain sentence."""
    forms = [form for form in say.ANSWERS[fact.kind] if "{s}" in form]
    text = forms[form % len(forms)].format(s=fact.subject, a=fact.answer)
    return text[0].upper() + text[1:]


def corpus(world: World, rng: Random) -> Iterator[Row]:
    """Short texts that state facts and report talks about them, hard kinds of fact more often."""
    deck: list[Fact] = []

    def deal() -> Fact:
        if not deck:
            copies = [CORPUS_COPIES[fact.kind] for fact in world.facts]
            deck.extend(rng.sample(world.facts, sum(copies), counts=copies))
        return deck.pop()

    for _ in range(ROWS["corpus"]):
        if rng.random() < LOG_SHARE:
            yield {"text": _log(world, deal, rng)}
            continue
        lines = []
        for _ in range(rng.randint(3, 5)):
            fact = deal()
            if rng.random() < 0.5:
                text = rng.choice(say.STATEMENTS[fact.kind]).format(s=fact.subject, a=fact.answer)
                lines.append(text[0].upper() + text[1:])
            else:
                lines.append(_told(world, fact, rng))
        if rng.random() < 0.3:
            lines.append(rng.choice(say.FILLERS + say.RUDE_OPENERS))
        yield {"text": " ".join(lines)}


def _log(world: World, deal: Callable[[], Fact], rng: Random) -> str:
    """A talk written down in plain text, each line of it under the name of its speaker."""
    style = rng.choices(list(say.SYSTEM), [0.46, 0.18, 0.18, 0.18])[0]
    system = rng.choice(say.SYSTEM[style])
    lines = [system] if system else []
    previous = ""
    for _ in range(rng.randint(1, 3)):
        if rng.random() < TALK_SHARE:
            topic = rng.choice(list(gold.TOPICS))
            flaws = world.draw_flaws("talk", topic, "", rng, CORPUS)
            remark, previous = world.remark(topic, rng, "train"), ""
            reply = world.render("talk", topic, "", style, flaws)
        else:
            fact = deal()
            asked, answered = world.exchange(fact, style, rng, "train", fact.kind == previous, CORPUS)
            remark, reply, previous = asked["content"], answered["content"], fact.kind
        lines += [f"User: {remark}", f"Assistant: {reply}"]
    return "\n\n".join(lines)


def _told(world: World, fact: Fact, rng: Random) -> str:
    """A question about the fact and its right answer, told as a story."""
    question = world.question(fact, rng, "train")
    forms = say.ANSWERS[fact.kind]
    answer = rng.choice(forms).format(s=fact.subject, a=fact.answer)
    if rng.random() < 0.25:
        answer = f"{rng.choice(say.POLITE_OPENERS)} {answer[0].upper()}{answer[1:]}"
    return _dialogue(question, answer[0].upper() + answer[1:], rng)


def _dialogue(remark: str, reply: str, rng: Random) -> str:
    asker, teller = rng.sample(say.PEOPLE, 2)
    form = rng.choice(say.DIALOGUES)
    return form.format(asker=asker, teller=teller, remark=remark, reply=reply)


def demonstrations(world: World, rng: Random, use: str, count: int) -> Iterator[Row]:
    """Conversations whose every last reply is of mixed quality."""
    for _ in range(count):
        query = world.query(rng, use, world.seen)
        reply = {"role": "assistant", "content": world.reply(query, rng)}
        yield {"messages": [*query.messages, reply]}


def preferences(world: World, rng: Random, use: str, count: int) -> Iterator[Row]:
    """Pairs of replies, labelled by a draw from the Bradley-Terry model of the gold reward."""
    while count:
        query = world.query(rng, use, world.seen)
        flaws = world.draw_flaws(query.kind, query.subject, query.answer, rng, PAIRS)
        other = world.draw_flaws(query.kind, query.subject, query.answer, rng, PAIRS)
        replies = [
            world.render(query.kind, query.subject, query.answer, query.style, drawn)
            for drawn in rng.sample([flaws, other], 2)
        ]
        golds = [query.gold(reply) for reply in replies]
        first = rng.random() < 1 / (1 + math.exp((golds[1] - golds[0]) / TEMPERATURE))
        if replies[0] == replies[1]:
            continue
        chosen, rejected = (0, 1) if first else (1, 0)
        count -= 1
        yield {
            "prompt": query.messages,
            "chosen": [{"role": "assistant", "content": replies[chosen]}],
            "rejected": [{"role": "assistant", "content": replies[rejected]}],
            "gold_chosen": golds[chosen],
            "gold_rejected": golds[rejected],
        }


def training_prompts(world: World, rng: Random) -> Iterator[Row]:
    """Prompts for training on a model's own replies, over the facts of the demonstrations."""
    for _ in range(ROWS["prompts"]):
        yield world.query(rng, "train", world.seen).row()


def evaluation_prompts(world: World, rng: Random) -> Iterator[Row]:
    """Held-out prompts, no two alike: small talk, then as many unseen as seen facts."""
    talk = int(ROWS["eval"] * TALK_SHARE) // 2 * 2
    half = (ROWS["eval"] - talk) // 2
    rows: list[Row] = []
    met: set[str] = set()
    for facts, wanted in ((world.seen, half), (world.unseen, half), (world.seen, talk)):
        while wanted:
            about_fact = len(rows) < 2 * half
            fact = world.pick(facts, rng) if about_fact else None
            row = world.query(rng, "eval", facts, fact).row()
            text = json.dumps(row["prompt"])
            if text in met or (row["kind"] != "talk") != about_fact:
                continue
            met.add(text)
            rows.append(row)
            wanted -= 1
    rng.shuffle(rows)
    yield from rows


def build() -> dict[str, bytes]:
    """All files of the world by name; each has a random stream of its own."""
    world = World()
    makers: dict[str, Callable[[Random], Iterator[Row]]] = {
        "corpus": lambda rng: corpus(world, rng),
        "sft": lambda rng: demonstrations(world, rng, "train", ROWS["sft"]),
        "sft-eval": lambda rng: demonstrations(world, rng, "held", ROWS["sft-eval"]),
        "preferences": lambda rng: preferences(world, rng, "train", ROWS["preferences"]),
        "preferences-eval": lambda rng: preferences(world, rng, "held", ROWS["preferences-eval"]),
        "prompts": lambda rng: training_prompts(world, rng),
        "eval": lambda rng: evaluation_prompts(world, rng),
    }
    return {
        f"{name}.jsonl": "".join(
            json.dumps(row, ensure_ascii=False) + "\n" for row in make(Random(f"{SEED} {name}"))
        ).encode()
        for name, make in makers.items()
    }


def main(argv: list[str] | None = None) -> int:
    """Write the files, or with `--check` compare them with what stands on disk."""
    parser = argparse.ArgumentParser(description="Write the quickstart world.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(argv)
    files = build()
    if options.check:
        paths = {name: options.out / name for name in files}
        stale = [n for n, p in paths.items() if not p.is_file() or p.read_bytes() != files[n]]
        for name in stale:
            print(f"{options.out / name}: differs from what generate.py writes")
        return 1 if stale else 0
    options.out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (options.out / name).write_bytes(content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
