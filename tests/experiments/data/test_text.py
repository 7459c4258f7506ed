import pytest
import torch
from formats import zipped

from experiments.data import AlteredDataError, MissingDataError, Vocabulary, load_text, text
from experiments.data.catalogue import DATA_SETS
from experiments.data.text import words_and_marks

TRAIN = " \n = A title = \n \n the cat <unk> the @-@ cat the dog \n"
VALID = " \n the dog sat \n"
TEST = " the <unk> \n"


def files(train=TRAIN, valid=VALID, test=TEST, pattern="wiki.{}.tokens"):
    contents = zip(text.SPLITS, (train, valid, test), strict=True)
    return {pattern.format(split): content.encode() for split, content in contents}


@pytest.mark.parametrize("place", ["files", "archive"])
def test_wikitext(publish, write, cache, monkeypatch, place):
    contents = files()
    archive = zipped({f"wikitext-103/{name}": content for name, content in contents.items()})
    publish("wikitext103", contents, archives={"wikitext-103-v1.zip": archive})
    write(cache / "wikitext103", {"wikitext-103-v1.zip": archive} if place == "archive" else contents)
    with pytest.raises(AlteredDataError, match=r"wiki\.train\.tokens has 16 tokens, expected 103227021"):
        load_text("wikitext103")
    monkeypatch.setattr(text, "_WIKITEXT103_TOKENS", {"train": 16, "valid": 5, "test": 3})
    found = load_text("wikitext103")
    # The end of a line, the unknown word, then by frequency, and by name where that is the same.
    assert found.vocabulary.tokens == ("<eos>", "<unk>", "the", "=", "cat", "@-@", "A", "dog", "title")
    assert found.train.tolist() == [0, 3, 6, 8, 3, 0, 0, 2, 4, 1, 2, 5, 4, 2, 7, 0]
    assert found.valid.tolist() == [0, 2, 7, 1, 0]
    assert found.test.tolist() == [2, 1, 0]
    assert found.train.dtype == torch.int64
    assert (found.vocabulary.eos, found.vocabulary.unk, found.vocabulary.size) == (0, 1, 9)
    small = load_text("wikitext103", vocabulary_size=4)
    assert small.vocabulary.tokens == ("<eos>", "<unk>", "the", "=")
    assert small.train.tolist() == [0, 3, 1, 1, 3, 0, 0, 2, 1, 1, 2, 1, 1, 2, 1, 0]


def test_shakespeare_holds_out_whole_plays(publish, write, cache):
    names = [file.name for file in DATA_SETS["shakespeare"].files]
    contents = {name: f"A {name.split('_gut')[0]}.\n\xe6'er\n".encode("latin-1") for name in names}
    publish("shakespeare", contents)
    write(cache / "shakespeare", contents | {"hamlet_gut_f.txt": b"another edition"})
    found = load_text("shakespeare", level="char")
    decoded = {split: found.vocabulary.decode(getattr(found, split)) for split in text.SPLITS}
    held_out = {"valid": text.SHAKESPEARE_VALID, "test": text.SHAKESPEARE_TEST}
    for split, plays in held_out.items():
        assert decoded[split] == "".join(f"A {play}.\næ'er\n\n" for play in plays)
    for name in names:
        play = name.split("_gut")[0]
        assert sum(f"A {play}.\n" in part for part in decoded.values()) == 1
    assert "another edition" not in decoded["train"]
    assert len(names) == 42


@pytest.mark.parametrize("pattern", ["{}.txt", "ptb.{}.txt", "wiki.{}.raw"])
def test_a_folder_of_three_files(write, tmp_path, pattern):
    write(tmp_path / "some", files("The cat's here; the cat.\n", "The dog\n", "cat", pattern))
    found = load_text(tmp_path / "some")
    assert found.vocabulary.decode(found.train) == "The cat's here ; the cat .\n"
    assert found.vocabulary.decode(found.valid) == "The <unk>\n"
    # A line without an end gets none.
    assert found.vocabulary.decode(found.test) == "cat"
    assert load_text("some", root=tmp_path, lowercase=True).vocabulary.tokens[2] == "the"


def test_other_names_of_splits_and_texts_that_are_cut_already(write, tmp_path):
    write(tmp_path, {"train.txt": b"don't <unk> N.\n", "val.txt": b"N.\n", "test.txt": b"x\n"})
    assert load_text(tmp_path).vocabulary.tokens == ("<eos>", "<unk>", "N.", "don't")
    cut = load_text(tmp_path, tokenize=lambda line: list(line.strip()))
    assert cut.vocabulary.decode(cut.valid) == "N .\n"


def test_one_file_is_cut_at_ends_of_lines(tmp_path):
    lines = [f"line {i:03}\n" for i in range(100)]
    (tmp_path / "whole.txt").write_text("".join(lines))
    found = load_text(tmp_path / "whole.txt", level="char")
    parts = [found.vocabulary.decode(getattr(found, split)) for split in text.SPLITS]
    assert "".join(parts) == "".join(lines)
    assert all(part.endswith("\n") for part in parts)
    assert [part.count("\n") for part in parts[1:]] == pytest.approx([5, 5], abs=1)


def test_characters_that_training_has_not_seen(write, tmp_path):
    write(tmp_path, files("aab\n", "abc\u20ac\n", "b", "{}.txt"))
    found = load_text(tmp_path, level="char")
    assert found.vocabulary.tokens == ("<unk>", "a", "\n", "b")
    assert found.valid.tolist() == [1, 3, 0, 0, 2]
    assert found.vocabulary.decode(found.valid) == "ab\ufffd\ufffd\n"
    assert found.vocabulary.eos is None
    kept = load_text(tmp_path, level="char", vocabulary_size=2)
    assert kept.train.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("level", ["word", "char"])
def test_encode_is_what_reading_does(write, tmp_path, level):
    train = "One, two;\r\nthree\u2028four\x0b five \x85 six\r\n\r\nsix _two_ <unk>"
    write(tmp_path, files(train, train, train, "{}.txt"))
    found = load_text(tmp_path, level=level)
    assert torch.equal(found.vocabulary.encode(train), found.train)
    assert torch.equal(found.valid, found.train)
    assert found.vocabulary.encode("").tolist() == []
    if level == "char":
        assert found.vocabulary.decode(found.train) == train.replace("\r\n", "\n")
    else:
        assert int((found.train == found.vocabulary.eos).sum()) == 3


def test_words_and_marks():
    line = "[Exit.] 'Tis perform'd--Come, <unk>; _now_ or 2nd-best!\n"
    assert words_and_marks(line) == [
        "[", "Exit", ".", "]", "'", "Tis", "perform'd", "-", "-", "Come", ",", "<unk>", ";", "_", "now", "_", "or",
        "2nd", "-", "best", "!",
    ]  # fmt: skip


def test_long_texts_are_read_in_pieces(tmp_path):
    # Beyond one piece of 2**20 characters, of two bytes each.
    whole = ("\u00e9" * 99 + "\n") * 12_000
    (tmp_path / "long.txt").write_text(whole, encoding="utf-8")
    found = load_text(tmp_path / "long.txt", level="char")
    assert len(found.train) + len(found.valid) + len(found.test) == len(whole)
    assert torch.bincount(found.train)[1:].tolist() == [99 * (len(found.train) // 100), len(found.train) // 100]


def test_bad_arguments_are_named(write, tmp_path):
    write(tmp_path / "whole", files(pattern="{}.txt"))
    with pytest.raises(ValueError, match="level must be word or char, got 'byte'"):
        load_text(tmp_path / "whole", level="byte")
    with pytest.raises(ValueError, match="vocabulary_size must be at least 3, got 2"):
        load_text(tmp_path / "whole", vocabulary_size=2)
    with pytest.raises(MissingDataError, match="must be one of wikitext103, shakespeare, or the path of a folder or"):
        load_text("austen", root=tmp_path)
    write(tmp_path / "part", {"train.txt": b"a\n", "valid.txt": b"a\n", "dev.txt": b"a\n"})
    with pytest.raises(MissingDataError, match=r"one file for valid, such as valid\.txt, got dev\.txt, valid\.txt"):
        load_text(tmp_path / "part")
    (tmp_path / "part" / "dev.txt").unlink()
    with pytest.raises(MissingDataError, match=r"one file for test, such as test\.txt, got none"):
        load_text(tmp_path / "part")


def test_texts_that_cannot_be_cut_or_decoded_are_refused(write, tmp_path):
    (tmp_path / "short.txt").write_text("one line\n")
    with pytest.raises(ValueError, match=r"short\.txt must have text for valid, got none"):
        load_text(tmp_path / "short.txt")
    write(tmp_path / "latin", {"train.txt": b"a\n", "valid.txt": b"\xe9\n", "test.txt": b"a\n"})
    with pytest.raises(ValueError, match=r"valid\.txt is not text in utf-8; encoding= names another"):
        load_text(tmp_path / "latin")
    assert len(load_text(tmp_path / "latin", encoding="latin-1").valid) == 2


def test_vocabularies_compare_by_their_tokens():
    assert Vocabulary(("<unk>", "a"), "char") == Vocabulary(("<unk>", "a"), "char")
    assert Vocabulary(("<unk>", "a"), "char") != Vocabulary(("<unk>", "b"), "char")
    assert len(Vocabulary(("<unk>", "a"), "char")) == 2
