"""A run proves its chat template before anything is loaded, and stops where it trains the wrong text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRONG = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_run_stops_before_its_first_step(
    tmp_path: Path, tiny_policy: Path, tiny_recipe: Callable[..., Any], run_recipe: Callable[..., Path]
) -> None:
    template = tmp_path / "wrong.jinja"
    template.write_text(WRONG)
    recipe = tiny_recipe("sft", sft={"model": str(tiny_policy), "chat_template": str(template)})
    run = run_recipe(recipe, expect=2)
    status = json.loads((run / "sft" / "status.json").read_text())
    assert status["message"].startswith(
        "chat_template: the chat template does not train what it should: trained-text: "
    )
    assert "text of the prompt is trained with an answer" in status["message"]
    assert not list((run / "sft").glob("checkpoint-*"))


def test_a_run_says_that_its_template_is_proved(
    tiny_policy: Path, tiny_recipe: Callable[..., Any], run_recipe: Callable[..., Path], capsys: Any
) -> None:
    stage = {"model": str(tiny_policy), "train": {"max_steps": 2}}
    run_recipe(tiny_recipe("sft", "dpo", sft=stage, dpo={"train": {"max_steps": 2}}))
    assert capsys.readouterr().out.count("  template   proved on 48 rows\n") == 2
