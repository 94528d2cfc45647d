"""The crash test: kill runs anywhere, run the same command again, and compare with the run that was left alone.

    python tests/crash [--kills 200] [--seed N] [--parts stages,ddp,zero2,zero3,chain,damage,storage,signals]
    python tests/crash --sample                    the 20 kills of `make test`

Kills are uniform in time and, by injected faults, uniform over all calls that change a file: before, in the middle of
and after them. A run is judged by its weights and other published files, its metrics, the lines of its log and the rows
that every step saw (`judge.py`). A case whose fault did not fire is drawn again, and counts nothing.

Needs Linux and a C compiler (`cc`). The same seed draws the same faults; how long a step takes is the machine's.
"""

from __future__ import annotations

import argparse
import errno
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cases
import judge
import world
from world import Attempt, Fault, World

from alignment.pipeline import runs
from alignment.pipeline.seals import SEALED, checkpoints, seal_fault

PARTS = ("stages", "ddp", "zero2", "zero3", "chain", "damage", "storage", "signals")
SHARES = {"stages": 0.3, "ddp": 0.11, "zero2": 0.11, "zero3": 0.11, "chain": 0.37}  # of the kills
SAMPLE = ("sft-one", "dpo-lora-one", "ppo-one", "sft-ddp", "chain")
DAMAGED = (
    "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "exact-0-of-1.json",
    "config.json", SEALED,
)  # fmt: skip
STORAGE, ON_STORAGE = 50, ("sft-one", "dpo-lora-one", "ppo-one", "reward-one", "sft-zero2")
SIGNALS, ON_SIGNALS = 20, ("sft-one", "dpo-one", "ppo-lora-one", "kto-ddp", "sft-zero3")
PARENTS = ("base", "sft", "reward")


@dataclass
class Tally:
    """What was counted, and every case that went wrong, in words."""

    kills: int = 0
    resumed: int = 0
    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    parents: list[str] = field(default_factory=list)
    damage: list[bool] = field(default_factory=list)
    storage: list[bool] = field(default_factory=list)
    signals: list[bool] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """No case went wrong."""
        others = [*self.damage, *self.storage, *self.signals]
        return not (self.lost or self.different or self.parents or self.wrong) and all(others)


class Suite:
    """The cases of one seed."""

    def __init__(self, world: World, seed: int):
        self.world, self.seed, self.tally = world, seed, Tally()
        self.references: dict[str, Attempt] = {}
        self.say(f"seed {seed}")
        self.chain = self.reference("chain")
        self.parents = self.runs("chain") / "chain"
        self.weights = {name: self._weights(name) for name in PARENTS}

    def say(self, text: str) -> None:
        print(text, flush=True)

    def recipe(self, name: str) -> dict[str, Any]:
        rows = self.world.folder / "rows"
        return cases.chain(rows) if name == "chain" else cases.one(name, self.parents, rows)

    def runs(self, place: str) -> Path:
        return self.world.folder / place / "runs"

    def reference(self, name: str) -> Attempt:
        """The run of a recipe that is left alone."""
        if name not in self.references:
            self.references[name] = found = self.world.attempt(name, self.recipe(name))
            assert found.code == 0, f"{name} does not even run alone:\n{found.output[-3000:]}"
        return self.references[name]

    def drawn(self, name: str, random: random.Random, *, share: float = 1.0) -> Fault:
        """A kill: by time or around a call."""
        reference = self.reference(name)
        when: Any = random.choice(("time", "before", "middle", "after"))
        most = reference.seconds if when == "time" else reference.calls
        return Fault(when, random.uniform(0.02 if when == "time" else 1 / most, share) * most)

    def finish(self, name: str, place: str, story: list[str]) -> bool:
        """Run the same command again, to its end, and compare; whether all is as it must be."""
        last = self.world.attempt(place, self.recipe(name))
        what = f"{name}: {' | '.join(story)}"
        self.tally.resumed += 1
        if last.code != 0:
            self.tally.lost.append(f"{what}: ends with {last.code}: {last.output[-1500:]}")
            return False
        kind = name.split("-")[0]
        stages = list(self.recipe(name)["stages"])
        run = "chain" if kind == "chain" else "stage"
        found = judge.differences(self.runs(place) / run, self.runs(name) / run, stages)
        if found:
            self.tally.different.append(f"{what}: {'; '.join(found)}")
        broken = [parent for parent in PARENTS if self._weights(parent) != self.weights[parent]]
        if broken:
            self.tally.parents.append(f"{what}: {broken}")
        if not (found or broken):
            shutil.rmtree(self.world.folder / place)
        return not (found or broken)

    def _weights(self, parent: str) -> str:
        return str(runs.verify_parent(self.parents / parent, deep=True)["weights_sha256"])

    # --- kills ----------------------------------------------------------------------------------------------------

    def kill(self, name: str, number: int, *, most: int = 1) -> int:
        """One run that is killed up to `most` times and then left alone; how often it was killed."""
        random = world.seeded(self.seed, name, number)
        place = f"{name}.{number}"
        story: list[str] = []
        for _ in range(most):
            fault = self.drawn(name, random, share=1 / 3 if name == "chain" else 1.0)
            attempt = self.world.attempt(place, self.recipe(name), fault)
            if attempt.fired is None:
                if attempt.code != 0:
                    self.tally.lost.append(f"{name}: {story}: ends with {attempt.code}: {attempt.output[-1500:]}")
                break
            story.append(f"{fault} ({attempt.fired})")
        if story:
            good = self.finish(name, place, story)
            self.say(f"  {name} #{number}: {'; '.join(story)}: {'exact' if good else 'WRONG'}")
        else:
            shutil.rmtree(self.world.folder / place)
        self.tally.kills += len(story)
        return len(story)

    def kills(self, names: list[str], wanted: int, *, most: Callable[[int], int]) -> None:
        """Kill runs of `names` in turn until there were `wanted` kills."""
        done, number = 0, 0
        while done < wanted:
            done += self.kill(names[number % len(names)], number, most=most(number))
            number += 1

    # --- damage, storage, signals ------------------------------------------------------------------------------------

    def damage(self, name: str) -> None:
        """Every kind of damage to the newest of two checkpoints of an unfinished run."""
        place = f"{name}.damage"
        stage = self.runs(place) / "stage" / name.split("-")[0]
        for hundredth in range(60, 100, 2):
            shutil.rmtree(self.world.folder / place, ignore_errors=True)
            at = round(self.reference(name).calls * hundredth / 100)
            self.world.attempt(place, self.recipe(name), Fault("before", at))
            found = checkpoints(stage)
            if len(found) == 2 and not any(seal_fault(path) for path in found):
                break
        else:
            raise AssertionError("no state with two whole checkpoints")
        for file in DAMAGED:
            for kind in ("truncated", "zeroed", "flipped", "missing"):
                copy = f"{name}.{kind}"
                world.copied(self.world.folder / place, self.world.folder / copy)
                newest = checkpoints(self.runs(copy) / "stage" / name.split("-")[0])[0]
                _damage(newest / file, kind)
                assert seal_fault(newest) is not None, f"the damage ({file} {kind}) did no harm"
                self.tally.damage.append(self.finish(name, copy, [f"{newest.name}/{file} {kind}"]))

    def storage(self, name: str, number: int) -> None:
        """A disk that is full, or fails once, or turns read-only, from a random call on."""
        random = world.seeded(self.seed, "storage", name, number)
        when: Any
        when, error = (("on", errno.ENOSPC), ("on", errno.ENOSPC), ("once", errno.EIO), ("on", errno.EROFS))[number % 4]
        fault = Fault(when, random.randint(1, self.reference(name).calls), error=error)
        place = f"{name}.storage.{number}"
        attempt = self.world.attempt(place, self.recipe(name), fault)
        assert attempt.fired is not None, f"{fault} did not fire"
        allowed = (0, 4) if when == "once" else (4,)
        lines = [line for line in attempt.output.splitlines() if "the same command goes on" in line]
        fine = attempt.code in allowed and "Traceback" not in attempt.output
        if not fine:
            self.tally.wrong.append(f"{name}: {fault} ({attempt.fired}): code {attempt.code}: {attempt.output[-2500:]}")
        good = self.finish(name, place, [f"{fault} ({attempt.fired})"])
        self.tally.storage.append(fine and good)
        what = f"{fault} ({attempt.fired})"
        self.say(f"  {name}: {what}: code {attempt.code}, {'exact' if good else 'WRONG'}; {lines[:1]}")

    def signal(self, name: str, number: int) -> None:
        """SIGTERM, SIGINT or SIGUSR1 to `alignment run`: saved, left with 85, nothing published, goes on exactly."""
        random = world.seeded(self.seed, "signal", name, number)
        which = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[number % 3]
        for attempts in range(5):
            place = f"{name}.signal.{number}.{attempts}"
            at = random.uniform(0.2, 0.9) * self.reference(name).seconds
            attempt = self.world.attempt(place, self.recipe(name), Fault("time", at, signal=which))
            stage = self.runs(place) / "stage" / name.split("-")[0]
            began = (stage / runs.STATUS).exists()
            if attempt.fired and began and attempt.code != 0:
                break
        published = (stage / runs.MANIFEST).exists()
        fine = attempt.code == 85 and not published
        what = f"{which.name} after {at:.2f} s"
        if not fine:
            self.tally.wrong.append(f"{name}: {what}: code {attempt.code}: {attempt.output[-1500:]}")
        good = self.finish(name, place, [what])
        self.tally.signals.append(fine and good)
        self.say(f"  {name}: {what}: code {attempt.code}, {'exact' if good else 'WRONG'}")


def _damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
        return
    if kind == "truncated":
        content = content[: len(content) // 2]
    elif kind == "zeroed":
        content = bytearray(len(content))
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


def play(suite: Suite, parts: list[str], kills: int, *, sample: bool) -> None:
    """Run the parts of the suite."""
    if sample:
        suite.kills(list(SAMPLE), kills, most=lambda number: 4)
        return
    for part in parts:
        suite.say(f"{part}:")
        wanted = round(kills * SHARES.get(part, 0))
        if part == "stages":
            suite.kills(cases.names(("one",)), wanted, most=lambda number: 1 + number % 3)
        elif part in cases.LAUNCHES:
            suite.kills(cases.names((part,)), wanted, most=lambda number: 3)
        elif part == "chain":
            suite.kills(["chain"], wanted, most=lambda number: 8)
        elif part == "damage":
            suite.damage("sft-one")
        elif part == "storage":
            for number in range(STORAGE):
                suite.storage(ON_STORAGE[number % len(ON_STORAGE)], number)
        elif part == "signals":
            for number in range(SIGNALS):
                suite.signal(ON_SIGNALS[number % len(ON_SIGNALS)], number)


def report(tally: Tally, seed: int, seconds: float) -> None:
    """The result, for a person, and one line of JSON for a test."""
    for title, found in (("lost", tally.lost), ("different", tally.different), ("damaged parents", tally.parents),
                         ("wrong", tally.wrong)):  # fmt: skip
        for line in found:
            print(f"{title}: {line}")
    print(
        f"{tally.kills} kills, {tally.resumed} runs resumed: {len(tally.lost)} lost, {len(tally.different)} different, "
        f"{len(tally.parents)} damaged parents; damage {sum(tally.damage)} of {len(tally.damage)}, storage "
        f"{sum(tally.storage)} of {len(tally.storage)}, signals {sum(tally.signals)} of {len(tally.signals)}; "
        f"seed {seed}, {seconds:.0f} s"
    )
    numbers = {"kills": tally.kills, "resumed": tally.resumed, "lost": len(tally.lost),
               "different": len(tally.different), "parents": len(tally.parents), "wrong": len(tally.wrong)}  # fmt: skip
    print(json.dumps(numbers))


def main() -> int:
    """Parse, run, print; 0 if nothing went wrong."""
    parser = argparse.ArgumentParser(prog="crash", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, help="how many (default: 200; of the sample 20)")
    parser.add_argument("--seed", type=int, help="draws the same faults again (default: a new one, printed)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--sample", action="store_true", help="the small one of `make test`")
    parser.add_argument("--plant", choices=world.PLANTS, default="", help="a fault in resuming, to see it found")
    parser.add_argument("--folder", type=Path, help="where runs lie; those that went wrong are kept (default: removed)")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts {unknown[0]}: there are {', '.join(PARTS)}")
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="crash-test-"))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    suite = Suite(World(folder, plant=arguments.plant), seed)
    play(suite, parts, arguments.kills or (20 if arguments.sample else 200), sample=arguments.sample)
    report(suite.tally, seed, time.monotonic() - started)
    if arguments.folder is None and suite.tally.good:
        shutil.rmtree(folder)
    return 0 if suite.tally.good else 1


if __name__ == "__main__":
    sys.exit(main())
