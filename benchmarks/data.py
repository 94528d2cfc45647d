"""How fast pairs are checked, tokenized and converted, and in how much memory, beside TRL's own preparation of the same
rows, in one run.

    python benchmarks/data.py [--rows 100000] [--threads 2]
    python benchmarks/data.py --rows 10000000 --short --only convert

The rows are made up: transcripts of one to four turns whose lengths are those of HH-RLHF (medians of about 90 words of
prompt and 35 of answer), of words that are as unevenly frequent as real ones; with `--short` one question of about 6
words and answers of 6, so that many rows fit on a disk. Each side runs in a process of its own:

    prepare        alignment data prepare: read, check, convert, hold against `data.limits`, tokenize, write the table
    again          the same once more, from the cache
    check          alignment data check with every check, from nothing
    convert        alignment data convert to JSON Lines
    trl            DPOTrainer's `_prepare_dataset` (one process, as ours), on the conversations as a data set; reading
                   and converting the transcripts is not counted

and prints seconds, rows per second, processor seconds of all threads, and the largest resident memory: all of it, and
without the pages of files that are mapped, which the system takes back when it needs them (looked at every tenth of a
second). On a busy machine only the processor seconds and the memory can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 30_000
SIDES = ("prepare", "again", "check", "convert", "trl")
MAX_LENGTH = 1024


def generate(path: Path, count: int, seed: int = 0, *, short: bool = False) -> None:
    """Write made-up transcripts of pairs."""
    draw = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(draw.choices(letters, weights=range(26, 0, -1), k=draw.randint(2, 9))) for _ in range(VOCABULARY)]
    cumulative, total = [], 0.0
    for rank in range(VOCABULARY):
        total += 1 / (rank + 10)
        cumulative.append(total)

    def text(median: float) -> str:
        said = draw.choices(words, cum_weights=cumulative, k=max(1, round(draw.lognormvariate(0, 0.8) * median)))
        return " ".join(said).capitalize() + "."

    asked, said, many = (6, 6, (1,)) if short else (20, 35, (1, 1, 2, 2, 3, 4))
    with path.open("w") as file:
        for _ in range(count):
            turns = draw.choice(many)
            prompt = "".join(
                f"\n\nHuman: {text(asked)}" + (f"\n\nAssistant: {text(said)}" if turn < turns - 1 else "")
                for turn in range(turns)
            )
            row = {name: f"{prompt}\n\nAssistant: {text(said)}" for name in ("chosen", "rejected")}
            file.write(json.dumps(row) + "\n")


def tokenizer(folder: Path, rows: Path) -> None:
    """A byte-level BPE tokenizer with the ChatML template, trained on some of the rows."""
    from alignment.data import templates
    from alignment.models.tokenizer import fit, train_tokenizer

    with rows.open() as file:
        texts = [json.loads(line)["chosen"] for _, line in zip(range(5000), file, strict=False)]
    trained = train_tokenizer(texts, 16_000, templates.template("chatml").special_tokens)
    fit(trained, "chatml", conversational=True)
    trained.save_pretrained(folder)


# --- one side --------------------------------------------------------------------------------------------------------


def memory(field: str) -> float:
    """A line of /proc/self/status in MiB: VmHWM, the most that was resident; RssAnon, what is resident and no file."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) / 1024


class Anonymous(threading.Thread):
    """Looks every tenth of a second at how much memory is no mapped file."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._over = 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.1):
            self.most = max(self.most, memory("RssAnon"))

    def peak(self) -> float:
        """Stop, and say what was the most."""
        self._over.set()
        self.join()
        return self.most


def converted(folder: Path) -> dict[str, Any]:
    """Time a conversion; imports are not counted."""
    from alignment.data.convert import convert
    from alignment.recipe.schema import Source

    out = folder / "converted.jsonl"
    start, processor = time.perf_counter(), time.process_time()
    source = Source(path=str(folder / "rows.jsonl"))
    summary = convert(source, out, schema=None, strict=False, say=lambda text: None)
    found = {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor}
    out.unlink()
    return {**found, "kept": summary["rows"]["kept"]}


def ours(side: str, folder: Path) -> dict[str, Any]:
    """Time our side; imports and the tokenizer are not counted."""
    from alignment.data.prepare import prepare
    from alignment.data.report import Subject, examine
    from alignment.models.tokenizer import load_tokenizer
    from alignment.recipe.schema import Source, Stage

    loaded = load_tokenizer(folder / "tokenizer")
    source = Source(path=str(folder / "rows.jsonl"))
    data: dict[str, Any] = {"train": [source.model_dump()], "limits": {"dropped": 1.0}}
    stage = Stage.model_validate({"algorithm": "dpo", "seed": 1, "data": data})
    cache = folder / ("checked" if side == "check" else "cache")
    found: dict[str, Any] = {}
    start, processor = time.perf_counter(), time.process_time()
    if side == "check":
        data["eval_fraction"] = 0.01
        stage = Stage.model_validate({"algorithm": "dpo", "seed": 1, "data": data})
        subject = Subject(
            "dpo", "preference", stage, against=[Source(path=str(folder / "exam.jsonl"))], tokenizer=loaded,
            max_length=MAX_LENGTH,
        )  # fmt: skip
        report = examine(subject, cache=cache, say=lambda text: None)
        found["findings"] = [finding["check"] for finding in report["findings"]]
    else:
        made = prepare(
            stage, "preference", loaded, max_length=MAX_LENGTH, cache=cache, say=lambda text: None
        )  # fmt: skip
        found["kept"] = len(made.train)
    found["seconds"], found["processor"] = time.perf_counter() - start, time.process_time() - processor
    return found


def trl(folder: Path) -> dict[str, Any]:
    """Time TRL's preparation of the same conversations, as its trainer calls it."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    from alignment.data.prepare import load_rows
    from alignment.models.tokenizer import load_tokenizer
    from alignment.recipe.schema import DataLimits, Source

    datasets.disable_caching()
    loaded = load_tokenizer(folder / "tokenizer")
    rows = load_rows(
        [Source(path=str(folder / "rows.jsonl"))], "preference", seed=1, strict=False, limits=DataLimits(dropped=1.0),
        say=lambda text: None,
    )  # fmt: skip
    table = datasets.Dataset.from_list(rows)
    small = LlamaConfig(
        vocab_size=len(loaded), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    arguments = DPOConfig(
        output_dir=str(folder / "trl"), max_length=MAX_LENGTH, report_to="none", use_cpu=True, bf16=False,
        disable_tqdm=True,
    )  # fmt: skip
    found: dict[str, Any] = {}
    original = DPOTrainer._prepare_dataset

    def timed(*given: Any, **named: Any) -> Any:
        start, processor = time.perf_counter(), time.process_time()
        prepared = original(*given, **named)
        found["seconds"], found["processor"] = time.perf_counter() - start, time.process_time() - processor
        found["kept"] = len(prepared)
        return prepared

    DPOTrainer._prepare_dataset = timed
    policy, reference = LlamaForCausalLM(small), LlamaForCausalLM(small)
    DPOTrainer(policy, reference, args=arguments, train_dataset=table, processing_class=loaded)
    return found


def main() -> None:
    """Make the rows, run each side in a process of its own, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--short", action="store_true", help="rows of a few words")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="keep rows and tokenizer here, and take those that are there")
    parser.add_argument("--only", nargs="+", choices=SIDES, default=SIDES, help="sides to run (default: all)")
    given = parser.parse_args()
    if given.side:
        watched = Anonymous()
        other = {"trl": trl, "convert": converted}
        found = other[given.side](given.folder) if given.side in other else ours(given.side, given.folder)
        print(json.dumps({**found, "memory_mib": memory("VmHWM"), "anonymous_mib": watched.peak()}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = given.folder or Path(name)
        if not (folder / "tokenizer").exists():
            folder.mkdir(exist_ok=True)
            generate(folder / "rows.jsonl", given.rows, short=given.short)
            generate(folder / "exam.jsonl", min(1000, given.rows), seed=1, short=given.short)
            tokenizer(folder / "tokenizer", folder / "rows.jsonl")
        print(f"{given.rows:,} pairs, {(folder / 'rows.jsonl').stat().st_size / 2**20:.0f} MiB\n")
        print("| side | seconds | rows per second | processor seconds | memory | without mapped files |")
        print("|---|---|---|---|---|---|", flush=True)
        for side in given.only:
            found = _run(side, folder, given.threads)
            seconds, processor = found["seconds"], found["processor"]
            most, own = found["memory_mib"], found["anonymous_mib"]
            rate = f"{given.rows / seconds:,.0f}"
            line = f"| {side} | {seconds:.1f} | {rate} | {processor:.1f} | {most:,.0f} MiB | {own:,.0f} MiB |"
            print(line, flush=True)
            if "findings" in found:
                print(f"  {side}: findings: {found['findings']}", file=sys.stderr)


def _run(side: str, folder: Path, threads: int) -> dict[str, Any]:
    variables = os.environ | {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
