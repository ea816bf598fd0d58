"""One progress bar for everything that takes more than a few seconds."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def progress(iterable: Iterable[Item], desc: str | None = None, total: int | None = None) -> Iterator[Item]:
    """Go through an iterable with a tqdm bar, in a terminal or a notebook; silent where neither is there.

    `TQDM_DISABLE=1` in the environment switches it off everywhere.

    Args:
        iterable: what is gone through.
        desc: what the bar says.
        total: number of steps, where `iterable` does not know it.

    Returns:
        The same items, one by one.
    """
    from tqdm.auto import tqdm

    # None asks whether the output is a terminal, which a notebook's is not. What is done within two seconds
    # shows no bar: an inner loop would add hundreds of them.
    quiet = {} if "ipykernel" in sys.modules else {"disable": None}
    return tqdm(iterable, desc=desc, total=total, leave=False, delay=2, **quiet)
