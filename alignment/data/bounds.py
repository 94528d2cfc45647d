"""A chat template is a program: it is tried in a process of its own, with bounds on time and memory, before it is used.

Jinja's sandbox keeps a template from files and from Python's internals. It does not keep it from looping for hours or
from filling the memory, so a template that is not one of ours renders a fixed conversation under limits first. What
passes may still do otherwise on other contents: the hash of the template stands in every manifest.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache

from alignment.errors import ModelError

SECONDS = 5  # of processor time, for all conversations of the trial together
WALL = 300  # seconds by the clock, on a machine that has no time for it
MEMORY = 512 * 2**20  # bytes beyond what the libraries take
TEXT = 10_000_000  # characters of a rendered conversation
SOURCE = 1_000_000  # characters of a template
ROLES = (["user"], ["user", "assistant"], ["system", "user", "assistant"],
         ["user", "assistant", "user", "assistant", "user"])  # fmt: skip
# Last, a long one: work that grows with the square of a text shows on no short one.
LONG = 20_000  # characters of each message
FEW, MANY = "a conversation of a few words", f"messages of {LONG:,} characters"


def require_bounded(jinja: str, special: Mapping[str, str], name: str) -> None:
    """Try a template on fixed conversations under limits; a template is tried once in each process.

    Args:
        special: the special tokens it may write, by name.
        name: what the message calls it: the folder or file it comes from.

    Raises:
        ModelError: it is too large, runs too long, takes too much memory, or writes too much.
    """
    if len(jinja) > SOURCE:
        raise ModelError(f"{name}: a chat template of {len(jinja):,} characters; more than {SOURCE:,} is refused")
    reason = _trial(jinja, tuple(sorted(special.items())), SECONDS)
    if reason:
        raise ModelError(f"{name}: its chat template {reason}; it is not used: set another `chat_template:`")


@lru_cache(maxsize=64)
def _trial(jinja: str, special: tuple[tuple[str, str], ...], seconds: int) -> str:
    """Why a template must not be used; empty where it kept its bounds (also by refusing the conversations)."""
    question = json.dumps({"jinja": jinja, "special": dict(special), "seconds": seconds})
    command = [sys.executable, "-m", "alignment.data.bounds"]
    try:
        done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=WALL, check=False)
    except subprocess.TimeoutExpired:
        return f"did not end within {WALL} s"
    *before, said = [line for line in done.stdout.splitlines() if line.strip()] or [""]
    if done.returncode == 0 and said == "ok":
        return ""
    if done.returncode < 0 or done.returncode == 137:
        where = MANY if said == MANY or MANY in before else FEW
        return f"took more than {seconds} s of processor time on {where}"
    return said if done.returncode == 3 else f"could not be tried ({done.stderr.strip().rpartition(chr(10))[2][:200]})"


def main() -> int:
    """The trial itself: 0 and `ok`, or 3 and a reason, or killed by its limits."""
    from transformers.utils.chat_template_utils import render_jinja_template

    question = json.loads(sys.stdin.read())
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (spent + question["seconds"], spent + question["seconds"]))
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    talks = [[(role, f"What is {number} + {number}?") for number, role in enumerate(roles)] for roles in ROLES]
    for pairs in [*talks, [(role, ("What is 2 + 2? " * LONG)[:LONG]) for role in ("user", "assistant")]]:
        talk = [{"role": role, "content": content} for role, content in pairs]
        where = FEW if len(talk[0]["content"]) < LONG else MANY
        if where == MANY:
            print(MANY, flush=True)  # for whoever finds this process killed
        try:
            texts, _ = render_jinja_template(
                conversations=[talk], chat_template=question["jinja"], add_generation_prompt=True, **question["special"]
            )
        except (MemoryError, OverflowError):
            print(f"took more than {MEMORY // 2**20} MB on {where}")
            return 3
        except RecursionError:
            print("is nested too deeply")
            return 3
        except Exception:  # a template may refuse a conversation in any way; the rows will tell
            continue
        if len(texts[0]) > TEXT:
            print(f"wrote {len(texts[0]):,} characters for {where}")
            return 3
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
