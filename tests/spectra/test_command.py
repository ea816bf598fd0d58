"""`sdnb spectra` on a decoder and on an encoder; other commands keep refusing encoders."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from sdnb import load
from sdnb.cli.main import main
from sdnb.errors import ModelError
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    config = AutoConfig.for_model(
        "bert",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=384,
    )
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_table_of_a_decoder_with_random_weights(tmp_path, capsys):
    folder = tiny_model(tmp_path / "plain", "gpt_neox", d=48, f=160)
    assert main(["spectra", str(folder), "--layers", "1", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split() for line in lines if line[:2].isdigit()}
    assert set(table) == {
        f"{layer}.{kind}" for layer in ("01", "03") for kind in ("q", "k", "v", "o", "up", "down")
    }
    assert table["01.q"][1] == "48x48" and table["01.q"][5] == "hard"
    assert table["03.up"][1] == "160x48" and table["03.up"][5] == "0"


def test_json_of_an_encoder(encoder, capsys):
    assert main(["spectra", str(encoder), "--json"]) == 0
    matrices = json.loads(capsys.readouterr().out)["matrices"]
    assert len(matrices) == 12
    assert matrices["02.down"]["shape"] == [32, 64]


def test_a_layer_that_is_not_there_is_refused(tmp_path, capsys):
    assert main(["spectra", str(tiny_model(tmp_path / "plain")), "--layers", "9"]) == 1
    assert "has layers 1 to 3" in capsys.readouterr().err


def test_an_encoder_is_taken_only_where_asked_for(encoder):
    with pytest.raises(ModelError, match="no causal decoder"):
        load(str(encoder))
    assert load(str(encoder), encoders=True).model.config.model_type == "bert"
