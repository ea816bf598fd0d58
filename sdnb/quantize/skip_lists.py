"""Which modules should keep their precision: by spikes in their inputs, or by what skipping them recovers.

The rule: a linear module goes on the list when its largest input is at least `MIN_TOKEN_RATIO` times the
median token's largest input. With one int8 scale for all tokens, the largest input takes all 127 levels; at a
ratio of 32 the median token is left with fewer than four of them, and at 254 it is rounded to zero.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import gguf
from torch import Tensor, nn

from sdnb.errors import ParameterError
from sdnb.quantize.modules import InputStatistics, linear_modules, never_quantized
from sdnb.quantize.schemes import PairedRatio, Scheme, perplexity_ratio, quantized

MIN_TOKEN_RATIO = 32.0
# Sibling modules that vLLM loads as one, and refuses when only some of them are skipped.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("w1", "w3"),
)


@dataclass(frozen=True)
class SkipList:
    """The modules that should keep their precision."""

    spiking: tuple[str, ...]  #: modules chosen by the rule, or by measurement; the largest first
    fused: tuple[str, ...]  #: modules that are there only because vLLM fuses them with one that was chosen
    #: modules that quantizers leave alone by themselves: the output embedding and tied weights
    by_default: tuple[str, ...]
    threshold: float  #: the ratio of the rule

    @property
    def chosen(self) -> list[str]:
        """What is skipped beyond the defaults."""
        return [*self.spiking, *self.fused]

    @property
    def modules(self) -> list[str]:
        """All, without repetition: what a quantizer must be given, since a list replaces its defaults."""
        return list(dict.fromkeys((*self.spiking, *self.fused, *self.by_default)))


def skip_list(
    model: nn.Module, statistics: dict[str, InputStatistics], *, threshold: float = MIN_TOKEN_RATIO
) -> SkipList:
    """Return the modules whose largest input is at least `threshold` times the median token's largest one.

    `statistics` are those of `input_statistics`. Names are full, so that layer 1 never matches layer 11.

    Raises:
        ParameterError: a threshold of 1 or below, which every module passes.
    """
    if threshold <= 1:
        raise ParameterError(f"the threshold of the skip list is {threshold}; give a ratio above 1, say 32")
    spikes = {n: s.token_ratio or float("inf") for n, s in statistics.items() if s.largest > 0}
    chosen = sorted((n for n, ratio in spikes.items() if ratio >= threshold), key=lambda n: -spikes[n])
    return SkipList(tuple(chosen), fused_with(model, chosen), tuple(never_quantized(model)), threshold)


def fused_with(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Full names of the modules that vLLM fuses with some of the given ones and that are not among them."""
    given, missing = set(names), set()
    for name in given:
        parent, _, own = name.rpartition(".")
        missing |= {f"{parent}.{other}" for group in FUSED if own in group for other in group}
    return tuple(name for name in linear_modules(model) if name in missing - given)


@dataclass(frozen=True)
class Sensitivity:
    """What skipping modules recovers of the loss that quantization adds."""

    cost: PairedRatio  #: perplexity with everything quantized over the intact model's
    #: module -> perplexity without skipping over that with this module skipped, the largest first
    gains: dict[str, PairedRatio]
    #: the fewest modules, in this order, that recover the share; all candidates where these do not, none
    #: where quantization costs nothing
    shortest: tuple[str, ...]
    recovered: float  #: share of the added loss that they recover
    left: PairedRatio  #: perplexity with them skipped over the intact model's


def sensitivity(
    model: nn.Module,
    scheme: Scheme,
    losses: Callable[[], Tensor],
    statistics: dict[str, InputStatistics],
    *,
    share: float = 0.8,
    candidates: int = 12,
) -> Sensitivity:
    """Return modules ranked by what skipping each recovers, and the shortest list that recovers a share.

    Candidates are the modules with the largest output error on the calibration text; each is skipped alone
    and the loss measured; then the best k of them together, k found by bisection: candidates +
    log2(candidates) + 3 passes. A module that vLLM fuses with others is skipped together with them.

    Args:
        model: a causal language model, all weights in memory.
        scheme: how everything else is quantized.
        losses: runs the model as it is and returns the loss of each window, (W,), in nats.
        statistics: from `input_statistics(model, lines, scheme=scheme)`.
        share: of the added loss that is to be recovered, above 0 and up to 1.
        candidates: number of modules that are tried.

    Raises:
        ParameterError: another share, or statistics without output errors.
    """
    if not 0 < share <= 1:
        raise ParameterError(f"share is {share}: give a number above 0 and up to 1")
    errors = {name: s.output_error for name, s in statistics.items() if s.output_error is not None}
    if not errors:
        raise ParameterError("no output errors: give input_statistics the scheme, with all weights in memory")

    def measured(skip: Sequence[str]) -> Tensor:
        with quantized(model, scheme, skip={*skip, *fused_with(model, skip)}, statistics=statistics):
            return losses()

    def recovered(now: Tensor) -> float:
        return ((nothing - now).mean() / (nothing - intact).mean()).item()

    intact, nothing = losses(), measured(())
    tried = sorted(errors, key=errors.get, reverse=True)[:candidates]
    alone = {name: measured([name]) for name in tried}
    order = sorted(tried, key=lambda name: alone[name].mean().item())
    low, high, best = 0, len(order), measured(order)
    if nothing.mean() <= intact.mean():
        high, best = 0, nothing
    while recovered(best) >= share and high - low > 1:
        middle = (low + high) // 2
        now = measured(order[:middle])
        low, high, best = (low, middle, now) if recovered(now) >= share else (middle, high, best)
    gains = {name: perplexity_ratio(nothing, alone[name]) for name in order}
    cost, left = perplexity_ratio(nothing, intact), perplexity_ratio(best, intact)
    return Sensitivity(cost, gains, tuple(order[:high]), recovered(best), left)


@dataclass(frozen=True)
class Form:
    """A skip list as one tool takes it: name of the parameter, its value, and lines to paste."""

    parameter: str
    value: object
    text: str


# Tool -> parameter, and its value for some full names; patterns match exactly these modules.
_FORMS: dict[str, tuple[str, Callable[[list[str]], list | dict]]] = {
    "transformers": ("modules_to_not_convert", list),
    "bitsandbytes": ("llm_int8_skip_modules", list),
    "compressed-tensors": ("ignore", list),
    "llm-compressor": ("ignore", lambda names: [f"re:{re.escape(name)}$" for name in names]),
    "torchao": ("FqnToConfig", dict.fromkeys),
    "optimum-quanto": ("exclude", list),
    "gptqmodel": ("dynamic", lambda names: {f"-:^{re.escape(name)}$": {} for name in names}),
    "modelopt": ("quant_cfg", lambda names: [{"quantizer_name": f"{n}.*", "enable": False} for n in names]),
    "quark": ("exclude", list),
    "auto-round": ("layer_config", lambda names: {name: {"bits": 16, "act_bits": 16} for name in names}),
}
TOOLS = (*_FORMS, "llama.cpp")
# Two ways to say it: a filter over modules, and a configuration by name.
_TORCHAO = """skip = {}
linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
quantize_(model, config, filter_fn=lambda m, n: n in linear and n not in skip)
# or, which can be stored with a checkpoint:
named = OrderedDict((n, None if n in skip else config) for n in linear)
quantize_(model, FqnToConfig(named), filter_fn=None)"""


def forms(skip: SkipList, model: nn.Module) -> dict[str, Form]:
    """Return the list in the form of each tool, by its name; their versions are named in book/quantizers.md.

    llama.cpp is left out where its converter does not know the model's architecture.
    """
    found = {}
    for tool, (parameter, value_of) in _FORMS.items():
        value = value_of(skip.modules)
        text = f"{parameter} = {_python(value)}"
        if tool == "modelopt":
            text = f'config["quant_cfg"] += {_python(value)}'
        if tool == "torchao":
            text = _TORCHAO.format(_python(skip.modules))
        found[tool] = Form(parameter, value, text)
    tensors = [name for module in skip.chosen if (name := gguf_name(model, module)) is not None]
    if tensors or not skip.chosen:
        lines = [f"{re.escape(name)}\\.weight=q8_0" for name in dict.fromkeys(tensors)]
        found["llama.cpp"] = Form("--tensor-type-file", lines, "\n".join(lines))
    return found


def _python(value: list | dict) -> str:
    """A list or dict as Python source, an entry a line."""
    pairs = isinstance(value, dict)
    lines = [f"{key!r}: {entry!r}" for key, entry in value.items()] if pairs else [repr(v) for v in value]
    return "".join(["{" if pairs else "[", *(f"\n    {line}," for line in lines), "\n}" if pairs else "\n]"])


def gguf_name(model: nn.Module, module: str) -> str | None:
    """What a GGUF file calls a module, such as blk.11.ffn_down; None where llama.cpp has no name for it."""
    known = {re.sub(r"\W|_", "", name): arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    kind = re.sub(r"\W|_|text$", "", model.config.model_type)
    arch = known.get(kind, gguf.MODEL_ARCH.LLAMA)  # mistral and others are stored as llama
    layers = model.config.get_text_config().num_hidden_layers
    return gguf.get_tensor_name_map(arch, layers).get_name(module)
