"""`sdnb detect` against planted truth and slow references, on every kind of model that it may be given."""

import json
from contextlib import ExitStack

import pytest
import torch

from sdnb import encode, hidden_states, load
from sdnb.cli import main
from sdnb.inspection import MULTIPLES, inspect_model, report
from sdnb.quantize.skip_lists import TOOLS
from tests.tiny import build, planted_model, save, tiny_model

LINES = [f"the module number {n} provides a class for {n} objects" + " of it" * (n % 3) for n in range(12)]
CHAT = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A planted model, loaded, its truth, and what is said of it."""
    folder = tmp_path_factory.mktemp("planted")
    truth = planted_model(folder, "llama", layers=6, explosion_layer=2, decay_layer=6)
    loaded = load(str(truth.folder))
    return loaded, truth, inspect_model(loaded, LINES)


def check_report(values: dict) -> None:
    """It is text that a terminal holds, and the values are JSON."""
    json.dumps(values, allow_nan=False)
    for everything in (False, True):
        text = report(values, everything)
        assert "None" not in text and "nan" not in text
    assert len(report(values).splitlines()) <= 60


def test_finds_what_was_planted(planted):
    _, truth, values = planted
    assert values["explosion_layers"] == [truth.explosion_layer]
    assert values["decay_layers"] == [truth.decay_layer]
    [begin] = values["high_norm_tokens"]
    assert (begin["token_id"], begin["position"], begin["count"]) == (0, "first", 12)
    assert begin["peak_norm"] == pytest.approx(truth.peak_norm, rel=0.1)
    assert values["high_norm_kinds"] == {"begin token": 12}
    assert values["begin_token"] and values["add_special_tokens"] and values["begin_token_note"] is None
    down = {f"model.layers.{n - 1}.mlp.down_proj" for n in (truth.explosion_layer, truth.decay_layer)}
    assert set(values["spiking_modules"]) == down and values["fused_modules"] == []
    assert values["skip_list"] == [*values["spiking_modules"], "lm_head"]
    assert values["masking"]["first_positions"] == values["masking"]["tokens"] == 12
    assert values["masking"]["high_norm_states_taken"] > 0.9 and values["masking"]["later"] == {}
    assert values["first_float16_overflow"] is None and values["left_out"] == {}
    check_report(values)


def test_layers_and_inputs_are_those_of_a_loop_over_lines(planted):
    loaded, _, values = planted
    lines, modules = encode(loaded, LINES).lines, dict(loaded.model.named_modules())
    inputs: dict[str, list] = {row["module"]: [] for row in values["linear_inputs"]}
    with ExitStack() as hooks:
        for name, kept in inputs.items():
            hook = lambda m, args, y, kept=kept: kept.append(args[0][0].clone())  # noqa: E731
            hooks.enter_context(modules[name].register_forward_hook(hook))
        states = [hidden_states(loaded.model, line[None])[:, 0] for line in lines]
    for number, row in enumerate(values["layers"], start=1):
        norms = torch.cat([s[number] for s in states]).double().norm(dim=1)
        entry, where = row["largest_entry"], torch.stack([s[number].abs().max() for s in states]).argmax()
        at = states[where][number]
        t, j = divmod(int(at.abs().argmax()), at.shape[1])
        assert (entry["line"], entry["position"], entry["dimension"]) == (int(where), t, j)
        assert entry["value"] == pytest.approx(at[t, j].item(), rel=1e-4)
        assert entry["token_id"] == int(lines[where][t])
        for k in MULTIPLES:
            share = (norms > k * norms.median()).double().mean().item()
            assert row["above_medians"][str(k)] == pytest.approx(share, abs=1e-6)
    for row in values["linear_inputs"]:
        x = inputs[row["module"]][row["line"]][row["position"]]
        largest = max(kept.abs().max().item() for kept in inputs[row["module"]])
        assert abs(x[row["dimension"]].item()) == pytest.approx(largest, rel=1e-4)
        assert row["largest_input"] == pytest.approx(largest, rel=1e-4)


def test_single_weight_cache_and_sinks(planted):
    _, truth, values = planted
    found, sinks, cache = values["single_weight"], values["sinks"], values["cache"]
    assert found["chosen"]["layer"] == truth.explosion_layer and found["chosen"]["column"] == 0
    assert found["chosen"]["row"] == int(truth.direction.abs().argmax())
    assert found["zero"]["peak_norm"] < 0.99 * found["intact"]["peak_norm"]
    assert found["others_zero"]["count"] == 100 and found["intact"]["ratio"] == 1
    assert len(sinks["heads"]) == 6 and len(sinks["heads"][0]) == 4
    assert sinks["rate"] == pytest.approx(sum(sinks["layer_rates"]) / 6)
    assert [row["kept"] for row in cache["kept"]] == ["nothing", "first position"]
    assert cache["front_ids"] == [0]


def test_measured_list_gives_back_what_it_costs():
    values = inspect_model(load("zoo/llama"), max_tokens=1024, costs=False, measure=["int8 tensor", "nvfp4"])
    [row, block] = values["measured"]["schemes"]
    assert row["nothing"]["ratio"] > 1.02 and values["spiking_modules"] == ["model.layers.4.mlp.down_proj"]
    assert row["recovered_list"] > 0.7 > 0.3 > row["recovered_random"]
    assert block["scheme"] == "nvfp4" and 0 < block["kept_share"] < 1
    ranked = values["sensitivity"]
    assert ranked["shortest"][0] == values["spiking_modules"][0] and ranked["recovered"] >= 0.8
    assert set(ranked["forms"]) == set(TOOLS)
    check_report(values)


def test_a_real_model():
    values = inspect_model(load("zoo/smollm2"), costs=False)
    assert values["explosion_layers"] == [12, 3] and values["decay_layers"] == [29, 30, 10, 11]
    assert values["masking"]["first_positions"] == values["line_count"] == 64
    top = max(values["massive_dimensions"], key=lambda row: row["share"])
    assert top["dimension"] == 507 and top["share"] > 0.9
    listed = [f"model.layers.{number}.mlp.down_proj" for number in (11, 28, 2, 9, 1)]
    assert values["spiking_modules"] == listed
    check_report(values)


def test_float16_overflow_is_foreseen_and_explained(tmp_path, capsys):
    truth = planted_model(tmp_path, "llama", size=1e6)
    values = inspect_model(load(str(truth.folder)), LINES)
    assert values["first_float16_overflow"] == truth.explosion_layer and values["float16_share"] > 1
    check_report(values)
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES))
    assert main(["detect", str(truth.folder), "--text", str(path), "--dtype", "float16"]) == 1
    error = capsys.readouterr().err
    assert f"layer {truth.explosion_layer}" in error and "65,504" in error


def test_a_model_without_high_norm_tokens(tmp_path):
    values = inspect_model(load(str(tiny_model(tmp_path))), LINES)
    assert values["high_norm_tokens"] == values["massive_dimensions"] == values["explosion_layers"] == []
    assert values["skip_list"] == ["lm_head"] and values["masking"] is None
    assert "chosen" not in values["single_weight"] and values["cache"]["front"] == []
    check_report(values)
    ranked = inspect_model(load(str(tmp_path)), LINES, costs=False, measure=["int8 tensor"])
    assert "list" not in ranked["measured"]["schemes"][0] and ranked["sensitivity"]["gains"]
    check_report(ranked)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_an_expert_scaled_by_hand_is_named(tmp_path, family):
    model = build(family, layers=2, vocabulary=384)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3] *= 200
    values = inspect_model(load(str(save(model, tmp_path, 384))), LINES)
    assert values["super_experts"] == ["model.layers.1.mlp.experts.3"] and len(values["experts"]) == 8
    check_report(values)


def test_an_offloaded_model_is_read_and_not_quantized(tmp_path, planted, capsys):
    truth = planted[1]
    values = inspect_model(load(str(truth.folder), device="offload"), LINES)
    same = ("explosion_layers", "decay_layers", "skip_list")
    assert {key: values[key] for key in same} == {key: planted[2][key] for key in same}
    assert values["single_weight"]["chosen"]["column"] == 0 and "zero" not in values["single_weight"]
    check_report(values)
    assert main(["detect", str(truth.folder), "--device", "offload", "--measure"]) == 1
    assert "device=offload" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"whole": True}, {"chat": True}, {"chat": True, "whole": True}, {}])
def test_texts(planted, options):
    loaded = planted[0]
    loaded.tokenizer.chat_template = CHAT
    try:
        values = inspect_model(loaded, LINES[:4], costs=False, add_special_tokens=False, **options)
    finally:
        loaded.tokenizer.chat_template = None
    assert values["line_count"] == (1 if options.get("whole") else 4)
    assert values["begin_token"] == bool(options.get("chat")) and not values["add_special_tokens"]
    assert (values["begin_token_note"] is None) == bool(options.get("chat"))
    assert ("begin token" in values["high_norm_kinds"]) == bool(options.get("chat"))
    if not options:
        cut = inspect_model(loaded, LINES, costs=False, max_tokens=40)
        assert cut["token_count"] == 40 and 1 < cut["line_count"] < 12, "the tokens of all lines"


def test_command(tmp_path, capsys):
    truth = planted_model(tmp_path, "llama", layers=3, explosion_layer=1, decay_layer=3)
    path = tmp_path / "text"
    path.write_text("\n".join(LINES[:4]))
    words = ["detect", str(truth.folder), "--text", str(path)]
    capsys.readouterr()
    assert main([*words, "--json", "--progress"]) == 0
    out, err = capsys.readouterr()
    values = json.loads(out)
    assert set(values["forms"]) == set(TOOLS) and "tokens" in err
    for tool in ("transformers", "gptqmodel", "llama.cpp"):
        assert main([*words, "--form", tool]) == 0
        assert capsys.readouterr().out == values["forms"][tool]["text"] + "\n"
    assert main(words) == 0
    assert values["spiking_modules"][0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threshold", "-3"], "--threshold -3"),
        (["--share", "2"], "--share 2"),
        (["--form", "hqq"], "gptqmodel"),
        (["--measure", "--schemes", "int9"], "int8 tensor"),
        (["--max-tokens", "1"], "max_tokens is 1"),
        (["--chat"], "--chat"),
        (["--min-ratio", "0.5"], "threshold of the skip list"),
    ],
)
def test_an_option_out_of_range_is_named(words, message, planted, capsys):
    assert main(["detect", str(planted[1].folder), "--max-lines", "2", *words]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_a_tokenizer_another_models_is_taken(tmp_path, planted, capsys):
    model = build("llama", vocabulary=384)
    model.save_pretrained(tmp_path / "bare")
    assert main(["detect", str(tmp_path / "bare")]) == 1
    error = capsys.readouterr().err
    assert "--base" in error and "token_ids" not in error
    other = tiny_model(tmp_path / "other")
    assert main(["detect", str(tmp_path / "bare"), "--base", str(other), "--max-lines", "4"]) == 0
