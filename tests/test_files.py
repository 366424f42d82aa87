"""Files: tiny files of exactly each format are read, and a wrong or truncated one is named."""

import bz2
import gzip
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from asyncprop.tasks import files, text
from asyncprop.tasks.files import BadFile


def test_digits_are_those_of_scikit_learn() -> None:
    images, labels = files.read_digits()
    from sklearn.datasets import load_digits

    theirs = load_digits()
    assert np.array_equal(images.squeeze(1).numpy(), theirs.images.astype(np.uint8))
    assert np.array_equal(labels.numpy(), theirs.target)


# ---- idx


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def fashion_mnist(folder: Path) -> np.ndarray:
    images = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 251
    for part in files.IDX_FILES:
        write_idx(folder / files.IDX_FILES[part][0], images)
        write_idx(folder / files.IDX_FILES[part][1], np.array([3, 1, 2]))
    return images


def test_idx(tmp_path: Path) -> None:
    written = fashion_mnist(tmp_path)
    images, labels = files.read_idx_pair(tmp_path, "test")
    assert images.shape == (3, 1, 28, 28)
    assert np.array_equal(images.squeeze(1).numpy(), written)
    assert labels.tolist() == [3, 1, 2]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def lose_values(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))


def write_nonsense(path: Path) -> None:
    path.write_bytes(gzip.compress(b"nonsense"))


@pytest.mark.parametrize("damage", [truncate, lose_values, write_nonsense, Path.unlink, lambda p: p.write_bytes(b"x")])
def test_damaged_idx_files_are_named(tmp_path: Path, damage) -> None:
    fashion_mnist(tmp_path)
    name = files.IDX_FILES["train"][0]
    damage(tmp_path / name)
    with pytest.raises(BadFile, match=name):
        files.read_idx_pair(tmp_path, "train")


def test_labels_must_be_as_many_as_images(tmp_path: Path) -> None:
    fashion_mnist(tmp_path)
    write_idx(tmp_path / files.IDX_FILES["train"][1], np.array([1, 2]))
    with pytest.raises(BadFile, match="must hold 3 labels"):
        files.read_idx_pair(tmp_path, "train")


# ---- CIFAR: the same images in both layouts


def cifar_rows(count: int, offset: int) -> tuple[np.ndarray, list[int]]:
    data = ((np.arange(count * 3072) + offset) % 256).astype(np.uint8).reshape(count, 3072)
    return data, [(offset + index) % 10 for index in range(count)]


def write_python_layout(folder: Path, name: str) -> None:
    place, train, test, key = files.CIFAR_PYTHON[name]
    (folder / place).mkdir()
    for number, file in enumerate(train + test):
        data, labels = cifar_rows(2, number)
        content = {b"batch_label": b"x", key: labels, b"data": data, b"filenames": [b"a", b"b"]}
        (folder / place / file).write_bytes(pickle.dumps(content, protocol=2))


def write_binary_layout(folder: Path, name: str) -> None:
    place, train, test, label_bytes = files.CIFAR_BINARY[name]
    (folder / place).mkdir()
    for number, file in enumerate(train + test):
        data, labels = cifar_rows(2, number)
        records = [
            bytes([9] * (label_bytes - 1) + [label]) + row.tobytes() for row, label in zip(data, labels, strict=True)
        ]
        (folder / place / file).write_bytes(b"".join(records))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("write", [write_python_layout, write_binary_layout])
def test_cifar(tmp_path: Path, name: str, write) -> None:
    write(tmp_path, name)
    count = len(files.CIFAR_PYTHON[name][1])
    images, labels = files.read_cifar(name, tmp_path, "train")
    expected = [cifar_rows(2, number) for number in range(count)]
    assert images.dtype == torch.uint8
    assert np.array_equal(images.numpy(), np.concatenate([data for data, _ in expected]).reshape(-1, 3, 32, 32))
    assert labels.tolist() == [label for _, row in expected for label in row]
    images, labels = files.read_cifar(name, tmp_path, "test")
    assert labels.tolist() == cifar_rows(2, count)[1]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_damaged_cifar_files_are_named(tmp_path: Path, name: str) -> None:
    write_binary_layout(tmp_path, name)
    place, train, _, _ = files.CIFAR_BINARY[name]
    truncate(tmp_path / place / train[0])
    with pytest.raises(BadFile, match=train[0]):
        files.read_cifar(name, tmp_path, "train")


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    write_python_layout(tmp_path, "cifar100")
    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps(Path("/")))
    with pytest.raises(BadFile, match="it asks for pathlib"):
        files.read_cifar("cifar100", tmp_path, "train")


def test_no_cifar_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data-dir must hold cifar-10-batches-py"):
        files.read_cifar("cifar10", tmp_path, "train")


# ---- folders of images


def image_folder(folder: Path) -> Path:
    for number, kind in enumerate(["cat", "dog"]):
        (folder / kind).mkdir()
        for index in range(2):
            Image.new("RGB", (40, 30), (100 * number, 10 * index, 0)).save(folder / kind / f"{index}.png")
    return folder


def test_image_folders(tmp_path: Path) -> None:
    data = files.read_image_folder(image_folder(tmp_path), 16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    images, labels = data.batch(torch.tensor([0, 3]), None)
    assert (len(data), images.shape, labels.tolist()) == (4, (2, 3, 16, 16), [0, 1])
    assert torch.allclose(images[1, :, 0, 0], torch.tensor([100.0, 10.0, 0.0]) / 255)
    again = [data.batch(torch.tensor([1]), torch.Generator().manual_seed(3))[0] for _ in range(2)]
    assert torch.equal(*again)


def test_an_image_that_is_none_is_named(tmp_path: Path) -> None:
    data = files.read_image_folder(image_folder(tmp_path), 16, (0.0,) * 3, (1.0,) * 3)
    (tmp_path / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(BadFile, match=r"1\.png"):
        data.batch(torch.tensor([3]), None)


def test_random_crops_lie_inside_the_image() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        (left, top, right, bottom), _ = files.random_resized_crop((50, 20), generator)
        assert 0 <= left < right <= 50 + 1e-6
        assert 0 <= top < bottom <= 20 + 1e-6


# ---- texts


def test_imdb_folders(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for kind, words in (("neg", "bad film"), ("pos", "good film!")):
            (tmp_path / "aclImdb" / part / kind).mkdir(parents=True)
            (tmp_path / "aclImdb" / part / kind / "0_1.txt").write_text(words, encoding="utf-8")
    assert text.read_imdb(tmp_path, "train") == (["bad film", "good film!"], [0, 1])
    (tmp_path / "aclImdb" / "test" / "pos" / "0_1.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(BadFile, match=r"0_1\.txt"):
        text.read_imdb(tmp_path, "test")
    with pytest.raises(ValueError, match="data-dir must hold aclImdb/train"):
        text.read_imdb(tmp_path / "elsewhere", "train")


def test_tokens_are_numbered_by_frequency_in_the_training_part() -> None:
    split, size = text.tokenise((["the cat", "the dog the", "cat!"], [0, 1, 0]), (["the bird"], [1]), longest=2)
    assert size == 4  # padding, unknown, "the", "cat"
    assert [row.tolist() for row in split.train.sequences] == [[2, 3], [2, 1], [3, 1]]
    assert [row.tolist() for row in split.test.sequences] == [[2, 1]]


def rotten_tomatoes(path: Path, films: int) -> None:
    rows = ["category,text,movie_name"]
    for film in range(films):
        rows += [f"{kind},{kind} words of {film},film {film}" for kind in ("fresh", "rotten", "plot")]
    path.write_bytes(bz2.compress("\n".join(rows).encode()))


def test_rotten_tomatoes_are_split_by_film(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv.bz2"
    rotten_tomatoes(path, 60)
    train, test = text.read_rotten_tomatoes(path)
    films = [{line.rpartition(" ")[2] for line in part[0]} for part in (train, test)]
    assert len(train[0]) + len(test[0]) == 120
    assert not films[0] & films[1]
    assert all(label == line.startswith("fresh") for part in (train, test) for line, label in zip(*part, strict=True))


@pytest.mark.parametrize("content", [b"no bz2", bz2.compress(b"a,b\n1,2\n"), bz2.compress(b"category,text,movie_name")])
def test_damaged_reviews_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "reviews.csv.bz2").write_bytes(content)
    with pytest.raises(BadFile, match="reviews"):
        text.read_rotten_tomatoes(tmp_path / "reviews.csv.bz2")


def test_plays(tmp_path: Path) -> None:
    path = tmp_path / "plays.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in (("p/b_gut.txt", b"second"), ("p/a_gut.txt", b"first\r\nline"), ("p/note.txt", b"no")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert text.read_shakespeare(path) == "first\nline\nsecond"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(BadFile, match="plays"):
        text.read_shakespeare(path)


def test_characters_predict_their_successors() -> None:
    split, size = text.characters("abcab" * 40, length=5)
    tokens, following = split.train.batch(torch.tensor([0, 1]), None)
    assert size == 4
    assert torch.equal(tokens[:, 1:], following[:, :-1])
