"""A model on disk through its layers one at a time: the linear layer, its leading triplets, its eigenpair.

    python benchmarks/offload.py                                   # a 70B shape with every side quartered
    python benchmarks/offload.py --shape llama-3-70b --layers 8 --alone   # 14 GB in TMPDIR

A random bfloat16 model is written layer by layer as safetensors and loaded with device="offload". The peak of
anonymous memory must stay below three layers' weights as stored plus 2 GiB: it is sampled every 10 ms, and
the process is ended with status 1 as soon as it holds more. Beside it the same computations with the model in
memory, where it fits.
"""

import argparse
import contextlib
import json
import tempfile
from pathlib import Path

import torch
from common import GIB, SHAPES, Shape, anonymous_bytes, limits, parse, store, timed
from safetensors.torch import save_file
from transformers import LlamaConfig

from sdnb.decompose import leading_triplets, nearest_eigenpair
from sdnb.errors import MemoryShortage
from sdnb.layers import layer_view
from sdnb.linearize import linear_layer
from sdnb.loading import load

VOCABULARY, SEED = 1024, 0


def layer_weights(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer's weights, as a Llama's checkpoint has them."""
    d, f, kv = shape.d, shape.f, shape.d // shape.heads * shape.kv_heads
    return {
        "input_layernorm": (d,), "post_attention_layernorm": (d,),
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
    }  # fmt: skip


def layer_bytes(shape: Shape) -> int:
    """Bytes of one layer's weights in bfloat16."""
    return 2 * sum(torch.Size(sizes).numel() for sizes in layer_weights(shape).values())


def drawn(sizes: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A gain near one, or a random matrix that keeps lengths."""
    scale = 0.1 if len(sizes) == 1 else sizes[1] ** -0.5
    return (torch.randn(sizes, generator=generator) * scale + (len(sizes) == 1)).bfloat16()


def write_model(folder: Path, shape: Shape, layers: int) -> None:
    """Write a random Llama, one file a layer, with a planted rank-one defect in each W_down.

    Args:
        folder: an empty folder.
        shape: the sizes.
        layers: number of layers.
    """
    LlamaConfig(
        hidden_size=shape.d, intermediate_size=shape.f, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, num_hidden_layers=layers, vocab_size=VOCABULARY,
        tie_word_embeddings=True, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    generator, where = torch.Generator().manual_seed(SEED), {}
    parts = [{"model.norm": (shape.d,), "model.embed_tokens": (VOCABULARY, shape.d)}]
    parts += [{f"model.layers.{n}.{k}": s for k, s in layer_weights(shape).items()} for n in range(layers)]
    for number, part in enumerate(parts):
        weights = {f"{name}.weight": drawn(sizes, generator) for name, sizes in part.items()}
        for name, weight in weights.items():
            if name.endswith("down_proj.weight"):
                u, v = (torch.randn(n, generator=generator) for n in weight.shape)
                weight += 3 * torch.outer(u / u.norm(), v / v.norm()).bfloat16()
        file = f"model-{number:05d}.safetensors"
        save_file(weights, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(weights, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf8")


def decompositions(folder: Path, device: str) -> list[tuple[torch.Tensor, complex | None]]:
    """The computations of notebooks 04 and 05 from weights alone, layer by layer.

    Args:
        folder: the checkpoint.
        device: where to load it, as for `sdnb.loading.load`.

    Returns:
        For each layer the two leading singular values of L, and the eigenvalue of L - I nearest to its
        leading left vector, None where none is near.
    """
    model = load(str(folder), device=device, dtype="bfloat16").model
    return [one_layer(model, number) for number in range(1, model.config.num_hidden_layers + 1)]


def one_layer(model: torch.nn.Module, number: int) -> tuple[torch.Tensor, complex | None]:
    """The two leading singular values and the eigenvalue of a layer; nothing else of it is kept."""
    R = linear_layer(layer_view(model, number)).R  # from here on nothing holds the layer's weights
    L = R + torch.eye(len(R)).to(R)
    triplets = leading_triplets(L)
    pair = nearest_eigenpair(R, triplets.U[:, 0], method="shifted")
    return triplets.S.cpu(), None if pair is None else pair.value


def apart(answers: list, others: list) -> str:
    """The largest relative difference of singular values, and of eigenvalues, in words."""
    values = max(((a - b).abs() / b).max().item() for (a, _), (b, _) in zip(answers, others, strict=True))
    pairs = [(a, b) for (_, a), (_, b) in zip(answers, others, strict=True)]
    if any((a is None) != (b is None) for a, b in pairs):
        return f"values {values:.1e}, an eigenvalue found by one alone"
    eigen = max((abs(a - b) / abs(b) for a, b in pairs if a is not None), default=0.0)
    return f"values {values:.1e}, eigenvalues {eigen:.1e}"


def compare(folder: Path, shape: Shape, layers: int, options: argparse.Namespace) -> None:
    """Measure both ways, print and store.

    Args:
        folder: the checkpoint.
        shape: its sizes.
        layers: its number of layers.
        options: from `parse`.
    """
    rates, allowed, held = limits(options.device), 3 * layer_bytes(shape) + 2 * GIB, anonymous_bytes()
    answers, watch = timed(lambda: decompositions(folder, "offload"), "cpu", allowed)
    peak = watch.peak
    kv = shape.d // shape.heads * shape.kv_heads
    work = layers * 2 * shape.d**2 * (kv + shape.f + shape.d)  # the products A, F and F A
    cost = {"operations": work, "bytes": layers * layer_bytes(shape)}
    others = None
    if not options.alone:
        with contextlib.suppress(MemoryShortage):
            others, whole = timed(lambda: decompositions(folder, options.device), options.device)
    difference = "not compared with the whole model in memory" if others is None else apart(answers, others)
    what = f"one layer at a time, {layers} layers (ours)"
    rows = [watch.row(what, difference=difference, **cost)]
    if others is not None:
        rows.append(whole.row("the whole model in memory, same computations", **cost))
    facts = {"held_before_gib": held / GIB, "peak_anonymous_gib": peak / GIB, "allowed_gib": allowed / GIB}
    facts = {key: round(value, 2) for key, value in facts.items()}
    store("offload", options, rates, rows, layers=layers, seed=SEED, **facts, within=peak <= allowed)


def options_of(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark alone."""
    parser.add_argument("--layers", type=int, help="cut to so many layers")
    parser.add_argument(
        "--alone", action="store_true", help="leave out the run with the whole model in memory"
    )


def main() -> None:
    """Write the model where none is given, and compare."""
    options = parse(
        __doc__,
        ("small", "llama-3.2-1b", "llama-2-7b", "quarter-70b", "llama-3-70b"),
        "quarter-70b",
        options_of,
    )
    shape = SHAPES[options.shape]
    layers = options.layers or shape.layers
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape, layers)
        compare(Path(folder), shape, layers, options)


if __name__ == "__main__":
    main()
