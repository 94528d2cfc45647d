"""The command line: help, what is not imported, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alignment import cli
from alignment.recipe.algorithms import ALGORITHMS

COMMANDS = ("check", "run", "data", "status", "runs", "report", "verify", "chat", "export", "env")
HEAVY = ("torch", "transformers", "trl", "datasets", "deepspeed", "accelerate", "numpy", "pyarrow")
NOTICE = f"""
import sys
from alignment.cli import main
code = main(sys.argv[1:])
loaded = {{name.partition(".")[0] for name in sys.modules}} & set({HEAVY})
print("IMPORTED", *sorted(loaded), "CODE", code, file=sys.stderr)
"""


def python(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def logged_run(run: Path) -> None:
    """A run of two stages: a loss that rises, and an evaluation that has not been."""
    (run / "sft").mkdir(parents=True)
    (run / "recipe.yaml").write_text("stages: {sft: {algorithm: sft}, evaluate: {algorithm: evaluate}}\n")
    lines = [{"step": 5 * number, "loss": 1 + number / 10, "grad_norm": 1.0} for number in range(1, 13)]
    (run / "sft" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_dry_run_writes_nothing(root: Path, tmp_path: Path) -> None:
    words = ("-m", "alignment", "run", "recipes/quickstart.yaml", "--dry-run", "--runs", str(tmp_path))
    done = python(*words, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("alignment.training.launcher") == 6
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["run", "recipes/quickstart.yaml", "--dry-run", "--runs", "RUNS"],
        ["check", "recipes/quickstart.yaml", "--quick"],
        ["runs", "--runs", "RUNS"],
        ["status", "nothing", "--runs", "RUNS"],
        ["report", "nothing", "--runs", "RUNS"],
        ["report", "RUNS/logged", "--diagnose"],
        ["env"],
    ],
    ids=" ".join,
)
def test_the_login_node_commands_import_nothing_heavy(root: Path, tmp_path: Path, words: list[str]) -> None:
    logged_run(tmp_path / "logged")
    done = python("-c", NOTICE, *[word.replace("RUNS", str(tmp_path)) for word in words], cwd=root)
    last = done.stderr.splitlines()[-1]
    assert last == f"IMPORTED CODE {2 if 'nothing' in words else 0}", done.stderr


def test_help_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in text
    assert "85 preempted: start it again" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert f"\n  alignment {command}" in text, "an example"
    assert "exit codes:" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("  evaluate ")) <= 120
    if command == "check":
        assert all(f"  {name} " in text for name in ALGORITHMS)


def test_every_flag_is_explained() -> None:
    parser = cli._parser()
    commands = next(action for action in parser._actions if action.choices)
    assert isinstance(commands.choices, dict)
    for name, command in commands.choices.items():
        for action in command._actions:
            assert action.help, f"{name} {action.option_strings or action.dest}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "no.yaml"], "no.yaml"),
        (["run", "bad.yaml"], "bad.yaml:4: stages.sft.algorithm: "),
        (["check", "bad.yaml"], "bad.yaml:4: stages.sft.algorithm: "),
        (["status", "x"], "x: no such run in runs"),
        (["report", "x"], "x: no such run in runs"),
        (["report", "x", "--diagnose"], "x: no such run in runs"),
        (["chat", "x"], "x: no such run in runs"),
        (["export", "x", "out"], "x: no such run in runs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_code_2_one_line_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(
        "name: bad\nstages:\n  sft:\n    algorithm: stf\n    model: x\n    data: {train: [{path: a}]}\n"
    )
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("alignment: ")
    assert says in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_check_names_every_problem(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    write_jsonl: Callable[..., Path],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("wrong.jsonl"), [{"question": "?"}])
    Path("broken.jsonl").write_text('{"messages": [}\n')
    Path("empty.jsonl").write_text("")
    sources = "{path: wrong.jsonl}, {path: broken.jsonl}, {path: empty.jsonl}, {path: absent.jsonl}, {path: org/hub}"
    Path("recipe.yaml").write_text(
        "name: x\nchat_template: own.jinja\nmodel: ./nowhere\nstages:\n  sft:\n    algorithm: sft\n"
        f"    data: {{train: [{sources}]}}\n    batch: {{global: 8, per_device: 8}}\n"
    )
    assert cli.main(["check", "recipe.yaml", "--quick", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    starts = [
        "stages.sft.model: ./nowhere: no model folder",
        "stages.sft.chat_template: no such file: own.jinja",
        "stages.sft.data.train[0]: wrong.jsonl: columns question fit no format of messages rows",
        "stages.sft.data.train[1]: broken.jsonl:1: ",
        "stages.sft.data.train[2]: empty.jsonl: no records",
        "stages.sft.data.train[3]: absent.jsonl: no such file",
    ]
    assert len(found["problems"]) == len(starts)
    for problem, start in zip(found["problems"], starts, strict=True):
        assert problem.startswith(start)
    assert "stages.sft.data.train[4]: org/hub is a hub name, which is not downloaded here" in found["unchecked"]


def test_check_takes_rows_through_the_template(
    tmp_path: Path, data_folder: Path, tiny_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: x\nchat_template: chatml\nmodel: {tiny_policy}\nstages:\n"
        f"  sft:\n    algorithm: sft\n    data: {{train: [{{path: {data_folder}/sft.jsonl}}]}}\n"
        "    batch: {global: 8, per_device: 8}\n"
        f"  dpo:\n    algorithm: dpo\n    model: stage:sft\n"
        f"    data: {{train: [{{path: {data_folder}/preferences.jsonl}}]}}\n"
        "    batch: {global: 8, per_device: 8}\n"
    )
    assert cli.main(["check", str(recipe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    shown = [line for line in found["checked"] if "chat_template" in line]
    assert len(shown) == 2
    assert shown[0].startswith("stages.sft.chat_template: 48 rows tokenize; of the first one, 'The cat likes the ")
    assert "<|im_end|>" in shown[0]


def test_env_says_what_is_missing_for_what(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from alignment import environment

    monkeypatch.setattr(environment, "NEEDS", (("report_to: [none]", "no_such_module", False, "pip install it"),))
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"]
    assert found["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert found["missing"] == [{"what": "no_such_module", "for": "report_to: [none]", "remedy": "pip install it"}]
    assert cli.main(["env"]) == 0
    assert "missing     no_such_module, for report_to: [none]: pip install it" in capsys.readouterr().out


def test_runs_of_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", "--runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"


def test_report_says_what_the_logs_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged_run(tmp_path / "logged")
    words = ["report", "logged", "--runs", str(tmp_path), "--diagnose"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "sft: 7 rules looked at 12 logged lines, steps 5 to 60: 1 finding"
    assert printed[2] == "  warning  loss-rises, steps 5 to 60"
    assert printed[3].startswith("    shows   loss 1.15 in the first fifth, 2.15 in the last (noise ")
    assert "stages.sft.train.learning_rate" in printed[5]
    assert printed[-1] == "evaluate: no log.jsonl: nothing to judge"
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["code"]) == (str(tmp_path / "logged"), 0)
    assert [stage["stage"] for stage in found["stages"]] == ["sft", "evaluate"]
    assert found["stages"][0]["findings"][0]["rule"] == "loss-rises"
    assert cli.main(["report", str(tmp_path / "logged" / "evaluate"), "--diagnose"]) == 0
    assert capsys.readouterr().out == "evaluate: no log.jsonl: nothing to judge\n"
    (tmp_path / "logged" / "sft" / "log.jsonl").write_text("nonsense\n{}\n")
    assert cli.main(words) == 2
    assert "log.jsonl:1: damaged: no JSON object with a step" in capsys.readouterr().err


def test_report_prints_the_page_of_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "logged"
    logged_run(run)
    words = ["report", "logged", "--runs", str(tmp_path)]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"no report.md in logged: `alignment status {run}` shows how its stages stand\n"
    assert cli.main(["status", str(run)]) == 0, "the command that it names"
    capsys.readouterr()
    (run / "evaluate").mkdir()
    (run / "evaluate" / "report.md").write_text("# Evaluation of sft\n")
    assert cli.main(words) == 0
    assert capsys.readouterr().out == "# Evaluation of sft\n"
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"run": str(run), "code": 0, "reports": {"evaluate": "# Evaluation of sft\n"}}


def test_smoke_is_handed_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    called = {}
    module = types.ModuleType("alignment.training.smoke")
    module.smoke = lambda recipe, **options: called.update(recipe=recipe.name, **options) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "alignment.training.smoke", module)
    recipe = root / "recipes" / "quickstart.yaml"
    monkeypatch.chdir(root)
    assert cli.main(["run", str(recipe), "--smoke", "--launch", "--runs", str(tmp_path), "--run", "s"]) == 0
    assert (called["recipe"], called["run"], called["launch"], called["runs"]) == ("quickstart", "s", True, tmp_path)
