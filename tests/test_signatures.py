"""Signatures: both kinds of evidence against slow references, copies that are related, others not."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sdnb
from sdnb.decompose import angle_deg, log10_chance
from sdnb.errors import ParameterError
from sdnb.signatures import (
    Signature,
    _log10_permutation_chance,
    _resampled_mean,
    _shared_tokens,
    alignment,
    compare_signatures,
    related_groups,
    signature,
    signature_command,
)
from tests.tiny import planted_model, tiny_model, tiny_tokenizer

LINES = [f"the module number {n} provides a class for {n * n} objects" for n in range(20)]
ZOO = Path(__file__).resolve().parents[1] / "zoo"
FAMILY = ("llama", "llama-code", "llama-chat", "llama-steps/step-004000", "llama-steps/step-008000")
UNRELATED = ("llama-seed2", "llama-batch8k", "neox", "gpt2")


def unit(vector: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vector, dim=-1)


def drawn(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(d: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(drawn(d, d, seed=seed))[0]


def measured(loaded) -> Signature:
    return signature(loaded, sdnb.encode(loaded, max_lines=30, add_special_tokens=False))


@pytest.fixture(scope="module")
def zoo():
    """The signature of every model of the zoo, by its name."""
    found = {name: measured(sdnb.load(str(ZOO / name))) for name in (*FAMILY, *UNRELATED)}
    return {name: dataclasses.replace(one, name=name) for name, one in found.items()}


# --- the numbers


def test_resampled_radius_is_that_of_a_plain_loop():
    states = drawn(60, 8) + 3
    line = torch.arange(60) % 15
    direction, radius = _resampled_mean(states, line, 16, 5)
    mean = states.double().mean(dim=0)
    assert float(angle_deg(direction, mean)) < 1e-4
    angles = []
    for draw in torch.randint(16, (2000, 16), generator=torch.Generator().manual_seed(6)).tolist():
        chosen = torch.cat([states[line == number] for number in draw]).double()
        angles.append(float(angle_deg(chosen.mean(dim=0), mean)))
    assert radius == pytest.approx(sorted(angles)[1900], rel=0.15)
    assert _resampled_mean(states[:1].expand(60, 8), line, 16, 0)[1] < 1e-5


@pytest.mark.parametrize(("exponent", "share"), [(0.0, 1e-3), (0.5, 1e-3), (1.0, 0.05), (2.0, 0.1)])
def test_permutation_chance_is_that_of_drawn_permutations(exponent, share):
    d, draws, generator = 64, 60_000, torch.Generator().manual_seed(3)
    a = unit((torch.arange(d) + 1.0).double() ** -exponent)  # coordinates that fall as a power
    order = torch.rand(draws, d, generator=generator).argsort(dim=1)
    signs = torch.randint(2, (draws, d), generator=generator) * 2 - 1
    cosines = (a * signs * a[order]).sum(dim=1).abs()
    cosine = torch.quantile(cosines, 1 - share).item()
    seen = (cosines >= cosine - 1e-12).double().mean().item()
    found = 10 ** _log10_permutation_chance(a, a.flip(0), math.degrees(math.acos(min(cosine, 1.0))))
    assert 0.6 < found / seen < 1.7


def test_permutation_chance_of_few_axes_and_of_none():
    axis, pair = torch.eye(500)[7], unit(torch.eye(500)[3] + torch.eye(500)[4])
    assert 10 ** _log10_permutation_chance(axis, axis, 0.0) == pytest.approx(1 / 500)
    assert 10 ** _log10_permutation_chance(pair, pair, 0.0) == pytest.approx(1 / (500 * 499), rel=1e-6)
    assert _log10_permutation_chance(axis, axis, 90.0) == 0.0
    for angle in (70.0, 80.0, 88.0):
        found = _log10_permutation_chance(drawn(500), drawn(500), angle)
        assert found == pytest.approx(log10_chance(angle, 500), rel=0.15, abs=0.02)


def test_alignment_is_the_procrustes_overlap():
    A = drawn(200, 6)
    B = 0.5 * drawn(200, 6, seed=1) + A @ rotation(6, 2)
    found = alignment(A, B)
    a, b = (unit(E - E.mean(0)).double() for E in (A, B))

    def overlap(R):
        return ((a @ R) * b).sum().item() / (a.norm() * b.norm()).item()

    R = found.rotation.double()
    assert overlap(R) == pytest.approx(found.value, rel=1e-5)
    assert torch.allclose(R @ R.T, torch.eye(6).double(), atol=1e-5)
    for seed in range(50):  # no other rotation does better, near or far
        Q = rotation(6, seed).double()
        near = torch.linalg.qr(R + 0.05 * Q)[0]
        near = near * torch.sign(torch.diagonal(near.T @ R))
        assert overlap(Q) < found.value and overlap(near) < found.value + 1e-6
    assert found.shuffled < 0.4 < found.value


def test_alignment_of_copies_in_other_bases_and_widths():
    A, direction, Q = drawn(300, 16) * torch.linspace(0.1, 2, 16), drawn(24), rotation(24, 1)
    found = alignment(A, 3.0 * A @ Q[:16] + 5.0)  # another width, another scale, another mean
    assert found.value == pytest.approx(1.0, abs=1e-4) and found.rotation.shape == (16, 24)
    assert float(angle_deg(found.rotation @ direction, Q[:16] @ direction)) < 0.1
    assert found.beyond_shuffled == pytest.approx(1.0, abs=1e-3)


# --- one against another, on vectors

SPREAD, OTHER = unit(drawn(128, seed=9)), drawn(1200, 128, seed=1)


def made(direction=None, embedding=None, radius=0.0, **more) -> Signature:
    known = {
        "name": "a", "kind": "all", "count": 5, "output_embedding": None, "output_gain": torch.ones(128),
        "tokenizer": vocabulary(1200), "text_hash": "x",
        "direction": None if direction is None else unit(direction), "radius_deg": radius,
        "embedding": drawn(1200, 128) if embedding is None else embedding,
    }  # fmt: skip
    return Signature(**(known | more))


def vocabulary(size: int) -> SimpleNamespace:
    return SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(size)})


def at(degrees: float, base: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A direction at an angle to a unit vector."""
    other = drawn(len(base), seed=seed)
    other = unit(other - (other @ base) * base)
    return math.cos(math.radians(degrees)) * base + math.sin(math.radians(degrees)) * other


def test_direction_rests_on_the_chance_at_the_far_end_of_the_uncertainty():
    base = made(SPREAD)

    def says(angle, radius=0.0, **options):
        row = compare_signatures(base, made(at(angle, SPREAD), OTHER, radius), **options)
        assert row["angle_deg"] == pytest.approx(angle, abs=1e-3)
        assert row["chance_log10"] == max(row["isotropic_log10"], row["permutation_log10"])
        return row["direction"]

    limit = next(
        angle for angle in range(90)
        if max(log10_chance(angle, 128), _log10_permutation_chance(SPREAD, SPREAD, angle)) > -6
    )  # fmt: skip
    assert says(limit - 3) == "related" and says(limit + 3) == "no sign of a relation"
    assert says(limit - 3, radius=6.0) == says(limit + 3, radius=6.0) == "undecided"
    assert says(limit + 3, chance=0.5) == "related"
    assert compare_signatures(base, made(-SPREAD))["angle_deg"] < 1e-3, "a direction has no sign"
    with pytest.raises(ParameterError):
        compare_signatures(base, base, chance=2.0)


def test_massive_coordinates_alone_relate_nobody():
    axis = torch.eye(128)[5]
    first, second = made(at(7, axis, seed=1)), made(at(7, axis, seed=2), OTHER)
    row = compare_signatures(first, second)
    assert row["angle_deg"] < 12 and row["isotropic_log10"] < -80
    assert row["permutation_log10"] == pytest.approx(-math.log10(128), abs=0.3)
    assert first.massive.keys() == second.massive.keys() == {5} and row["beyond_massive_deg"] > 60
    assert row["verdict"] == "no sign of a relation"
    row = compare_signatures(first, made(at(0.5, first.direction), OTHER))
    assert row["direction"] == "related" and row["beyond_massive_deg"] < 10


def test_evidence_against_evidence_is_undecided():
    base, Q = made(SPREAD), rotation(128, 4)
    agree = compare_signatures(base, made(at(5, SPREAD)))
    assert agree["verdict"] == agree["direction"] == agree["embeddings"] == "related"
    direction_only = compare_signatures(base, made(at(5, SPREAD), OTHER))
    assert (direction_only["direction"], direction_only["verdict"]) == ("related", "undecided")
    embeddings_only = compare_signatures(base, made(at(88, SPREAD)))
    assert (embeddings_only["embeddings"], embeddings_only["verdict"]) == ("related", "undecided")
    rotated = compare_signatures(base, made(Q @ SPREAD, base.embedding @ Q.T))
    assert rotated["verdict"] == "related" and rotated["direction"] == "no sign of a relation"
    assert rotated["carried_angle_deg"] < 0.5
    flat = made(SPREAD, base.embedding - (base.embedding @ SPREAD)[:, None] * SPREAD)
    row = compare_signatures(flat, made(Q @ SPREAD, flat.embedding @ Q.T))
    assert row["alignment"] > 0.99 and row["carried_angle_deg"] is None, "no rotation of that axis is told"


def test_what_is_missing_leaves_gaps():
    row = compare_signatures(made(SPREAD), made(radius=None, name="silent"))
    assert row["angle_deg"] is row["carried_angle_deg"] is row["direction"] is None
    assert row["verdict"] == row["embeddings"] == "related" and "silent" in row["note"]
    few = {"radius": None, "tokenizer": vocabulary(40)}  # 40 tokens fit any 40 others
    row = compare_signatures(made(**few), made(None, OTHER, **few))
    assert row["shuffled_alignment"] > 0.7 and row["embeddings"] is None
    assert row["verdict"] == "not comparable" and row["shared_tokens"] == 40


def test_output_embeddings_count_where_the_input_ones_do_not_tell():
    base, gain = made(SPREAD, output_embedding=OTHER), torch.linspace(0.2, 3, 128)
    noise = drawn(1200, 128, seed=7)
    other = made(at(10, SPREAD), noise, output_embedding=OTHER / gain, output_gain=gain)
    row = compare_signatures(base, other)
    assert row["alignment_beyond_shuffled"] < 0.1 and row["output_alignment"] > 0.99
    assert row["embeddings"] == row["verdict"] == "related"


def test_groups_are_chains():
    related = {("a", "c"), ("c", "d")}
    pairs = [{"first": a, "second": b, "verdict": "related" if (a, b) in related else "undecided"}
             for a, b in itertools.combinations("abcd", 2)]  # fmt: skip
    assert related_groups("abcd", pairs) == [1, 2, 1, 1] and related_groups("a", []) == [1]


# --- tokens


def metaspace(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that writes a space as SentencePiece does, and whose decoder strips the first one."""
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<s>", "a", "▁a", *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def test_tokens_of_different_tokenizers_are_matched_by_their_text():
    byte_level = tiny_tokenizer(384)
    other = metaspace(["▁the", "the", "▁zebra", "é", "s"])
    first = made(tokenizer=byte_level, embedding=torch.zeros(384, 128))
    second = made(tokenizer=other, embedding=torch.zeros(len(other), 128))
    rows, other_rows = _shared_tokens(first, second)
    pairs = zip(byte_level.convert_ids_to_tokens(rows), other.convert_ids_to_tokens(other_rows), strict=True)
    found = {ours.replace("Ġ", "▁"): theirs for ours, theirs in pairs}
    assert {"▁the", "a", "s", "▁a"} <= found.keys()
    assert all(ours == theirs for ours, theirs in found.items())
    assert "▁zebra" not in found and "<s>" not in found
    same = _shared_tokens(first, dataclasses.replace(first, embedding=torch.zeros(300, 128)))
    assert torch.equal(*same) and len(same[0]) == 300, "rows that both have"


# --- models


def test_signature_of_a_planted_model(tmp_path):
    truth = planted_model(tmp_path / "planted", "gpt2", d=64, f=64, layers=4, decay_layer=4)
    loaded = sdnb.load(str(truth.folder))
    found = signature(loaded, sdnb.encode(loaded, LINES, add_special_tokens=False))
    assert float(angle_deg(found.direction, truth.direction)) < 5
    assert found.count >= 20 and found.embedding.shape == (384, 64) and found.output_embedding is None
    plain = sdnb.load(str(tiny_model(tmp_path / "plain", "llama")))
    nothing = signature(plain, sdnb.encode(plain, LINES, add_special_tokens=False))
    assert nothing.direction is None and nothing.count == 0 and nothing.massive == {}
    norm = plain.model.model.norm.weight
    assert torch.allclose(nothing.output_gain, norm, atol=1e-5)
    assert not any(p.requires_grad for p in plain.model.parameters())


def test_zoo_is_told_apart(zoo):
    pairs = [compare_signatures(a, b) for a, b in itertools.combinations(zoo.values(), 2)]
    groups = dict(zip(zoo, related_groups(list(zoo), pairs), strict=True))
    assert [groups[name] for name in FAMILY] == [1] * len(FAMILY)
    assert len({groups[name] for name in UNRELATED} | {1}) == 5
    for row in pairs:
        family = {row["first"], row["second"]} <= set(FAMILY)
        assert row["verdict"] == ("related" if family else "no sign of a relation")
        assert row["direction"] == row["embeddings"] == row["verdict"], "both kinds of evidence agree"
        assert (row["alignment"] > 0.8) == family and (family or 0.35 < row["alignment"] < 0.5)


@torch.no_grad()
def in_other_coordinates(loaded, R):
    """The same function with its gains folded into what reads the norms, and its residual stream times R."""
    copy = sdnb.load(loaded.name)
    model = copy.model.model
    norms = [(model.norm, [copy.model.lm_head])]
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        norms.append((layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        norms.append((layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.copy_(R.T @ writer.weight)
    for norm, readers in norms:
        for reader in readers:
            reader.weight.copy_((reader.weight * norm.weight) @ R)
        norm.weight.fill_(1)
    model.embed_tokens.weight.copy_(model.embed_tokens.weight @ R)
    return copy


@pytest.mark.parametrize("kind", ["permuted", "rotated"])
def test_copies_in_other_coordinates_are_related(zoo, kind):
    llama, R = sdnb.load("zoo/llama"), rotation(128, 0)
    if kind == "permuted":
        R = torch.eye(128)[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    copy = in_other_coordinates(llama, R)
    ids = torch.arange(40)[None]
    assert torch.allclose(copy.model(ids).logits, llama.model(ids).logits, atol=1e-3), "the same function"
    found = measured(copy)
    for name, limit in (("llama", 0.1), ("llama-chat", 10), ("llama-code", 20)):
        row = compare_signatures(zoo[name], found)
        assert row["direction"] != "related" and row["angle_deg"] > 60
        assert row["verdict"] == "related" and row["carried_angle_deg"] < limit
        assert row["alignment"] > 0.97 and row["output_alignment"] > 0.9
    for name in UNRELATED:
        assert compare_signatures(zoo[name], found)["verdict"] == "no sign of a relation"


def test_command_names_everyone(capsys):
    models = ["zoo/llama", "zoo/llama-chat", "zoo/gpt2"]
    options = {"models": models, "text": LINES, "max_lines": 20, "chance": 1e-6}
    assert signature_command(SimpleNamespace(json=True, **options)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["groups"] == [1, 1, 2] and len(found["pairs"]) == 3
    signature_command(SimpleNamespace(json=False, **options))
    text = capsys.readouterr().out
    assert all(name in text for name in models)
    with pytest.raises(sdnb.ModelError):
        signature_command(SimpleNamespace(json=True, **(options | {"models": ["zoo/llama", "/no/such"]})))
