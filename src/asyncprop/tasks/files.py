"""Readers of image data sets: digits, Fashion-MNIST, CIFAR in both layouts, folders of images; a bad file is named."""

from __future__ import annotations

import gzip
import importlib.util
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asyncprop.tasks.batches import Batch

Images = tuple[Tensor, Tensor]
"""uint8 images of shape (n, channels, height, width), and long labels of shape (n,)."""


class BadFile(ValueError):  # noqa: N818 (read as a sentence)
    """A data file is missing, truncated, or not of its format; the line names it."""

    def __init__(self, path: Path, problem: str, way_out: str = "get the file again") -> None:
        super().__init__(f"{path} {problem}: {way_out}")


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Turn uint8 images into floats of zero mean, unit deviation; `mean`, `std` are per channel, of values in 0..1."""
    shape = (1, len(mean), 1, 1)
    return (images.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


# ---- digits


def read_digits() -> Images:
    """Read the 1,797 digits of 8x8 pixels, 0 to 16, that the scikit-learn package carries."""
    # The package is looked up, not imported: importing it takes over a second of the few to a first step.
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            "digits must be read from scikit-learn, which is not installed: pip install 'asyncprop[tasks]'"
        )
    path = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    with _opening(path, gzip.open) as file:
        table = np.array([line.split(b",") for line in file.read().split()], dtype=np.uint8)
    if table.shape != (1797, 65):
        raise BadFile(path, f"must hold 1,797 rows of 65 numbers (it holds {table.shape})", "reinstall scikit-learn")
    pixels = torch.from_numpy(table[:, :64].copy()).view(-1, 1, 8, 8)
    return pixels, torch.from_numpy(table[:, 64].astype(np.int64))


# ---- Fashion-MNIST (the idx format of MNIST)

IDX_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def read_idx_pair(folder: Path, part: str) -> Images:
    """Read one part (`"train"` or `"test"`) of a data set in the idx format from `folder`."""
    images, labels = (read_idx(folder / name) for name in IDX_FILES[part])
    if len(images) != len(labels):
        raise BadFile(folder / IDX_FILES[part][1], f"must hold {len(images)} labels (it holds {len(labels)})")
    return images.unsqueeze(1), labels.long()


def read_idx(path: Path) -> Tensor:
    """Read a gzipped idx file of unsigned bytes: magic 0 0 8 rank, the sizes as big-endian ints, the values."""
    with _opening(path, gzip.open) as file:
        data = file.read()
    rank = data[3] if len(data) > 3 else 0
    if data[:3] != b"\0\0\x08" or not rank:
        raise BadFile(path, "must be an idx file of unsigned bytes (its first bytes are others)")
    shape = tuple(np.frombuffer(data, ">i4", rank, 4)) if len(data) >= 4 + 4 * rank else (0,)
    values = np.frombuffer(data, np.uint8, offset=min(len(data), 4 + 4 * rank))
    if len(values) != int(np.prod(shape)):
        raise BadFile(path, f"must hold {int(np.prod(shape))} values (it holds {len(values)}; truncated?)")
    return torch.from_numpy(values.reshape(shape).copy())


# ---- CIFAR

CIFAR_PYTHON = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], b"labels"),
    "cifar100": ("cifar-100-python", ["train"], ["test"], b"fine_labels"),
}
CIFAR_BINARY = {
    "cifar10": ("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], 1),
    "cifar100": ("cifar-100-binary", ["train.bin"], ["test.bin"], 2),
}


def read_cifar(name: str, data_dir: Path, part: str) -> Images:
    """Read CIFAR-10 or -100, in the python or the binary layout, whichever `data_dir` (or the folder in it) holds."""
    folder, train, test, label_key = CIFAR_PYTHON[name]
    for place in (data_dir / folder, data_dir):
        if (place / train[0]).is_file():
            return _concatenate(
                [_read_pickle(place / file, label_key) for file in (train if part == "train" else test)]
            )
    folder, train, test, label_bytes = CIFAR_BINARY[name]
    for place in (data_dir / folder, data_dir):
        if (place / train[0]).is_file():
            files = train if part == "train" else test
            return _concatenate([_read_binary(place / file, label_bytes) for file in files])
    raise ValueError(
        f"data-dir must hold {CIFAR_PYTHON[name][0]} or {CIFAR_BINARY[name][0]} (got {data_dir}): "
        f"unpack the {name} archive there"
    )


class _PlainUnpickler(pickle.Unpickler):
    """Admits arrays, and nothing that could run code."""

    ALLOWED = frozenset({("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED or name == "_reconstruct":
            home = "numpy._core.multiarray" if name == "_reconstruct" else module
            return super().find_class(home, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_pickle(path: Path, label_key: bytes) -> Images:
    with _opening(path, open) as file:
        try:
            content = _PlainUnpickler(file, encoding="bytes").load()
            data, labels = np.asarray(content[b"data"], np.uint8), np.asarray(content[label_key], np.int64)
            images = data.reshape(len(labels), 3, 32, 32)
        except Exception as error:  # a damaged pickle can raise anything
            raise BadFile(path, f"must be a CIFAR batch in the python layout ({error})") from error
    return torch.from_numpy(images), torch.from_numpy(labels)


def _read_binary(path: Path, label_bytes: int) -> Images:
    with _opening(path, open) as file:
        data = np.frombuffer(file.read(), np.uint8)
    record = label_bytes + 3072
    if not len(data) or len(data) % record:
        raise BadFile(path, f"must hold records of {record} bytes (it holds {len(data)} bytes; truncated?)")
    records = data.reshape(-1, record)
    images = torch.from_numpy(records[:, label_bytes:].reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(records[:, label_bytes - 1].astype(np.int64))


def _concatenate(parts: list[Images]) -> Images:
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def _opening(path: Path, opener: Callable[..., Any]) -> _Opened:
    return _Opened(path, opener)


class _Opened:
    """Opens a file for reading bytes, and turns what goes wrong with it into a BadFile."""

    def __init__(self, path: Path, opener: Callable[..., Any]) -> None:
        self._path, self._opener = path, opener

    def __enter__(self) -> Any:
        try:
            self._file = self._opener(self._path, "rb")
        except FileNotFoundError as error:
            raise BadFile(self._path, "is missing") from error
        except OSError as error:
            raise BadFile(self._path, f"cannot be opened ({error.strerror})", "check its permissions") from error
        return self._file

    def __exit__(self, kind: object, error: BaseException | None, tb: object) -> None:
        self._file.close()
        if isinstance(error, EOFError | gzip.BadGzipFile | OSError) and not isinstance(error, BadFile):
            raise BadFile(self._path, f"is truncated or damaged ({error})") from error


# ---- folders of images (ImageNet)


@dataclass(frozen=True)
class ImageFolder:
    """Images in one folder per class, decoded by Pillow as they are asked for.

    Args:
        paths: of the images.
        labels: long, of shape (n,): the class folders in alphabetical order.
        size: pixels of a side of what is returned.
        mean, std: of values in 0..1, per channel.
    """

    paths: tuple[str, ...]
    labels: Tensor
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> Batch:
        """Return (images, labels): random resized crops and mirrors with a generator, else resized centre crops."""
        images = [self._decode(Path(self.paths[index]), generator) for index in indices.tolist()]
        return normalise(torch.stack(images), self.mean, self.std), self.labels[indices]

    def _decode(self, path: Path, generator: torch.Generator | None) -> Tensor:
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise BadFile(path, f"cannot be decoded as an image ({error})") from error
        if generator is None:
            scaled = ImageOps.scale(image, self.size * 8 / 7 / min(image.size))
            image = ImageOps.fit(scaled, (self.size, self.size))
        else:
            box, mirror = random_resized_crop(image.size, generator)
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box)
            image = ImageOps.mirror(image) if mirror else image
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def random_resized_crop(
    size: tuple[int, int], generator: torch.Generator
) -> tuple[tuple[float, float, float, float], bool]:
    """Return a random box of 8 to 100 % of the area and an aspect of 3/4 to 4/3, and whether to mirror it."""
    width, height = size
    for _ in range(10):
        area, aspect, x, y, flip = torch.rand(5, generator=generator).tolist()
        target = (0.08 + 0.92 * area) * width * height
        ratio = (3 / 4) * (16 / 9) ** aspect
        w, h = (target * ratio) ** 0.5, (target / ratio) ** 0.5
        if w <= width and h <= height:
            left, top = x * (width - w), y * (height - h)
            return (left, top, left + w, top + h), flip < 0.5
    return (0.0, 0.0, float(width), float(height)), False


def read_image_folder(folder: Path, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageFolder:
    """List `folder`/<class>/<image>, classes and images in alphabetical order."""
    if not folder.is_dir():
        raise ValueError(f"data-dir must hold a folder of classes for each part ({folder} is missing)")
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    files = [
        (str(file), label) for label, kind in enumerate(classes) for file in sorted(kind.iterdir()) if file.is_file()
    ]
    if not files:
        raise ValueError(f"data-dir must hold images in one folder per class ({folder} has none)")
    return ImageFolder(tuple(path for path, _ in files), torch.tensor([label for _, label in files]), size, mean, std)
