"""Whether a run that was killed and resumed ended as the one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignment.pipeline import runs
from alignment.pipeline.seals import checkpoints, seal_fault


def differences(run: Path, reference: Path, stages: list[str]) -> list[str]:
    """What is not as in the reference run, one line each; `run` and `reference` are folders of runs of one recipe."""
    found = []
    for stage in stages:
        try:
            found += [f"{stage}: {line}" for line in _stage(run / stage, reference / stage)]
        except Exception as error:  # a lost run must be a line of the report and not the end of it
            found.append(f"{stage}: {type(error).__name__}: {error}")
    return found


def _stage(ours: Path, theirs: Path) -> list[str]:
    mine, other = (runs.verify_parent(folder, deep=True) for folder in (ours, theirs))
    found = []
    for name in sorted(mine["files"].keys() | other["files"].keys()):
        hashes = [manifest["files"].get(name, {}).get("sha256") for manifest in (mine, other)]
        if hashes[0] != hashes[1]:
            found.append(f"{name} differs")
    if mine["metrics"] != other["metrics"]:
        found.append(f"metrics differ: {mine['metrics']} {other['metrics']}")
    found += _logs(ours / "log.jsonl", theirs / "log.jsonl")
    found += [f"{path.name}: {fault}" for path in checkpoints(ours) if (fault := seal_fault(path)) is not None]
    if len(checkpoints(ours)) != len(checkpoints(theirs)):
        found.append(f"checkpoints {[path.name for path in checkpoints(ours)]}")
    litter = [path.name for path in ours.iterdir() if path.name.endswith(".tmp") or path.name == ".publishing"]
    found += [f"left behind: {name}" for name in litter]
    found += _samples(ours.parents[2], theirs.parents[2], ours.name)
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _logs(ours: Path, theirs: Path) -> list[str]:
    plain = [[{k: v for k, v in line.items() if k != "time"} for line in _lines(path)] for path in (ours, theirs)]
    if plain[0] == plain[1]:
        return []
    for mine, other in zip(*plain, strict=False):
        if mine != other:
            keys = sorted(key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key))
            shown = "; ".join(f"{key} {mine.get(key)} for {other.get(key)}" for key in keys[:4])
            return [f"log.jsonl: step {other['step']}: {shown}"]
    return [f"log.jsonl: {len(plain[0])} lines for {len(plain[1])}"]


def _samples(ours: Path, theirs: Path, stage: str) -> list[str]:
    """Every step saw the same rows, however often it was made."""
    found = []
    for path in sorted(theirs.glob(f"samples-{stage}-*.jsonl")):
        wanted = {line["step"]: line["rows"] for line in _lines(path)}
        seen = _lines(ours / path.name)
        found += [f"step {line['step']} saw other rows" for line in seen if line["rows"] != wanted.get(line["step"])]
        missing = wanted.keys() - {line["step"] for line in seen}
        found += [f"steps {sorted(missing)} saw no rows"] if missing else []
    return found
