"""Nothing leaks, nothing calls home, no payload runs: a run from the command line, watched from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from alignment.errors import CheckpointError
from alignment.pipeline import runs, seals
from alignment.recipe.credentials import Masked, find, mask

SECRETS = {
    "HF_TOKEN": "hf_" + "Qz7xK2mP" * 5,
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MY_SECRET": "correct horse battery",
    "OPENAI": "sk-proj-" + "Ab3dE6gH" * 5,
    "AWS": "AKIA" + "ABCD1234EFGH5678",
    "ADDRESS": "https://me:hunter2hunter2@example.org/data",
    "HEADER": "Authorization: Bearer abcdef0123456789",
}
HIDDEN = [
    *(value for name, value in SECRETS.items() if name not in ("ADDRESS", "HEADER")),
    "hunter2",
    "abcdef0123456789",
]
HOOK = """\
import os
import sys
def score(prompts, completions, **columns):
    for name in NAMES:
        print("seen", name, os.environ[name])
        print("seen", os.environ[name], file=sys.stderr)
    return [1.0 for _ in prompts]
"""
NO_NETWORK = """\
import os, socket
def refuse(*args, **kwargs):
    if args and isinstance(args[0], socket.socket) and args[0].family == socket.AF_UNIX:
        return real(*args, **kwargs)
    with open(os.environ["CONNECTIONS"], "a") as file:
        file.write(repr(args[1:] or args) + "\\n")
    raise OSError("no network here")
real = socket.socket.connect
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.gethostbyname = refuse
open(os.environ["CONNECTIONS"] + ".watched", "a").write("x")
"""


@pytest.mark.parametrize("name", SECRETS)
def test_every_kind_of_secret_is_masked(name: str) -> None:
    text = f"before {SECRETS[name]} after"
    masked = mask(text, SECRETS)
    assert not any(hidden in masked for hidden in HIDDEN)
    assert masked.startswith("before ")
    assert masked.endswith(" after")
    if name not in ("WANDB_API_KEY", "MY_SECRET"):
        assert find(text) is not None


def test_harmless_text_is_left_alone() -> None:
    text = "eos_token='<|im_end|>' TOKENIZERS_PARALLELISM=false http://host:80/a@b sha256 " + "0f" * 32
    assert mask(text, {"PATH": "/bin:/usr/bin", "TOKEN": "x", "EMPTY_KEY": ""}) == text
    assert find(text) is None
    assert mask("HF_TOKEN=abcdefgh1234 x", {}) == "HF_TOKEN=[key] x"


def test_a_masked_stream_is_its_stream(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Masked(sys.stdout)
    print("token", SECRETS["OPENAI"], file=stream)
    stream.writelines(["a\n"])
    assert stream.isatty() is False
    assert capsys.readouterr().out == "token [API key (sk-)]\na\n"


@pytest.mark.ci_slow
def test_a_run_leaks_nothing_and_calls_nobody(
    root: Path, tiny_policy: Path, tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    (tmp_path / "hook.py").write_text(HOOK.replace("NAMES", repr(list(SECRETS))))
    recipe = tiny_recipe("ppo", ppo={"model": str(tiny_policy), "train": {"max_steps": 1}})
    recipe["stages"]["ppo"]["rewards"] = [{"name": "hook", "function": f"{tmp_path}/hook.py:score"}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    env = dict(os.environ, PYTHONPATH=f"{tmp_path}:{root}", CONNECTIONS=str(tmp_path / "connections"), **SECRETS)
    words = [sys.executable, "-m", "alignment", "run", "recipe.yaml", "--quiet"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "connections").exists(), (tmp_path / "connections").read_text()
    assert (
        len((tmp_path / "connections.watched").read_text()) >= 4
    )  # planner, launcher, worker, the one that reads back
    output = (tmp_path / "runs" / "tiny" / "ppo" / "output.log").read_text()
    assert "seen HF_TOKEN [Hugging Face token]" in output  # the hook did speak
    texts = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    texts |= {tmp_path / "stdout": done.stdout.encode(), tmp_path / "stderr": done.stderr.encode()}
    leaks = [(path.name, hidden) for path, text in texts.items() for hidden in HIDDEN if hidden.encode() in text]
    assert leaks == []


# --- pickles ----------------------------------------------------------------------------------------------------------


class Payload:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.canary,))


NAMES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin", "pytorch_model.bin",
         "optimizer.bin", "rng_state_1.pth", "replies-0-of-1.pt", "adapter_model.bin",
         "global_step2/mp_rank_00_model_states.pt",
         "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["added", "replaced"])
def test_a_checkpoint_with_a_planted_pickle_is_never_opened(name: str, how: str, tmp_path: Path) -> None:
    canary, stage = tmp_path / "canary", tmp_path / "stage"
    folder = stage / "checkpoint-2"
    planted = folder / name
    planted.parent.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    if how == "replaced":
        planted.write_bytes(b"what upstream wrote")
    seals.seal(folder, step=2, world_size=1, fingerprint_sha256="f")
    assert seals.latest_sealed(stage, "f") == (folder, [])
    torch.save(Payload(canary), planted)
    with pytest.raises(CheckpointError, match=rf"checkpoint-2: {name}: "):
        seals.latest_sealed(stage, "f")
    assert not canary.exists()
    torch.load(planted, weights_only=False)  # the payload is one
    assert canary.exists()


@pytest.mark.parametrize("how", ["folder", "file", "table"])
def test_a_checkpoint_that_leads_out_is_never_used(how: str, tmp_path: Path) -> None:
    stage, elsewhere = tmp_path / "stage", tmp_path / "elsewhere"
    folder = stage / "checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    seals.seal(folder, step=2, world_size=1, fingerprint_sha256="f")
    if how == "folder":
        folder.rename(elsewhere)
        folder.symlink_to(elsewhere)
    elif how == "file":
        (folder / "model.safetensors").rename(elsewhere)
        (folder / "model.safetensors").symlink_to(elsewhere)
    else:
        elsewhere.write_bytes(b"weights")
        table = {"../../elsewhere": {"size": 7, "sha256": runs.digest("x")}}
        runs.write_json(folder / seals.SEALED, {"schema": 1, "step": 2, "fingerprint_sha256": "f", "files": table})
    with pytest.raises(CheckpointError, match="leads out of the"):
        seals.latest_sealed(stage, "f")
