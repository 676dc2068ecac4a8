"""The small commands: what they print, what they write, what they refuse."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from lavis_mafa import __version__
from lavis_mafa.cli.main import COMMANDS, EXAMPLES, _arguments, main
from lavis_mafa.config.read import project_files


def test_ls_shows_every_yaml_with_its_first_line(capsys):
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(project_files())
    assert "mafa/quickstart/train/mafa.yaml" in project_files()
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)


def test_ls_with_a_part_shows_those_alone(capsys):
    assert main(["ls", "quickstart/train/m"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["mafa/quickstart/train/mafa.yaml"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_mistake(unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "lavis_mafa", "ls"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_the_command_takes(name, capsys):
    lines = EXAMPLES[name].strip().splitlines()
    assert [_arguments(shlex.split(re.split("lavis.mafa ", line)[-1])).command for line in lines] == [name] * len(lines)
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    said = capsys.readouterr().out
    assert f"examples:\n  {lines[0].strip()}\n" in said, "as it is typed"


def test_no_help_waits_for_what_is_slow_to_import():
    script = """
import contextlib, io, sys
from lavis_mafa.cli.main import COMMANDS, main
for name in (None, *COMMANDS):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main([*filter(None, [name]), "--help"])
print(*({"torch", "lavis", "numpy", "pyarrow", "transformers", "matplotlib"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "", done.stdout


def test_cp_into_a_folder_and_to_a_name(tmp_path, capsys):
    name = "mafa/quickstart/train/mafa.yaml"
    for target, written in ((tmp_path, tmp_path / "mafa.yaml"), (tmp_path / "own.yaml", tmp_path / "own.yaml")):
        assert main(["cp", name, str(target)]) == 0
        assert written.read_bytes() == project_files()[name].read_bytes()
        assert capsys.readouterr().out.strip() == str(written)


def test_validate_names_each_file(tmp_path, capsys):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("model: {}\n")
    assert main(["validate", "--no-files", "mafa/quickstart/train/grit.yaml", str(wrong)]) == 2
    said = capsys.readouterr()
    assert said.out == "mafa/quickstart/train/grit.yaml: fine\n"
    assert [line.split(" is missing")[0] for line in said.err.splitlines()] == [f"{wrong}: datasets", f"{wrong}: run"]


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lavis-mafa {__version__}\n"


def test_help_lists_every_command_and_each_explains_its_flags(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, text in COMMANDS.items():
        assert f"{name} {text}" in said
    flags = {"train": "--cfg-path", "evaluate": "--cfg-path", "quickstart": "--folder", "build-emoji": "--size", "cp": "target"}
    for name in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        said = capsys.readouterr().out
        assert COMMANDS[name].split(" (")[0] in " ".join(said.split()) and flags.get(name, "") in said


def test_scenes_are_built_as_told(tmp_path, capsys):
    """Each flag is the world's setting of its name."""
    flags = "--concepts 7 --unseen 2 --things 1 3 --size 32 --clutter 1 --named 1 3 --wrong 0.25"
    shares = {"relations": 0.1, "counts": 0.2, "plates": 0.3, "grounds": 0.4}
    told = [*flags.split(), *(part for name, share in shares.items() for part in (f"--{name}", str(share)))]
    assert main(["build-scenes", str(tmp_path / "new"), "--train", "8", "--test", "4", "--seed", "5", *told]) == 0
    said = capsys.readouterr().out
    assert "8 train, 4 val, 4 test, 4 unseen images" in said and "start.yaml --options" in said
    summary = json.loads((tmp_path / "new/summary.json").read_text())
    world = {"concepts": 7, "unseen": 2, "things": [1, 3], "size": 32, "clutter": 1, "named": [1, 3], "wrong": 0.25, **shares}
    assert summary["world"] == world and summary["seed"] == 5


def test_looking_around_does_not_wait_for_torch():
    code = "import sys; from lavis_mafa.cli.main import main; main(['ls']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "lavis_mafa", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"lavis-mafa {__version__}\n")


@pytest.mark.parametrize("command", ["train", "ls"])
def test_where_lavis_cannot_be_installed_that_is_one_sentence(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 13, 0, "final", 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([command]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"lavis-mafa {command}: LAVIS 1.0.2 needs Python 3.11 or older, and this is 3.13;") and said.count("\n") == 1
