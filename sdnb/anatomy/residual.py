"""What a layer adds to the residual stream, taken apart by silence.

The trick that needs no table: silence the last linear map of attention, and `layer(x) - x` is what the FFN
adds; silence the FFN's, and it is what attention adds; silence both, and the layer must return its input.
"""

from itertools import product

import torch
from torch import Tensor, nn

from sdnb.anatomy.calls import Seen, outermost
from sdnb.anatomy.probe import LayerProbe
from sdnb.anatomy.weights import is_linear
from sdnb.errors import LayerRefused

TOLERANCE = 1e-4  # of the branches, for identities that hold exactly up to rounding


def relative(error: Tensor, of: Tensor) -> float:
    """The size of an error relative to what it is an error of; infinite if either is not finite.

    Args:
        error: the difference of two tensors.
        of: the tensor that counts as 1.

    Returns:
        |error| / |of|.
    """
    return (error.norm() / of.norm()).nan_to_num(torch.inf).item()


def without(probe: LayerProbe, x: Tensor, *modules: nn.Module) -> Tensor:
    """What the layer adds to hidden states while some of its submodules return zeros.

    Args:
        probe: the layer.
        x: hidden states of one-token sequences, shape (n, d).
        *modules: the silenced submodules.

    Returns:
        layer(x) - x, shape (n, d).
    """
    with probe.muted(*modules):
        return probe.rows(x) - x


def find_silenced(
    probe: LayerProbe, x: Tensor, attention: tuple[Seen, Seen], seen: list[Seen], outside: list[Seen]
) -> tuple[Seen, Seen]:
    """Finds a submodule for each branch such that, both silenced, the layer returns its input.

    The last linear map of each comes first: the module around it may add the residual (Bloom, MPT). A mixture
    of experts has none, and is silenced as a whole.

    Args:
        probe: the layer.
        x: hidden states, shape (n, d).
        attention: attention's call, and that of the linear map behind it (itself, if the map is inside).
        seen: the calls of a pass, one token long.
        outside: those of them outside attention.

    Returns:
        The calls of the two submodules, attention's first.

    Raises:
        LayerRefused: there is no such pair.
    """
    linears = [s for s in seen if is_linear(s.module)]
    weighty = [s for s in outside if any(p.ndim > 1 for p in s.module.parameters())]
    mixer, projection = attention
    of_attention = (
        [*[s for s in linears if s.inside(mixer)][-1:], mixer] if projection is mixer else [projection]
    )
    of_ffn = [*[s for s in outside if is_linear(s.module)][-1:], *outermost(weighty)[::-1]]
    if not of_ffn:
        raise LayerRefused(probe.number, "layer", "has no feed-forward branch beside attention")
    total = without(probe, x)
    errors = []
    for pair in product(of_attention, of_ffn):
        errors.append(relative(without(probe, x, *(s.module for s in pair)), total))
        if errors[-1] < TOLERANCE:
            return pair
    reason = (
        f"the residual stream is not recognised: with attention and {of_ffn[0].name} silenced the layer "
        f"does not return its input (error {min(errors):.1e} of what it adds), as in layers that norm the sum"
    )
    raise LayerRefused(probe.number, mixer.name, reason)


def coefficient(real: Tensor, base: Tensor) -> float:
    """The multiplier c for which c * base comes nearest to what a branch adds; 1 if it is 1 up to rounding.

    Args:
        real: what the branch adds, shape (n, d).
        base: the same without the multiplier, shape (n, d).

    Returns:
        c = <real, base> / <base, base>.
    """
    c = ((real.double() * base).sum() / base.double().square().sum()).item()
    return 1.0 if abs(c - 1.0) < 1e-5 else c


def is_parallel(probe: LayerProbe, x: Tensor, attention: nn.Module, ffn: nn.Module) -> bool:
    """Whether the FFN reads the layer's input (parallel) or the residual stream after attention (serial).

    Args:
        probe: the layer.
        x: hidden states, shape (n, d).
        attention: the submodule that silences attention.
        ffn: the submodule that silences the FFN.

    Returns:
        True for layer(x) = x + a(x) + f(x), False for layer(x) = x + a(x) + f(x + a(x)).

    Raises:
        LayerRefused: neither sum gives the layer's output.
    """
    total, a = without(probe, x), without(probe, x, ffn)
    serial = relative(a + without(probe, x + a, attention) - total, total)
    parallel = relative(a + without(probe, x, attention) - total, total)
    if not min(serial, parallel) < TOLERANCE:
        reason = f"the branches add up neither serially (error {serial:.1e}) nor in parallel ({parallel:.1e})"
        raise LayerRefused(probe.number, "layer", reason)
    return parallel < serial
