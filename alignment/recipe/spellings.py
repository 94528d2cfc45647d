"""Keys as other tools and older releases spell them, and the key of today.

A recipe that comes from alignment-handbook, LLaMA-Factory, Axolotl or an older TRL fails with these answers instead of
`unknown key`. A test holds every answer against the schema and the installed classes: a key that does not exist is
never recommended.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Spelling:
    """One foreign key.

    Attributes:
        origin: who writes it so.
        here: the place in a recipe; None where there is no such setting.
        note: what is different about it, if anything is.
    """

    origin: str
    here: str | None
    note: str = ""


def today(key: str, train_keys: Collection[str] | None = None) -> str | None:
    """Answer a foreign key: `LLaMA-Factory's name; today it is `train.max_length``. None for a key without an entry.

    Args:
        key: the key as found.
        train_keys: the keys of the stage's trainer, where they are known: no other key of `train` is recommended.
    """
    spelling = SPELLINGS.get(key)
    if spelling is None:
        return None
    if spelling.here is None:
        return f"{spelling.origin}; {spelling.note}"
    section, _, name = spelling.here.partition(".")
    if section == "train" and train_keys is not None and name not in train_keys:
        return None
    note = f" ({spelling.note})" if spelling.note else ""
    return f"{spelling.origin}; today it is `{spelling.here}`{note}"


_OLD_TRL = "a name of older TRL"
_OLD_TRANSFORMERS = "a name of older Transformers"
_HANDBOOK = "alignment-handbook's name"
_FACTORY = "LLaMA-Factory's name"
_AXOLOTL = "Axolotl's name"

SPELLINGS: dict[str, Spelling] = {
    # older TRL and Transformers
    "torch_dtype": Spelling(_OLD_TRANSFORMERS, "precision.compute", "precision.weights for frozen weights"),
    "dtype": Spelling("a name of Transformers", "precision.compute", "precision.weights for frozen weights"),
    "max_seq_length": Spelling(_OLD_TRL, "train.max_length"),
    "max_prompt_length": Spelling(_OLD_TRL, "train.max_length", "prompt and completion together"),
    "max_completion_length": Spelling(_OLD_TRL, "train.max_length", "prompt and completion together"),
    "max_target_length": Spelling(_OLD_TRL, "train.max_length", "prompt and completion together"),
    "warmup_ratio": Spelling(_OLD_TRANSFORMERS, "train.warmup_steps", "a value below 1 is a share of all steps"),
    "evaluation_strategy": Spelling(_OLD_TRANSFORMERS, "train.eval_strategy"),
    "group_by_length": Spelling(_OLD_TRANSFORMERS, "train.train_sampling_strategy", "value group_by_length"),
    "no_cuda": Spelling(_OLD_TRANSFORMERS, "launch.env", 'CUDA_VISIBLE_DEVICES: ""'),
    "logging_dir": Spelling(_OLD_TRANSFORMERS, "report_to", "logs are kept in the run directory"),
    "per_gpu_train_batch_size": Spelling(_OLD_TRANSFORMERS, "batch.per_device"),
    "rpo_alpha": Spelling(_OLD_TRL, "train.loss_type", "[sigmoid, sft], weighted by train.loss_weights"),
    "reference_free": Spelling(_OLD_TRL, None, "TRL removed it: the reference is always used"),
    "label_pad_token_id": Spelling(_OLD_TRL, None, "labels are masked by this toolkit; remove it"),
    "padding_value": Spelling(_OLD_TRL, None, "the padding token follows from the tokenizer; remove it"),
    "generate_during_eval": Spelling(_OLD_TRL, None, "add a stage with `algorithm: evaluate`"),
    "ref_model_init_kwargs": Spelling(_OLD_TRL, "precision.weights", "the reference is the stage's own start"),
    "model_adapter_name": Spelling(_OLD_TRL, "peft", "adapters are named by this toolkit"),
    "use_peft": Spelling(_OLD_TRL, "peft", "give the section to train an adapter"),
    "load_in_4bit": Spelling(_OLD_TRL, "model.quantization.bits"),
    "load_in_8bit": Spelling(_OLD_TRL, "model.quantization.bits"),
    "bnb_4bit_quant_type": Spelling(_OLD_TRL, "model.quantization.type"),
    "use_bnb_nested_quant": Spelling(_OLD_TRL, "model.quantization.double"),
    "use_flash_attention_2": Spelling(_OLD_TRANSFORMERS, "model.attention", "value flash_attention_2"),
    "attn_implementation": Spelling("a name of Transformers", "model.attention"),
    "lora_r": Spelling("a name of TRL", "peft.r"),
    "lora_alpha": Spelling("PEFT's name", "peft.lora_alpha"),
    "lora_dropout": Spelling("PEFT's name", "peft.lora_dropout"),
    "lora_target_modules": Spelling("a name of TRL", "peft.target_modules"),
    "lora_modules_to_save": Spelling("a name of TRL", "peft.modules_to_save"),
    # alignment-handbook
    "dataset_mixer": Spelling(_HANDBOOK, "data.train", "a list of sources with path and weight"),
    "dataset_mixture": Spelling(_HANDBOOK, "data.train", "a list of sources with path and weight"),
    "dataset_splits": Spelling(_HANDBOOK, "data.train[].split"),
    "dataset_name": Spelling(_HANDBOOK, "data.train[].path"),
    "dataset_config": Spelling(_HANDBOOK, "data.train[].subset"),
    "model_name_or_path": Spelling(_HANDBOOK, "model.path"),
    "model_revision": Spelling(_HANDBOOK, "model.revision"),
    "tokenizer_name_or_path": Spelling(_HANDBOOK, "model.path", "the tokenizer comes with the model"),
    "preprocessing_num_workers": Spelling(_HANDBOOK, None, "rows are tokenized by this toolkit; remove it"),
    # LLaMA-Factory
    "cutoff_len": Spelling(_FACTORY, "train.max_length"),
    "pref_beta": Spelling(_FACTORY, "train.beta"),
    "pref_loss": Spelling(_FACTORY, "algorithm", "one algorithm for each loss"),
    "pref_ftx": Spelling(_FACTORY, "train.loss_type", "[sigmoid, sft], weighted by train.loss_weights"),
    "dpo_label_smoothing": Spelling(_FACTORY, "train.label_smoothing"),
    "kto_chosen_weight": Spelling(_FACTORY, "train.desirable_weight"),
    "kto_rejected_weight": Spelling(_FACTORY, "train.undesirable_weight"),
    "stage": Spelling(_FACTORY, "algorithm"),
    "finetuning_type": Spelling(_FACTORY, "peft", "give the section to train an adapter"),
    "adapter_name_or_path": Spelling(_FACTORY, "model.path", "the folder of the adapter"),
    "dataset": Spelling(_FACTORY, "data.train"),
    "eval_dataset": Spelling(_FACTORY, "data.eval"),
    "dataset_dir": Spelling(_FACTORY, "data.train[].path"),
    "max_samples": Spelling(_FACTORY, "data.train[].rows"),
    "val_size": Spelling(_FACTORY, "data.eval_fraction"),
    "mix_strategy": Spelling(_FACTORY, "data.train[].weight"),
    "interleave_probs": Spelling(_FACTORY, "data.train[].weight"),
    "template": Spelling(_FACTORY, "chat_template"),
    "flash_attn": Spelling(_FACTORY, "model.attention"),
    "quantization_bit": Spelling(_FACTORY, "model.quantization.bits"),
    "quantization_type": Spelling(_FACTORY, "model.quantization.type"),
    "double_quantization": Spelling(_FACTORY, "model.quantization.double"),
    "lora_rank": Spelling(_FACTORY, "peft.r"),
    "lora_target": Spelling(_FACTORY, "peft.target_modules"),
    "additional_target": Spelling(_FACTORY, "peft.modules_to_save"),
    "pure_bf16": Spelling(_FACTORY, None, "AdamW on bfloat16 weights loses its updates; see `precision.compute`"),
    "upcast_layernorm": Spelling(_FACTORY, None, "trained weights are float32; remove it"),
    "max_new_tokens": Spelling("a name of Transformers", "sampling.max_new_tokens", "in a stage that evaluates"),
    # Axolotl
    "base_model": Spelling(_AXOLOTL, "model.path"),
    "tokenizer_config": Spelling(_AXOLOTL, "model.path", "the tokenizer comes with the model"),
    "tokenizer": Spelling(_AXOLOTL, "model.path", "the tokenizer comes with the model"),
    "sequence_len": Spelling(_AXOLOTL, "train.max_length"),
    "micro_batch_size": Spelling(_AXOLOTL, "batch.per_device"),
    "eval_batch_size": Spelling(_AXOLOTL, "batch.per_device_eval"),
    "batch_size": Spelling(_AXOLOTL, "batch.global"),
    "num_epochs": Spelling(_AXOLOTL, "train.num_train_epochs"),
    "epochs": Spelling("a common name", "train.num_train_epochs"),
    "rank": Spelling("a common name", "peft.r"),
    "alpha": Spelling("a common name", "peft.lora_alpha"),
    "dropout": Spelling("a common name", "peft.lora_dropout"),
    "lr": Spelling("a common name", "train.learning_rate"),
    "optimizer": Spelling(_AXOLOTL, "train.optim"),
    "lr_scheduler": Spelling(_AXOLOTL, "train.lr_scheduler_type"),
    "gradient_clipping": Spelling("a common name", "train.max_grad_norm"),
    "datasets": Spelling(_AXOLOTL, "data.train"),
    "test_datasets": Spelling(_AXOLOTL, "data.eval"),
    "val_set_size": Spelling(_AXOLOTL, "data.eval_fraction"),
    "rl": Spelling(_AXOLOTL, "algorithm"),
    "rl_beta": Spelling(_AXOLOTL, "train.beta"),
    "sample_packing": Spelling(_AXOLOTL, "train.packing"),
    "adapter": Spelling(_AXOLOTL, "peft", "give the section to train an adapter"),
    "lora_target_linear": Spelling(_AXOLOTL, "peft.target_modules", "value all-linear"),
    "peft_use_dora": Spelling(_AXOLOTL, "peft.use_dora"),
    "peft_use_rslora": Spelling(_AXOLOTL, "peft.use_rslora"),
    "flash_attention": Spelling(_AXOLOTL, "model.attention", "value flash_attention_2"),
    "evals_per_epoch": Spelling(_AXOLOTL, "train.eval_steps"),
    "saves_per_epoch": Spelling(_AXOLOTL, "checkpoints.every"),
    "wandb_project": Spelling(_AXOLOTL, "report_to"),
    "use_wandb": Spelling(_AXOLOTL, "report_to"),
    "dataset_prepared_path": Spelling(_AXOLOTL, None, "tokenized rows are cached by content; remove it"),
    "special_tokens": Spelling(_AXOLOTL, "chat_template", "it names the special tokens"),
}
