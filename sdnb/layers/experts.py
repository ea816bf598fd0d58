"""One expert of a mixture, on request: the mixture's own module, told to send every token to it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sdnb.errors import ParameterError
from sdnb.layers.parts import Wiring
from sdnb.layers.probe import LayerProbe


def _is_routed(values: list[Any]) -> bool:
    """Whether a module is called with rows, the numbers of their experts and the weights of these."""
    if len(values) != 3 or not all(torch.is_tensor(value) and value.ndim == 2 for value in values):
        return False
    rows, numbers, weights = values
    whole = not numbers.is_floating_point() and rows.is_floating_point() and weights.is_floating_point()
    return whole and numbers.shape == weights.shape and len(numbers) == len(rows)


@torch.no_grad()
def find_expert(probe: LayerProbe, wiring: Wiring, number: int) -> Callable[[Tensor], Tensor]:
    """Finds one expert of a layer's mixture by watching how the router calls the experts.

    Args:
        probe: the layer.
        wiring: its wiring.
        number: the expert, from 0 as the router counts.

    Returns:
        The expert alone with weight 1, for rows u of shape (n, d): no router, no shared experts.

    Raises:
        ParameterError: the layer has no mixture of this kind, or no such expert.
    """
    found: list[nn.Module] = []

    def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if _is_routed([*args, *kwargs.values()]):
            found.append(module)

    outside = [m for m, name in probe.names.items() if not name.startswith(wiring.stand_in.name)]
    handles = [module.register_forward_pre_hook(look, with_kwargs=True) for module in outside]
    probe.rows(probe.states())
    for handle in handles:
        handle.remove()
    if not found:
        raise ParameterError(f"layer {probe.number} has no mixture whose experts can be called one by one")
    module = found[0]
    count = next(len(p) for p in module.parameters() if p.ndim == 3)
    if not 0 <= number < count:
        raise ParameterError(
            f"expert {number} does not exist: layer {probe.number} has experts 0 to {count - 1}"
        )

    def expert(u: Tensor) -> Tensor:
        numbers = torch.full((len(u), 1), number, device=u.device)
        return module(u, numbers, torch.ones_like(u[:, :1]))

    return expert
