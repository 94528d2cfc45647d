"""Where the reward of a reply comes from (functions, reward models, patterns, lengths), and how it becomes one number.

    sources = load_rewards(stage.rewards, path_of=ctx.path_of, dtype=..., device=..., batch_size=8, template=None)
    scores = {source.name: source.score(rows, replies, finished) for source in sources}
    total = combine(scores, weights(sources), normalizers(sources), rows=rows)

Everything goes by text. A reward model may have another tokenizer and another chat template than the policy: it reads
each conversation in its own, as it did in its training. A reply that was cut off has no end token, for the reward model
either, so that it can tell a whole answer from a broken one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.integrations import deepspeed as zero

from alignment.data import templates
from alignment.data.checks import Message
from alignment.data.dialect import Dialect
from alignment.errors import DataError, ModelError, NonFiniteError
from alignment.evaluation.generate import score
from alignment.evaluation.judges import JudgeError, judge_replies, load_judge, row_name
from alignment.evaluation.metrics import Floats
from alignment.models.generation import Policy, positions
from alignment.models.load import is_adapter, load_scorer
from alignment.models.tokenizer import load_tokenizer
from alignment.pipeline.runs import read_manifest
from alignment.recipe.schema import Reward

Row = Mapping[str, Any]
Score = Callable[[Sequence[Row], Sequence[str], Sequence[bool]], Floats]

# What a reply may hold that a tokenizer can lose: spaces, line breaks, accents, other scripts, code.
PROBE_REPLIES = (
    "It is 4.",
    "A naïve café,  two  spaces:\n\n- Zürich\n- 東京 🙂",
    "def f(x):\n\treturn {x: 'It is 4.'}",
)


# --- one number per reply, from several -------------------------------------------------------------------------------


@dataclass
class Normalizer:
    """Puts the scores of one source on a common scale: (score - mean) / deviation.

    `none` leaves them, `stored` uses a mean and a deviation that are given, `running` those of all scores that it was
    shown (Welford's method, float64). A deviation of 0, or of a single score, counts as 1: the scores are only centred.
    """

    kind: Literal["none", "stored", "running"] = "none"
    mean: float = 0.0
    std: float = 1.0
    count: int = 0
    squares: float = 0.0  # sum of the squared distances from the mean

    def update(self, values: Floats) -> None:
        """Show a running normalizer more scores (N,), one after the other; NaN is passed over."""
        if self.kind != "running":
            return
        for value in values[~np.isnan(values)].tolist():
            self.count += 1
            distance = value - self.mean
            self.mean += distance / self.count
            self.squares += distance * (value - self.mean)
        self._set_deviation()

    def __call__(self, values: Floats) -> Floats:
        """The scores (N,) on the common scale; NaN stays."""
        return values if self.kind == "none" else (values - self.mean) / self.std

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs to go on to the bit, as plain numbers; also exact through JSON."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares} if self.kind == "running" else {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over what `state_dict` gave."""
        assert state.keys() == self.state_dict().keys(), f"{self.kind}: {sorted(state)}"
        if self.kind == "running":
            self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]
            self._set_deviation()

    def _set_deviation(self) -> None:
        self.std = math.sqrt(self.squares / self.count) if self.squares > 0 else 1.0


def combine(
    scores: Mapping[str, Floats],
    weights: Mapping[str, float],
    normalizers: Mapping[str, Normalizer],
    *,
    seen: Mapping[str, Floats] | None = None,
    rows: Sequence[Row] = (),
) -> Floats:
    """The reward of each reply (N,): the sum of weight * normalised score over the sources.

    A source that does not apply to a reply (NaN) adds 0 to it, which for a normalised source is its mean.

    Args:
        scores: per source, the score of each reply (N,).
        seen: the scores by which running normalizers are updated first; default: `scores`. With several processes,
            the scores of all of them, in one order, or each process would have a scale of its own.
        rows: the replies' rows, for the message.

    Raises:
        JudgeError: no source applies to a reply; names the row.
    """
    lost = np.logical_and.reduce([np.isnan(values) for values in scores.values()])
    if lost.any():
        index = int(np.flatnonzero(lost)[0])
        name = row_name(rows, index) if rows else f"row {index + 1}"
        raise JudgeError(f"rewards: none of {', '.join(scores)} applies to {name}; leave it out, or add a reward")
    total = np.zeros(lost.shape)
    for name, values in scores.items():
        normalizers[name].update((seen or scores)[name])
        total += weights[name] * np.nan_to_num(normalizers[name](values), nan=0.0)
    return total


# --- sources ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardSource:
    """One reward of a recipe, loaded.

    Attributes:
        name, weight: as in the recipe.
        score: (rows, replies, finished) -> float64 (N,), NaN where it does not apply. A row is a mapping with `prompt`
            (messages, or the text of a user's turn) and its other columns; a reply is text without a stop token;
            `finished` says whether there was one.
        normalizer: brings its scores to a common scale; a running one has state.
        tokenizer: the reward model's own; None for other sources.
    """

    name: str
    weight: float
    score: Score
    normalizer: Normalizer = field(default_factory=Normalizer)
    tokenizer: PreTrainedTokenizerBase | None = None


def weights(sources: Sequence[RewardSource]) -> dict[str, float]:
    """The sources' weights by name, for `combine`."""
    return {source.name: source.weight for source in sources}


def normalizers(sources: Sequence[RewardSource]) -> dict[str, Normalizer]:
    """The sources' normalizers by name, for `combine`."""
    return {source.name: source.normalizer for source in sources}


def load_rewards(
    rewards: Sequence[Reward],
    *,
    path_of: Callable[[str], Path],
    dtype: torch.dtype,
    device: torch.device | str,
    batch_size: int,
    template: str | None,
    share: Callable[[Path], Any] = lambda path: None,
) -> list[RewardSource]:
    """The rewards of a stage, ready to score, in the recipe's order.

    Args:
        path_of: the folder behind `stage:<name>`, or a path as it is (`Context.path_of`).
        dtype: of a reward model's weights and computation; the score itself is computed in float32.
        batch_size: conversations per forward pass of a reward model.
        template: name or file of a chat template, for a reward model whose tokenizer brings none.
        share: gives a scorer for a folder that needs no model of its own, or None.

    Raises:
        RecipeError: a function cannot be imported.
        ModelError: a reward model cannot be loaded, or stores no mean and deviation and is asked for them.
    """
    sources = []
    for reward in rewards:
        if reward.model is not None:
            sources.append(_model_source(reward, path_of(reward.model), dtype, device, batch_size, template, share))
        else:
            sources.append(_judge_source(reward))
    return sources


def _judge_source(reward: Reward) -> RewardSource:
    judge = load_judge(reward)

    def scored(rows: Sequence[Row], replies: Sequence[str], finished: Sequence[bool]) -> Floats:
        return judge_replies(judge, rows, replies, finished)

    return RewardSource(reward.name, reward.weight, scored, Normalizer(reward.normalize or "none"))


def _model_source(
    reward: Reward,
    path: Path,
    dtype: torch.dtype,
    device: torch.device | str,
    batch_size: int,
    template: str | None,
    share: Callable[[Path], Any],
) -> RewardSource:
    scorer = share(path)
    if scorer is not None:
        tokenizer = load_tokenizer(path)
    else:
        with _unsharded():
            scorer, tokenizer = load_scorer(path, dtype=dtype)
        scorer = scorer.to(device).eval().requires_grad_(False)
    normalizer = _normalizer(reward, path, scorer)
    if tokenizer.chat_template is None and template is not None:
        tokenizer.chat_template = templates.template(template).jinja

    def scored(rows: Sequence[Row], replies: Sequence[str], finished: Sequence[bool]) -> Floats:
        ids = encode(tokenizer, rows, replies, finished, name=reward.name)
        _require_room(reward.name, scorer, ids, rows)
        values = score(scorer, tokenizer, ids, batch_size=batch_size)
        if not np.isfinite(values).all():
            index = int(np.flatnonzero(~np.isfinite(values))[0])
            raise NonFiniteError(f"rewards: {reward.name} gave {values[index]} for {row_name(rows, index)}; see {path}")
        return values

    return RewardSource(reward.name, reward.weight, scored, normalizer, tokenizer)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    replies: Sequence[str],
    finished: Sequence[bool],
    *,
    name: str = "the reward model",
) -> list[list[int]]:
    """The ids of prompt and reply as a reward model's training table has them, without the end if there was none.

    A reply that spells one of the tokenizer's special tokens is cut there and has no end: written out, the token would
    close the answer, and the policy could add turns in praise of itself.

    Raises:
        DataError: the template refuses a conversation; names the row.
    """
    dialect = Dialect.of(tokenizer)
    texts = []
    for index, (row, reply, ended) in enumerate(zip(rows, replies, finished, strict=True)):
        kept = _before_special(dialect, reply)
        try:
            text = _written(dialect, row, kept, whole=ended and kept == reply)
        except DataError as error:
            raise DataError(f"rewards: {name}: {row_name(rows, index)}: {error}") from error
        texts.append(text)
    return [encoding.ids for encoding in templates.tokenize(tokenizer, texts)]


def _before_special(dialect: Dialect, reply: str) -> str:
    """A reply up to the first special token that it spells."""
    special = "|".join(map(re.escape, sorted(dialect.tokens, key=len, reverse=True)))
    return re.split(special, reply, maxsplit=1)[0] if special else reply


def _written(dialect: Dialect, row: Row, reply: str, *, whole: bool) -> str:
    """A conversation as text, through the stop token if it is `whole`, else to the last character of the reply."""
    prompt = row["prompt"]
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    text = dialect.render([*messages, {"role": "assistant", "content": reply}], row.get("tools"))[0]
    if whole:
        return text
    text = text.removesuffix(dialect.stop)
    for said in (reply, reply.strip()):  # templates may strip it
        at = text.rfind(said)
        if at >= 0:
            return text[: at + len(said)]
    return text  # the template rewrote it (a thought that it moves)


def _require_room(name: str, scorer: Policy, conversations: Sequence[Sequence[int]], rows: Sequence[Row]) -> None:
    limit = positions(scorer)
    lengths = [len(ids) for ids in conversations]
    if limit is not None and max(lengths, default=0) > limit:
        index = lengths.index(max(lengths))
        raise ModelError(
            f"rewards: {name}: {row_name(rows, index)}: prompt and reply are {lengths[index]} of the reward model's "
            f"tokens, and it has {limit} positions; allow shorter prompts or replies, or take another reward model"
        )


def _normalizer(reward: Reward, path: Path, scorer: Policy) -> Normalizer:
    """As the recipe wants it; by default `stored` where the reward model has stored its scale."""
    if reward.normalize in ("none", "running"):
        return Normalizer(reward.normalize)
    stored = stored_scale(path, scorer)
    if stored is not None:
        return Normalizer("stored", *stored)
    if reward.normalize == "stored":
        raise ModelError(
            f"rewards: {reward.name}: {path} stores no score_mean and score_std above 0; train the reward model again, "
            "or write `normalize: running`"
        )
    return Normalizer("none")


def stored_scale(path: Path, scorer: Policy) -> tuple[float, float] | None:
    """Mean and deviation of a reward model's scores, as its training left them; None if there are none to divide by.

    They stand in the stage's manifest and in a whole model's config.json. The configuration of an adapter's base tells
    of another model.
    """
    manifest = read_manifest(path) or {}
    found: Mapping[str, Any] = manifest.get("model") or {}
    if "score_mean" not in found and not is_adapter(path):
        found = scorer.config.to_dict()
    mean, std = found.get("score_mean"), found.get("score_std")
    if mean is None or std is None or not math.isfinite(mean) or not 0 < std < math.inf:
        return None
    return float(mean), float(std)


@contextmanager
def _unsharded() -> Iterator[None]:
    """Load a whole model on every rank also where ZeRO-3 is declared: `from_pretrained` would shard its weights.

    No engine runs a reward model, so nothing would gather them for its forward pass.
    """
    declared = zero._hf_deepspeed_config_weak_ref
    zero.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        zero._hf_deepspeed_config_weak_ref = declared


# --- check ------------------------------------------------------------------------------------------------------------


def round_trip(
    policy_tokenizer: PreTrainedTokenizerBase, source: RewardSource, replies: Sequence[str] = PROBE_REPLIES
) -> str | None:
    """What a reward model misses of the policy's replies: a line on the first text that it loses; None if it reads all.

    A reply is drawn in the policy's ids, decoded, written in the reward model's template and encoded again: what is
    decoded from those ids must hold the reply's text. White space at its ends does not count, templates strip it.
    """
    if source.tokenizer is None:
        return None
    for text in replies:
        drawn = policy_tokenizer(text, add_special_tokens=False)["input_ids"]
        reply = policy_tokenizer.decode(drawn, skip_special_tokens=True)
        row = {"prompt": [{"role": "user", "content": "?"}]}
        (ids,) = encode(source.tokenizer, [row], [reply], [True], name=source.name)
        read = source.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if _before_special(Dialect.of(source.tokenizer), reply).strip() not in read:
            return (
                f"rewards: {source.name}: its tokenizer loses a part of the reply {reply!r}, it reads {read!r}; take a "
                "reward model with a byte-level tokenizer"
            )
    return None
