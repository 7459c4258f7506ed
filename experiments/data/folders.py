"""Folders of image files with one folder for each class, such as ImageNet's."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from experiments.data.cache import MissingDataError
from experiments.data.optional import needs
from experiments.data.sampling import sample_seed

EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")

_SPLITS = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}

# Fraction of the shorter side that a central crop keeps (Krizhevsky, Sutskever and Hinton, NeurIPS 2012: 224 of 256).
_KEPT = 224 / 256

# A random crop's area and aspect ratio (Szegedy et al., Going Deeper with Convolutions, CVPR 2015, section 6).
_AREA, _RATIO, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """See :func:`image_folder`. Sample i is an image, uint8, (3, size, size), and its label.

    Attributes:
        classes: Names of the folders, in order; a label is an index into it.
        files: Pairs of a path and a label.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str, size: int, train_augmentation: bool, seed: int = 0
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f"split must be one of {', '.join(_SPLITS)}, got {split!r}")
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {seed}")
        with needs("Pillow", "an image folder"):
            import PIL.Image  # noqa: F401  # fail here, not in the first worker
        self.folder = _split_folder(Path(root).expanduser(), split)
        self.size, self.train_augmentation, self.seed = size, train_augmentation, seed
        # Shared with the workers of a DataLoader; they keep their own copies of everything else from epoch to epoch.
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()
        folders = sorted(path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        self.classes = tuple(folder.name for folder in folders)
        self.files: list[tuple[str, int]] = []
        for label, folder in enumerate(folders):
            paths = sorted(
                os.path.join(place, name)
                for place, _, names in os.walk(folder, followlinks=True)
                for name in names
                if name.lower().endswith(EXTENSIONS)
            )
            if not paths:
                raise MissingDataError(f"{folder} has no images: no file ends with {', '.join(EXTENSIONS)}")
            self.files += [(path, label) for path in paths]
        if not folders:
            raise MissingDataError(f"{self.folder} must have a folder for each class, got none")

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        return (
            f"ImageFolder({len(self)} images of 3x{self.size}x{self.size}, {len(self.classes)} classes, {self.folder})"
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; crops and flips depend only on seed, epoch and sample."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Read one image.

        Raises:
            ValueError: If the file cannot be read as an image; the message names it.
        """
        from PIL import Image

        path, label = self.files[index]
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        generator = None
        if self.train_augmentation:
            generator = torch.Generator("cpu").manual_seed(sample_seed(self.seed, int(self._epoch), index % len(self)))
            box = _random_box(image.width, image.height, generator)
        else:
            box = _central_box(image.width, image.height)
        resized = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        if generator is not None and torch.rand((), generator=generator, device="cpu") < 0.5:
            pixels = pixels.flip(2)
        return pixels.contiguous(), label


def image_folder(
    root: str | os.PathLike[str], split: str, size: int, train_augmentation: bool = False, *, seed: int = 0
) -> ImageFolder:
    """Make a data set of images in folders, ``root/<split>/<class>/*``, which are read on access; needs Pillow.

    Without augmentation: the central square with 7/8 of the shorter side, resized. With it: a random crop of 8 to 100%
    of the area and an aspect ratio of 3:4 to 4:3, resized, and a horizontal flip with probability 1/2. The random
    numbers of sample i depend only on the seed, the epoch (:meth:`ImageFolder.set_epoch`) and i.

    Args:
        root: Folder with the splits' folders.
        split: "train", "valid" (in a folder valid, val or validation) or "test".
        size: Height and width in pixels.
        train_augmentation: Whether to crop and flip at random.
        seed: Seed of the crops and flips.

    Raises:
        ModuleNotFoundError: Without Pillow.
        ValueError: If an argument is out of range.
        MissingDataError: If a folder is missing, or a class has no images.
    """
    return ImageFolder(root, split, size, train_augmentation, seed)


def _split_folder(root: Path, split: str) -> Path:
    for name in _SPLITS[split]:
        if (root / name).is_dir():
            return root / name
    expected = " or ".join(str(root / name) for name in _SPLITS[split])
    raise MissingDataError(f"{expected} must be a folder with a folder of images for each class; it is not there")


def _central_box(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height) * _KEPT
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_box(width: int, height: int, generator: torch.Generator) -> tuple[float, float, float, float]:
    """Draw a box of random area and aspect ratio; if ten boxes do not fit, return the largest allowed central box."""
    for _ in range(_TRIES):
        area, ratio, x, y = torch.rand(4, generator=generator, dtype=torch.float64, device="cpu").tolist()
        pixels = width * height * (_AREA[0] + area * (_AREA[1] - _AREA[0]))
        # Uniform in the logarithm of the ratio: wide and high boxes are equally likely.
        shape = _RATIO[0] * (_RATIO[1] / _RATIO[0]) ** ratio
        wide, high = (pixels * shape) ** 0.5, (pixels / shape) ** 0.5
        if wide <= width and high <= height:
            left, top = x * (width - wide), y * (height - high)
            return left, top, left + wide, top + high
    wide, high = min(width, height * _RATIO[1]), min(height, width / _RATIO[0])
    left, top = (width - wide) / 2, (height - high) / 2
    return left, top, left + wide, top + high
