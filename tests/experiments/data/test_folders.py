import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from experiments.data import MissingDataError, image_folder
from experiments.data.folders import _random_box


def gradient(width, height):
    """Red grows to the right and green downwards, from 0 to 255; blue is 100."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 100)], axis=-1).round().astype(np.uint8))


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "ant", "bee")):
            folder = tmp_path / split / name / "nested"
            folder.mkdir(parents=True)
            for i in range(label + 1):
                gradient(64, 48).save(folder.parent / f"{i}.png")
        (tmp_path / split / ".hidden").mkdir()
        (tmp_path / split / "cat" / "notes.txt").write_text("not an image")
    gradient(30, 90).convert("L").save(tmp_path / "train" / "ant" / "nested" / "gray.JPEG")
    return tmp_path


def test_classes_are_folders_in_order(root):
    train, valid = image_folder(root, "train", 8), image_folder(root, "valid", 8)
    assert train.classes == ("ant", "bee", "cat")
    assert [label for _, label in train.files] == [0, 0, 0, 1, 1, 1, 2]
    assert len(valid) == 6
    pixels, label = train[2]
    assert (pixels.shape, pixels.dtype, label) == ((3, 8, 8), torch.uint8, 0)
    # The gray one, in three channels.
    assert torch.equal(pixels[0], pixels[1])


def test_without_augmentation_the_central_square_is_resized(root):
    pixels = image_folder(root, "valid", 21)[0][0].double()
    # 7/8 of 48 are 42 pixels, at 11 to 53 of 64 and 3 to 45 of 48; one of 21 covers two. Means over pixels differ
    # by no more than rounding to whole numbers, twice.
    places = torch.arange(21, dtype=torch.float64) * 2 + 1
    red, green = (11 + places - 0.5) * 255 / 63, (3 + places - 0.5) * 255 / 47
    assert (pixels[0] - red).abs().max() <= 1.01
    assert (pixels[1] - green[:, None]).abs().max() <= 1.01
    assert (pixels[2] - 100).abs().max() == 0


def test_augmentation_depends_on_seed_epoch_and_sample_alone(root):
    one, other = (image_folder(root, "train", 16, True, seed=5) for _ in range(2))
    assert torch.equal(one[3][0], other[3][0])
    one[1]
    assert torch.equal(one[3][0], other[3][0])
    assert torch.equal(one[-1][0], one[6][0])
    assert not torch.equal(one[3][0], image_folder(root, "train", 16, True, seed=6)[3][0])
    # Files 3 and 4 hold the same picture.
    assert not torch.equal(one[3][0], one[4][0])
    one.set_epoch(1)
    assert not torch.equal(one[3][0], other[3][0])
    other.set_epoch(1)
    assert torch.equal(one[3][0], other[3][0])


# Of CPython, where the process that makes a worker has threads.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_that_live_on_hear_of_a_new_epoch(root):
    data = image_folder(root, "train", 16, True)
    loader = DataLoader(data, batch_size=7, num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    for epoch in (0, 1):
        data.set_epoch(epoch)
        ((images, labels),) = loader
        assert torch.equal(images, torch.stack([data[i][0] for i in range(7)]))
        assert labels.tolist() == [label for _, label in data.files]


def test_random_boxes_fit_and_are_as_random_as_said():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([_random_box(100, 100, generator) for _ in range(2000)])
    assert boxes.min() >= 0
    assert boxes.max() <= 100
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, ratios = wide * high / 1e4, wide / high
    assert 0.08 - 1e-6 <= areas.min() < 0.09
    assert 0.9 < areas.max() <= 1 + 1e-6
    assert 0.75 - 1e-6 <= ratios.min() < 0.76
    assert 1.32 < ratios.max() <= 4 / 3 + 1e-6
    # As often wide as high: sixfold of sqrt(2000) / 2.
    assert abs(int((ratios > 1).sum()) - 1000) < 6 * 2000**0.5 / 2


def test_a_strip_gets_the_largest_box_that_is_allowed():
    generator = torch.Generator().manual_seed(0)
    assert _random_box(1000, 3, generator) == (498, 0, 502, 3)
    assert _random_box(3, 1000, generator) == (0, 498, 3, 502)


def test_augmented_images_are_flipped_half_of_the_time(root):
    data = image_folder(root, "train", 8, True)
    rising = 0
    for epoch in range(100):
        data.set_epoch(epoch)
        red = data[5][0][0].int()
        rising += int(red[0, -1] > red[0, 0])
    # Sixfold of sqrt(100) / 2.
    assert abs(rising - 50) < 30


def test_a_file_that_is_no_image_is_named(root):
    path = root / "train" / "bee" / "broken.jpg"
    path.write_bytes((root / "train" / "bee" / "0.png").read_bytes()[:60])
    data = image_folder(root, "train", 8)
    index = data.files.index((str(path), 1))
    with pytest.raises(ValueError, match=r"bee/broken\.jpg cannot be read as an image"):
        data[index]


def test_missing_folders_are_named(root, tmp_path):
    with pytest.raises(MissingDataError, match="/test must be a folder with a folder of images for each class"):
        image_folder(root, "test", 8)
    (tmp_path / "test" / "empty").mkdir(parents=True)
    with pytest.raises(MissingDataError, match="empty has no images"):
        image_folder(root, "test", 8)
    (tmp_path / "test" / "empty").rmdir()
    with pytest.raises(MissingDataError, match="/test must have a folder for each class, got none"):
        image_folder(root, "test", 8)


def test_bad_arguments_are_named(root):
    with pytest.raises(ValueError, match="split must be one of train, valid, test, got 'val'"):
        image_folder(root, "val", 8)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        image_folder(root, "train", 0)
    with pytest.raises(ValueError, match="seed must be in"):
        image_folder(root, "train", 8, seed=-1)


def test_without_pillow(root, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "PIL"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"an image folder needs Pillow.*pip install Pillow"):
        image_folder(root, "train", 8)
