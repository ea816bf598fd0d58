"""Live or from frames: whether someone sits before the notebook decides, unless a parameter does."""

from functools import partial

import ipywidgets

from sdnb.loading import Loaded, load
from sdnb.widgets.frames import static_explorer
from sdnb.widgets.live import LiveExplorer
from sdnb.widgets.shelf import Shelf


def someone_present() -> bool:
    """Say whether a person runs this notebook: only then may the kernel ask for input.

    Returns:
        True in JupyterLab, VS Code and their like; False under papermill and `sdnb run`, and outside of a
        notebook.
    """
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is None:
        return False
    return bool(kernel.get_parent().get("content", {}).get("allow_stdin"))


def explore(
    loaded: Loaded,
    sentence: str,
    *,
    compare: str | None = None,
    begin: bool = True,
    live: bool | None = None,
    seed: int = 0,
    **options: object,
) -> ipywidgets.VBox:
    """Build the explorer.

    Args:
        loaded: the first model.
        sentence: the first sentence.
        compare: a second model: zoo/<name>, hub id or folder; `@` and a revision may follow.
        begin: let the tokenizer add its own tokens.
        live: widgets that compute, which need a kernel, or frames that are drawn now; automatic when None.
        seed: of the decompositions.
        **options: of `sdnb.load`, such as dtype and device, for every other model that is chosen.

    Returns:
        The widgets; in a notebook, the last line of a cell shows them.
    """
    shelf = Shelf(loaded, partial(load, **options), seed)
    if someone_present() if live is None else live:
        return LiveExplorer(shelf, sentence, compare or "", begin=begin).box
    names = [shelf.first, *([compare] if compare else [])]
    return ipywidgets.VBox([static_explorer(shelf.take(name), sentence, begin=begin) for name in names])
