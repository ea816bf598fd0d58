"""Errors that a user can act on: each message says what is wrong and what to do."""


class SdnbError(Exception):
    """Anything the package refuses on purpose; the message is meant to be read by a person."""


class ModelError(SdnbError):
    """The model cannot be found, loaded or used: unknown, gated, damaged, quantized, of the wrong kind."""


class LayerUnsupported(SdnbError):
    """A decoder layer whose structure was not recognised or does not reproduce the real layer.

    Args:
        layer: the layer's number, 1..L.
        module: the name of the module at fault, as in `named_modules` of the layer.
        reason: what did not hold, with its number, and what to do about it.
    """

    def __init__(self, layer: int, module: str, reason: str):
        self.layer, self.module, self.reason = layer, module, reason
        super().__init__(f"layer {layer}, {module}: {reason}")


class TextError(SdnbError):
    """The text is missing, empty, too short or too long for what is asked."""


class ParameterError(SdnbError):
    """A parameter is unknown, misspelt or out of range."""


class RecordError(SdnbError):
    """A record is missing, damaged, does not fit its schema or cannot be written."""


class MemoryShortage(SdnbError):
    """The memory does not suffice; the message says how much is needed and which option lowers it."""
