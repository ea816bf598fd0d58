"""What pages 06 to 11 say and draw, on planted and plain models and on records changed by hand."""

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt

from sdnb import figures, observations, report
from sdnb.loading import load
from sdnb.report.paths import code
from tests.tiny import planted_model, tiny_model

matplotlib.use("Agg")
TEXT = [f"line {word} reads a few more words" for word in ("one", "two", "three", "four", "five", "six")]
COMMON = {"text": TEXT, "max_lines": 6, "add_special_tokens": True}
SHORT = {"window": 32, "max_windows": 2}


@pytest.fixture(scope="module", params=["planted", "plain"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    if request.param == "planted":
        return True, load(str(planted_model(folder, noninitial="$").folder), device="cpu")
    return False, load(str(tiny_model(folder)), device="cpu")


def draw(figure) -> None:
    """Render a figure or the figure of axes, so that a label that is no formula shows."""
    figure = getattr(figure, "figure", figure)
    figure.canvas.draw()
    plt.close(figure)


def said(template: str, values: dict) -> str:
    return report.findings(template, values, "a/model").text


def test_06(model):
    planted, loaded = model
    found = observations.initial_tokens(loaded, **COMMON, ablation_items=384)
    text = said("06_initial_tokens", found.values)
    if planted:
        assert "Unlike in paper A, not every token explodes" in text
        assert "Without the FFN of layer 2 the share that explodes falls most, from 0.521 % to 0 %." in text
        median = {"intact_share": 0.9, "intact_norm": 100.0, "attention_zeroed_norm": [80.0, 120.0]}
        median |= {"ffn_zeroed_norm": [90.0, 5.0, None, None, None, None]}
        every = found.values | {"exploding_share": 0.95, "random_share": 0.9}
        assert "As in paper A, a token" in said("06_initial_tokens", every)
        assert "unlike there, a random embedding does so nearly as often" in said("06_initial_tokens", every)
        assert "Without the FFN of layer 2 the median norm falls most" in said(
            "06_initial_tokens", every | median
        )
    else:
        assert "No layer of this model is an explosion layer" in text and "That is a result." in text
    norms = [found.arrays[name].numpy() for name in ("norms_tokens", "norms_random", "trained")]
    draw(figures.initial_norms(*norms, found.values))
    draw(figures.ablations(found.values))


def test_07(model):
    planted, loaded = model
    found = observations.noninitial_tokens(loaded, **COMMON, top=5)
    text = said("07_noninitial_tokens", found.values)
    if planted:
        assert "`$`" in text and "That agrees with paper A" in text
    else:
        assert "None of the top items is a high-norm token" in text
    draw(figures.noninitial_norms(found.arrays["norms"].numpy(), found.values))
    draw(figures.in_context(found.arrays["in_context_norms"].numpy(), found.values))


def test_08(model, tmp_path):
    planted, loaded = model
    found = observations.explosion_subspace(loaded, **COMMON, results_dir=tmp_path)
    text = said("08_explosion_subspace", found.values)
    assert ("close to one line" in text) == planted
    draw(figures.subspace_outputs(found.arrays["output_norms"].numpy(), found.values))
    for kind, name in (("raw", "coefficients"), ("normalised", "normalised")):
        clouds = [found.arrays[f"{name}_{place}"].numpy() for place in ("first", "second")]
        draw(figures.coefficients(*clouds, found.values, kind))


def test_09(model):
    planted, loaded = model
    found = observations.interventions(loaded, **COMMON, **SHORT, new_tokens=3)
    text = said("09_interventions", found.values)
    assert "Projecting the direction out" in text and "attention zeroed: text" in text
    assert ("dimensions hold" in text) == planted
    groups = {name: dict(group) for name, group in found.values["interventions"].items()}
    for name in groups:
        groups[name]["perplexity"] = 10.0 if name == "none" else 30.0
    assert "as paper A says" in said("09_interventions", found.values | {"interventions": groups})
    for name in groups:
        groups[name]["perplexity"] = 10.0
    assert "The text hardly suffers" in said("09_interventions", found.values | {"interventions": groups})
    curves = [found.arrays[name].numpy() for name in ("first_norms", "other_norms")]
    draw(figures.intervention_norms(*curves, found.values))


def dynamics(counts: list[int], angles: list[float | None]) -> dict:
    """Values of a record 10 over four steps."""
    return {
        "steps": [0, 100, 1000, 5000], "names": list("abcd"), "peak_ratio": [1.0, 6.0, 20.0, 30.0],
        "explosion_layers": [[], [3], [2], [2, 4]], "high_norm_count": counts, "angle_to_final_deg": angles,
        "first_state_angle_deg": [80.0, 40.0, 5.0, 0.0], "state_layer": 2, "sink_rate": [0.0, 0.1, None, 0.5],
        "loss": [8.0, 6.0, 4.0, 3.0], "random_angle_deg": 85.0,
    }  # fmt: skip


def test_10():
    settled = dynamics([0, 4, 8, 8], [None, 50.0, 3.0, 0.0])
    text = said("10_training_dynamics", settled)
    assert "high-norm token is step 100" in text and "From step 1,000 on" in text
    slow = settled | {"steps": [0, 100, 4000, 5000]}
    assert "turns until late" in said("10_training_dynamics", slow)
    late = dynamics([0, 4, 8, 8], [None, 50.0, 30.0, 0.0])
    assert "does not settle" in said("10_training_dynamics", late)
    assert "No checkpoint has" in said("10_training_dynamics", dynamics([0] * 4, [None] * 4))
    draw(figures.training(settled))
    draw(figures.explosion_map(settled, 6))


def test_11():
    values = {
        "names": ["base", "chat", "other"], "angle_deg": [0.0, 2.5, None], "random_angle_deg": 85.0,
        "pair_angle_deg": [[0.0, 2.5, None], [2.5, 0.0, None], [None, None, None]],
        "explosion_layers": [[2], [2], []], "decay_layers": [[5], [5], []], "peak_ratio": [60.0, 55.0, 2.0],
        "high_norm_count": [5, 5, 0],
    }  # fmt: skip
    text = said("11_fine_tuning", values)
    assert "Within 10° of `base`: `chat`." in text and "without a direction: `other`" in text
    draw(figures.pair_angles(values))
    curves = np.ones((3, 7))
    draw(figures.norm_curves(curves, curves, values))


def test_code_is_safe_in_a_table():
    assert code("a|b") == "`a\\|b`" and code("`") == "`` ` ``" and code("a\nb") == "`a\\nb`"
