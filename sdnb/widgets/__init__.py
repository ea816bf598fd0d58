"""The explorer: live in JupyterLab, and from precomputed frames in the book. The only user of ipywidgets."""

from sdnb.widgets.exploration import INTERVENTIONS, Exploration, LayerFacts, Sentence
from sdnb.widgets.frames import static_explorer
from sdnb.widgets.live import LiveExplorer
from sdnb.widgets.present import explore, someone_present
from sdnb.widgets.shelf import Shelf, zoo_models

__all__ = [
    "INTERVENTIONS",
    "Exploration",
    "LayerFacts",
    "LiveExplorer",
    "Sentence",
    "Shelf",
    "explore",
    "someone_present",
    "static_explorer",
    "zoo_models",
]
