"""The command `sdnb`: exit codes, errors in one line, what it imports, and the spectra."""

import json
import os
import subprocess
import sys

import pytest

from sdnb import load
from sdnb.cli import COMMANDS, main
from sdnb.errors import ModelError
from tests.templates import encoder
from tests.tiny import tiny_model


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
        (["spectra", "zoo/llama", "--rate", "2"], 1),
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


@pytest.mark.parametrize("command", ["detect", "spectra", "signature"])
def test_commands_take_what_messages_name(command, tmp_path, monkeypatch, capfd):
    asked = []

    def refuse(name, **options):
        asked.append(options)
        raise ModelError("that is all")

    monkeypatch.setattr("sdnb.loading.load", refuse)
    monkeypatch.setattr("sdnb.signatures.load", refuse)
    folder = tiny_model(tmp_path / "tiny", layers=1)
    assert main([command, str(folder), "--allow-pickle", "--trust-remote-code", "--dtype", "float32"]) == 1
    assert asked[0]["allow_pickle"] and asked[0]["trust_remote_code"] and asked[0]["dtype"] == "float32"


def test_spectra_of_a_decoder_with_random_weights(tmp_path, capsys):
    folder = tiny_model(tmp_path / "plain", "gpt_neox", d=48, f=160)
    assert main(["spectra", str(folder), "--layers", "1", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split() for line in lines if line[:2].isdigit()}
    kinds = ("q", "k", "v", "o", "up", "down")
    assert set(table) == {f"{layer}.{kind}" for layer in ("01", "03") for kind in kinds}
    assert table["01.q"][1] == "48x48" and table["01.q"][5] == "hard"
    assert table["03.up"][1] == "160x48" and table["03.up"][5] == "0"


def test_spectra_of_an_encoder_as_json(tmp_path, capsys):
    folder = encoder(tmp_path / "bert")
    assert main(["spectra", str(folder), "--json"]) == 0
    matrices = json.loads(capsys.readouterr().out)["matrices"]
    assert len(matrices) == 12 and matrices["02.down"]["shape"] == [32, 64]
    with pytest.raises(ModelError, match="no causal decoder"):
        load(str(folder))


def test_a_layer_that_is_not_there_is_refused(tmp_path, capsys):
    assert main(["spectra", str(tiny_model(tmp_path / "plain")), "--layers", "9"]) == 1
    assert "layers 1 to 3" in capsys.readouterr().err
