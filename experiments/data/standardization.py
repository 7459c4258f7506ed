"""Mean and standard deviation of images' channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.data.images import Images


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel over the training images, as values in [0, 1].

    Args:
        mean: Means.
        std: Standard deviations.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


KNOWN = {
    # Computed from the training splits with `statistics(load_images(name, "train"))`, rounded to four decimals.
    "digits": Statistics((0.2874,), (0.3534,)),
    "fashion_mnist": Statistics((0.2860,), (0.3530,)),
    "cifar10": Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    # The values that published models for ImageNet use.
    "imagenet": Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def statistics(data: str | Images) -> Statistics:
    """Return mean and standard deviation of each channel.

    Args:
        data: Images; or the name of a data set, "digits", "fashion_mnist", "cifar10" or "imagenet", for the known
            numbers of its training images.

    Raises:
        ValueError: If the name is unknown, or there are no images.
    """
    if isinstance(data, str):
        if data not in KNOWN:
            raise ValueError(f"data must be one of {', '.join(KNOWN)}, or images, got {data!r}")
        return KNOWN[data]
    count = data.images.numel() // max(1, data.images.shape[1])
    if not count:
        raise ValueError(f"data must have images, got shape {tuple(data.images.shape)}")
    # The counts of the 256 values are whole numbers: the sums are exact.
    values = torch.arange(256, dtype=torch.float64, device="cpu")
    counts = [torch.bincount(channel.flatten(), minlength=256) for channel in data.images.unbind(dim=1)]
    means = [float(n.double() @ values) / count for n in counts]
    deviations = [
        float(n.double() @ (values - mean).square() / count) ** 0.5 for n, mean in zip(counts, means, strict=True)
    ]
    return Statistics(tuple(mean / 255 for mean in means), tuple(deviation / 255 for deviation in deviations))
