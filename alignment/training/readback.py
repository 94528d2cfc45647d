"""Reading a saved model back in a process that knows nothing of the one that wrote it.

    readback.start()                              # imports while the weights are being written
    found = readback.read(folder, scorer=False)   # what the folder holds, from the disk alone

The process is started once and kept: it imports, then forks for each model that it is to load, so that a model leaves
nothing behind. It sees no GPU and nothing of the launch, so nothing is sharded, and it waits for no other rank.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from alignment.errors import ExitCode, ModelError, NonFiniteError, UserError

if TYPE_CHECKING:
    from alignment.recipe.schema import Quantization

LOGITS = ".logits.npy"  # of the probe, beside the folder that was read
OF_THE_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR",
                 "MASTER_PORT")  # fmt: skip
FAMILIES = ("ACCELERATE_", "TORCHELASTIC_", "ROLE_", "GROUP_", "FSDP_")
PR_SET_PDEATHSIG = 1


# --- the process that asks ----------------------------------------------------------------------------------------


class Reader:
    """The other process, and the pipes to it."""

    def __init__(self) -> None:
        theirs, ours = os.pipe()  # questions
        answers, back = os.pipe()
        command = [sys.executable, "-m", "alignment.training.readback", str(theirs), str(back)]
        self.process = subprocess.Popen(
            command, pass_fds=(theirs, back), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment()
        )
        os.close(theirs)
        os.close(back)
        self.questions: TextIO = os.fdopen(ours, "w", encoding="utf-8")
        self.answers: TextIO = os.fdopen(answers, encoding="utf-8")

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """One question, one answer. Raises UserError when the process is gone."""
        try:
            self.questions.write(json.dumps(question) + "\n")
            self.questions.flush()
            answer = self.answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise UserError(f"the process that reads the saved model back ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        """Let it end: it leaves when there is nobody to ask."""
        with suppress(OSError):
            self.questions.close()
        self.answers.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)


_readers: list[Reader] = []  # one, or none yet; kept from stage to stage where several run in one process


def environment(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Our environment without the launch and without GPUs."""
    kept = {key: value for key, value in env.items() if key not in OF_THE_LAUNCH and not key.startswith(FAMILIES)}
    return kept | {"CUDA_VISIBLE_DEVICES": ""}


def start() -> Reader:
    """Start the other process, if it does not run yet, and go on at once."""
    if _readers and _readers[0].process.poll() is not None:
        _readers.pop().close()
    if not _readers:
        _readers.append(Reader())
        atexit.register(stop)
    return _readers[0]


def stop() -> None:
    """End the other process."""
    while _readers:
        _readers.pop().close()


def read(
    folder: Path, *, scorer: bool, attention: str, remembered: Path | None = None, tolerance: float = 0.0,
    frozen: bool = True, quantization: Quantization | None = None, compute: str = "bfloat16",
) -> dict[str, Any]:  # fmt: skip
    """What the other process finds in a model folder.

    Args:
        remembered: what `remembered.Trained.save` wrote of the model in memory.
        tolerance: of its norms, and of its numbers relative to the largest one of a tensor.
        frozen: whether weights that were not trained are compared; those of a quantized base are made anew.
        quantization, compute: how the base is quantized again, and the dtype that it is multiplied in.

    Returns:
        `probe_ids`, `stop_ids`, `template` (hash or None), `generation_eos`, `process`, and `logits`, a float32 array:
        (1, S, V), or (1, 1) of a scorer; `differences`, lines on what is not as `remembered`.

    Raises:
        ModelError: it cannot be loaded.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    import numpy as np

    attention = "sdpa" if attention.startswith("flash") else attention  # there is no GPU there
    logits = folder.with_name(folder.name + LOGITS)
    try:
        answer = start().ask({
            "folder": str(folder), "scorer": scorer, "attention": attention, "logits": str(logits),
            "remembered": remembered and str(remembered), "tolerance": tolerance, "frozen": frozen,
            "quantization": quantization and quantization.model_dump(mode="json", by_alias=True, exclude_none=True),
            "compute": compute,
        })  # fmt: skip
        if "error" in answer:
            kind = {ExitCode.NON_FINITE: NonFiniteError, ExitCode.BAD_INPUT: ModelError}.get(answer["code"], UserError)
            raise kind(answer["error"])
        return answer | {"logits": np.load(logits, allow_pickle=False)}
    finally:
        logits.unlink(missing_ok=True)


# --- the process that reads ---------------------------------------------------------------------------------------


def serve(questions: TextIO, answers: TextIO) -> None:
    """Answer until there is nobody left to ask; each model is loaded in a fork."""
    for line in questions:
        question = json.loads(line)
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receive)
            with os.fdopen(send, "w", encoding="utf-8") as out:
                out.write(json.dumps(_answer(question)))
            os._exit(0)
        os.close(send)
        with os.fdopen(receive, encoding="utf-8") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        if not answer:
            end = f"killed by signal {os.WTERMSIG(status)} (out of memory?)" if os.WIFSIGNALED(status) else "ended"
            text = f"{question['folder']}: the process that read the saved model back was {end}"
            answer = json.dumps({"error": text, "code": int(ExitCode.FAILED)})
        answers.write(answer + "\n")
        answers.flush()


def _answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """What is found, or why nothing is."""
    try:
        return look(question)
    except UserError as error:
        return {"error": str(error), "code": int(error.code)}
    except Exception as error:  # a crash here must name itself in the process that asked
        traceback.print_exc()
        return {"error": f"reading back: {type(error).__name__}: {error}", "code": int(ExitCode.FAILED)}


def look(question: Mapping[str, Any]) -> dict[str, Any]:
    """Load a model folder and describe it; see `read`."""
    import numpy as np
    import torch

    from alignment.models.load import load_policy, load_scorer
    from alignment.models.tokenizer import describe
    from alignment.pipeline.folders import read_object
    from alignment.recipe.schema import Quantization
    from alignment.training.remembered import Trained, differences

    folder, scorer = Path(question["folder"]), question["scorer"]
    _require_finite(folder)
    quantization = question["quantization"] and Quantization.model_validate(question["quantization"])
    model, tokenizer = (load_scorer if scorer else load_policy)(
        folder, attention=question["attention"], quantization=quantization,
        compute=getattr(torch, question["compute"]),
    )  # fmt: skip
    lines: list[str] = []
    if question["remembered"]:
        trained = Trained.load(Path(question["remembered"]))
        lines = list(differences(model, trained, tolerance=question["tolerance"], frozen=question["frozen"]))
    ids = probe(tokenizer)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    np.save(Path(question["logits"]), out.numpy(), allow_pickle=False)
    described = describe(tokenizer)
    # From the file: an adapter has the generation settings of its base in memory.
    settings = folder / "generation_config.json"
    eos = None if scorer else read_object(settings).get("eos_token_id")
    return {
        "probe_ids": described["probe_ids"],
        "stop_ids": described["eos_ids"],
        "template": described["template_sha256"],
        "generation_eos": [eos] if isinstance(eos, int) else eos,
        "process": os.getpid(),
        "differences": lines,
    }


def probe(tokenizer: Any) -> Any:
    """Token ids (1, S) on which two models are compared."""
    import torch

    from alignment.models.tokenizer import probe_ids

    return torch.tensor([probe_ids(tokenizer)])


def _require_finite(folder: Path) -> None:
    """Every tensor in every weight file, also those that no loss ever touches (rows of ids that do not occur)."""
    import torch
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, an object of safetensors and no dict
                    tensor = file.get_tensor(name)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        where = path.relative_to(folder)
                        raise NonFiniteError(f"{where}: {name} is not finite; nothing was published")
        except SafetensorError as error:
            raise ModelError(f"{path}: damaged ({error})") from None


def main(argv: list[str]) -> None:
    """The process's beginning: it dies with who asks, and leaves signals to it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    from alignment.training import quiet

    quiet.before_import()
    import alignment.models.load  # noqa: F401, the imports that take seconds

    quiet.quiet()
    with os.fdopen(int(argv[0]), encoding="utf-8") as questions, os.fdopen(int(argv[1]), "w") as answers:
        serve(questions, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
