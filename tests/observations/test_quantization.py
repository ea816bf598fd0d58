"""12 on models with a spike planted by hand: what hurts, what gives it back, and what the record says."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sdnb.activations import perplexity
from sdnb.errors import ParameterError, TextError
from sdnb.figures import input_spikes, layer_errors, quantized_perplexity
from sdnb.loading import load
from sdnb.observations import Observation, quantization
from sdnb.observations.measures import text_ids
from sdnb.quantize import Scheme, quantized
from sdnb.records import SCHEMAS
from sdnb.records.schema import check_values
from sdnb.report import findings
from tests.tiny import planted_model, tiny_model, tiny_tokenizer

TEXT = [f"the module number {n} provides a class for {n * n} objects of type {n + 7}" for n in range(60)]
SETTINGS = {
    "text": TEXT,
    "max_tokens": 512,
    "window": 64,
    "calibration_windows": 4,
    "add_special_tokens": True,
}


def sharpened(folder):
    """The planted model made to lean on the spoilt modules, with a head in which errors show.

    Ordinary columns of the two down-projections grow tenfold, and the head is fitted by least squares to the
    next token of the text, on the model's own last states.
    """
    truth = planted_model(folder, "llama", d=64, f=128, layers=4, decay_layer=4, size=2000.0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(tiny_tokenizer()("\n\n".join(TEXT), add_special_tokens=False).input_ids)[: 63 * 20]
    windows = torch.cat([torch.zeros(20, 1, dtype=torch.long), ids.reshape(20, 63)], dim=1)
    with torch.no_grad():
        for layer in (truth.explosion_layer, truth.decay_layer):
            model.model.layers[layer - 1].mlp.down_proj.weight[:, 1:] *= 10  # column 0 is the planted unit
        states = model.model(windows, use_cache=False).last_hidden_state[:, :-1].reshape(-1, 64)
        targets = torch.nn.functional.one_hot(windows[:, 1:].flatten(), 384).float()
        model.lm_head.weight.copy_(8 * torch.linalg.lstsq(states, targets).solution.T)
    model.save_pretrained(folder)
    return truth


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> tuple[Observation, object, object]:
    truth = sharpened(tmp_path_factory.mktemp("planted"))
    loaded = load(str(truth.folder))
    return quantization(loaded, **SETTINGS), truth, loaded


def row_of(values, method, skip, static=False, weights="tensor", number_format="int8") -> dict:
    wanted = {
        "method": method, "skip": skip, "static": static, "weights": weights, "number_format": number_format,
    }  # fmt: skip
    [row] = [row for row in values["rows"] if all(row[key] == value for key, value in wanted.items())]
    return row


def test_record_fits_its_schema_and_lists_every_scheme(case):
    values = case[0].values
    check_values(SCHEMAS["12_quantization"], values, {"L": 4})
    assert len(values["rows"]) == 1 + 4 * 3 + 2 * 2
    assert values["rows"][0]["method"] == "none" and values["rows"][0]["kept_share"] == 1.0
    assert values["window"] == 64 and values["predicted_tokens"] == (512 // 63) * 63
    assert values["calibration_windows"] == 4 and not values["calibration_overlaps"]
    assert case[0].begin_token is True


def test_detected_modules_are_the_planted_ones(case):
    result, truth, _ = case
    down = {f"model.layers.{n - 1}.mlp.down_proj" for n in (truth.explosion_layer, truth.decay_layer)}
    assert set(result.values["spiking_modules"]) == down
    for skip in ("paper", "detected"):
        assert set(row_of(result.values, "rtn", skip)["skipped"]) == down
    assert result.values["explosion_layers"] == [truth.explosion_layer]


def test_quantizing_everything_hurts_and_the_skip_list_gives_it_back(case):
    values = case[0].values
    intact = values["rows"][0]["perplexity"]
    for method in ("rtn", "smoothquant"):
        for static in (False, True):
            hurt = row_of(values, method, "none", static)["perplexity"] - intact
            kept = row_of(values, method, "detected", static)["perplexity"] - intact
            assert hurt > 0.02 * intact, "the spike costs perplexity"
            assert kept < 0.3 * hurt, "keeping two modules gives most of it back"
    finer = row_of(values, "rtn", "none", weights="channel")["perplexity"] - intact
    assert abs(finer) < 0.3 * (row_of(values, "rtn", "none")["perplexity"] - intact)


def test_error_arises_at_the_planted_layers(case):
    result, truth, _ = case
    errors, kept = result.values["layer_error"], result.values["layer_error_skipped"]
    assert errors[truth.explosion_layer - 1] > 2 * kept[truth.explosion_layer - 1]
    assert errors[0] == pytest.approx(kept[0], rel=1e-6), "before the explosion nothing differs"


def test_rows_are_the_perplexities_themselves(case):
    result, _, loaded = case
    ids = text_ids(loaded, TEXT, False)[0][: (512 // 63) * 63]
    assert (
        result.values["rows"][0]["perplexity"]
        == perplexity(loaded.model, ids, window=64, begin_token=0).value
    )
    row = row_of(result.values, "rtn", "detected")
    with quantized(loaded.model, Scheme(), skip=row["skipped"]) as names:
        assert row["perplexity"] == perplexity(loaded.model, ids, window=64, begin_token=0).value
    sizes = {n: m.weight.numel() for n, m in loaded.model.named_modules() if isinstance(m, torch.nn.Linear)}
    sizes.pop("lm_head")
    share = sum(sizes[name] for name in row["skipped"]) / sum(sizes.values())
    assert row["kept_share"] == pytest.approx(share) and len(names) == len(sizes) - 2


def test_pictures_and_words_come_from_the_record(case):
    values = case[0].values
    import matplotlib.pyplot as plt

    figure, axes, errors = input_spikes(values), quantized_perplexity(values), layer_errors(values)
    tops = [max(line.get_ydata()) for line in figure.axes[0].lines if len(line.get_ydata()) > 2]
    assert max(tops) == pytest.approx(max(row["token_ratio"] for row in values["linear_inputs"]))
    drawn = [y for line in axes.lines if line.get_linestyle() == "None" for y in line.get_ydata()]
    assert sorted(drawn) == sorted(row["perplexity"] for row in values["rows"][1:])
    assert list(errors.lines[0].get_ydata()) == pytest.approx([100 * e for e in values["layer_error"]])
    plt.close("all")
    said = findings("12_quantization", values, "planted").text
    assert "hurts" in said and "10.18, 59.38" in said and "of the loss of round-to-nearest" in said
    assert all(f"`{name}`" in said for name in values["spiking_modules"])


def test_a_model_without_spikes_is_a_result(tmp_path):
    loaded = load(str(tiny_model(tmp_path, "gpt2", d=64, layers=2)))
    values = quantization(loaded, **SETTINGS).values
    check_values(SCHEMAS["12_quantization"], values, {"L": 2})
    assert values["spiking_modules"] == [] and values["high_norm_tokens"] == []
    none, paper, detected = (row_of(values, "rtn", skip) for skip in ("none", "paper", "detected"))
    assert none["perplexity"] == paper["perplexity"] == detected["perplexity"]
    assert "No module of this model spikes" in findings("12_quantization", values, "plain").text


def test_calibration_takes_another_text_or_says_that_it_overlaps(case):
    _, _, loaded = case
    short = {"text": TEXT[:20], "max_tokens": None, "window": 64, "calibration_windows": 2}
    assert quantization(loaded, **short).values["calibration_overlaps"]
    other = quantization(loaded, calibration_text=TEXT[30:], **short)
    assert (
        not other.values["calibration_overlaps"]
        and other.text_hash != quantization(loaded, **short).text_hash
    )
    assert other.begin_token is False
    with pytest.raises(ParameterError, match="alpha"):
        quantization(loaded, alpha=2.0, **short)


def test_a_text_shorter_than_one_window_is_one_window(case):
    _, _, loaded = case
    short = {"text": ["a few words, and then a few more"], "window": 64}
    every, some = (quantization(loaded, max_tokens=count, **short).values for count in (None, 512))
    assert every == some and every["calibration_overlaps"]
    assert every["predicted_tokens"] == len(text_ids(loaded, short["text"], False)[0]) - 1


def test_a_calibration_text_that_was_asked_for_is_never_replaced(case):
    _, _, loaded = case
    with pytest.raises(TextError, match=r"calibration_text.*63 tokens"):
        quantization(loaded, calibration_text=["a few words"], **SETTINGS)


def test_weights_that_are_not_in_memory_are_refused_before_anything_is_read(tmp_path):
    loaded = load(str(tiny_model(tmp_path, "llama", layers=2)), device="offload")
    with pytest.raises(ParameterError, match=r"in memory.*device=cpu"):
        quantization(loaded, text="/no/such/file.txt")
