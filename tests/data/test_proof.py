"""The template proof: templates with the traits of those in use pass, planted faults are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from alignment.data import page, proof, templates, tokens
from alignment.data.dialect import Dialect
from alignment.errors import DataError
from alignment.recipe.schema import Data, Source

Tokenizer = PreTrainedTokenizerFast
Build = Callable[..., Tokenizer]

# Templates of our own with the traits of those in use; none has a generation block.
HEADERS = (  # as Llama-3.1: BOS in the template, contents trimmed, a system turn of its own with a default
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nDate: 26 Jul 2024\n\n' + system + '<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
THINKING = (  # as Qwen3: thoughts of earlier turns are taken away, an empty one is written before the last answer
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set content = m['content'] %}{% set thought = '' %}"
    "{% if m['role'] == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING_PROMPT = (  # as DeepSeek-R1: generation starts inside a thought, which training does not write
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + m['content'].split('</think>')[-1] + eos_token }}"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
INSTRUCTIONS = (  # as Mistral: system merged into the first user turn, a space before answers, nothing for the prompt
    "{% set system = '' %}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
TURNS = (  # as Gemma: BOS, the assistant is called model, system turns are refused
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ENDS = (  # as Phi: role, content and <|end|> on lines of their own; EOS after everything
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CHATML = (  # as stock ChatML: a line end after the stop token
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (  # as Zephyr: the role marks are no tokens, EOS ends every turn
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
IN_USE = {
    "llama": (HEADERS, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "qwen": (THINKING, ["<|im_start|>", "<|im_end|>"]),
    "deepseek": (THINKING_PROMPT, ["<|assistant|>", "<|user|>", "<|system|>"]),
    "mistral": (INSTRUCTIONS, []),
    "gemma": (TURNS, ["<start_of_turn>", "<end_of_turn>"]),
    "phi": (ENDS, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]),
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "zephyr": (ZEPHYR, []),
}
ANSWERS = [
    "Good day 😀.",
    "  Fine, and two\n\nparagraphs.\n",
    "a",
    "assistant",
    "Yes",
    "<think>\nhm\n</think>\n\nIt is 4.",
]


def fitted(build: Build, jinja: str, special: list[str], *, stop: str | None = None) -> Tokenizer:
    tokenizer = build(None, bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = jinja
    if stop:
        tokenizer.eos_token = stop
    return tokenizer


def rows(*, system: bool) -> list[dict[str, Any]]:
    found = []
    for index in range(40):
        first, second = ANSWERS[index % len(ANSWERS)], ANSWERS[(index + 1) % len(ANSWERS)]
        turns = [
            {"role": "user", "content": f"Hi {index}"}, {"role": "assistant", "content": first},
            {"role": "user", "content": " think\nassistant "}, {"role": "assistant", "content": second},
        ]  # fmt: skip
        found.append(
            {"messages": ([{"role": "system", "content": "Be kind."}] if system and index % 2 else []) + turns}
        )
    return found


def pairs_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": row["messages"][:-1],
            "chosen": row["messages"][-1:],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for row in messages
    ]


@pytest.mark.parametrize("name", IN_USE)
def test_templates_with_the_traits_of_those_in_use_are_proved(build_tokenizer: Build, name: str) -> None:
    jinja, special = IN_USE[name]
    tokenizer = fitted(build_tokenizer, jinja, special)
    talks = rows(system=name != "gemma")
    found = proof.prove(tokenizer, talks, "messages")
    assert found.lines == []
    assert (found.rows, found.skipped, found.unstopped) == (40, 0, 0)
    assert found.answers == 80
    preferred = proof.prove(tokenizer, pairs_of(talks), "preference")
    # Generation starts inside a thought that no training row has: the prompt ends before it, and it is counted.
    assert preferred.boundaries == (80 if name == "deepseek" else 0)
    assert (preferred.lines, preferred.rows, preferred.answers) == ([], 40, 80)


@pytest.mark.parametrize("name", templates.NAMED)
def test_our_own_templates_are_proved(build_tokenizer: Build, name: str) -> None:
    tokenizer = build_tokenizer(name, bos=True)
    for schema, talks in (("messages", rows(system=True)), ("preference", pairs_of(rows(system=True)))):
        found = proof.prove(tokenizer, talks, schema)
        assert (found.lines, found.rows, found.boundaries) == ([], 40, 0)
    unpaired = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in pairs_of(rows(system=True))
    ]
    assert proof.prove(tokenizer, unpaired, "unpaired").lines == []


def test_system_turns_that_the_template_refuses_are_skipped(build_tokenizer: Build) -> None:
    found = proof.prove(fitted(build_tokenizer, *IN_USE["gemma"]), rows(system=True), "messages")
    assert (found.lines, found.rows, found.skipped) == ([], 20, 20)


def test_a_template_that_takes_no_row_is_not_called_proved(build_tokenizer: Build) -> None:
    """As Mistral-7B-v0.2-Chat, whose template needs a system turn."""
    needs = "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% endif %}{{ '' + s }}"
    tokenizer = fitted(build_tokenizer, needs + ZEPHYR, [])
    found = proof.prove(tokenizer, rows(system=False), "messages")
    assert (found.rows, found.skipped, found.lines) == (0, 40, [])
    assert page._proof_text(found.as_dict()) == "not proved: it takes none of the rows looked at"
    assert page._proof_text({**found.as_dict(), "rows": 3}).startswith("proved on 3 rows")


def planted(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[str, list[tuple[int, int]]], list[tuple[int, int]]]
) -> None:
    """Let the spans that training uses be wrong."""
    render = Dialect.render

    def wrong(self: Dialect, messages: Any, tools: Any = None) -> Any:
        text, spans = render(self, messages, tools)
        return text, change(text, spans)

    monkeypatch.setattr(Dialect, "render", wrong)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text, spans: [(0, spans[-1][1])], "trained-text: 40 of 40 rows: 1 trained spans for 2 answers"),
        (lambda text, spans: [(a - 20, b) for a, b in spans], "text of the prompt is trained with an answer"),
        (lambda text, spans: spans[:-1], "trained-text: 40 of 40 rows: 1 trained spans for 2 answers"),
        (lambda text, spans: [(a + 1, b) for a, b in spans], "characters of an answer are not trained"),
        (lambda text, spans: [(a, b - len("<|im_end|>")) for a, b in spans],
         "stop-trained: 1 of 40 rows: 80 of 80 answers do not end with a trained stop token"),
        (lambda text, spans: [(a, min(len(text), b + 20)) for a, b in spans], "text after the stop token is trained"),
    ],
)  # fmt: skip
def test_wrong_spans_are_named(build_tokenizer: Build, monkeypatch: pytest.MonkeyPatch, change: Any, says: str) -> None:
    planted(monkeypatch, change)
    found = proof.prove(build_tokenizer("chatml"), rows(system=False), "messages")
    assert any(says in line for line in found.lines), found.lines
    with pytest.raises(DataError, match=r"stages\.sft: the chat template does not train what it should: ") as error:
        found.enforce("stages.sft")
    assert "\n" not in str(error.value)


def test_generation_blocks_around_the_wrong_turn(build_tokenizer: Build) -> None:
    """The template's own marks are not believed: here they hold the role line too."""
    jinja = templates.CHATML.replace("'<|im_start|>' + message['role'] + '\\n'", "''").replace(
        "{%- generation %}{{- message", "{%- generation %}{{- '<|im_start|>assistant\\n' + message"
    )
    jinja = jinja.replace(
        "{{- message['content'] + '<|im_end|>\\n' }}",
        "{{- '<|im_start|>user\\n' + message['content'] + '<|im_end|>\\n' }}",
    )
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = jinja
    found = proof.prove(tokenizer, rows(system=False), "messages")
    assert [line.partition(":")[0] for line in found.lines] == ["trained-text"]
    assert "text of the prompt is trained" in found.lines[0]


def test_answers_that_end_with_a_token_at_which_generation_goes_on(
    build_tokenizer: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "stop_ids", lambda tokenizer: [tokenizer.pad_token_id])
    found = proof.prove(build_tokenizer("chatml"), rows(system=False), "messages")
    assert [line.partition(":")[0] for line in found.lines] == ["stops-generation"]
    assert "<|im_end|>, at which generation does not stop" in found.lines[0]


def test_two_bos_tokens(build_tokenizer: Build) -> None:
    tokenizer = fitted(build_tokenizer, "{{ bos_token }}" + HEADERS, IN_USE["llama"][1])
    found = proof.prove(tokenizer, rows(system=False), "messages")
    assert [line.partition(":")[0] for line in found.lines] == ["double-bos"]
    # A tokenizer that adds BOS itself changes nothing: the template's text is tokenized without.
    tokenizer = fitted(build_tokenizer, *IN_USE["llama"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert proof.prove(tokenizer, rows(system=False), "messages").lines == []


def test_a_prompt_that_training_writes_otherwise(build_tokenizer: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation starts from another text than training put before the answer."""
    jinja = templates.CHATML.replace(
        "{{- '<|im_start|>assistant\\n' }}",
        "{{- 'Now answer as kindly as you ever can, please: <|im_start|>assistant\\n' }}",
    )
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = jinja
    found = proof.prove(tokenizer, rows(system=False), "messages")
    assert [line.partition(":")[0] for line in found.lines] == ["prompt-is-prefix"]
    ours = templates.encode_prompt

    def other(tokenizer: Tokenizer, messages: Any, tools: Any = None) -> list[int]:
        return [*ours(tokenizer, messages, tools), 5]

    monkeypatch.setattr(templates, "encode_prompt", other)
    found = proof.prove(build_tokenizer("chatml"), rows(system=False), "messages")
    assert [line.partition(":")[0] for line in found.lines] == ["same-ids"]


def test_a_tokenizer_that_is_another_one_once_saved(build_tokenizer: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = fitted(build_tokenizer, THINKING, IN_USE["qwen"][1])
    exported.add_tokens(["Hi"])
    monkeypatch.setattr(proof, "_exported", lambda tokenizer: exported)
    found = proof.prove(fitted(build_tokenizer, *IN_USE["qwen"]), rows(system=False), "messages")
    assert [line.partition(":")[0] for line in found.lines] == ["same-ids-exported"]


def test_a_boundary_that_moves_is_counted(build_tokenizer: Build) -> None:
    """`: ` and `:\\n` are other tokens than `:` where the tokenizer merges them."""
    tokenizer = build_tokenizer(None)
    tokenizer.add_tokens([":a"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "abc"}]
    row = {"prompt": talk[:1], "chosen": talk[1:], "rejected": [{"role": "assistant", "content": "b"}]}
    found = proof.prove(tokenizer, [row] * 3, "preference")
    assert (found.lines, found.boundaries) == ([], 6), "the answers share their prompt, so it is moved for both"


def test_tool_calls(build_tokenizer: Build) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "lookup", "arguments": {"x": 1}}}]}
    talk = [
        {"role": "user", "content": "q"},
        call,
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "It is 7."},
    ]
    tokenizer = build_tokenizer("chatml")
    found = proof.prove(tokenizer, [{"messages": talk}], "messages")
    assert (found.lines, found.rows, found.answers, found.skipped) == ([], 1, 2, 0), "the call is written by us"
    answer = {"prompt": talk[:1], "chosen": [call], "rejected": [{"role": "assistant", "content": "7?"}]}
    found = proof.prove(tokenizer, [answer], "preference")
    assert (found.lines, found.rows, found.answers, found.skipped) == ([], 1, 2, 0)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function | tojson + '</call>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    found = proof.prove(tokenizer, [{"messages": talk}], "messages")
    assert (found.lines, found.rows, found.answers, found.skipped) == ([], 1, 2, 0)
    # As DeepSeek-R1: calls are written only where the content is null, and ours is an empty text.
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m.tool_calls or []", "([] if m.content is string else m.tool_calls)"
    )
    found = proof.prove(tokenizer, [{"messages": talk}], "messages")
    assert found.lines == ["trained-text: 1 of 1 rows: the template does not write the call of lookup"]
    # ... and takes that null: then our empty text becomes it.
    tokenizer.chat_template = tokenizer.chat_template.replace("+ m['content'] }}", "+ (m['content'] or '') }}")
    found = proof.prove(tokenizer, [{"messages": talk}], "messages")
    assert (found.lines, found.rows, found.answers) == ([], 1, 2)
    trained = templates.encode_messages(tokenizer, talk)
    text = tokenizer.decode([token for token, flag in zip(trained.ids, trained.trained, strict=True) if flag])
    assert text.startswith('<call>{"name": "lookup", "arguments": {"x": 1}}</call><|im_end|>')


def test_the_proof_looks_at_what_is_trained(build_tokenizer: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = tokens.tables

    def noted(rows_: Any, *arguments: Any) -> Any:
        seen.append(len(rows_))
        return original(rows_, *arguments)

    monkeypatch.setattr(proof, "tables", noted)
    many = [{"messages": row["messages"], "n": n} for n, row in enumerate(rows(system=False) * 10)]
    proof.prove(build_tokenizer("chatml"), many, "messages")
    assert seen == [64]
    assert [row["n"] for row in proof.sample(many)][:33] == [*range(32), 32]
    assert proof.sample(many)[-1]["n"] > 300, "and not only the first ones"


def test_rows_for_the_proof_are_the_first_usable_ones(lines: Callable[..., Path]) -> None:
    answers = ["a", "", *["a"] * 198]
    written = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": answer}]}
        for i, answer in enumerate(answers)
    ]
    sources = [Source(path=str(lines(written, name))) for name in ("a.jsonl", "b.jsonl")]
    found = proof.head(Data(train=sources), "messages")
    assert [row["messages"][0]["content"] for row in found][:3] == ["q0", "q2", "q3"]
    assert len(found) == 64


def test_rows_for_the_proof_are_read_as_training_reads_them(lines: Callable[..., Path]) -> None:
    """Rated answers, a filter, and system turns as the recipe settles them."""
    written = [
        {
            "system": "Be kind.", "prompt": f"q{i}", "responses": ["a", f"b{i}", "c"], "scores": [3, 1, 2],
            "lang": "en" if i % 2 else "de",
        }
        for i in range(150)
    ]  # fmt: skip
    source = Source(path=str(lines(written)), pairs="adjacent")
    keys = {"train": [source], "filter": {"columns": {"lang": "en"}}, "on_system": "merge"}
    found = proof.head(Data.model_validate(keys), "preference")
    assert len(found) == 64
    assert [row["prompt"][0]["content"] for row in found[:3]] == ["Be kind.\n\nq1", "Be kind.\n\nq1", "Be kind.\n\nq3"]
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in found[:2]] == [
        ("a", "c"), ("c", "b1"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="has a system turn"):
        proof.head(Data.model_validate({**keys, "on_system": "error"}), "preference")
