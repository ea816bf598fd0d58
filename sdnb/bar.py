"""One progress bar for everything that takes more than a few seconds."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def progress(iterable: Iterable[Item], desc: str | None = None, total: int | None = None) -> Iterator[Item]:
    """Go through an iterable with a tqdm bar, in a terminal or a notebook; silent where neither is there.

    `TQDM_DISABLE=1` in the environment switches it off everywhere.

    Args:
        iterable: any.
        desc: the text in front of the bar.
        total: number of steps, where `iterable` does not know it.

    Returns:
        The same items, one by one.
    """
    from tqdm.auto import tqdm

    # disable=None silences the bar where the output is no terminal, as a notebook's, whose tqdm does not ask
    # the environment. What takes less than two seconds shows no bar: an inner loop would add hundreds.
    notebook, off = "ipykernel" in sys.modules, os.environ.get("TQDM_DISABLE") == "1"
    disable = off if notebook else off or None
    return tqdm(iterable, desc=desc, total=total, leave=False, delay=2, disable=disable)
