"""Which modules should keep their precision: one rule, one threshold, and the forms that quantizers take.

The rule: a linear module goes on the list when its largest input is at least `MIN_TOKEN_RATIO` times the
median token's largest input. With one int8 scale for all tokens, the largest input takes all 127 levels; at a
ratio of 32 the median token is left with fewer than four of them, and at 254 it is rounded to zero.
"""

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from sdnb.errors import ParameterError
from sdnb.quantize.linears import never_quantized
from sdnb.quantize.statistics import InputStatistics

MIN_TOKEN_RATIO = 32.0


@dataclass(frozen=True)
class SkipList:
    """The modules that should keep their precision.

    Args:
        spiking: modules chosen by the rule, the largest ratio first.
        by_default: modules that quantizers leave alone by themselves: the output embedding and tied weights.
        threshold: the ratio of the rule.
    """

    spiking: tuple[str, ...]
    by_default: tuple[str, ...]
    threshold: float

    @property
    def modules(self) -> list[str]:
        """Both, without repetition: what a quantizer must be given, since a list replaces its defaults."""
        return list(dict.fromkeys((*self.spiking, *self.by_default)))

    def forms(self) -> dict[str, list[str]]:
        """The list by the name of the parameter that takes it.

        Returns:
            `modules_to_not_convert` for the quantization configurations of transformers,
            `llm_int8_skip_modules` for bitsandbytes, `ignore` for llm-compressor.
        """
        return {key: self.modules for key in ("modules_to_not_convert", "llm_int8_skip_modules", "ignore")}


def skip_list(
    model: nn.Module, statistics: dict[str, InputStatistics], *, threshold: float = MIN_TOKEN_RATIO
) -> SkipList:
    """Apply the rule of this module.

    Args:
        model: a causal language model.
        statistics: of its linear modules' inputs, from `input_statistics`.
        threshold: smallest ratio of the largest input to the median token's largest input that counts as a
            spike.

    Returns:
        The list, with full module names, so that layer 1 never matches layer 11.

    Raises:
        ParameterError: a threshold of 1 or below, which every module passes.
    """
    if threshold <= 1:
        raise ParameterError(
            f"the threshold of the skip list is {threshold}; give a ratio above 1, such as 32"
        )
    spikes = {
        name: found.token_ratio if found.token_ratio is not None else float("inf")
        for name, found in statistics.items()
        if found.largest > 0
    }
    chosen = sorted((n for n, ratio in spikes.items() if ratio >= threshold), key=lambda n: -spikes[n])
    return SkipList(tuple(chosen), tuple(never_quantized(model)), threshold)


def down_projections(statistics: dict[str, InputStatistics], layers: Collection[int]) -> list[str]:
    """Return the down-projection of each of the given layers: the FFN's last linear module with d outputs.

    The module that a layer calls first reads its input and has d columns. Attention runs before the FFN, side
    by side or in turn, so that what lies outside of the first module's branch is the FFN's. It ends with its
    down-projection, or with a gate of one output behind it (the shared expert of Qwen2-MoE). Where it has no
    linear module of its own (experts in one parameter), there is none.

    Args:
        statistics: with the order of calls.
        layers: decoder layers, 1..L.

    Returns:
        Full module names, in the order of `layers`.
    """
    found = []
    for layer in layers:
        called = sorted((s for s in statistics.values() if s.layer == layer), key=lambda s: s.order)
        for module in reversed(called):
            if module.branch != called[0].branch and module.outputs == len(called[0].channel_largest):
                found.append(module.name)
                break
    return found
