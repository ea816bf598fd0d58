"""A whole model: every layer linearized and its leading triplets, against the paper's way.

    python benchmarks/model.py                                    # one layer of a 1B shape, times 16
    python benchmarks/model.py --shape llama-2-7b --device cuda   # all 32 layers, the paper's way on two

Ours: watch a layer, check it, read A, fit F in closed form, form L, take the two leading triplets of A, F and
L, on a GPU those of all layers at once. The paper's way: 100,000
random inputs, a least-squares problem, and three full decompositions a layer (A, F, L). It is run on
`--paper-layers` layers with `--samples` inputs; its times are multiplied by layers and, for the least
squares, by operations. The weights are random, with one direction planted in every F; A and L have no gap,
which is the slow case.
"""

import argparse

import torch
from common import SHAPES, Row, Shape, limits, parse, store, timed
from linearize import SAMPLES, least_squares, least_squares_operations
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from sdnb.decompose import angle_deg, leading_triplets
from sdnb.layers import layer_view
from sdnb.linearize import closed_form_fit, linear_layer

VOCABULARY, SEED, PLANTED = 1024, 0, 3.0


def build(shape: Shape, layers: int, device: str) -> nn.Module:
    """A random Llama of a shape in bfloat16, each F = W_down B with a planted value along u and B^T v."""
    config = LlamaConfig(
        hidden_size=shape.d, intermediate_size=shape.f, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, num_hidden_layers=layers, vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight += 0.1 * torch.randn_like(norm.weight)
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(std=module.in_features**-0.5)
            mlp, down = layer.mlp, layer.mlp.down_proj.weight
            gate, up = mlp.gate_proj.weight.float(), mlp.up_proj.weight.float()
            v = closed_form_fit(gate, nn.functional.silu, v=up) @ torch.randn(shape.d)
            u = nn.functional.normalize(torch.randn(shape.d), dim=0)
            down += PLANTED * torch.outer(u, v / v.norm()).to(down)
    return model


def ours(model: nn.Module) -> list[Tensor]:
    """The leading left singular vector of L of every layer."""
    count, d = model.config.num_hidden_layers, model.config.hidden_size
    at_once = count if model.device.type == "cuda" else 1
    matrices, found = torch.empty(3, at_once, d, d, device=model.device), []
    for number in range(1, count + 1):
        layer = linear_layer(layer_view(model, number))
        for stack, M in zip(matrices, (layer.A, layer.F, layer.L), strict=True):
            stack[(number - 1) % at_once] = M
        if number % at_once == 0:
            found += leading_triplets(matrices.flatten(0, 1)).U[-at_once:, :, 0]
    return found


def papers_matrices(layer: nn.Module, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, F and L of a Llama layer by the paper's recipe, written plainly, in float32."""
    attention, ffn = layer.self_attn, layer.mlp
    gains = [norm.weight.float() for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    V = attention.v_proj.weight.float().unflatten(0, (-1, attention.head_dim))
    repeats = attention.o_proj.in_features // attention.v_proj.out_features
    V = V.repeat_interleave(repeats, dim=0).flatten(0, 1)
    A = attention.o_proj.weight.float() @ V * gains[0]
    B = least_squares(ffn.gate_proj.weight.float(), ffn.up_proj.weight.float(), samples)
    F = ffn.down_proj.weight.float() @ B * gains[1]
    one = torch.eye(len(A), device=A.device)
    return A, F, (one + F) @ (one + A)


def decompositions(matrices: tuple[Tensor, ...]) -> Tensor:
    """Full decompositions of all of them; the leading left vector of the last."""
    return [torch.linalg.svd(matrix)[0] for matrix in matrices][-1][:, 0]


def papers_row(model: nn.Module, directions: list[Tensor], options: argparse.Namespace, shape: Shape) -> Row:
    """The paper's way on some layers, its times multiplied to all layers and all samples."""
    layers, count = model.model.layers, min(options.paper_layers, len(model.model.layers))
    samples = options.samples or SAMPLES
    whole, did = (least_squares_operations(n, shape.d, shape.f) for n in (SAMPLES, samples))
    wall = cpu = 0.0
    for number in range(count):
        matrices, fit = timed(lambda n=number: papers_matrices(layers[n], samples), options.device)
        left, svd = timed(lambda m=matrices: decompositions(m), options.device)
        wall += fit.wall_s * whole / did + svd.wall_s
        cpu += fit.cpu_s * whole / did + svd.cpu_s
        angle = angle_deg(left.to(directions[number]), directions[number]).item()
        peak = max(fit.peak_gib, svd.peak_gib)
    times = shape.layers / count
    note = f"{count} of {shape.layers} layers with {samples:,} inputs, multiplied"
    return Row(
        "the paper's: least squares and three full decompositions", wall * times, cpu * times, peak,
        shape.layers * (whole + 3 * 22 * shape.d**3), shape.layers * 4 * SAMPLES * (shape.d + shape.f),
        times, f"leading direction of L {angle:.2g} degrees from ours", note,
    )  # fmt: skip


def options_of(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark alone."""
    parser.add_argument("--layers", type=int, help="layers of our run; all on a GPU, one on a CPU")
    parser.add_argument(
        "--paper-layers", type=int, default=0, help="layers of the paper's way (2; on a CPU 1)"
    )
    parser.add_argument("--samples", type=int, default=0, help="its inputs (100,000; on a CPU 2 d)")


def main() -> None:
    """Print the table and store the record."""
    options = parse(__doc__, ("small", "llama-3.2-1b", "llama-2-7b"), "llama-3.2-1b", options_of)
    shape, gpu = SHAPES[options.shape], options.device.startswith("cuda")
    layers = options.layers or (shape.layers if gpu else 1)
    options.paper_layers = options.paper_layers or (2 if gpu else 1)
    options.samples = options.samples or (SAMPLES if gpu else 2 * shape.d)
    model = build(shape, layers, options.device)
    ours(build(shape if gpu else SHAPES["small"], 1, options.device))  # the first calls start libraries
    rates = limits(options.device)
    directions, watch = timed(lambda: ours(model), options.device)
    d, f = shape.d, shape.f
    # A as a product of two weights, F and F A; the check's rows and the triplets' products are far less
    work = layers * 2 * d * d * (d * shape.kv_heads // shape.heads + f + d)
    size = 2 * sum(p.numel() for p in model.model.layers.parameters())
    times = shape.layers / layers
    note = "" if times == 1 else f"{layers} of {shape.layers} layers, multiplied"
    row = watch.row("closed form and leading triplets (ours)", operations=work * times, bytes=size * times,
                    scaled=times, note=note)  # fmt: skip
    rows = [row, papers_row(model, directions, options, shape)]
    store("model", options, rates, rows, layers=shape.layers, seed=SEED)


if __name__ == "__main__":
    main()
