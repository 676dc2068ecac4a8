"""What a tab gives, in a bash of its own that has argcomplete's function."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from lavis_mafa.cli.main import COMMANDS
from lavis_mafa.config.read import project_files

argcomplete = pytest.importorskip("argcomplete")
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@pytest.fixture
def tab(tmp_path):
    """What the shell offers after a line."""
    command = tmp_path / "lavis-mafa"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m lavis_mafa "$@"\n')
    command.chmod(0o755)
    function = argcomplete.shellcode([str(command)])
    ask = f'COMP_LINE="$1" COMP_POINT=${{#1}} COMP_TYPE=9; _python_argcomplete {command}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    (tmp_path / "here").mkdir()

    def tab(line: str) -> list[str]:
        call = ["bash", "-c", f"{function}\n{ask}", "bash", line]
        done = subprocess.run(call, cwd=tmp_path / "here", capture_output=True, text=True, timeout=60)
        assert not done.stderr
        return [word.strip() for word in done.stdout.splitlines() if word.strip()]

    return tab


def test_commands_flags_and_choices(tab):
    assert set(COMMANDS) <= set(tab("lavis-mafa "))
    assert tab("lavis-mafa count") == ["count-false-negatives"]
    assert tab("lavis-mafa train --re") == ["--resume"]
    assert tab("lavis-mafa count-false-negatives --same-image ") == ["count", "exclude"]
    assert tab("lavis-mafa no-such --") == ["--help", "--version"]


def test_a_yaml_is_a_shipped_one_by_name_or_a_file(tab, tmp_path):
    (tmp_path / "here/my.yaml").touch()
    (tmp_path / "here/my.jsonl").touch()
    assert {*project_files(), "my.yaml"} == set(tab("lavis-mafa train --cfg-path "))
    assert tab("lavis-mafa cp mafa/quickstart/scenes/mafa") == ["mafa/quickstart/scenes/mafa.yaml"]
    assert tab("lavis-mafa validate m") == [*sorted(["my.yaml", *project_files()], key=lambda name: name != "my.yaml")]


def test_python_m_is_completed_too(tab, tmp_path):
    """argcomplete's function for all commands asks a module whether it answers, by the mark in its first lines."""
    call = [sys.executable, "-m", "argcomplete._check_module", "lavis_mafa"]
    assert subprocess.run(call, timeout=60).returncode == 0
    line = "python -m lavis_mafa pla"
    script = (
        f"COMP_LINE='{line}' COMP_POINT={len(line)} _ARGCOMPLETE=3 _ARGCOMPLETE_SUPPRESS_SPACE=1 {sys.executable} -m lavis_mafa 8>&1"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("plan", "")
