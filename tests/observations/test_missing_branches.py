"""Layers without an FFN, and FFNs that write nothing: gaps in 03 and 04, no crash, no made-up direction."""

import matplotlib
import pytest
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from sdnb import figures, observations
from sdnb.anatomy import decoder_layers
from sdnb.errors import LayerRefused, ModelError
from sdnb.loading import load
from sdnb.records import SCHEMAS
from sdnb.records.schema import check_arrays, check_values
from sdnb.report import findings
from tests.tiny import planted_model

D, LAYERS, GAP = 32, 4, 2  # the third layer's FFN is the one that is missing
TEXT = ["line one reads a few more words", "line two reads a few more words"]
COMMON = {"text": TEXT, "max_lines": 2, "add_special_tokens": True}


class AttentionOnly(LlamaDecoderLayer):
    """x + attention(norm(x))."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]


def without_ffn(layer):
    layer.__class__ = AttentionOnly
    del layer.mlp, layer.post_attention_layernorm


def with_silent_ffn(layer):
    layer.mlp.down_proj.weight.zero_()


@pytest.fixture(scope="module", params=[without_ffn, with_silent_ffn])
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted") / "planted"
    planted_model(folder, d=D, f=64, layers=LAYERS, decay_layer=4)
    loaded = load(str(folder), device="cpu")
    request.param(decoder_layers(loaded.model)[GAP])
    return loaded


def checked(template, found):
    """The values as a record would hold them; NaN, for one, is refused."""
    sizes = {"L": LAYERS, "d": D}
    check_arrays(SCHEMAS[template], {name: tuple(a.shape) for name, a in found.arrays.items()}, sizes)
    return check_values(SCHEMAS[template], found.values, sizes)


def test_05_has_no_ledger_where_a_layer_is_refused(tmp_path):
    planted_model(tmp_path / "planted", d=D, f=64, layers=LAYERS, decay_layer=4)
    loaded = load(str(tmp_path / "planted"), device="cpu")
    decoder_layers(loaded.model)[GAP].self_attn.o_proj.weight.zero_()
    found = observations.negative_eigenvalues(loaded, **COMMON, results_dir=tmp_path)
    values = checked("05_negative_eigenvalues", found)
    assert list(values["refused"]) == [str(GAP + 1)] and holds_a_gap(values, "eigenvalue")
    assert values["ledger_attention"] is None and values["ledger_end"] is None
    figures.eigenpairs(values)
    plt.close("all")
    assert "ledger" not in findings("05_negative_eigenvalues", values, "m").text


def holds_a_gap(values, key):
    return [entry is None for entry in values[key]] == [layer == GAP for layer in range(LAYERS)]


def test_08_refuses_a_layer_without_an_ffn(loaded, tmp_path):
    with pytest.raises(LayerRefused, match="writes nothing, so it has no explosion subspace"):
        observations.explosion_subspace(loaded, **COMMON, explosion_layer=GAP + 1, results_dir=tmp_path)


def test_14_and_15_refuse_a_record_about_no_matrix(tmp_path):
    planted_model(tmp_path / "planted", d=D, f=64, layers=LAYERS, decay_layer=4)
    loaded = load(str(tmp_path / "planted"), device="cpu")
    for parameter in decoder_layers(loaded.model)[GAP].parameters():
        if parameter.ndim == 2:
            parameter.data[1:] = 0  # what is left has one singular value, and no bulk
    with pytest.raises(ModelError, match="choose other `layers`"):
        observations.weight_spectra(loaded, layers=[GAP + 1])
    with pytest.raises(ModelError, match="choose other `layers`"):
        observations.singular_vectors(loaded, **COMMON, layers=[GAP + 1], results_dir=tmp_path)


def test_03_has_gaps_where_there_is_no_ffn(loaded):
    found = observations.linearity(loaded, **COMMON, max_states=16, sample_layer=GAP + 1, sample_counts=[200])
    values = checked("03_linear_layers", found)
    names = [f"ffn{scale}{inputs}" for scale in ("", "_gain") for inputs in ("", "_gaussian")]
    assert all(holds_a_gap(values, f"{name}_{what}") for name in names for what in ("cosine", "error"))
    assert min(values["attention_cosine"]) > 0.999 and values["layer_error"][GAP] < 1e-3
    figures.linearity(values)
    plt.close("all")
    assert "none" not in findings("03_linear_layers", values, "m").text


def test_04_has_gaps_where_there_is_no_ffn(loaded, tmp_path):
    found = observations.singular_directions(loaded, **COMMON, starts=2, results_dir=tmp_path)
    values = checked("04_singular_directions", found)
    keys = ("ffn_angle_deg", "ffn_singular_value", "ffn_second_singular_value", "gain_angle_deg", "gain")
    assert all(holds_a_gap(values, key) for key in keys)
    assert None not in values["angle_deg"] and values["status"] == ["exact"] * LAYERS
    for name in ("ffn_directions", "gain_inputs", "gain_outputs"):
        assert [bool(row.any()) for row in found.arrays[name]] == [layer != GAP for layer in range(LAYERS)]
    figures.singular_directions(values)
    plt.close("all")
    text = findings("04_singular_directions", values | {"decay_layers": [GAP + 1]}, "m").text
    assert f"| F, at decay layers | layer {GAP + 1}: none" in text
