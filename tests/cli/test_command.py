"""The command `sdnb`: exit codes, errors in one line, and what it imports."""

import os
import subprocess
import sys

import pytest

from sdnb.cli import COMMANDS, main


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 2),
        (["run"], 2),
        (["none"], 2),
        (["--help"], 0),
        *(([command, "--help"], 0) for command in COMMANDS),
        (["run", "zoo/llama", "--jobs", "0"], 1),
        (["run", "zoo/llama", "--timeout", "0"], 1),
        (["run", "zoo/llama", "-p", "modell", "x"], 1),
    ],
)
def test_exit_codes(words, code, capfd):
    assert main(words) == code
    err = capfd.readouterr().err
    assert (err == "") == (code == 0) and "Traceback" not in err
    assert code != 1 or (err.startswith("sdnb: ") and err.count("\n") == 1)


def test_help_and_summary_import_nothing_heavy(tmp_path):
    source = (
        "import sys; from sdnb.cli import main; main({}); "
        "print(sorted({{'torch', 'transformers', 'matplotlib', 'papermill', 'pandas'}} & {{*sys.modules}}))"
    )
    for words, heavy in ((["--help"], "[]"), (["summary", "--results-dir", str(tmp_path)], "['pandas']")):
        command = [sys.executable, "-c", source.format(words)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said.splitlines()[-1] == heavy, words


def test_a_reader_that_goes_away_is_no_failure():
    source = (
        "import sys; from sdnb import cli; cli._run_cache = lambda args: print('line') or 0; "
        "sys.exit(cli.main(['cache']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
