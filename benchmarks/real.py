"""All layers of a real model, SmolLM2-135M: ours against the authors' way, and what both answers say.

    python benchmarks/real.py                    # 30 layers ours, two theirs: a minute and 3 GiB
    python benchmarks/real.py --paper-layers 1 2 3 29 30

Ours: watch each layer, check it, F in closed form, two leading triplets of L, compared with the empirical
direction. Theirs: 100,000 random inputs, a least-squares problem and a full decomposition of L, compared with
it. It is run on `--paper-layers`, and its times are multiplied to all layers. What both do alike is not in
the times: the direction, and the eigenpair of L - I nearest to it, at this width from all eigenvectors. What
their answer differs by is held against the sampling noise that is expected of it, which follows from the
spread of the residuals of our fit.
"""

import argparse

import torch
from common import Row, limits, parse, store, timed
from linearize import SAMPLES, least_squares_operations
from model import papers_matrices
from torch import Tensor

import sdnb
from sdnb import LayerView, LinearLayer

FRESH, SEED = 4096, 0  # random inputs that measure the residuals


def ours(view: LayerView, direction: Tensor) -> tuple[LinearLayer, sdnb.Triplets, Tensor]:
    """The linear layer, its leading triplets, and their angles to the direction."""
    linear = sdnb.linear_layer(view)
    triplets = sdnb.leading_triplets(linear.L)
    return linear, triplets, sdnb.angle_deg(triplets.U.T, direction)


def theirs(layer: torch.nn.Module, direction: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """F, L, left singular vectors and values of L, and the angles of all vectors to the direction."""
    _, F, L = papers_matrices(layer, SAMPLES)
    U, S, _ = torch.linalg.svd(L)
    return F, L, U, S, sdnb.angle_deg(U.T, direction)


def sampling_noise(view: LayerView, F: Tensor) -> float:
    """The expected distance of F by 100,000 samples from F, relative to |F|."""
    # each sample x with the residual r moves F by about r (g x)^T / n, independently of the others
    x = torch.randn(FRESH, len(F), generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        left = view.ffn_module(x) - (x / view.ffn.norm.gain) @ F.T
    moved = (view.ffn.norm.gain * x).square().sum(1) * left.square().sum(1)
    return ((moved.mean() / SAMPLES).sqrt() / F.norm()).item()


def said(angle: Tensor, values: Tensor, R: Tensor, direction: Tensor) -> str:
    """What one way says of a layer, in words."""
    pair = sdnb.nearest_eigenpair(R, direction)
    number = f"{pair.value.real:+.4g}" + (f" ± {pair.value.imag:.3g} i" if pair.value.imag else "")
    return (
        f"u at {angle:.2f} degrees from the direction, singular values {values[0]:.4g} and {values[1]:.4g}, "
        f"nearest eigenvalue {number} at {pair.angle_deg:.1f} degrees"
    )


def options_of(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark alone."""
    parser.add_argument("--paper-layers", type=int, nargs="+", default=[12, 29], help="layers run their way")


def main() -> None:
    """Print the table and store the record."""
    options = parse(__doc__, ("smollm2",), "smollm2", options_of)
    model = sdnb.load("zoo/smollm2", dtype="float32", device=options.device)
    direction = sdnb.find_defect(model, sdnb.encode(model, max_lines=8)).direction
    count, d, f = model.layer_count, model.hidden_size, model.model.config.intermediate_size
    rates, layers = limits(options.device), sdnb.decoder_layers(model.model)
    ours(sdnb.layer_view(model, 1), direction)  # the first calls start libraries
    found, watch = timed(
        lambda: [ours(sdnb.layer_view(model, n), direction) for n in range(1, count + 1)], options.device
    )
    work, size = count * 2 * d * d * (f + 2 * d), count * 4 * d * (3 * f + 2 * d)
    rows = [watch.row("closed form and leading triplets (ours)", operations=work, bytes=size)]
    _, eigen = timed(lambda: sdnb.nearest_eigenpair(found[0][0].R, direction), options.device)
    facts, watches, apart = {"seconds_of_an_eigenpair": eigen.cpu_s}, [], []
    for n in options.paper_layers:
        (F, L, U, S, angles), watch = timed(lambda n=n: theirs(layers[n - 1], direction), options.device)
        linear, triplets, our_angles = found[n - 1]
        watches.append(watch)
        distance = ((F - linear.F).norm() / linear.F.norm()).item()
        noise = sampling_noise(sdnb.layer_view(model, n), linear.F)
        between = sdnb.angle_deg(U[:, 0], triplets.U[:, 0]).item()
        apart.append(f"{n}: u {between:.2g} degrees, F {distance:.1%}, {noise:.1%} expected of sampling")
        facts[f"layer_{n}_theirs"] = said(angles[0], S, L - torch.eye(d), direction)
        facts[f"layer_{n}_ours"] = said(our_angles[0], triplets.S, linear.R, direction)
    times = count / len(watches)
    rows.append(Row(
        "100,000 samples, least squares, full decomposition (the authors')",
        sum(w.wall_s for w in watches) * times, sum(w.cpu_s for w in watches) * times,
        max(w.peak_gib for w in watches),
        count * (least_squares_operations(SAMPLES, d, f) + 22 * d**3), count * 4 * SAMPLES * (d + f),
        times, "layer " + "; ".join(apart), f"{len(watches)} of {count} layers, multiplied",
    ))  # fmt: skip
    store("real", options, rates, rows, **facts)


if __name__ == "__main__":
    main()
