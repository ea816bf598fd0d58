"""zoo/smollm2, the real model in a package's GGUF file, and what is known of it; some by other means."""

import json
from importlib.metadata import PackageNotFoundError, distribution

import numpy as np
import pytest
import torch

import sdnb
from sdnb.checkpoint import zoo_folder

POINTER = json.loads((zoo_folder() / "smollm2" / "pointer.json").read_text(encoding="utf-8"))
SENTENCE = "The quick brown fox jumps over the lazy dog."
EXPLOSION = 12


def installed() -> bool:
    try:
        return distribution(POINTER["package"]).locate_file(POINTER["file"]).is_file()
    except PackageNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not installed(), reason=f"{POINTER['package']} is not installed (make setup)")


@pytest.fixture(scope="module")
def lm():
    """Loaded through the user's own cache, where it is converted once."""
    return sdnb.load("zoo/smollm2", device="cpu")


def test_it_is_the_model_of_its_card(lm):
    config = lm.model.config
    assert (lm.hidden_size, lm.layer_count, config.vocab_size) == (576, 30, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (9, 3, 1536)
    assert config.tie_word_embeddings and not hasattr(config, "quantization_config")
    assert (lm.format, lm.file_hash) == ("gguf Q4_1", POINTER["sha256"])
    assert (lm.name, lm.title, lm.slug) == ("zoo/smollm2", "zoo/smollm2", "zoo__smollm2")
    card = (zoo_folder() / "smollm2" / "README.md").read_text(encoding="utf-8")
    assert all(str(value) in card for value in POINTER.values())


def test_it_speaks(lm):
    text = sdnb.encode(lm, ["The capital of France is"])
    assert (text.begin_token, text.unusual) == (False, None)  # its tokenizer adds none
    assert sdnb.token_labels(lm, text.lines[0]) == ["The", "␣capital", "␣of", "␣France", "␣is"]
    with torch.inference_mode():
        best = lm.model(text.lines[0][None]).logits[0, -1].argmax()
    assert sdnb.token_labels(lm, [best]) == ["␣Paris"]


def test_its_rounding_noise_is_the_measured_one(lm):
    matrices = {name: weight for name, weight in lm.model.named_parameters() if weight.ndim > 1}
    assert set(lm.rounding_noise) == set(matrices)
    down = "model.layers.11.mlp.down_proj.weight"
    share = lm.rounding_noise[down] / matrices[down].square().mean().sqrt()
    assert float(share) == pytest.approx(0.083, abs=0.002)
    for name, edge, smallest, inside in (
        (down, 1.05, 1.66, 0),
        ("model.layers.11.self_attn.q_proj.weight", 0.88, 0.0, 0.17),
        ("model.layers.11.self_attn.o_proj.weight", 0.64, 0.0, 0.18),
    ):
        values = torch.linalg.svdvals(matrices[name])
        band = lm.rounding_noise[name] * sum(side**0.5 for side in matrices[name].shape)
        assert band == pytest.approx(edge, abs=0.01)
        assert float(values.min()) == pytest.approx(smallest, abs=0.01)
        assert float((values < band).float().mean()) == pytest.approx(inside, abs=0.01)


@pytest.mark.slow
def test_its_defect_is_the_same_on_one_sentence_and_on_one_token_repeated(lm):
    sentence = sdnb.find_defect(lm, sdnb.encode(lm, [SENTENCE]))
    repeated = sdnb.find_defect(lm, sdnb.encode(lm, ["a" * 400]))
    for found in (sentence, repeated):
        assert found.explosion_layers == [12, 3]
        assert {29, 30, 10} <= {*found.decay_layers} <= {29, 30, 10, 11}
        largest = {layer: int(mean.abs().argmax()) for layer, mean in found.by_layer.items()}
        assert largest == {12: 507, 3: 507}
    assert repeated.high_norm.all() and sentence.high_norm.sum() == 2


# --- three numbers of the book by plain transformers and numpy: nothing of the package but the weights


@pytest.fixture(scope="module")
def states(lm):
    """h_0 to h_29 of the sentence and h_30 behind the final norm, (31, T, d)."""
    ids = lm.tokenizer(SENTENCE, return_tensors="pt").input_ids
    with torch.no_grad():
        found = lm.model(ids, output_hidden_states=True).hidden_states
    return np.stack([state[0].double().numpy() for state in found])


def test_norm_of_the_first_token(lm, states):
    norms = np.linalg.norm(states[:-1], axis=-1)
    assert norms[EXPLOSION, 0] > 100 * norms[EXPLOSION - 1, 0]
    assert norms[EXPLOSION, 0] > 100 * np.median(norms[EXPLOSION])
    line = sdnb.encode(lm, [SENTENCE])
    ours = sdnb.hidden_norms(lm.model, line.lines[0][None])[:-1, 0].numpy()
    np.testing.assert_allclose(ours, norms, rtol=1e-4)


def test_angle_of_the_leading_left_singular_vector(lm, states):
    """L = (I + F)(I + A) of layer 12, its expectations by Gauss-Hermite quadrature, a full SVD."""
    layer = lm.model.model.layers[EXPLOSION - 1]
    weights = {name: p.detach().double().numpy() for name, p in layer.named_parameters()}
    g1, g2 = weights["input_layernorm.weight"], weights["post_attention_layernorm.weight"]
    heads, groups = lm.model.config.num_attention_heads, lm.model.config.num_key_value_heads
    d = len(g1)
    V = weights["self_attn.v_proj.weight"].reshape(groups, -1, d)
    V = V.repeat(heads // groups, axis=0).reshape(-1, d)
    A = weights["self_attn.o_proj.weight"] @ V * g1
    w, v = weights["mlp.gate_proj.weight"], weights["mlp.up_proj.weight"]
    s = np.linalg.norm(w, axis=1)
    z, share = np.polynomial.hermite_e.hermegauss(120)
    share = share / share.sum()
    silu = s[:, None] * z / (1 + np.exp(-s[:, None] * z))  # silu(s z), (f, nodes)
    second = (share * (z**2 - 1) * silu).sum(1) * (w * v).sum(1) / s**2
    B = second[:, None] * w + (share * silu).sum(1)[:, None] * v
    F = weights["mlp.down_proj.weight"] @ B * g2
    L = (np.eye(d) + F) @ (np.eye(d) + A)
    u = np.linalg.svd(L)[0][:, 0]
    direction = states[EXPLOSION, 0]
    angle = np.degrees(np.arccos(abs(u @ direction) / np.linalg.norm(direction)))
    assert angle == pytest.approx(6.1, abs=0.2)
    linear = sdnb.linear_layer(sdnb.layer_view(lm, EXPLOSION))
    ours = sdnb.leading_triplets(linear.L, k=1).U[:, 0].double().numpy()
    assert abs(ours @ u) > 1 - 1e-5


def test_the_massive_dimension_to_zero_and_to_its_mean(lm):
    """One entry of one token's state behind layer 12, overwritten by a hook of three lines."""
    text = sdnb.encode(lm, "heldout", whole=True, max_tokens=128).lines[0][None]

    def loss(value: float) -> float:
        def overwrite(module, args, state):
            state = state.clone()
            state[:, 0, 507] = value
            return state

        with lm.model.model.layers[EXPLOSION - 1].register_forward_hook(overwrite), torch.no_grad():
            return lm.model(text, labels=text).loss.item()

    with torch.no_grad():
        plain = lm.model(text, labels=text, output_hidden_states=True)
    sign, intact = np.sign(plain.hidden_states[EXPLOSION][0, 0, 507].item()), plain.loss.item()
    assert abs(loss(sign * 22_500.0) - intact) < 0.02 and loss(0.0) > intact + 3
