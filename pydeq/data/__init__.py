"""Data sets, in the formats that their own sites publish, and how training walks through them.

    train = pydeq.data.load_images("cifar10", "train")
    for indices in pydeq.data.batches(len(train), 128, seed=0, epoch=0):
        images = pydeq.data.random_flip(pydeq.data.random_crop(train.images[indices], generator=g), generator=g)

Nothing is downloaded unless ``python -m pydeq data get`` is asked to. Import it as ``import pydeq.data`` or
``from pydeq import data``.
"""

from __future__ import annotations

from pydeq.data.augmentation import normalize, random_crop, random_flip
from pydeq.data.cache import AlteredDataError, MissingDataError, data_root
from pydeq.data.folders import ImageFolder, image_folder
from pydeq.data.graphs import Graph, load_graph
from pydeq.data.images import Images, load_images
from pydeq.data.sampling import Batches, batches
from pydeq.data.standardization import Statistics, statistics
from pydeq.data.text import Text, Vocabulary, load_text

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
