"""A continuation sampled token by token, the same random numbers each time, so that texts can be compared."""

import torch
from torch import Tensor, nn

from sdnb.activations.capture import input_device
from sdnb.errors import ParameterError


@torch.no_grad()
def continuation(
    model: nn.Module, ids: Tensor, count: int, *, temperature: float = 0.8, seed: int = 0
) -> Tensor:
    """Sample a continuation: x_t ~ softmax(logits / temperature), by one uniform number a token.

    Each step is a full forward pass without a cache, so that an intervention acts on all of it.

    Args:
        model: a causal language model.
        ids: token ids of the beginning, (T,).
        count: tokens to sample.
        temperature: positive; small ones take the likeliest token.
        seed: of the uniform numbers, which do not depend on the model.

    Returns:
        The sampled token ids, (count,), on the CPU.

    Raises:
        ParameterError: a temperature that is not positive.
    """
    if not temperature > 0:
        raise ParameterError(f"temperature is {temperature}; give a positive number, such as 0.8")
    device = input_device(model)
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for number in uniform:
        logits = model(input_ids=ids[None].to(device), use_cache=False).logits[0, -1].double().cpu()
        steps = torch.softmax(logits / temperature, dim=0).cumsum(dim=0)
        chosen = int((steps < number * steps[-1]).sum())
        ids = torch.cat([ids, torch.tensor([chosen])])
    return ids[len(ids) - count :]
