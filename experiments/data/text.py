"""Text as tokens: words or characters, numbered by how often they occur."""

from __future__ import annotations

import io
import os
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.data.cache import AlteredDataError, MissingDataError, locate_all, read_files
from experiments.data.catalogue import DATA_SETS

EOS, UNK = "<eos>", "<unk>"

SPLITS = ("train", "valid", "test")

SHAKESPEARE_VALID = ("much_ado_about_nothing", "othello")
SHAKESPEARE_TEST = ("macbeth", "twelfth_night")
"""Held-out plays, a comedy and a tragedy each."""

HELD_OUT = 0.05
"""Fraction of a single file, from its end, for each of valid and test."""

# The published numbers (Merity et al., 2017, table 1), with ends of lines.
_WIKITEXT103_TOKENS = {"train": 103_227_021, "valid": 217_646, "test": 245_569}

_FILES = {
    "train": re.compile(r"(.*\.)?train\.(txt|tokens|raw)"),
    "valid": re.compile(r"(.*\.)?(valid|validation|val|dev)\.(txt|tokens|raw)"),
    "test": re.compile(r"(.*\.)?test\.(txt|tokens|raw)"),
}

# A special token such as <unk>, a word with its apostrophes, or one mark.
_WORDS = re.compile(r"<\w+>|[^\W_]+(?:['’][^\W_]+)*|[^\w\s]|_")


@dataclass(frozen=True, repr=False)
class Vocabulary:
    """The tokens of a text, the most frequent first.

    For words, token 0 is the end of a line and token 1 any unknown word. For characters, token 0 is any unknown
    character.

    Args:
        tokens: Tokens in the order of their numbers.
        level: "word" or "char".
        lowercase: Whether to convert text to lower case first.
        tokenize: Function that cuts a line into words.
    """

    tokens: tuple[str, ...]
    level: str
    lowercase: bool = False
    tokenize: Callable[[str], Sequence[str]] = str.split
    _numbers: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_numbers", {token: number for number, token in enumerate(self.tokens)})

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def size(self) -> int:
        """Number of tokens, including the special ones."""
        return len(self.tokens)

    @property
    def unk(self) -> int:
        """The token for pieces of text that are not in the vocabulary."""
        return self._numbers[UNK]

    @property
    def eos(self) -> int | None:
        """The token of the end of a line; None for characters, where it is the newline."""
        return self._numbers.get(EOS)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} tokens, level={self.level!r})"

    def mapping(self) -> dict[str, Any]:
        """Return the vocabulary as JSON holds it.

        Raises:
            ValueError: If it cuts lines by a function that is not in :data:`TOKENIZERS`.
        """
        names = [name for name, tokenize in TOKENIZERS.items() if tokenize is self.tokenize]
        if not names:
            raise ValueError(f"tokenize must be one of {', '.join(TOKENIZERS)} to be saved, got {self.tokenize}")
        return {"tokens": self.tokens, "level": self.level, "lowercase": self.lowercase, "tokenize": names[0]}

    @staticmethod
    def of(mapping: Mapping[str, Any]) -> Vocabulary:
        """Make a vocabulary from a :meth:`mapping` that went through JSON."""
        tokenize = TOKENIZERS[mapping["tokenize"]]
        return Vocabulary(tuple(mapping["tokens"]), mapping["level"], mapping["lowercase"], tokenize)

    def encode(self, text: str) -> Tensor:
        """Convert a text to tokens, int64, (length,)."""
        # As when files are read, only \n, \r\n and \r end a line.
        stream = io.StringIO(text, newline=None)
        return self._encode([stream.read()] if self.level == "char" else stream)

    def decode(self, tokens: Tensor | Iterable[int]) -> str:
        """Convert tokens to text: words with single spaces between them, unknown characters as U+FFFD."""
        numbers = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        words = [self.tokens[number] for number in numbers]
        if self.level == "char":
            return "".join("\N{REPLACEMENT CHARACTER}" if word == UNK else word for word in words)
        return re.sub(f" ?{EOS} ?", "\n", " ".join(words))

    def _encode(self, pieces: Iterable[str]) -> Tensor:
        numbers, unk = self._numbers, self.unk
        tokens = array("i")
        for piece in pieces:
            words = _words(piece, self.level, self.lowercase, self.tokenize)
            tokens.extend([numbers.get(word, unk) for word in words])
        return _tensor(tokens)


@dataclass(frozen=True, repr=False)
class Text:
    """A text as tokens, cut into parts.

    Args:
        train: Tokens for training, int64, (length,).
        valid: Tokens for validation.
        test: Tokens for the test.
        vocabulary: Vocabulary of the training part.
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    vocabulary: Vocabulary

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {len(getattr(self, split))}" for split in SPLITS)
        return f"Text({sizes} tokens, {self.vocabulary!r})"


def words_and_marks(line: str) -> list[str]:
    """Cut a line into words with their apostrophes, single punctuation marks, and special tokens such as <unk>."""
    return _WORDS.findall(line)


TOKENIZERS: dict[str, Callable[[str], Sequence[str]]] = {"split": str.split, "words_and_marks": words_and_marks}
"""The functions that cut lines into words, by the names under which vocabularies are saved."""


def load_text(
    name_or_path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    level: str = "word",
    vocabulary_size: int | None = None,
    *,
    lowercase: bool = False,
    encoding: str = "utf-8",
    tokenize: Callable[[str], Sequence[str]] | None = None,
) -> Text:
    """Read a text, cut it into tokens and number them by how often they occur in the training part.

    wikitext103: the files wiki.*.tokens, or the archive as published. shakespeare: plays and poems; four plays are held
    out. Otherwise a folder of three files, such as train.txt, valid.txt and test.txt, or one file. In one file, valid
    and test are a twentieth each from the end, cut at the end of a line.

    At the level of words, a line is cut at white space if the text is already cut into tokens (files *.tokens, or a
    training part with the token <unk>). Otherwise it is cut into words and marks. Each end of a line is a token.

    Args:
        name_or_path: "wikitext103", "shakespeare", or the path of a folder or file.
        root: Folder of a data set's files; for a path, the folder that it is relative to.
        level: "word" or "char".
        vocabulary_size: Keep only the most frequent tokens, this many including the special ones; None keeps all. The
            other tokens become <unk>. With all tokens kept, training sees <unk> only if the text has it.
        lowercase: Whether to convert the text to lower case first.
        encoding: Encoding of the files of a path.
        tokenize: Function that cuts a line into words, instead of the rule above.

    Raises:
        ValueError: If an argument is out of range, or a file has another encoding or is not the published one
            (AlteredDataError).
        MissingDataError: If a file is missing (a FileNotFoundError).
    """
    if level not in ("word", "char"):
        raise ValueError(f"level must be word or char, got {level!r}")
    special = (EOS, UNK) if level == "word" else (UNK,)
    if vocabulary_size is not None and vocabulary_size <= len(special):
        raise ValueError(f"vocabulary_size must be at least {len(special) + 1}, got {vocabulary_size}")
    texts, names, encoding = _read(name_or_path, root, encoding)
    for split in SPLITS:
        if not texts[split]:
            raise ValueError(f"{names[split]} must have text for {split}, got none")
    if tokenize is None:
        cut = names["train"].endswith(".tokens") or UNK.encode("ascii") in texts["train"]
        tokenize = str.split if cut else words_and_marks

    def pieces(split: str) -> Iterable[str]:
        # A BytesIO does not copy its bytes, and frees them at its end.
        stream = io.TextIOWrapper(io.BytesIO(texts.pop(split)), encoding=encoding)
        return stream if level == "word" else iter(lambda: stream.read(1 << 20), "")

    split = "train"
    try:
        numbers = _Numbers()
        tokens = array("i")
        for piece in pieces("train"):
            tokens.extend([numbers[word] for word in _words(piece, level, lowercase, tokenize)])
        # int32 is half the size of the result, 0.8 GB for the training part of WikiText-103.
        small = np.frombuffer(tokens, np.int32)
        kept, renumbered = _by_frequency(numbers, small, special, vocabulary_size)
        vocabulary = Vocabulary(kept, level, lowercase, tokenize)
        parts = {"train": torch.from_numpy(renumbered[small])}
        for split in ("valid", "test"):
            parts[split] = vocabulary._encode(pieces(split))
    except UnicodeDecodeError as error:
        raise ValueError(f"{names[split]} is not text in {encoding}; encoding= names another: {error}") from error
    if name_or_path == "wikitext103" and level == "word" and tokenize is str.split:
        for split, expected in _WIKITEXT103_TOKENS.items():
            if len(parts[split]) != expected:
                raise AlteredDataError(
                    f"{names[split]} has {len(parts[split])} tokens, expected {expected}: it is not the one published"
                )
    return Text(**parts, vocabulary=vocabulary)


class _Numbers(dict[str, int]):
    """A mapping that numbers words in the order of their first use."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number


def _words(piece: str, level: str, lowercase: bool, tokenize: Callable[[str], Sequence[str]]) -> Sequence[str]:
    """Return the tokens of a line with its end, or of a run of characters."""
    if lowercase:
        piece = piece.lower()
    if level == "char":
        return piece
    words = tokenize(piece)
    return [*words, EOS] if piece.endswith("\n") else words


def _by_frequency(
    numbers: dict[str, int], tokens: np.ndarray, special: tuple[str, ...], size: int | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Order the vocabulary: special tokens, then the most frequent, ties by name; also map old to new numbers."""
    counts = np.bincount(tokens, minlength=len(numbers)).tolist()
    words = sorted((word for word in numbers if word not in special), key=lambda word: (-counts[numbers[word]], word))
    if size is not None:
        words = words[: size - len(special)]
    kept = (*special, *words)
    renumbered = np.full(len(numbers), kept.index(UNK), np.int64)
    for number, word in enumerate(kept):
        if word in numbers:
            renumbered[numbers[word]] = number
    return kept, renumbered


def _tensor(tokens: array[int]) -> Tensor:
    return (
        torch.from_numpy(np.frombuffer(tokens, np.int32).astype(np.int64))
        if tokens
        else torch.empty(0, dtype=torch.int64, device="cpu")
    )


def _read(
    name_or_path: str | os.PathLike[str], root: str | os.PathLike[str] | None, encoding: str
) -> tuple[dict[str, bytes], dict[str, str], str]:
    """Read the bytes of each split; also return their names for errors, and the encoding."""
    if name_or_path == "wikitext103":
        data = DATA_SETS["wikitext103"]
        files = {split: f"wiki.{split}.tokens" for split in SPLITS}
        contents = read_files(data, files.values(), root)
        places = locate_all(data, files.values(), root)
        texts = {split: contents.pop(file) for split, file in files.items()}
        return texts, {split: f"{places[file].path.parent / file}" for split, file in files.items()}, "utf-8"
    if name_or_path == "shakespeare":
        data = DATA_SETS["shakespeare"]
        contents = read_files(data, [file.name for file in data.files], root)
        held_out = {f"{play}_gut.txt": "valid" for play in SHAKESPEARE_VALID}
        held_out |= {f"{play}_gut.txt": "test" for play in SHAKESPEARE_TEST}
        texts = {"train": b"", "valid": b"", "test": b""}
        for name in sorted(contents):
            texts[held_out.get(name, "train")] += contents[name].rstrip(b"\n") + b"\n\n"
        return texts, {split: f"the {split} plays" for split in SPLITS}, "latin-1"
    path = (Path(root) if root is not None else Path()) / Path(name_or_path).expanduser()
    if path.is_dir():
        files = {split: _split_file(path, split) for split in SPLITS}
        return {split: file.read_bytes() for split, file in files.items()}, _names(files), encoding
    if path.is_file():
        return _cut(path.read_bytes()), dict.fromkeys(SPLITS, str(path)), encoding
    known = ", ".join(data.name for data in DATA_SETS.values() if data.kind == "text")
    raise MissingDataError(f"name_or_path must be one of {known}, or the path of a folder or file; there is no {path}")


def _names(files: dict[str, Path]) -> dict[str, str]:
    return {split: str(file) for split, file in files.items()}


def _split_file(folder: Path, split: str) -> Path:
    found = sorted(path for path in folder.iterdir() if _FILES[split].fullmatch(path.name))
    if len(found) != 1:
        got = ", ".join(path.name for path in found) or "none"
        raise MissingDataError(f"{folder} must have one file for {split}, such as {split}.txt, got {got}")
    return found[0]


def _cut(text: bytes) -> dict[str, bytes]:
    """Cut a text into train, valid and test, after ends of lines."""
    first = text.find(b"\n", int(len(text) * (1 - 2 * HELD_OUT))) + 1 or len(text)
    second = text.find(b"\n", max(first, int(len(text) * (1 - HELD_OUT)))) + 1 or len(text)
    return {"train": text[:first], "valid": text[first:second], "test": text[second:]}
