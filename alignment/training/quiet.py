"""Upstream's noise that a user can do nothing about, filtered in this one place, each filter with its reason."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

MESSAGES = (
    # We load a causal LM into a classifier on purpose; the head is set to zero and checked.
    "Some weights of .* were not initialized",
    # TRL notes that rows were tokenised before it saw them; they always are.
    ".*already processed.*",
    # DataLoader workers and pinned memory on a machine without an accelerator.
    ".*'pin_memory' argument is set as true but no accelerator.*",
    # Reentrant checkpointing is forced by TRL where ZeRO-3 needs it.
    ".*torch.utils.checkpoint: the use_reentrant parameter.*",
    # PEFT cannot reach a hub to compare vocabularies; the base is a folder and was checked.
    ".*Could not find a config file in.*",
    # Saving resized embeddings with the adapter is what we ask for.
    ".*Setting `save_embedding_layers` to `True`.*",
    # Upstream talks to itself about its own deprecated names.
    ".*is deprecated and will be removed.*",
)
LOGGERS = {
    # "Special tokens have been added", "the tokenizer has new PAD/BOS/EOS tokens": our header says both.
    "transformers": logging.ERROR,
    "trl": logging.ERROR,
    # DeepSpeed prints its whole configuration at INFO.
    "DeepSpeed": logging.WARNING,
    "deepspeed": logging.WARNING,
    "datasets": logging.ERROR,
    "accelerate": logging.ERROR,
    "torch.distributed": logging.ERROR,
    # Kernels for CPUs that it would like to download.
    "bitsandbytes": logging.ERROR,
}


def before_import() -> None:
    """What upstream reads from the environment while it is imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
        # DeepSpeed finds the same by trying, and warns of it in every process.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, level in LOGGERS.items():
        logging.getLogger(name).setLevel(level)


def quiet() -> None:
    """Apply the filters; call once, after the imports and before upstream is used."""
    for message in MESSAGES:
        warnings.filterwarnings("ignore", message=message)
    modules = r"(transformers|trl|peft|accelerate|torch|deepspeed)"
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=modules)
    import datasets
    from transformers.utils import logging as upstream

    datasets.disable_progress_bars()
    upstream.disable_progress_bar()
    upstream.set_verbosity_error()
