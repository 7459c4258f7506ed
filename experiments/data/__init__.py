"""Data sets, in the formats that their own sites publish, and their batches for training.

    from experiments import data

    train = data.load_images("cifar10", "train")
    for indices in data.batches(len(train), 128, seed=0, epoch=0):
        images = data.random_flip(data.random_crop(train.images[indices], generator=g), generator=g)

Nothing is downloaded unless ``python -m experiments data get`` is asked to. Import it as ``import experiments.data`` or
``from experiments import data``.
"""

from __future__ import annotations

from experiments.data.augmentation import normalize, random_crop, random_flip
from experiments.data.cache import AlteredDataError, MissingDataError, data_root
from experiments.data.folders import ImageFolder, image_folder
from experiments.data.graphs import Graph, load_graph
from experiments.data.images import Images, load_images
from experiments.data.sampling import Batches, batches
from experiments.data.standardization import Statistics, statistics
from experiments.data.text import Text, Vocabulary, load_text

__all__ = [
    "AlteredDataError",
    "Batches",
    "Graph",
    "ImageFolder",
    "Images",
    "MissingDataError",
    "Statistics",
    "Text",
    "Vocabulary",
    "batches",
    "data_root",
    "image_folder",
    "load_graph",
    "load_images",
    "load_text",
    "normalize",
    "random_crop",
    "random_flip",
    "statistics",
]
