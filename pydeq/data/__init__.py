"""Data sets, in the formats that their own sites publish, and how training walks through them.

    train = pydeq.data.load_images("digits", "train")
    for indices in pydeq.data.batches(len(train), 64, seed=0, epoch=0):
        images, labels = train.images[indices], train.labels[indices]

Import it as ``import pydeq.data`` or ``from pydeq import data``.
"""

from __future__ import annotations

from pydeq.data.augmentation import normalize, random_crop, random_flip
from pydeq.data.images import Images, load_images
from pydeq.data.sampling import Batches, batches

__all__ = ["Batches", "Images", "batches", "load_images", "normalize", "random_crop", "random_flip"]
