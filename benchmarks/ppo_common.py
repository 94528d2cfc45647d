"""What the PPO benchmarks share: TRL 1.12 in an environment of its own, random models, prompts, and how to run a side.

TRL 1.12.0 was the last release with a PPO trainer. It is installed beside this project, never into it: `environment`
makes a virtual environment outside of the repository with the torch, transformers and accelerate of the calling one,
so that a comparison is of two trainers and of nothing else.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TRL = "1.12.0"
DEFAULT_ENVIRONMENT = Path.home() / ".cache" / "alignment-benchmarks" / f"trl-{TRL}"
ROLES = ("policy", "reference", "reward", "value")
PAD, EOS = 0, 1


# --- the environment of TRL -------------------------------------------------------------------------------------------


def environment(folder: Path = DEFAULT_ENVIRONMENT) -> Path:
    """Path of a Python that has TRL 1.12.0; made with pip on the first call (about a minute, 1.5 GB with CPU torch).

    Where pip finds torch is pip's own configuration: on PyPI a Linux wheel of torch brings CUDA along.
    """
    python = folder / "bin" / "python"
    same = ("torch", "transformers", "accelerate", "tokenizers", "datasets")
    pins = [f"trl=={TRL}", *(f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in same)]
    stamp, wanted = folder / "installed.txt", "\n".join(pins) + "\n"
    if not (stamp.is_file() and stamp.read_text() == wanted):
        print(f"installing {' '.join(pins)} into {folder}", file=sys.stderr, flush=True)
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=300)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins]
        subprocess.run(install, check=True, timeout=3600)
        stamp.write_text(wanted)
    return python


def call(command: list[str], threads: int, timeout: float) -> str:
    """Run one side in a process of its own; returns "", or why it failed, with the end of what it printed."""
    variables = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    variables.pop("PYTHONPATH", None)  # TRL's environment must not see the packages of the calling one
    try:
        done = subprocess.run(
            command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {timeout:.0f} s"
    return "" if done.returncode == 0 else f"exit status {done.returncode}\n{done.stdout[-3000:]}"


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """The shape of a random Llama. Embedding and head are not tied: `bias_the_head` needs a head of its own."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int

    def config(self) -> LlamaConfig:
        """The configuration, in float32."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=None,
        )


SIZES = {
    "0.7M": Size(1024, 128, 384, 2, 4),
    "15M": Size(8192, 320, 864, 8, 8),
    "100M": Size(8192, 768, 2048, 12, 12),
    "500M": Size(32768, 1280, 3456, 20, 20),  # for a GPU
}


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocabulary` words, written without spaces: decoded and joined ids encode to the same ids."""
    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"w\d+"), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


@torch.no_grad()
def bias_the_head(model: LlamaForCausalLM, ends: float) -> None:
    """Give the head of a random Llama a bias: `ends` is the probability of the end token, padding gets (almost) none.

    Llama's head has no bias, so feature 0 of the residual stream is made a constant: every embedding holds it and no
    layer writes to it. The head's column 0 then acts as a bias. Random models draw the padding token too, which TRL's
    trainer, that knows padding by its id, would take for the end of the reply.
    """
    model.model.embed_tokens.weight[:, 0] = 4 * model.config.initializer_range
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    model.lm_head.weight[:, 0] = 0
    tokens = torch.randint(3, model.config.vocab_size, (16, 48), generator=torch.Generator().manual_seed(0))
    hidden = model.model(input_ids=tokens).last_hidden_state
    others = torch.logsumexp(model.lm_head(hidden), dim=-1).mean().item()
    feature = hidden[..., 0].mean().item()
    model.lm_head.weight[EOS, 0] = (others + math.log(ends / (1 - ends)) if ends else -30.0) / feature
    model.lm_head.weight[PAD, 0] = -30.0 / feature


def random_folders(size: Size, target: Path, *, finish: float, response_length: int) -> None:
    """Write policy, reference (the same weights), reward and value models of this size, and the tokenizer, to `target`.

    `finish` is the share of replies that end within `response_length` tokens: each token ends its reply with the
    probability that makes it so.
    """
    torch.manual_seed(0)
    policy = LlamaForCausalLM(size.config())
    bias_the_head(policy, 1 - (1 - finish) ** (1 / response_length))
    save_roles(policy, policy, word_tokenizer(size.vocabulary), target)


def trained_folders(source: str, target: Path) -> PreTrainedTokenizerBase:
    """The same folders from a trained policy; reward and value models are random ones of its shape."""
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # The trained policy all but never draws it; TRL's trainer would take an end token for padding.
        tokenizer.pad_token = tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise SystemExit(f"{source}: TRL's trainer needs a pad token that is not the end token, and there is none")
    policy = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    policy.config.pad_token_id = policy.generation_config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    save_roles(policy, policy, tokenizer, target)
    return tokenizer


def save_roles(
    policy: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path
) -> None:
    """Save the roles as plain `from_pretrained` folders, with new random reward and value models."""
    policy.save_pretrained(target / "policy")
    reference.save_pretrained(target / "reference")
    config = type(policy.config).from_dict(policy.config.to_dict() | {"num_labels": 1, "id2label": {0: "score"}})
    for role in ("reward", "value"):
        AutoModelForSequenceClassification.from_config(config).save_pretrained(target / role)
    for role in ROLES:
        tokenizer.save_pretrained(target / role)


def random_prompts(vocabulary: int, count: int, shortest: int, longest: int) -> list[list[int]]:
    """Prompts of `shortest` to `longest` random words."""
    draw = random.Random(0)
    lengths = [draw.randint(shortest, longest) for _ in range(count)]
    return [[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


def text_prompts(file: Path, tokenizer: PreTrainedTokenizerBase, count: int, longest: int) -> list[list[int]]:
    """The first `longest` tokens of the `prompt` or `text` of each line; the file repeats until there are `count`."""
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    texts = [row.get("prompt", row.get("text")) for row in rows[:count]]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:longest] for text in texts]
    return [ids[i % len(ids)] for i in range(count)]
