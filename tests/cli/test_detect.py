"""`sdnb detect` from end to end: table, JSON, a model without high-norm tokens, and what is no decoder."""

import json

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from sdnb.activations import hidden_norms
from sdnb.cli.main import main
from sdnb import token_labels
from sdnb.loading import load
from sdnb.observations.inspection import Inspection, inspect_lines
from tests.tiny import planted_model, tiny_model, tiny_tokenizer

LINES = "\n".join(f"the module number {n} provides a class for {n} objects" for n in range(12))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text(LINES, encoding="utf-8")
    return str(path)


def values_of(capsys, *words) -> dict:
    assert main(["detect", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_finds_what_was_planted(tmp_path, text, capsys):
    truth = planted_model(tmp_path / "model", "llama", layers=12, explosion_layer=2, decay_layer=12)
    capsys.readouterr()
    values = values_of(capsys, str(truth.folder), "--text", text)
    assert values["explosion_layers"] == [truth.explosion_layer]
    assert values["decay_layers"] == [truth.decay_layer]
    [begin] = values["high_norm_tokens"]
    assert begin["token_id"] == 0 and begin["position"] == "first" and begin["count"] == 12
    assert begin["peak_norm"] == pytest.approx(truth.peak_norm, rel=0.1)
    down = [f"model.layers.{n}.mlp.down_proj" for n in (truth.explosion_layer - 1, truth.decay_layer - 1)]
    assert set(values["spiking_modules"]) == set(down)
    assert values["skip_list"] == [*values["spiking_modules"], "lm_head"]
    assert all(form == values["skip_list"] for form in values["forms"].values())
    assert set(values["forms"]) == {"modules_to_not_convert", "llm_int8_skip_modules", "ignore"}
    assert len(values["linear_inputs"]) == 12 * 7
    assert values["token_count"] > 12 and values["layer_count"] == 12


def test_table_says_the_same(tmp_path, text, capsys):
    truth = planted_model(tmp_path / "model", "llama")
    assert main(["detect", str(truth.folder), "--text", text]) == 0
    out = capsys.readouterr().out
    assert f"explosion layers   {truth.explosion_layer}\n" in out
    assert f"decay layers       {truth.decay_layer}\n" in out
    assert f"  model.layers.{truth.explosion_layer - 1}.mlp.down_proj\n" in out and "  lm_head\n" in out
    assert token_labels(tiny_tokenizer(), [0])[0] in out
    assert "30 more" in out and "by token decides, from 32 on" in out
    assert main(["detect", str(truth.folder), "--text", text, "--all"]) == 0
    assert "more with smaller ratios" not in capsys.readouterr().out


def test_massive_dimensions_stand_five_times_above_the_rms():
    state = torch.ones(200)
    state[[17, 150]] = torch.tensor([-40.0, 60.0])  # the rms is 5.2, five times that is 26
    state[30] = 20.0
    seen = Inspection(None, None, None, None, state, {}, None)
    total = float((state**2).sum())
    assert seen.massive_dimensions() == [
        {"dimension": 150, "value": 60.0, "share": pytest.approx(3600 / total)},
        {"dimension": 17, "value": -40.0, "share": pytest.approx(1600 / total)},
    ]


def test_a_model_without_high_norm_tokens_says_so_and_succeeds(tmp_path, text, capsys):
    folder = tiny_model(tmp_path / "model", "llama")
    assert main(["detect", str(folder), "--text", text]) == 0
    out = capsys.readouterr().out
    assert "no high-norm token" in out and "  lm_head" in out
    values = values_of(capsys, str(folder), "--text", text)
    assert values["high_norm_tokens"] == [] and values["skip_list"] == ["lm_head"]
    assert values["explosion_layers"] == [] and values["massive_dimensions"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["detect", "x", "--threshold", "-3"], "--threshold -3: give a positive norm, or leave it out"),
        (["spectra", "x", "--rate", "2"], "--rate 2: give a probability between 0 and 1"),
    ],
)
def test_an_option_out_of_range_is_named(words, message, capsys):
    assert main(words) == 1
    assert message in capsys.readouterr().err


def test_an_encoder_is_refused_in_one_line(tmp_path, capsys):
    config = BertConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["detect", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "decoder" in captured.err or "causal" in captured.err


def test_the_threshold_of_the_list_is_a_parameter(tmp_path, text, capsys):
    folder = tiny_model(tmp_path / "model", "llama", layers=2)
    capsys.readouterr()
    values = values_of(capsys, str(folder), "--text", text, "--min-ratio", "1.01")
    assert len(values["spiking_modules"]) > 5 and values["skip_threshold"] == 1.01
    assert main(["detect", str(folder), "--text", text, "--min-ratio", "0.5"]) == 1
    assert "threshold of the skip list" in capsys.readouterr().err


def test_statistics_and_norms_come_from_one_pass(tmp_path):
    loaded = load(str(planted_model(tmp_path, "llama").folder))
    lines = [torch.tensor([0, 7, 8, 9, 10, 11]), torch.tensor([0, 12, 13]), torch.tensor([0, 5, 6, 7, 8, 9])]
    seen = inspect_lines(loaded, lines)
    expected = torch.cat([hidden_norms(loaded.model, line[None])[:, 0] for line in lines], dim=1)
    torch.testing.assert_close(seen.norms, expected, rtol=1e-4, atol=1e-4)
    assert seen.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert seen.detection.high_norm.nonzero().flatten().tolist() == [0, 6, 9]
