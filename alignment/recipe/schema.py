"""The typed recipe: what a user may write, and nothing else.

A recipe names stages; each stage names an algorithm of the table (`algorithms.py`) and its sections. Every model here
refuses unknown keys and is frozen. `train:` and `peft:` stay mappings: their keys are upstream's own, checked against
the installed classes by `upstream.py`. Field descriptions are what `recipes/README.md` and the error messages show.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from alignment.recipe.invariants import INVARIANTS, SKIPPABLE
from alignment.recipe.launching import Launch
from alignment.recipe.section import PositiveInt, Section


def _check(name: str) -> str:
    if name not in SKIPPABLE:
        needed = "is always made" if name in INVARIANTS else f"is no check; there are {', '.join(SKIPPABLE)}"
        raise ValueError(f"{name} {needed}")
    return name


Check = Annotated[str, AfterValidator(_check)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=80)]  # no dot: `--set stages.x.y=1`
Hook = Annotated[str, Field(pattern=r"^([A-Za-z_][\w.]*|.+\.py):[A-Za-z_]\w*$")]
LINK = "stage:"


# Writing systems, by the first word of the Unicode names of their letters.
SCRIPTS: dict[str, tuple[str, ...]] = {
    "latin": ("LATIN",), "greek": ("GREEK",), "cyrillic": ("CYRILLIC",), "arabic": ("ARABIC",), "hebrew": ("HEBREW",),
    "devanagari": ("DEVANAGARI",), "bengali": ("BENGALI",), "tamil": ("TAMIL",), "thai": ("THAI",),
    "hangul": ("HANGUL",), "cjk": ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"),
}  # fmt: skip


def _pattern(pattern: str) -> str:
    """A regular expression that compiles, and that is not found everywhere."""
    if pattern == "":
        raise ValueError("is empty, and would be found in every row; give a pattern")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression of Python: {error}") from None
    return pattern


class TrainTokenizer(Section):
    """A byte-level BPE tokenizer trained on the stage's own corpus."""

    vocab_size: Annotated[int, Field(ge=260, le=1_000_000, strict=True)] = Field(
        description="ids, special ones included"
    )


class InitTokenizer(Section):
    """Where the tokenizer of a randomly initialised model comes from: `train` it, or take it from `path`."""

    train: TrainTokenizer | None = None
    path: str | None = Field(default=None, description="folder or hub name of an existing tokenizer")

    @model_validator(mode="after")
    def _one_source(self) -> InitTokenizer:
        if (self.train is None) == (self.path is None):
            raise ValueError("give exactly one of train, path")
        return self


class Init(Section):
    """A model with random weights (`pretrain` only)."""

    config: dict[str, Any] = Field(description="keys of the Transformers config class of `model_type`")
    tokenizer: InitTokenizer


class Quantization(Section):
    """Frozen base weights in 4 or 8 bits (bitsandbytes); needs `peft:`."""

    bits: Literal[4, 8] = 4
    type: Literal["nf4", "fp4"] = "nf4"
    double: bool = True


def linked(text: str) -> str | None:
    """The stage that `stage:<name>` links to; None for a folder or hub name."""
    return text.removeprefix(LINK) if text.startswith(LINK) else None


def is_commit(revision: str | None) -> bool:
    """Whether a revision names one state of a repository for good; a branch or a tag may move."""
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def pinned(text: str) -> tuple[str, str | None]:
    """The name and the commit of `org/name@commit`; a name or a folder as it is, and None."""
    name, _, commit = text.rpartition("@")
    return (name, commit) if is_commit(commit) else (text, None)


class Model(Section):
    """Which weights a stage starts from: exactly one of `stage`, `path`, `init`."""

    stage: str | None = Field(default=None, description="an earlier stage of this recipe")
    path: str | None = Field(default=None, description="a folder, or a hub name")
    revision: str | None = Field(default=None, description="commit of the hub model")
    init: Init | None = Field(default=None, description="random weights")
    attention: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "sdpa"
    quantization: Quantization | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        """`stage:sft`, `path-or-hub-name` and `hub-name@commit` are short for the mapping."""
        if not isinstance(value, str):
            return value
        if (stage := linked(value)) is not None:
            return {"stage": stage}
        path, commit = pinned(value)
        return {"path": path} if commit is None else {"path": path, "revision": commit}

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        given = [key for key in ("stage", "path", "init") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of stage, path, init (found {', '.join(given) or 'none'})")
        if self.revision is not None and self.path is None:
            raise ValueError("revision belongs to path (a hub name)")
        return self


class Turns(Section):
    """How a file writes the turns of a conversation, where it is not one of the usual ways."""

    role: str | None = Field(default=None, description="the key that says who speaks")
    content: str | None = Field(default=None, description="the key that says what")
    roles: dict[str, Literal["system", "user", "assistant", "tool", "function_call"]] = Field(
        default_factory=dict, description="the file's name of a role: ours"
    )


class Source(Section):
    """One source of rows: a file, a glob, a folder, a hub name, or another tool's description of a data set."""

    path: str
    revision: str | None = None
    subset: str | None = Field(default=None, description="configuration name of a hub data set")
    folder: str | None = Field(default=None, description="folder of a hub data set whose files are wanted")
    split: str = Field(default="train", description="split of a hub data set or folder")
    rows: PositiveInt | None = Field(default=None, description="take this many rows, drawn with the recipe's seed")
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="share of this source in the mixture, relative to the other weights"
    )
    columns: dict[str, str] = Field(default_factory=dict, description="our column name: the file's column name")
    turns: Turns | None = Field(default=None, description="keys and names of roles of the turns, where unusual")
    format: str | None = Field(default=None, description="name of a format, where detection is not wanted")
    pairs: Literal["best-worst", "adjacent", "all"] = Field(
        default="best-worst", description="which pairs are made of several rated answers to a prompt"
    )
    score: str | None = Field(default=None, description="key that rates such answers, where it is not the usual one")


class DataLimits(Section):
    """When data is too bad to train on."""

    dropped: Fraction = Field(default=0.01, description="largest share of defective rows per source")


class ReportLimits(DataLimits):
    """When `alignment data check` fails: the largest share of rows that each check may see; null only reports."""

    duplicate: Fraction | None = Field(default=0.5, description="rows that repeat an earlier one")
    near_duplicate: Fraction | None = Field(default=None, description="rows that nearly repeat an earlier one")
    leak: Fraction | None = Field(default=0.05, description="held-out rows whose prompt is trained on")
    contaminated: Fraction | None = Field(default=0.01, description="rows of an evaluation set that are trained on")
    contradictory: Fraction | None = Field(default=0.05, description="pairs that other pairs contradict")
    secret: Fraction | None = Field(default=0.0, description="rows with a credential")
    personal_data: Fraction | None = Field(default=None, description="rows with personal data")
    truncated: Fraction | None = Field(default=None, description="rows cut at train.max_length")
    unstopped: Fraction | None = Field(default=0.05, description="answers whose stop token is not trained")
    length_bias: Fraction | None = Field(default=None, description="accuracy of a classifier that sees lengths only")
    separable: Fraction | None = Field(default=0.99, description="accuracy of a classifier that sees single words only")


Pattern = Annotated[str, AfterValidator(_pattern)]


class Range(Section):
    """What a number may be, both ends included."""

    min: Annotated[float, Field(allow_inf_nan=False)] | None = None
    max: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Range:
        if self.min is None and self.max is None:
            raise ValueError("give min, max, or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}: no row would be left")
        return self


class Filter(Section):
    """Which rows are kept; all that is given must hold."""

    length: Range | None = Field(default=None, description="characters of each answer (or of the text, or the prompt)")
    columns: dict[str, Range | list[str | bool | int | float] | str | bool | int | float] = Field(
        default_factory=dict, description="column of the file: its value, a list of values, or {min, max}"
    )
    matches: Pattern | None = Field(default=None, description="keep rows in whose turns this pattern is found")
    excludes: Pattern | None = Field(default=None, description="drop rows in whose turns this pattern is found")
    scripts: list[str] | None = Field(
        default=None, min_length=1, description="writing systems (latin, cyrillic, cjk) of nine tenths of the letters"
    )
    languages: list[Annotated[str, Field(pattern="^[a-z]{2,3}$")]] | None = Field(
        default=None, min_length=1, description="languages (ISO 639 codes: en, de, zh) of which the answers must be"
    )

    @field_validator("scripts")
    @classmethod
    def _known_scripts(cls, names: list[str] | None) -> list[str] | None:
        for name in names or ():
            if name not in SCRIPTS:
                raise ValueError(f"{name} is no known script; known are {', '.join(SCRIPTS)}")
        return names

    @model_validator(mode="after")
    def _says_something(self) -> Filter:
        if not self.model_fields_set:
            raise ValueError("give one of length, columns, matches, excludes, scripts, languages")
        return self


class Balance(Section):
    """The same number of rows for every value of a column."""

    by: str = Field(description="a column of the file")
    rows: PositiveInt | None = Field(
        default=None, description="at most so many rows of each value; default: as many as the rarest value has"
    )


class Prune(Section):
    """Keep a share of the rows by a number that they carry."""

    by: str = Field(description="a column of the file; margin: score_chosen - score_rejected where there is none")
    keep: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(description="share of the rows that is kept")
    side: Literal["highest", "lowest", "middle"] = Field(default="highest", description="which of them")


class Data(Section):
    """What a stage learns from."""

    train: Annotated[list[Source], Field(min_length=1)]
    eval: list[Source] = Field(default_factory=list)
    eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        default=None, description="held out of `train` with the recipe's seed, by prompt, where there is no `eval`"
    )
    on_overlong: Literal["drop", "truncate_left", "truncate_right", "error"] = Field(
        default="drop", description="what happens to rows longer than train.max_length"
    )
    on_system: Literal["keep", "merge", "drop", "error"] = Field(
        default="keep", description="what happens to system turns; merge: into the user turn that follows"
    )
    on_special_token: Literal["drop", "neutralize"] = Field(
        default="drop",
        description="what happens to rows whose text holds a control token of the template (<|im_end|>); neutralize: "
        "a space is put before its last character",
    )
    filter: Filter | None = Field(default=None, description="which rows are kept")
    dedupe: Literal["rows", "prompts"] | None = Field(
        default=None, description="keep the first of equal rows, or of rows with equal prompts, over all sources"
    )
    prune: Prune | None = Field(default=None, description="keep a share of the rows by a number that they carry")
    max_pairs_per_prompt: PositiveInt | None = Field(
        default=None, description="at most so many rows with the same prompt, drawn with the seed"
    )
    balance: Balance | None = Field(default=None, description="the same number of rows for every value of a column")
    augment: list[Hook] = Field(
        default_factory=list,
        description="functions (pkg.mod:fn, path/file.py:fn) that make of a row the list of rows to train on, in this "
        "order",
    )
    against: list[Source] = Field(
        default_factory=list,
        description="evaluation sets that must not be trained on; those of the recipe's evaluate stages are added",
    )
    limits: ReportLimits = Field(default_factory=lambda: ReportLimits())
    strict: bool = Field(default=False, description="stop at the first defective row")

    @property
    def watched(self) -> list[Source]:
        """The evaluation sets that a run looks for: none where `limits.contaminated` is null."""
        return self.against if self.limits.contaminated is not None else []

    @model_validator(mode="after")
    def _one_eval(self) -> Data:
        if self.eval and self.eval_fraction is not None:
            raise ValueError("give eval or eval_fraction, not both")
        return self

    @model_validator(mode="after")
    def _one_mixture(self) -> Data:
        if self.balance is not None and any(source.weight is not None for source in self.train):
            raise ValueError("balance and the weights of sources both decide the shares of rows; give one of the two")
        return self


class Batch(Section):
    """Rows per optimizer step. Accumulation is derived from the real number of processes."""

    global_: PositiveInt = Field(default=64, alias="global", description="rows per optimizer step, over all processes")
    per_device: PositiveInt = Field(default=8, description="rows per forward pass and process")
    per_device_eval: PositiveInt | None = Field(default=None, description="default: per_device")


class Precision(Section):
    """`compute` is autocast; `weights` is for frozen weights: trained ones are float32 or have a float32 master."""

    compute: Literal["auto", "bfloat16", "float32"] = "auto"
    weights: Literal["float32", "bfloat16"] = Field(default="float32", description="LoRA base, reference, scorers")


class Checkpoints(Section):
    """When a stage saves, and how many sealed checkpoints it keeps."""

    every: PositiveInt | Literal["epoch"] = Field(default=500, description="optimizer steps, or epoch")
    keep: PositiveInt = 2


class Reward(Section):
    """What scores a reply: exactly one of `function`, `model`, `regex`, `length`.

    A function has TRL's reward signature: `fn(prompts, completions, **columns) -> list[float]`.
    """

    name: Name
    function: Hook | None = Field(default=None, description="pkg.mod:fn or path/to/file.py:fn")
    model: str | None = Field(default=None, description="a reward model: stage:<name>, a folder, hub-name@commit")
    regex: str | None = Field(default=None, description="1 where the pattern is found in the reply, else 0")
    length: PositiveInt | None = Field(default=None, description="words without a penalty; twice as many cost 1")
    weight: Annotated[float, Field(allow_inf_nan=False)] = Field(default=1.0, description="factor in the sum")
    normalize: Literal["none", "stored", "running"] | None = Field(
        default=None, description="subtract a mean, divide by a deviation: the reward model's own, or of all scores yet"
    )

    @field_validator("regex")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern == "":
            raise ValueError("is empty, and would be found in every reply; give a pattern")
        try:
            re.compile(pattern or "", re.DOTALL)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"is not a regular expression of Python: {error}") from None
        return pattern

    @field_validator("weight")
    @classmethod
    def _counts(cls, weight: float) -> float:
        if weight == 0:
            raise ValueError("must not be 0: the reward would not count; remove it, or give it a weight")
        return weight

    @model_validator(mode="after")
    def _one_source(self) -> Reward:
        given = [key for key in ("function", "model", "regex", "length") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of function, model, regex, length (found {', '.join(given) or 'none'})")
        if self.normalize == "stored" and self.model is None:
            raise ValueError("normalize: stored is for `model:`, which brings its mean and deviation; write running")
        return self


class Sampling(Section):
    """How replies are drawn."""

    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = Field(default=1.0, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0, strict=True)] = 0
    max_new_tokens: PositiveInt = 256


class Stage(Section):
    """One step of the chain. Which sections an algorithm takes stands in its row of the table."""

    algorithm: str = Field(description="what the stage does: pretrain, sft, reward, dpo, kto, ppo, evaluate, ...")
    model: Model | None = None
    data: Data | None = None
    batch: Batch = Field(default_factory=lambda: Batch())
    train: dict[str, Any] = Field(default_factory=dict)
    peft: dict[str, Any] | None = None
    # evaluate
    models: list[str] | None = Field(default=None, description="stage:<name>, a folder, hub-name@commit")
    baseline: str | None = Field(default=None, description="the model that win rates and KL refer to")
    scorers: list[str] = Field(default_factory=list, description="reward models whose accuracy is measured on `pairs`")
    rewards: list[Reward] = Field(
        default_factory=list,
        description="ppo, rloo, grpo: what is maximised, summed; evaluate: judges, the first decides the win rate",
    )
    prompts: list[Source] | None = None
    pairs: list[Source] | None = Field(default=None, description="held-out preference pairs")
    sampling: Sampling | None = None
    limits: DataLimits | None = Field(default=None, description="for `prompts` and `pairs`; training rows: data.limits")
    # each overrides the recipe's
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] | None = None
    precision: Precision | None = None
    chat_template: str | None = None
    launch: Launch | None = None
    checkpoints: Checkpoints | None = None
    skip_checks: list[Check] = Field(
        default_factory=list, description="checks of the first batch that are left out, by name (recipes/checks.md)"
    )
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] | None = None


class Resolved(Stage):
    """A stage with everything it inherits filled in (see `resolve`); `chat_template` may stay None: the model's own."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    precision: Precision
    launch: Launch
    checkpoints: Checkpoints
    report_to: list[Literal["tensorboard", "wandb", "trackio"]]


class Recipe(Section):
    """A named chain of stages, in the order in which they run."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 42
    model: Model | None = Field(default=None, description="for stages that name none")
    precision: Precision = Field(default_factory=lambda: Precision())
    chat_template: str | None = Field(
        default=None, description="a named template, a .jinja file, or none: the model's own"
    )
    launch: Launch = Field(default_factory=lambda: Launch())
    checkpoints: Checkpoints = Field(default_factory=lambda: Checkpoints())
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    stages: Annotated[dict[StageName, Stage], Field(min_length=1)] = Field(
        description="what runs, in this order; each stage names its `algorithm:`"
    )
