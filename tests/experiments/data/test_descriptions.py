"""Data sets print a line, and vocabularies come back from JSON."""

import json

import pytest
import torch

from experiments import data
from experiments.data.text import words_and_marks
from experiments.training.synthetic import synthetic_graph, synthetic_images


def test_a_line_says_what_a_data_set_is(tmp_path):
    assert repr(synthetic_images("train")) == "Images(256 of 1x8x8, 4 classes)"
    graph = synthetic_graph()
    edges = graph.edges.shape[1]
    assert repr(graph) == (
        f"Graph(96 nodes with 8 features, {edges} edges, 3 classes; train 48, valid 24, test 24)"
    )  # fmt: skip
    (tmp_path / "text.txt").write_text("one two three\n" * 40)
    text = data.load_text(tmp_path / "text.txt")
    assert str(text) == "Text(train 148, valid 8, test 4 tokens, Vocabulary(5 tokens, level='word'))"


def test_a_folder_of_images_prints_a_line(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "train" / "red").mkdir(parents=True)
    image.new("RGB", (9, 9), "red").save(tmp_path / "train" / "red" / "0.png")
    found = data.image_folder(tmp_path, "train", size=8, train_augmentation=False)
    assert repr(found) == f"ImageFolder(1 images of 3x8x8, 1 classes, {tmp_path / 'train'})"


@pytest.mark.parametrize(
    "vocabulary",
    [
        data.Vocabulary(("<eos>", "<unk>", "one", "’two’"), "word", True, words_and_marks),
        data.Vocabulary(("<eos>", "<unk>", "one,"), "word"),
        data.Vocabulary(("<unk>", "a", "\n", "é"), "char"),
    ],
)
def test_a_vocabulary_comes_back_from_json(vocabulary):
    found = data.Vocabulary.of(json.loads(json.dumps(vocabulary.mapping())))
    assert found == vocabulary
    text = "One, ’two’\na é"
    assert torch.equal(found.encode(text), vocabulary.encode(text))


def test_a_function_of_ones_own_cannot_be_saved():
    vocabulary = data.Vocabulary(("<eos>", "<unk>"), "word", tokenize=lambda line: line.split("-"))
    with pytest.raises(ValueError, match="tokenize must be one of split, words_and_marks to be saved"):
        vocabulary.mapping()
