"""The models that the explorer has at hand: named, loaded when first asked for, the last few kept."""

from collections.abc import Callable
from pathlib import Path

from sdnb.checkpoint import zoo_folder
from sdnb.errors import ModelError
from sdnb.loading import Loaded
from sdnb.widgets.exploration import Exploration

KEPT = 3
"""Models in memory; the one that was not looked at for longest goes first."""


def zoo_models() -> list[str]:
    """Names of the models that come with the project, `zoo/<name>`; none outside a checkout."""
    zoo = zoo_folder()
    found = {path.parent for pattern in ("*", "*/*") for path in zoo.glob(f"{pattern}/config.json")}
    names = sorted(path.relative_to(zoo).as_posix() for path in found)
    return [f"zoo/{name}" for name in names if not name.startswith("runs/")]


class Shelf:
    """Explorations by the model's name.

    Args:
        first: a model that is loaded already.
        load: loads a further one by name and revision.
        seed: of the explorations.
    """

    def __init__(self, first: Loaded, load: Callable[..., Loaded], seed: int = 0):
        self.first = f"{first.name}@{first.revision}" if first.revision else first.name
        self._load, self._seed = load, seed
        self._open, self._ready = {}, {self.first: first}

    def take(self, name: str) -> Exploration:
        """Return the exploration of a model, loading it if need be.

        Args:
            name: zoo/<name>, hub id or folder; `@` and a revision may follow.

        Returns:
            The exploration; an error of loading the model passes through.

        Raises:
            ModelError: no name.
        """
        name = name.strip()
        if not name:
            raise ModelError("There is no model: choose one, or type a hub id or the path of a folder.")
        found = self._open.pop(name, None)
        if found is None:
            for old in list(self._open)[: len(self._open) - KEPT + 1]:
                del self._open[old]  # before the next one is read
            place, _, revision = (name, "", "") if Path(name).expanduser().exists() else name.partition("@")
            loaded = self._ready.pop(name, None) or self._load(place, revision=revision or None)
            found = Exploration(loaded, self._seed)
        self._open[name] = found
        return found
