"""08: how one-dimensional the explosion subspace is, and who lies in it."""

from pathlib import Path

import torch
from torch import Tensor

from sdnb.activations.sweep import Coefficients, ffn_input_coefficients, item_trajectories, vocabulary_size
from sdnb.anatomy import LayerView, layer_view
from sdnb.decompose import angle_deg
from sdnb.errors import LayerRefused
from sdnb.labels import token_labels
from sdnb.linearize import ffn_matrix
from sdnb.loading import Loaded
from sdnb.observations.common import Observation, empirical_direction, encode_line, encode_text
from sdnb.observations.explosion import find_explosion
from sdnb.observations.initial_tokens import explosion_values, trained_items

TOP = 10


def explosion_subspace(
    loaded: Loaded,
    *,
    text: str | list[str],
    max_lines: int,
    add_special_tokens: bool,
    threshold: float | None = None,
    explosion_layer: int | None = None,
    method: str = "closed_form",
    input_scale: str = "paper",
    centre: bool = False,
    samples: int = 100_000,
    prefix: str = "I am",
    seed: int = 0,
    results_dir: str | Path,
) -> Observation:
    """Feed the right singular vectors of F to the real FFN, and find who lies along the leading one.

    F = U S V^T at the explosion layer. Reported are n_i = max |FFN(norm(+-v_i))|, and v.x and v.x / rms(x)
    for the input x of the FFN's norm, v the leading vector with the sign of the larger output, for every item
    at position 0 and at position 1 behind a random item (paper A, "explosion subspace").

    Args:
        loaded: the model.
        text: a named corpus, a path, or literal lines, on which the layer and the direction are found.
        max_lines: number of lines.
        add_special_tokens: whether the tokenizer adds its own to the text; the sweeps have none.
        threshold: a norm that replaces the automatic ones.
        explosion_layer: a layer 1..L that replaces the automatic one.
        method: "closed_form" or "sampled" linear view of the FFN.
        input_scale: "paper" or "gain".
        centre: include a LayerNorm's mean subtraction.
        samples: of the sampled view.
        prefix: the neutral text in front of the top items of the second position.
        seed: of every random draw.
        results_dir: where records and their cache live.

    Returns:
        The record of template 08.

    Raises:
        LayerRefused: the layer has no FFN, or one that writes nothing.
    """
    encoded = encode_text(loaded, text, max_lines, add_special_tokens)
    place = find_explosion(
        loaded, encoded, explosion_layer=explosion_layer, threshold=threshold, results_dir=results_dir
    )
    direction = empirical_direction(loaded, encoded, threshold=threshold, results_dir=results_dir)
    view = layer_view(loaded.model, place.layer)
    F = ffn_matrix(view, method, input_scale, centre, samples, seed)
    if not F.any():
        reason = "writes nothing, so it has no explosion subspace: name another layer with `explosion_layer`"
        raise LayerRefused(place.layer, "FFN", reason)
    _, S, Vh = torch.linalg.svd(F.float())
    norms, signed, outputs = signed_responses(view, Vh)
    lead = int(norms.argmax())
    values = explosion_values(place) | {
        "method": method,
        "input_scale": input_scale,
        "state_threshold": place.state_threshold,
        "singular_value": S[0].item(),
        "second_singular_value": S[1].item(),
        "leading_output": norms[0].item(),
        "first_to_second": _first_to_second(norms),
        "largest_index": lead + 1,
        "participation": (norms.square().sum().square() / norms.pow(4).sum()).item(),
        "output_angle_deg": float(angle_deg(outputs[0], direction.vector)) if direction.found else None,
    }
    items = torch.arange(vocabulary_size(loaded.model))
    _, trained = trained_items(loaded, items)
    drawn = torch.randint(int(trained.sum()), (len(items),), generator=torch.Generator().manual_seed(seed))
    before = {"first": None, "second": items[trained][drawn][:, None]}
    arrays = {"output_norms": norms, "right_vector": signed[0]}
    for name, others in before.items():
        found = ffn_input_coefficients(
            loaded.model, place.layer, signed[0], view.ffn_norm, items, prefix=others
        )
        values |= _statistics(name, found, trained)
        arrays |= {f"coefficients_{name}": found.raw, f"normalised_{name}": found.normalised}
    values |= _top(loaded, arrays["coefficients_second"], trained, prefix, place.state_limits)
    return Observation(values, arrays, encoded.text_hash, encoded.begin_token)


@torch.no_grad()
def signed_responses(view: LayerView, Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Feed +v and -v, of unit length as in the paper, to the real norm and FFN.

    Args:
        view: the layer.
        Vh: right singular vectors as rows, (d, d).

    Returns:
        The larger of the two output norms, (d,), the vectors with its sign, (d, d), and their outputs,
        (d, d); on the CPU.
    """
    plus, minus = view.ffn_branch(Vh), view.ffn_branch(-Vh)
    up = plus.norm(dim=1) >= minus.norm(dim=1)
    outputs = torch.where(up[:, None], plus, minus)
    signed = torch.where(up[:, None], Vh, -Vh)
    return outputs.norm(dim=1).cpu(), signed.cpu(), outputs.cpu()


def _first_to_second(norms: Tensor) -> float | None:
    """Output norm of the leading vector over the largest of the others; None where no other moves the FFN."""
    rest = norms[1:].max().item()
    return norms[0].item() / rest if rest > 0 else None


def _statistics(name: str, found: Coefficients, trained: Tensor) -> dict:
    """Mean and standard deviation of the trained items' coefficients at one position."""
    values = {}
    for kind, numbers in (("coefficient", found.raw), ("normalised", found.normalised)):
        chosen = numbers[trained].double()
        values |= {f"{kind}_{name}_mean": chosen.mean().item(), f"{kind}_{name}_std": chosen.std().item()}
    return values


def _top(loaded: Loaded, second: Tensor, trained: Tensor, prefix: str, limits: Tensor) -> dict:
    """Trained items with the largest coefficients at the second position, and their peaks in context."""
    order = second.masked_fill(~trained, -torch.inf).argsort(descending=True, stable=True)[:TOP]
    paths = item_trajectories(loaded.model, order, encode_line(loaded, prefix, False))
    return {
        "top_token_ids": order.tolist(),
        "top_tokens": token_labels(loaded.tokenizer, order.tolist()),
        "top_coefficients": second[order].tolist(),
        "in_context_peak": paths[1:].amax(dim=0).tolist(),
        "real": (paths[1:] > limits[1:, None]).any(dim=0).tolist(),
    }
