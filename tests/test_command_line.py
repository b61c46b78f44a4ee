"""``python -m fused_dropout``: help, versions, mistakes and an output that cannot be written."""

import subprocess
import sys

import pytest
import torch

import fused_dropout as fd
from fused_dropout.__main__ import COMMANDS, main


def ended(capsys, *arguments):
    """Exit status, standard output and standard error of a command that argparse ends."""
    with pytest.raises(SystemExit) as ending:
        main(arguments)
    return ending.value.code, *capsys.readouterr()


def test_help(capsys):
    status, text, _ = ended(capsys, "--help")
    assert status == 0
    for command in COMMANDS:
        assert f"\n    {command}" in text
    status, nothing, same = ended(capsys)
    assert (status, nothing, same) == (2, "", text)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command, capsys):
    status, text, _ = ended(capsys, command, "--help")
    assert status == 0
    assert text.startswith(f"usage: python -m fused_dropout {command} ")
    assert "--json" in text or command == "check"


def test_version(capsys):
    assert ended(capsys, "--version") == (0, f"fused_dropout {fd.__version__}, torch {torch.__version__}\n", "")


def test_a_typing_error(capsys):
    status, _, text = ended(capsys, "chek")
    assert status == 2
    assert "invalid choice: 'chek' (choose from " in text


@pytest.mark.skipif(sys.platform != "linux", reason="the device that is always full is Linux's")
@pytest.mark.parametrize("argument", ["info", "--help"])
def test_output_that_cannot_be_written(argument, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # so that the output is written at the end
    command = [sys.executable, "-W", "ignore", "-m", "fused_dropout", argument]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "fused_dropout: the output could not be written: No space left on device\n"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as cut_off:
        cut_off.stdout.close()
        assert cut_off.stderr.read() == ""
