"""Signatures of planted models: kinship, its uncertainty, what is stored, and what is refused."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from sdnb.cli.main import main
from sdnb.cli.signature import _power
from sdnb.decompose import angle_deg
from sdnb.decompose.chance import log10_chance
from sdnb.errors import ModelError, ParameterError, RecordError
from sdnb.loading import load
from sdnb.observations import lineage, signature, signatures, stored_signature
from sdnb.observations.robustness import fine_tuned, noisy
from sdnb.observations.signatures import Facts, Signature, bootstrap, compare, grouping
from sdnb.records.signatures import read_signature
from tests.tiny import planted_model, tiny_model, tiny_tokenizer

LINES = [f"the module number {n} provides a class for {n * n} objects" for n in range(20)]
READING = {"text": LINES, "max_lines": 20}


def planted(folder, seed=0, **more):
    """A GPT-2 shape in which every first token explodes."""
    return planted_model(folder, "gpt2", seed=seed, d=64, f=64, layers=4, decay_layer=4, **more)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A model, a descendant of it whose weights are a little off, a stranger, and one of another width."""
    root = tmp_path_factory.mktemp("family")
    truth = planted(root / "parent")
    model = AutoModelForCausalLM.from_pretrained(truth.folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(root / "child")
    tiny_tokenizer().save_pretrained(root / "child")
    planted(root / "stranger", seed=7)
    planted_model(root / "wide", "gpt2", d=96, f=64, layers=4, decay_layer=4)
    tiny_model(root / "plain", "gpt2", d=64)
    return root, truth


def test_is_the_planted_direction(family):
    root, truth = family
    found = signature(load(str(root / "parent")), **READING)
    assert float(angle_deg(found.direction, truth.direction)) < 5
    assert found.facts.states >= 20 and found.facts.hidden_size == 64 and found.facts.layers == 4
    assert found.direction.norm() == pytest.approx(1.0, abs=1e-5)


def test_descendants_are_told_from_strangers(family, tmp_path):
    root, _ = family
    names = [str(root / name) for name in ("parent", "stranger", "child")]
    values, angles, _ = lineage(names, results_dir=tmp_path, **READING)
    verdicts = {(row["first"], row["second"]): row["verdict"] for row in values["pairs"]}
    assert verdicts[names[0], names[2]] == "related"
    assert verdicts[names[0], names[1]] == verdicts[names[1], names[2]] == "no sign of kinship"
    assert values["groups"] == [1, 2, 1]
    assert abs(values["order"].index(0) - values["order"].index(2)) == 1
    assert angles[0, 2] < 10 and angles[0, 1] > 60 and torch.equal(angles, angles.T)
    assert all("the same weights" not in row["note"] for row in values["pairs"])


def test_a_stored_signature_spares_the_model(family, tmp_path, monkeypatch):
    root, _ = family
    name = str(root / "parent")
    first = stored_signature(name, results_dir=tmp_path, **READING)
    [path] = tmp_path.rglob("signature.safetensors")
    assert path.stat().st_size < 6000
    _, facts, provenance = read_signature(path)
    assert provenance["fingerprint"] == facts["fingerprint"] and provenance["versions"]["torch"]
    monkeypatch.setattr(
        "sdnb.observations.kinship.load", lambda *_, **__: pytest.fail("the model was loaded")
    )
    again = stored_signature(name, results_dir=tmp_path, **READING)
    moved = stored_signature(str(path), results_dir=tmp_path / "elsewhere")
    for other in (again, moved):
        assert torch.equal(first.direction, other.direction) and first.facts == other.facts
    monkeypatch.undo()
    calls = []
    monkeypatch.setattr("sdnb.observations.kinship.load", lambda *a, **k: calls.append(a) or load(*a, **k))
    stored_signature(name, results_dir=tmp_path, text=LINES, max_lines=19)
    (root / "parent" / "model.safetensors").touch()
    stored_signature(name, results_dir=tmp_path, **READING)
    stored_signature(name, results_dir=tmp_path, fresh=True, **READING)
    assert len(calls) == 3, "another text, a changed checkpoint, and asked for"


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(RecordError, match="no signature"):
        read_signature(path)
    path.write_bytes(b"nothing")
    with pytest.raises(RecordError):
        read_signature(path)
    from safetensors.torch import save_file

    save_file({"direction": torch.ones(3)}, path)
    with pytest.raises(RecordError, match="no stored signature"):
        read_signature(path)


def made(direction, radius=0.0, **facts) -> Signature:
    known = {
        "name": "a", "kind": "all", "radius_deg": radius, "states": 5, "hidden_size": len(direction),
        "layers": 4, "tokenizer": "t", "fingerprint": str(id(direction)), "text_hash": "x", "settings": {},
    }  # fmt: skip
    return Signature(torch.nn.functional.normalize(direction, dim=0), Facts(**(known | facts)))


def at(degrees: float, d: int = 128) -> torch.Tensor:
    vector = torch.zeros(d)
    vector[0], vector[1] = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return vector


def test_verdict_rests_on_the_chance_at_the_far_end_of_the_uncertainty():
    base = made(at(0))
    row = compare(base, made(at(30)))
    assert row["verdict"] == "related" and row["angle_deg"] == pytest.approx(30, abs=1e-3)
    assert row["chance_log10"] == pytest.approx(log10_chance(30, 128), rel=1e-4)
    limit = next(a for a in range(90) if log10_chance(a, 128) > -6)
    assert compare(base, made(at(limit - 2)))["verdict"] == "related"
    assert compare(base, made(at(limit - 2), radius=5.0))["verdict"] == "undecided"
    assert compare(base, made(at(limit + 2)))["verdict"] == "no sign of kinship"
    assert compare(base, made(at(limit + 2), radius=5.0))["verdict"] == "undecided"
    assert compare(base, made(-at(30)))["verdict"] == "related", "a direction has no sign"
    assert compare(base, made(at(limit + 2)), chance=0.5)["verdict"] == "related"


def test_what_differs_is_said():
    base = made(at(0))
    row = compare(base, made(at(3), tokenizer="u", layers=5, text_hash="y", kind="initial"))
    assert row["verdict"] == "related"
    for word in ("tokenizers", "4 and 5 layers", "different texts", "initial"):
        assert word in row["note"]
    assert compare(base, base)["chance_log10"] is None and "the same weights" in compare(base, base)["note"]
    row = compare(base, made(at(0, 64)))
    assert row["verdict"] == "not comparable" and row["angle_deg"] is None and "128 and 64" in row["note"]


@pytest.mark.parametrize(
    ("log10", "text"),
    [(-134.4, "4e-135"), (-6.0, "1e-6"), (-5.01, "1e-5"), (0.0, "1e0"), (-math.inf, "0")],
)
def test_a_chance_is_written_as_a_number(log10, text):
    assert _power(log10) == text


def test_groups_are_chains_of_related_models():
    names = ["a", "b", "c", "d"]
    rows = {
        ("a", "b"): 80.0,
        ("a", "c"): 5.0,
        ("a", "d"): 50.0,
        ("b", "c"): 81.0,
        ("b", "d"): None,
        ("c", "d"): 8.0,
    }
    related = {("a", "c"), ("c", "d")}
    pairs = [{"angle_deg": v, "verdict": "related" if k in related else "no"} for k, v in rows.items()]
    angles, groups, order = grouping(names, pairs)
    assert (
        groups == [1, 2, 1, 1] and angles[1, 3] == -1 and angles[2, 3] == 8 and sorted(order) == [0, 1, 2, 3]
    )
    assert grouping(["a"], [])[1:] == ([1], [0])


def test_bootstrap_radius_is_that_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(60, 8, generator=generator) + 3
    line = torch.arange(60) % 15
    direction, radius = bootstrap(states, line, 16, seed=5)
    mean = states.double().mean(dim=0)
    assert float(angle_deg(direction, mean)) < 1e-4
    draws = torch.randint(16, (2000, 16), generator=torch.Generator().manual_seed(6))
    angles = []
    for draw in draws:
        chosen = [states[line == number] for number in draw.tolist()]
        angles.append(float(angle_deg(torch.cat(chosen).double().mean(dim=0), mean)))
    assert radius == pytest.approx(sorted(angles)[1900], rel=0.15)
    same = states[:1].expand(60, 8)
    assert bootstrap(same, line, 16, seed=0)[1] < 1e-5, "states that do not depend on the line leave no doubt"


def test_models_without_high_norm_tokens_and_other_widths_are_named(family, tmp_path, capsys):
    root, _ = family
    names = [str(root / name) for name in ("parent", "plain", "wide")]
    values, angles, _ = lineage(names, results_dir=tmp_path, **READING)
    assert values["names"] == [names[0], names[2]] and "no high-norm token" in values["left_out"][names[1]]
    assert values["pairs"][0]["verdict"] == "not comparable" and angles[0, 1] == -1
    text = tmp_path / "text.txt"
    text.write_text("\n".join(LINES), encoding="utf-8")
    words = ["signature", *names, "--text", str(text), "--max-lines", "20", "--results-dir", str(tmp_path)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "not comparable" in out and "left out" in out and "widths 64 and 96" in out
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["angle_deg"][0][1] is None and found["names"] == values["names"]
    assert main([*words, "--chance", "2"]) == 1
    with pytest.raises(ParameterError):
        lineage([], results_dir=tmp_path)


def test_all_names_are_checked_before_the_first_is_measured(family, tmp_path, monkeypatch):
    root, _ = family
    measured = []
    monkeypatch.setattr("sdnb.observations.kinship.stored_signature", lambda *a, **k: measured.append(a))
    with pytest.raises(ModelError, match="no folder"):
        lineage([str(root / "parent"), str(root / "nobody")], results_dir=tmp_path)
    with pytest.raises(ModelError, match="no folder /no/such"):
        lineage("/no/such", results_dir=tmp_path)
    assert measured == []


def test_robustness_is_measured_and_the_model_is_left_alone(family, tmp_path):
    root, _ = family
    name = str(root / "parent")
    result = signatures(
        [name], results_dir=tmp_path, base=name, noise_levels=(0.0, 0.05), tuning_steps=(1, 2), **READING
    )
    rows = result.values["robustness"]
    assert [row["change"] for row in rows] == ["noise"] * 2 + ["quantization"] * 3 + ["fine-tuning"] * 2
    assert rows[0]["angle_deg"] < 1e-3 < rows[1]["angle_deg"] < 45
    assert all(row["angle_deg"] is not None and row["angle_deg"] < 60 for row in rows)
    assert rows[5]["angle_deg"] <= rows[6]["angle_deg"]
    assert result.arrays["angle_deg"].shape == (1, 1)


def test_noise_and_fine_tuning_restore_and_copy(family):
    root, _ = family
    loaded = load(str(root / "parent"))
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    with pytest.raises(ZeroDivisionError), noisy(loaded.model, 0.1, seed=0):
        changed = [name for name, p in loaded.model.named_parameters() if not torch.equal(p, before[name])]
        assert changed and all(before[name].ndim >= 2 for name in changed)
        raise ZeroDivisionError
    [(steps, tuned)] = fine_tuned(loaded, LINES, (3,), learning_rate=1e-3, seed=0)
    assert steps == 3 and any(not torch.equal(p, before[n]) for n, p in tuned.model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in loaded.model.named_parameters())
    assert not any(p.requires_grad for p in loaded.model.parameters())
