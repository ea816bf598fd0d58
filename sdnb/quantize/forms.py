"""A skip list in the forms that quantizers take, each bounded so that exactly the listed modules match.

The versions whose rules were read are named in `book/quantizers.md`; tests apply each form by the tool's own
matcher where it is installed, and by its documented rule everywhere.
"""

import re
from dataclasses import dataclass

import gguf
from torch import nn

from sdnb.quantize.skip_lists import SkipList


@dataclass(frozen=True)
class Form:
    """A skip list as one tool takes it.

    Args:
        parameter: what the tool calls it.
        value: the value, made of lists, dicts, strings and numbers.
        text: lines to paste into a script, or into a file for llama.cpp.
    """

    parameter: str
    value: object
    text: str


def forms(skip: SkipList, model: nn.Module) -> dict[str, Form]:
    """The list in every form, by the tool's name.

    Args:
        skip: from `skip_list`.
        model: the model it belongs to, whose architecture says how llama.cpp calls its tensors.

    Returns:
        Tool -> form. llama.cpp is left out where its converter does not know the architecture.
    """
    names = skip.modules
    literal = [re.escape(name) for name in names]
    quantizers = [{"quantizer_name": f"{name}.*", "enable": False} for name in names]
    values = {
        "transformers": ("modules_to_not_convert", names),
        "bitsandbytes": ("llm_int8_skip_modules", names),
        "compressed-tensors": ("ignore", names),
        "llm-compressor": ("ignore", [f"re:{name}$" for name in literal]),
        "torchao": ("FqnToConfig", dict.fromkeys(names)),
        "optimum-quanto": ("exclude", names),
        "gptqmodel": ("dynamic", {f"-:^{name}$": {} for name in literal}),
        "modelopt": ("quant_cfg", quantizers),
        "quark": ("exclude", names),
        "auto-round": ("layer_config", {name: {"bits": 16, "act_bits": 16} for name in names}),
    }
    found = {
        tool: Form(parameter, value, f"{parameter} = {_python(value)}")
        for tool, (parameter, value) in values.items()
    }
    found["torchao"] = Form("FqnToConfig", values["torchao"][1], _torchao(names))
    found["modelopt"] = Form("quant_cfg", quantizers, f'config["quant_cfg"] += {_python(quantizers)}')
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


def _torchao(names: list[str]) -> str:
    """Two ways to say it: a filter over modules, and a configuration by name."""
    return (
        f"skip = {_python(names)}\n"
        "linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]\n"
        "quantize_(model, config, filter_fn=lambda m, n: n in linear and n not in skip)\n"
        "# or, which can be stored with a checkpoint:\n"
        "named = OrderedDict((n, None if n in skip else config) for n in linear)\n"
        "quantize_(model, FqnToConfig(named), filter_fn=None)"
    )


def gguf_name(model: nn.Module, module: str) -> str | None:
    """What a GGUF file calls a module: blk.11.ffn_down for model.layers.11.mlp.down_proj; `.weight` follows.

    Args:
        model: a causal language model.
        module: full name of one of its modules.

    Returns:
        The name; None where llama.cpp's table has none.
    """
    known = {re.sub(r"\W|_", "", name): arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    kind = re.sub(r"\W|_|text$", "", model.config.model_type)
    arch = known.get(kind, gguf.MODEL_ARCH.LLAMA)  # mistral and others are stored as llama
    layers = model.config.get_text_config().num_hidden_layers
    return gguf.get_tensor_name_map(arch, layers).get_name(module)
