"""The `evaluate` stage: several models answer the same held-out prompts, and judges compare them.

    per model     mean reward with its interval, win rate against the baseline, KL to it, means of the other judges,
                  length, share of finished answers
    per scorer    accuracy on held-out pairs, beside the best possible on the same pairs
    files         samples.jsonl (every reply), report.md (the tables and five conversations)

`build` reads the recipe; `evaluate` does the work from a `Contest` and needs no recipe. One model is in memory at a
time, beside the baseline.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from alignment.data import templates
from alignment.data.prepare import load_rows
from alignment.errors import DataError
from alignment.evaluation import report
from alignment.evaluation.generate import Reply, batches, generate, kl_to, score
from alignment.evaluation.judges import Judge, judge_replies, load_judge
from alignment.evaluation.metrics import Estimate, Floats, estimate, mean, wins
from alignment.models.generation import Policy, placed, release_memory
from alignment.models.load import adapter_base, base_revision, is_adapter, load_config, load_policy, load_scorer
from alignment.models.tokenizer import load_tokenizer
from alignment.pipeline.files import write_text
from alignment.recipe.algorithms import Schema
from alignment.recipe.schema import DataLimits, Sampling, Source, pinned

if TYPE_CHECKING:
    from alignment.training.context import Context

Say = Callable[[str], None]
Row = Mapping[str, Any]
Loaded = tuple[Policy, PreTrainedTokenizerBase]

SHOWN = 5  # conversations side by side
SAMPLES, REPORT = "samples.jsonl", "report.md"


@dataclass(frozen=True)
class Contest:
    """What is compared, and how.

    Attributes:
        models: label -> folder, in the order of the table; holds the baseline if there is one.
        baseline: the label of the model that win rates and KL refer to.
        scorers: label -> folder of the reward models.
        judges: the first decides the win rate.
        prompts, pairs: normalised rows of the schemas `prompts` and `preference`.
        dtype: of weights and computation; float32 or bfloat16.
        template: for models whose tokenizer brings none.
    """

    models: Mapping[str, Path]
    baseline: str | None
    prompts: Sequence[Row]
    output: Path
    scorers: Mapping[str, Path] = field(default_factory=dict)
    judges: Sequence[Judge] = ()
    pairs: Sequence[Row] = ()
    sampling: Sampling = field(default_factory=Sampling)
    batch: int = 8
    seed: int = 42
    dtype: torch.dtype = torch.float32
    template: str | None = None


@dataclass(frozen=True)
class Answers:
    """One model's replies to all prompts; `kl` (N,) is NaN without a baseline of the same vocabulary."""

    replies: Sequence[Reply]
    kl: Floats


def build(ctx: Context) -> Callable[[], dict[str, float]]:
    """The runnable of an `evaluate` stage; it returns the flat metrics.

    Raises:
        RecipeError: a judge cannot be imported.
        DataError: prompts or pairs cannot be read.
    """
    stage = ctx.spec.config
    links = list(dict.fromkeys(stage.models or ())) if stage.prompts else []
    if stage.baseline is not None and stage.baseline not in links:
        links.insert(0, stage.baseline)
    names = labels([*links, *stage.scorers])
    seed = stage.seed or 0

    def rows(sources: list[Source] | None, schema: Schema) -> list[dict[str, Any]]:
        limits = stage.limits or DataLimits()
        return load_rows(sources, schema, seed=seed, strict=False, limits=limits, say=ctx.say) if sources else []

    contest = Contest(
        models={names[link]: ctx.path_of(link) for link in links},
        baseline=names[stage.baseline] if stage.baseline else None,
        scorers={names[link]: ctx.path_of(link) for link in stage.scorers},
        judges=[load_judge(reward) for reward in stage.rewards],
        prompts=rows(stage.prompts, "prompts"),
        pairs=rows(stage.pairs, "preference"),
        sampling=stage.sampling or Sampling(),
        batch=stage.batch.per_device,
        seed=seed,
        dtype=ctx.compute,
        output=ctx.spec.output,
        template=stage.chat_template,
    )
    return lambda: evaluate(contest, ctx.say)


def labels(links: Sequence[str]) -> dict[str, str]:
    """A short name for each link: its last part, with as many parents as tell it from the others.

    `stage:dpo` is dpo; the folders `a/dpo` and `b/dpo` are a-dpo and b-dpo; the commit of `org/dpo@commit` is left out.
    """
    parts = {link: [part for part in pinned(link)[0].removeprefix("stage:").split("/") if part] for link in links}
    for depth in range(1, max(map(len, parts.values())) + 1):
        names = {link: "-".join(path[-depth:]) for link, path in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {link: link for link in parts}


def evaluate(contest: Contest, say: Say) -> dict[str, float]:
    """Run the comparison, write `samples.jsonl` and `report.md`, print the tables; returns the flat metrics.

    Raises:
        DataError, ModelError, JudgeError: with one line that names the row, the folder or the judge.
    """
    best = _best_possible(contest)
    _try_judges(contest)
    contest = _fitting(contest, say)
    answers = _all_answers(contest, say) if contest.models else {}
    rewards = {name: _judged(contest, own.replies) for name, own in answers.items()}
    results = report.Results(
        lines=[_line(contest, name, answers, rewards) for name in contest.models],
        baseline=contest.baseline,
        judge=contest.judges[0].name if contest.judges else None,
        accuracies=_accuracies(contest, say),
        best_possible=None if best is None else mean(best),
        pairs=len(contest.pairs),
    )
    _write(contest, results, answers, rewards, say)
    return report.flat(results)


def _fitting(contest: Contest, say: Say) -> Contest:
    """Without the prompts that leave no room for a reply in one of the models; all answer the same ones."""
    limits = [limit for folder in contest.models.values() if (limit := _positions(folder)) is not None]
    if not limits:
        return contest
    leader = contest.baseline or next(iter(contest.models))
    room = min(limits) - contest.sampling.max_new_tokens
    tokenizer = _with_template(contest, load_tokenizer(contest.models[leader]))
    lengths = map(len, _encode(tokenizer, contest.prompts))
    kept = [row for row, length in zip(contest.prompts, lengths, strict=True) if length <= room]
    if not kept:
        raise DataError(f"prompts: none of {len(contest.prompts)} has at most {room} tokens; lower max_new_tokens")
    if len(kept) < len(contest.prompts):
        gone = len(contest.prompts) - len(kept)
        say(f"prompts: dropped {gone:,} of {len(contest.prompts):,}: overlong (more than {room:,} tokens)")
    return replace(contest, prompts=kept)


def _positions(folder: Path) -> int | None:
    """How many tokens the model in a folder can read, where its configuration says so."""
    adapter = is_adapter(folder)
    config = load_config(adapter_base(folder), base_revision(folder)) if adapter else load_config(str(folder))
    limit = getattr(config, "max_position_embeddings", None)
    return None if limit is None else int(limit)


# -- replies -----------------------------------------------------------------------------------------------------------


def _all_answers(contest: Contest, say: Say) -> dict[str, Answers]:
    """Every model's replies, in the order of the table."""
    leader = contest.baseline or next(iter(contest.models))
    # All models see the same batches, whatever their tokenizers make of the prompts' lengths.
    tokenizer = _with_template(contest, load_tokenizer(contest.models[leader]))
    plan = batches([len(ids) for ids in _encode(tokenizer, contest.prompts)], contest.batch)
    baseline = None if contest.baseline is None else _load(contest, contest.baseline)
    answers = {}
    for name in contest.models:
        answers[name] = _answer(contest, name, baseline, plan, say)
        release_memory()
    return answers


def _answer(contest: Contest, name: str, baseline: Loaded | None, plan: Sequence[Sequence[int]], say: Say) -> Answers:
    """One model's replies; it is loaded here and gone when this returns."""
    started = time.monotonic()
    own = baseline is not None and name == contest.baseline
    model, tokenizer = baseline if baseline is not None and own else _load(contest, name)
    prompts = _encode(tokenizer, contest.prompts)
    stops = templates.stop_ids(tokenizer)
    replies = generate(model, tokenizer, prompts, plan, contest.sampling, stops, seed=contest.seed)
    kl = np.full(len(prompts), np.nan)
    if own:
        kl = np.zeros(len(prompts))
    elif baseline is not None and tokenizer.get_vocab() == baseline[1].get_vocab():
        kl = kl_to(baseline[0], model, tokenizer, prompts, replies, batch_size=contest.batch)
    elif baseline is not None:
        say(f"{name}: no KL, because its vocabulary differs from that of {contest.baseline}")
    say(f"{name}: {len(replies):,} replies in {time.monotonic() - started:.0f} s")
    return Answers(replies, kl)


def _load(contest: Contest, name: str) -> Loaded:
    model, tokenizer = load_policy(contest.models[name], dtype=contest.dtype)
    return placed(model), _with_template(contest, tokenizer)


def _with_template(contest: Contest, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A base model without a template of its own is asked in the recipe's."""
    if tokenizer.chat_template is None and contest.template is not None:
        tokenizer.chat_template = templates.template(contest.template).jinja
    return tokenizer


def _encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[list[int]]:
    """The ids after which the model answers, for each row."""
    encoded = []
    for index, row in enumerate(rows):
        try:
            encoded.append(templates.encode_prompt(tokenizer, row["prompt"], row.get("tools")))
        except DataError as error:
            raise DataError(f"prompts: row {index + 1}: {error}") from error
    return encoded


# -- pairs -------------------------------------------------------------------------------------------------------------


def _best_possible(contest: Contest) -> Floats | None:
    """Per pair whether the first judge agrees with its label: the accuracy that a perfect scorer has on noisy pairs.

    The judge's rewards are taken from the columns `<judge>_chosen` and `<judge>_rejected` where the pairs have them.
    """
    if not contest.pairs or not contest.judges:
        return None
    first = contest.judges[0]
    columns = [f"{first.name}_{side}" for side in ("chosen", "rejected")]
    if all(column in row for row in contest.pairs for column in columns):
        try:
            chosen, rejected = ([float(row[column]) for row in contest.pairs] for column in columns)
        except (TypeError, ValueError) as error:
            raise DataError(f"pairs: {columns[0]} and {columns[1]} must be numbers: {error}") from error
        return wins(chosen, rejected)
    sides = [[row[side][0]["content"] for row in contest.pairs] for side in ("chosen", "rejected")]
    whole = [True] * len(contest.pairs)
    return wins(*(judge_replies(first, contest.pairs, side, whole) for side in sides))


def _accuracies(contest: Contest, say: Say) -> dict[str, Estimate]:
    """Each reward model's accuracy on the pairs, ties half."""
    accuracies = {}
    for name, folder in contest.scorers.items():
        accuracies[name] = estimate(_right(contest, folder), seed=contest.seed)
        say(f"{name}: {len(contest.pairs):,} pairs scored")
        release_memory()
    return accuracies


def _right(contest: Contest, folder: Path) -> Floats:
    """Per pair whether the reward model in `folder` prefers the chosen answer (P,)."""
    scorer, tokenizer = load_scorer(folder, dtype=contest.dtype)
    scorer = placed(scorer)
    sides = (_encode_pairs(tokenizer, contest.pairs, side) for side in ("chosen", "rejected"))
    return wins(*(score(scorer, tokenizer, side, batch_size=contest.batch) for side in sides))


def _encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Row], side: str) -> list[list[int]]:
    """Prompt and answer as one sequence of ids, as the reward model was trained on them."""
    encoded = []
    for index, row in enumerate(pairs):
        try:
            prompt, answer = templates.encode_completion(tokenizer, row["prompt"], row[side], row.get("tools"))
        except DataError as error:
            raise DataError(f"pairs: row {index + 1}: {error}") from error
        encoded.append([*prompt, *answer])
    return encoded


def _try_judges(contest: Contest) -> None:
    """Let every judge score one made-up reply: its faults should show before an hour of generation, not after."""
    for one in contest.judges if contest.prompts else ():
        judge_replies(one, contest.prompts[:1], ["I do not know."], [True])


def _judged(contest: Contest, replies: Sequence[Reply]) -> dict[str, Floats]:
    """Every judge's rewards for one model's replies (N,)."""
    texts, finished = [reply.text for reply in replies], [reply.finished for reply in replies]
    return {one.name: judge_replies(one, contest.prompts, texts, finished) for one in contest.judges}


# -- results -----------------------------------------------------------------------------------------------------------


def _line(
    contest: Contest, name: str, answers: Mapping[str, Answers], rewards: Mapping[str, Mapping[str, Floats]]
) -> report.Line:
    own = rewards[name]
    names = [one.name for one in contest.judges]
    judged = won = None
    if names:
        first = names[0]
        judged = estimate(own[first], seed=contest.seed)
        if contest.baseline is not None:
            won = estimate(wins(own[first], rewards[contest.baseline][first]), seed=contest.seed)
    return report.Line(
        model=name,
        kl=mean(answers[name].kl),
        length=mean([len(reply.ids) for reply in answers[name].replies]),
        finished=mean([reply.finished for reply in answers[name].replies]),
        judged=judged,
        win_rate=won,
        means={other: mean(own[other]) for other in names[1:]},
    )


def _write(
    contest: Contest,
    results: report.Results,
    answers: Mapping[str, Answers],
    rewards: Mapping[str, Mapping[str, Floats]],
    say: Say,
) -> None:
    """samples.jsonl, report.md, and the same tables and conversations on the terminal."""
    count = len(contest.prompts) if contest.models else 0
    write_text(contest.output / SAMPLES, "".join(_sample(contest, i, answers, rewards) for i in range(count)))
    drawn = np.random.default_rng(contest.seed).permutation(count)[:SHOWN]
    rows = sorted(int(index) for index in drawn)
    chosen_by = f"{len(rows)} of {count:,} prompts, drawn with seed {contest.seed}"
    tables = [table for table in (report.models_table(results), report.scorers_table(results)) if table]
    screen, page = [], [f"# Evaluation of {', '.join([*contest.models, *contest.scorers])}", "", *_notes(contest), ""]
    for table in tables:
        screen += ["", *report.aligned(table)]
        page += [*report.markdown_table(table), ""]
    if rows:
        screen += ["", f"{chosen_by}:"]
        page += [f"## {chosen_by}", ""]
    for index in rows:
        shown = [_shown(name, index, answers, rewards, results.judge) for name in contest.models]
        screen += report.conversation(f"prompt {index + 1}", contest.prompts[index]["prompt"], shown)
        page += report.markdown_conversation(f"Prompt {index + 1}", contest.prompts[index]["prompt"], shown)
    write_text(contest.output / REPORT, "\n".join(page))
    for line in screen:
        say(line)


def _notes(contest: Contest) -> list[str]:
    """How the numbers were made, for the report."""
    sampling = contest.sampling
    return [
        f"{len(contest.prompts):,} prompts, temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, top-k "
        f"{sampling.top_k}, at most {sampling.max_new_tokens} new tokens, seed {contest.seed}. Intervals: 95 %, "
        "percentile bootstrap over prompts (pairs for reward models). A win is a strictly higher reward, a tie counts "
        "half. KL in nats per reply, on the model's own replies. Length in tokens, the stop token included."
    ]


def _sample(
    contest: Contest, index: int, answers: Mapping[str, Answers], rewards: Mapping[str, Mapping[str, Floats]]
) -> str:
    """One line of samples.jsonl: the row, and every model's reply."""
    replies = {}
    for name in contest.models:
        reply = answers[name].replies[index]
        replies[name] = {
            "text": reply.text,
            "finished": reply.finished,
            "tokens": len(reply.ids),
            "kl": _or_none(answers[name].kl[index]),
            "rewards": {judge: _or_none(values[index]) for judge, values in rewards[name].items()},
        }
    return json.dumps({**contest.prompts[index], "replies": replies}, ensure_ascii=False, default=str) + "\n"


def _shown(
    name: str,
    index: int,
    answers: Mapping[str, Answers],
    rewards: Mapping[str, Mapping[str, Floats]],
    first: str | None,
) -> report.Shown:
    reply = answers[name].replies[index]
    reward = None if first is None else _or_none(rewards[name][first][index])
    return report.Shown(name, reply.text, reply.finished, reward)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
