"""Wrong chains: each is refused with the key that the remedy changes, and goes on with --force, which is recorded."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from alignment.cli import main
from alignment.pipeline import launch, runs
from alignment.pipeline.folders import vocabulary, weights_of
from alignment.recipe.load import load_recipe

STUB = Path(__file__).with_name("stub_worker.py")
RECIPE = """\
name: small
chat_template: chatml
precision: {compute: float32}
stages:
  base: {algorithm: pretrain, model: base, data: {train: [{path: rows/text.jsonl}]}}
  sft: {algorithm: sft, model: stage:base, data: {train: [{path: rows/sft.jsonl}]}}
  reward: {algorithm: reward, model: stage:sft, data: {train: [{path: rows/preferences.jsonl}]}}
  dpo: {algorithm: dpo, model: MODEL, data: {train: [{path: rows/preferences.jsonl}]}, train: {beta: 0.1}}
  ppo:
    algorithm: ppo
    model: stage:sft
    rewards: [{name: rm, model: REWARD}]
    data: {train: [{path: rows/prompts.jsonl}]}
    train: {critic_init: auto}
  compare:
    algorithm: evaluate
    models: [stage:sft, stage:dpo]
    scorers: [SCORER]
    prompts: [{path: rows/prompts.jsonl}]
    pairs: [{path: rows/preferences.jsonl}]
"""
DEFAULTS = {"MODEL": "stage:sft", "REWARD": "stage:reward", "SCORER": "stage:reward"}
RUN = Path("runs/small")


def tokenizer(folder: Path, *, words: int = 4, template: str = "{{ messages }}") -> None:
    """A `tokenizer.json` as small as it gets, and a template beside it."""
    table = {f"w{index}": index for index in range(words)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": table}, "added_tokens": []}))
    (folder / "chat_template.jinja").write_text(template)


def config(folder: Path, architecture: str = "LlamaForCausalLM") -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))


def edit(folder: Path, **changes: Any) -> None:
    """Change a manifest, its table of files made anew."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    names = [place for place in folder.iterdir() if place.suffix in (".safetensors", ".jinja")]
    names += [folder / name for name in ("config.json", "adapter_config.json", "tokenizer.json")]
    kept = {"stage.yaml", "lock"}
    table = runs.settle(folder)
    files = {place.name: table[place.name] for place in names if place.is_file() and place.name not in kept}
    content |= {"files": files, "weights_sha256": runs.weights_sha256(files), **changes}
    path.write_text(json.dumps(content))


@pytest.fixture
def run(workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`alignment run` with a stand-in for the worker: exit code, stdout, stderr."""
    monkeypatch.setattr(launch, "command", lambda spec, path, env=None: [sys.executable, str(STUB), str(path)])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    (workplace / "rows" / "text.jsonl").write_text('{"text": "words"}\n' * 16)
    (workplace / "base" / "tokenizer.json").write_text('{"model": {"vocab": {"w": 0}}}')  # and no template
    write_recipe()

    def command(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["run", "recipe.yaml", *words])
        out, err = capfd.readouterr()
        return code, out, err

    return command


def write_recipe(**changes: str) -> None:
    text = RECIPE
    for name, value in (DEFAULTS | changes).items():
        text = text.replace(name, value)
    Path("recipe.yaml").write_text(text)


@pytest.fixture
def chain(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same after base, sft and reward have run: they look like what such stages publish."""
    assert run("--until", "reward")[0] == 0
    for name in ("base", "sft", "reward"):
        tokenizer(RUN / name)
        config(RUN / name, "LlamaForSequenceClassification" if name == "reward" else "LlamaForCausalLM")
        edit(RUN / name, kind="sequence-classification" if name == "reward" else "causal-lm")
    edit_parents("sft", "base")
    edit_parents("reward", "sft")
    return run


def edit_parents(name: str, parent: str) -> None:
    entry = {"path": str((RUN / parent).absolute()), "weights_sha256": manifest(parent)["weights_sha256"]}
    edit(RUN / name, parents={parent: entry})


def manifest(name: str) -> dict[str, Any]:
    return json.loads((RUN / name / "manifest.json").read_text())


def adapter(folder: Path, base: Path | str, *, recorded: bool = True) -> None:
    """Make a folder an adapter on a base."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(b"adapter")
    settings = {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if recorded:
        sha256 = weights_of(Path(base), None)
        edit(folder, model={"adapter": {"base_path": str(base), "base_sha256": sha256}})


class Wrong(NamedTuple):
    """A wrong chain: how it comes about, the stage it is seen in, what the refusal says, and whether force helps."""

    plant: Callable[[], object]
    stage: str
    says: tuple[str, ...]
    words: tuple[str, ...] = ()


def other_weights() -> None:
    path = RUN / "sft" / "model.safetensors"
    path.write_bytes(path.read_bytes()[::-1])


def other_base() -> None:
    adapter(RUN / "sft", (RUN / "base").absolute())
    path = RUN / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[::-1])
    edit(RUN / "base")  # the base itself is whole: its stage ran again
    edit_parents("sft", "base")


def unmerged_base() -> None:
    adapter(Path("below"), (RUN / "base").absolute(), recorded=False)
    adapter(RUN / "sft", Path("below").absolute())


def missing_base() -> None:
    adapter(RUN / "sft", Path("base").absolute())
    Path("base").rename("elsewhere")
    write_recipe(MODEL="stage:sft")
    Path("recipe.yaml").write_text(Path("recipe.yaml").read_text().replace("model: base,", "model: elsewhere,"))


def foreign_adapter() -> None:
    adapter(Path("theirs"), Path("base").absolute(), recorded=False)
    write_recipe(MODEL="./theirs")


def other_reward_tokenizer() -> None:
    tokenizer(RUN / "reward", words=5)
    edit(RUN / "reward")


def other_reward_template() -> None:
    tokenizer(RUN / "reward", template="{{ other }}")
    edit(RUN / "reward")


def checkpoint_as_model() -> None:
    write_recipe(MODEL="runs/small/sft/checkpoint-2")
    config(RUN / "sft" / "checkpoint-2")


def unfinished_as_model() -> None:
    shutil.copytree(RUN / "sft", "half")
    Path("half/manifest.json").unlink()
    write_recipe(MODEL="./half")


def damaged_manifest() -> None:
    shutil.copytree(RUN / "sft", "broken")
    Path("broken/manifest.json").write_text("{")
    write_recipe(MODEL="./broken")


def altered_config() -> None:
    (RUN / "sft" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "rope_theta": 1e6}')


MATRIX: dict[str, Wrong] = {
    "a parent whose weights were altered": Wrong(
        other_weights, "dpo",
        ("stages.dpo.model: ", "content differs", "sft/model.safetensors: ", "run it again, --stage sft --force"),
    ),
    "a parent whose configuration was altered": Wrong(
        altered_config, "dpo",
        ("stages.dpo.model: ", "sft/config.json: ", "bytes, recorded were", "run it again, --stage sft --force"),
    ),
    "an adapter whose base is another one now": Wrong(
        other_base, "dpo", ("stages.dpo.model: ", "holds other weights than the adapter was trained on"),
    ),
    "an adapter on an adapter": Wrong(
        unmerged_base, "dpo", ("stages.dpo.model: ", "an adapter that was not merged", "alignment export"),
    ),
    "an adapter whose base is gone": Wrong(
        missing_base, "dpo", ("stages.dpo.model: ", "base is not there; put it back"),
    ),
    "somebody's adapter on a path of theirs": Wrong(
        foreign_adapter, "dpo", ("stages.dpo.model: ", "no manifest says which weights those were"),
    ),
    "a critic from a reward model with another tokenizer": Wrong(
        other_reward_tokenizer, "ppo",
        ("stages.ppo.train.critic_init: ", "has 5 ids of its own, the policy 4", "or set critic_init: policy"),
        ("--set", "stages.ppo.train.critic_init=reward"),
    ),
    "a critic from a reward model with another template": Wrong(
        other_reward_template, "ppo",
        ("stages.ppo.train.critic_init: ", "was trained with another", "or set critic_init: policy"),
        ("--set", "stages.ppo.train.critic_init=reward"),
    ),
    "a policy in another template than its own": Wrong(
        lambda: None, "dpo",
        ("stages.dpo.chat_template: zephyr, but ", "was trained with chatml; leave the key out"),
        ("--set", "stages.dpo.chat_template=zephyr"),
    ),
    "a reward model as policy": Wrong(
        lambda: write_recipe(MODEL="runs/small/reward"), "dpo",
        ("stages.dpo.model: ", "is a reward model, and a language model is needed"),
    ),
    "a language model as reward model": Wrong(
        lambda: write_recipe(REWARD="runs/small/sft"), "ppo",
        ("stages.ppo.rewards[0].model: ", "is a language model, and a reward model is needed"),
    ),
    "a checkpoint as model": Wrong(
        checkpoint_as_model, "dpo", ("stages.dpo.model: ", "is a checkpoint of an unfinished stage"),
    ),
    "an unfinished stage as model": Wrong(
        unfinished_as_model, "dpo", ("stages.dpo.model: ", "is a stage that is not finished"),
    ),
    "a stage whose manifest is damaged": Wrong(
        damaged_manifest, "dpo", ("stages.dpo.model: ", "manifest.json: damaged: not JSON"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MATRIX)
def test_a_wrong_chain_is_refused_and_force_is_recorded(name: str, chain: Callable[..., Any]) -> None:
    wrong = MATRIX[name]
    wrong.plant()
    words = ("--stage", wrong.stage, *wrong.words)
    told_by_hashes = "content differs" in wrong.says[1] or "other weights" in wrong.says[1]
    for extra in ((), *(() if told_by_hashes else (("--dry-run",),))):  # a dry run reads no weights
        code, _, err = chain(*words, *extra)
        assert code == 2, err
        assert all(says in err for says in wrong.says), err
        assert "Traceback" not in err
        assert "--force" in err
    assert not (RUN / wrong.stage / "manifest.json").exists()
    code, out, err = chain(*words, "--force")
    assert code == 0, err
    (forced,) = manifest(wrong.stage)["forced"]
    assert any(says in forced for says in wrong.says)
    assert "allowed" in out
    assert chain(*words, "--force", "--dry-run")[0] == 0


def test_a_right_chain_passes_without_a_word(chain: Callable[..., Any]) -> None:
    code, out, err = chain("--set", "stages.ppo.train.critic_init=reward", "--stage", "ppo", "--stage", "dpo")
    assert (code, err) == (0, "")
    assert "note" not in out
    assert manifest("ppo")["forced"] == manifest("dpo")["forced"] == []
    adapter(RUN / "sft", (RUN / "base").absolute())
    edit_parents("sft", "base")
    assert chain("--run", "small", "--stage", "compare", "--dry-run")[0] == 2  # dpo stood on the whole sft


def test_everything_wrong_comes_at_once(chain: Callable[..., Any]) -> None:
    other_weights()
    code, _, err = chain("--stage", "ppo", "--stage", "dpo")
    assert code == 2
    keys = [line.removeprefix("alignment: ").partition(": ")[0] for line in err.splitlines()]
    assert keys == ["stages.dpo.model", "stages.ppo.model"]


def test_a_reference_that_is_not_the_start_of_a_resumed_policy(chain: Callable[..., Any], workplace: Path) -> None:
    """The parent ran again, with the same recipe and other weights, while dpo had a checkpoint."""
    (workplace / "behave").write_text("dpo die\n")
    assert chain("--stage", "dpo")[0] == 1
    (workplace / "behave").unlink()
    other_weights()
    edit(RUN / "sft")
    code, _, err = chain("--stage", "dpo")
    assert code == 2
    assert "alignment: stages.dpo.parents.sft.weights: " in err
    assert "--allow-change KEY" in err
    code, _, _ = chain("--stage", "dpo", "--allow-change", "stages.dpo.parents.sft.weights")
    assert code == 0
    assert manifest("dpo")["forced"][0].startswith("stages.dpo.parents.sft.weights: ")


def test_a_stage_of_a_recipe_that_changed(chain: Callable[..., Any]) -> None:
    assert chain("--stage", "dpo")[0] == 0
    code, _, err = chain("--stage", "dpo", "--set", "stages.dpo.train.beta=0.3")
    assert code == 2
    assert "alignment: stages.dpo.train.beta: 0.1 -> 0.3\n" in err


def test_ppo_from_a_base_is_a_note_and_runs(chain: Callable[..., Any]) -> None:
    text = Path("recipe.yaml").read_text().replace("    model: stage:sft\n", "    model: stage:base\n")
    Path("recipe.yaml").write_text(text)
    code, out, _ = chain("--stage", "ppo")
    assert code == 0
    said = " ".join(out.split())
    assert "note stages.ppo.model: ppo starts from a base that was never instruction-tuned" in said
    assert "put an sft stage before it" in said


@pytest.mark.parametrize(
    ("start", "noted"), [("runs/small/base", True), ("runs/small/sft", False), ("hub/name", False)]
)
def test_whether_a_folder_was_instruction_tuned_is_read_from_its_manifest(
    chain: Callable[..., Any], start: str, noted: bool
) -> None:
    from alignment.pipeline.chains import cautions

    text = Path("recipe.yaml").read_text().replace("    model: stage:sft\n", f"    model: {start}\n")
    Path("recipe.yaml").write_text(text)
    assert any("instruction-tuned" in line for line in cautions(load_recipe("recipe.yaml"), "ppo")) is noted


def test_a_manifest_forged_into_a_circle_does_not_hold_the_plan(chain: Callable[..., Any]) -> None:
    from alignment.pipeline.chains import cautions

    edit(RUN / "base", fingerprint={"model": {"stage": "base"}})
    edit_parents("base", "base")
    text = Path("recipe.yaml").read_text().replace("    model: stage:sft\n", "    model: runs/small/base\n")
    Path("recipe.yaml").write_text(text)
    assert cautions(load_recipe("recipe.yaml"), "ppo") == []  # nobody knows where it began


def test_hooks_are_named_as_code_before_anything_runs(run: Callable[..., Any], workplace: Path) -> None:
    write_recipe(REWARD="stage:reward}, {name: judge, function: 'judge.py:score'")
    (workplace / "judge.py").write_text("raise SystemExit('imported by the planner')\n")
    code, out, _ = run("--dry-run")
    assert code == 0
    said = " ".join(out.split())
    assert f"runs code {workplace / 'judge.py'}:score (plain Python, unrestricted; rewards.judge)" in said
    assert said.count("runs code") == 1


def test_a_tokenizers_vocabulary_is_read_from_its_file(tmp_path: Path) -> None:
    for number, model in enumerate(({"vocab": {"a": 0, "b": 1}}, {"vocab": [["a", -1.0], ["b", -2.0]]})):
        folder = tmp_path / str(number)
        folder.mkdir()
        added = [{"id": 2, "content": "<x>"}]
        (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ a }}"}))
    one, two = vocabulary(tmp_path / "0"), vocabulary(tmp_path / "1")
    assert one == two
    assert one is not None
    assert (one.size, one.template_sha256) == (3, runs.digest("{{ a }}"))
    assert one.sha256 == runs.digest({"a": 0, "b": 1, "<x>": 2})
    assert vocabulary(tmp_path) is None
