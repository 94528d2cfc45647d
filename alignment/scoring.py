"""`alignment data score`: the loss that a model has on each row that it would be trained on.

The rows are those of a stage, tokenized as the stage does it; they are written in TRL's conversational schema with a
column `loss`, so that OUT can be the source of the stage and `data.prune` can keep the share that teaches most:

    messages, unpaired, text    the mean cross entropy of the trained tokens
    preference                  -log sigmoid(a - b), where a and b are the mean log-probabilities of the tokens of the
                                chosen and of the rejected answer; also `loss_chosen` = -a, `loss_rejected` = -b

A pair's loss is SimPO's without its margin and with beta 1 (Meng et al. 2024, arXiv:2405.14734): small where the model
already prefers the chosen answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.errors import ChainError, DataError, RecipeError, StorageError
from alignment.inspecting import CACHE, Tokenizers, trained_stages
from alignment.recipe.algorithms import ALGORITHMS
from alignment.recipe.load import load_recipe, max_length, resolve
from alignment.recipe.schema import Recipe, Resolved

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 8  # rows of a forward pass
IGNORED = -100
Say = Callable[[str], None]
Sequences = list[tuple[list[int], list[int]]]  # ids and labels, not shifted


def score(
    recipe_path: Path, out: Path, *, overrides: Sequence[str], stage: str, model: str | None, run: str | None,
    runs: Path, say: Say,
) -> int:  # fmt: skip
    """Write the rows of a stage with their loss; returns how many.

    Raises:
        UserError: rows, tokenizer or model cannot be had, the rows are packed documents or prompts, OUT exists.
    """
    import torch

    from alignment.data import convert
    from alignment.data.loading import Loading, load_splits
    from alignment.data.prepare import prepare
    from alignment.models.load import load_policy

    convert.refuse(out)
    recipe = load_recipe(recipe_path, list(overrides))
    trained_stages(recipe, [stage])
    resolved = resolve(recipe, stage)
    schema = ALGORITHMS[resolved.algorithm].schema
    if schema not in ("messages", "preference", "unpaired"):
        raise RecipeError(f"stage {stage}: {schema} rows have no answers of their own to score")
    data = resolved.data
    assert data is not None
    data = data.model_copy(update={"prune": None, "eval": [], "eval_fraction": None})
    resolved = resolved.model_copy(update={"data": data})
    tokenizer = Tokenizers(recipe).of(stage)
    splits = load_splits(data, Loading(schema, resolved.seed, data.strict, data.limits, say, data))
    table = prepare(
        resolved, schema, tokenizer, max_length=max_length(resolved), cache=runs / CACHE, say=say, splits=splits
    ).train
    folder = model or _start(recipe, resolved, stage, runs / (run or recipe.name))
    policy, _ = load_policy(folder, revision=resolved.model.revision if resolved.model and not model else None)
    if policy.get_input_embeddings().weight.shape[0] < len(tokenizer):
        raise DataError(f"{folder}: has no embedding for every token of the stage's template; score with a later model")
    policy = policy.to("cuda" if torch.cuda.is_available() else "cpu")
    rows, written = splits["train"][0], 0
    try:
        with convert.writer(out) as stream:
            for batch in table.iter(BATCH):
                entries = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
                for entry, columns in zip(entries, _losses(policy, entries), strict=True):
                    line = json.dumps({**rows[entry["row"]].row, **columns}, ensure_ascii=False, default=str)
                    stream.write(line.encode() + b"\n")
                    written += 1
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error.strerror or error}") from None
    say(f"{out}: {written:,} rows with the loss of {folder}")
    return written


def _start(recipe: Recipe, stage: Resolved, name: str, run: Path) -> str:
    """The folder or hub name of what a stage starts from."""
    model = stage.model
    if model is None or model.init is not None:
        raise RecipeError(f"stage {name} starts from random weights, whose loss says nothing; give --model")
    if model.stage is None:
        assert model.path is not None
        return str(Path(model.path).expanduser()) if Path(model.path).expanduser().exists() else model.path
    if not (run / model.stage / "manifest.json").is_file():
        raise ChainError(f"{run / model.stage}: not finished; run it first (alignment run), or give --model")
    return str(run / model.stage)


def _sequences(entry: Mapping[str, Any]) -> dict[str, tuple[list[int], list[int]]]:
    """Ids and labels of each sequence of a row of the table, by the column that its loss goes into."""
    if "labels" in entry:
        return {"loss": (entry["input_ids"], entry["labels"])}
    prompt = entry["prompt_ids"]
    named = {"chosen_ids": "loss_chosen", "rejected_ids": "loss_rejected", "completion_ids": "loss"}
    return {
        column: (prompt + entry[name], [IGNORED] * len(prompt) + entry[name])
        for name, column in named.items()
        if name in entry
    }


def _losses(model: PreTrainedModel, entries: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, float]]:
    """The columns of each row of a batch."""
    named = [_sequences(entry) for entry in entries]
    means = iter(mean_loss(model, [pair for row in named for pair in row.values()]))
    for row in named:
        columns = {column: next(means) for column in row}
        if "loss_chosen" in columns:
            margin = columns["loss_rejected"] - columns["loss_chosen"]  # of mean log-probabilities, chosen - rejected
            columns["loss"] = math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0)
        yield columns


def mean_loss(model: PreTrainedModel, sequences: Sequences) -> list[float]:
    """The mean cross entropy of the labelled tokens of each sequence; the first token is never predicted."""
    import torch

    longest = max(len(ids) for ids, _ in sequences)
    shape = (len(sequences), longest)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    mask = torch.zeros(shape, dtype=torch.long)
    for index, (tokens, wanted) in enumerate(sequences):  # padded on the right
        ids[index, : len(tokens)] = torch.tensor(tokens)
        labels[index, : len(wanted)] = torch.tensor(wanted)
        mask[index, : len(tokens)] = 1
    ids, labels, mask = (one.to(model.device) for one in (ids, labels, mask))
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()  # (B, S - 1, V)
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
        )  # (B, S - 1), 0 where nothing is labelled
    counts = (labels[:, 1:] != IGNORED).sum(1)
    return [float(value) for value in losses.double().sum(1) / counts]
