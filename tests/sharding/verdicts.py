"""From what was measured to what may be said: each action of a combination is proven, refused, or not what it must be.

The limits stand here once; the table in `recipes/sharding.md` is made of the verdicts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cells
from cells import ROOT, Cell

RESULTS = ROOT / "ds_configs" / "matrix.json"
PAGE = ROOT / "recipes" / "sharding.md"
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
PARITY = 1e-5  # of loss and gradient norm at each of 10 steps, relative above 1
OFFLOADED = 1e-4  # the same under offload, whose Adam is DeepSpeed's own, in another order of rounding
SAVED = 1e-4  # of a published weight after 10 steps: Adam's first steps enlarge the last digit of a gradient
RESUMED = 1e-6  # of a published weight, against the uninterrupted run
# In bfloat16, where the engine rounds weights that one process leaves in float32: that it is the same training.
ROUNDED = {"parity": 5e-2, "saved": 2e-2, "exported": 5e-3}
STAGE = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def faults(cell: Cell, result: dict[str, Any], action: str) -> list[str]:
    """What is not as it must be; empty: proven. An action that was refused with a reason is not asked about."""
    if "error" in result or action not in result:
        return [str(result.get("error", "not run"))]
    found = result[action]
    half = cell.compute != "float32"
    if found.get("code", 0) != 0:
        return [f"exit code {found['code']}: {found.get('said', '')}"]
    if action == "train":
        # PPO's critic is nearly fitted after these steps: its gradient is then small beside what bfloat16 rounds.
        compared = ("loss",) if half and cell.algorithm == "ppo" else ("loss", "grad_norm")
        limit = ROUNDED["parity"] if half else OFFLOADED if cell.sharding.endswith("offload") else PARITY
        apart = [f"{key} differs by {found[key]:.2g}" for key in compared if not found[key] <= limit]
        return [*apart, *(line for rank in found["ranks"] for line in _shares(cell, rank, len(found["ranks"])))]
    if action == "accumulate":
        most = max(found["loss"], found["grad_norm"])
        if cell.algorithm == "kto":  # marked `batch_dependent`: a cut that changed nothing would be a fault
            return [] if most > 1e-3 else [f"kto does not depend on its forward pass: {most:.2g}"]
        return [] if most <= PARITY else [f"8 passes of a row differ from one of 8 by {most:.2g}"]
    if action == "export":
        near = found["weights"] <= (ROUNDED["exported"] if half else RESUMED)
        return [] if near else [f"the shares differ from the saved model by {found['weights']:.2g}"]
    if action == "save":
        lost = [] if any(name.endswith(".safetensors") for name in found["files"]) else ["no weights were published"]
        limit = ROUNDED["saved"] if half else SAVED
        return [*lost, *([] if found["weights"] <= limit else [f"weights differ by {found['weights']:.2g}"])]
    lines = [] if found["resumed"] else ["it began anew"]
    limit = RESUMED if action == "resume" else SAVED
    lines += [] if found["weights"] <= limit else [f"weights differ by {found['weights']:.2g}"]
    return lines + ([] if found["loss"] <= PARITY else [f"loss differs by {found['loss']:.2g}"])


def must_refuse(cell: Cell) -> tuple[str, ...]:
    """The actions of a combination that are refused, each for a reason that stands on the page."""
    return () if cell.sharding == "none" and cell.algorithm != "kto" else ("other_ranks",)


def asked(cell: Cell) -> tuple[str, ...]:
    """The actions that are measured on a combination: those of the table, and one more."""
    return (*cells.ACTIONS, "accumulate" if cell.sharding == "none" else "export")


def _shares(cell: Cell, rank: dict[str, Any], ranks: int) -> list[str]:
    """Whether a rank has the engine and holds the share of the bytes that the file promises."""
    stage = STAGE[cell.sharding]
    lines = []
    if ranks != 2 or rank["stage"] != stage or rank["distributed"] != ("DEEPSPEED" if stage else "MULTI_CPU"):
        lines.append(f"{ranks} ranks, {rank['distributed']}, stage {rank['stage']}")
    # Adam keeps two float32 numbers per trained weight; shares are rounded up.
    share = 8 * rank["trained"] / (ranks if stage else 1)
    if not share <= rank["states"] <= 1.02 * share + 64:
        lines.append(f"{rank['states']} bytes of optimizer states, a share is {share:.0f}")
    # Norms and other vectors stay whole under ZeRO-3, and so do small matrices: those of adapters on a tiny model.
    small = rank.get("weights_small", 0) if stage == 3 else 0
    held = (rank["weights"] - small) / (rank["weights_whole"] - small)
    if (held > 0.65) if stage == 3 else (held != 1):
        lines.append(f"{held:.0%} of the weights")
    if rank["reference"] is not None:
        held = rank["reference"] / rank["reference_whole"]
        if (held > 0.65) if stage == 3 else (held != 1):
            lines.append(f"{held:.0%} of the reference's weights")
    return lines


def verdict(cell: Cell, result: dict[str, Any], action: str) -> str:
    """`proven`, `refused`, `unknown` (not measured yet) or `wrong`."""
    if not result:
        return "unknown"
    if "refused" in result.get(action, {}):
        return "refused"
    return "wrong" if faults(cell, result, action) else "proven"


def table(results: dict[str, Any]) -> str:
    """The matrix as Markdown, and the largest differences that were seen."""
    marks = {"proven": "yes", "refused": "refused", "wrong": "**no**", "unknown": "?"}
    heads = {"none": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "zero3_offload": "ZeRO-3 offload"}
    lines = [
        "| | | " + " | ".join(heads.values()) + " |", "|---|---|" + "---|" * len(heads)
    ]  # fmt: skip
    for algorithm in cells.ALGORITHMS:
        for tuning in cells.TUNINGS:
            row = []
            for sharding in cells.SHARDINGS:
                cell = Cell(algorithm, tuning, sharding)
                row.append(
                    " / ".join(marks[verdict(cell, results.get(cell.name, {}), action)] for action in cells.ACTIONS)
                )
            lines.append(f"| {algorithm} | {tuning} | " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *_extremes(results)])


def _extremes(results: dict[str, Any]) -> list[str]:
    named = [(cell, results[cell.name]) for cell in cells.all_cells() if cell.name in results]
    proven = [found for cell, found in named if verdict(cell, found, "train") == "proven"]
    resumed = [found for cell, found in named if verdict(cell, found, "resume") == "proven"]
    exact = sum(found["resume"]["weights"] == 0 for found in resumed)
    sharded = [rank for found in proven for rank in found["train"]["ranks"] if rank["stage"] == 3]
    held = [rank["weights"] / rank["weights_whole"] for rank in sharded] or [1.0]
    loss, norm = (max(found["train"][key] for found in proven) for key in ("loss", "grad_norm"))
    return [
        f"Largest difference to one process over 10 steps: loss {loss:.1e}, gradient norm {norm:.1e}. Of "
        f"{len(resumed)} resumed trainings {exact} ended with the same bits, the others (offload) within "
        f"{max((found['resume']['weights'] for found in resumed), default=0):.1e}. Under ZeRO-3 a rank of two held "
        f"{min(held):.0%} to {max(held):.0%} of the weights.",
        "", _in_bfloat16(results),
    ]  # fmt: skip


def _in_bfloat16(results: dict[str, Any]) -> str:
    asked_of = [cell for cell in cells.more_cells() if cell.compute == "bfloat16"]
    proven = [
        results[cell.name] for cell in asked_of
        if all(verdict(cell, results.get(cell.name, {}), action) in ("proven", "refused") for action in asked(cell))
    ]  # fmt: skip
    loss = max((found["train"]["loss"] for found in proven), default=0)
    return (
        f"In bfloat16, under ZeRO-2 and ZeRO-3: {len(proven)} of {len(asked_of)} combinations, among them embeddings "
        f"that grow, train, save and resume; loss within {loss:.1e} of one process, "
        f"{sum(found['resume']['weights'] == 0 for found in proven)} resumed to the same bits."
    )


def read() -> dict[str, Any]:
    """The recorded results."""
    content: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return content


def written_into(page: str, results: dict[str, Any]) -> str:
    """The page with the table between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table(results['cells'])}\n{END}{rest.split(END)[1]}"


def record(found: dict[str, Any], versions: dict[str, str]) -> None:
    """Write results over the recorded ones of the same combinations, and the page's table from all."""
    known = read()["cells"] if RESULTS.exists() else {}
    content = {"versions": versions, "cells": dict(sorted({**known, **found}.items()))}
    RESULTS.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    Path(PAGE).write_text(written_into(PAGE.read_text(encoding="utf-8"), content), encoding="utf-8")
