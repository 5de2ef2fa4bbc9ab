"""scikit-learn's digits as image files in every packing that a source can have."""

import io
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from sklearn.datasets import load_digits

from rlgen.features.convnet import ConvNet, ConvNetConfig
from rlgen.features.extractor import save_convnet

SIDE = 16
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_FEATURES = 24


@cache
def digit_files(count: int = 700) -> list[tuple[str, str, bytes]]:
    """Name, class and PNG bytes of the first digits, sorted by class and name."""
    digits = load_digits()
    files = []
    for index in range(count):
        image = Image.fromarray((digits.images[index] * 15.9).astype(np.uint8))
        stream = io.BytesIO()
        image.resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(stream, "PNG")
        files.append((f"{index:04d}.png", NAMES[digits.target[index]], stream.getvalue()))
    return sorted(files, key=lambda file: (file[1], file[0]))


def write_folder(root: Path, files: list[tuple[str, str, bytes]]) -> Path:
    """One subfolder per class."""
    for name, label, payload in files:
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / name).write_bytes(payload)
    return root


def write_tar(path: Path, files: list[tuple[str, str, bytes]], *, mode: str = "w") -> Path:
    """Members as a webdataset names them: a .cls file with each image."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, label, payload in files:
            add_member(archive, name, payload)
            add_member(archive, name.replace(".png", ".cls"), label.encode())
    return path


def add_member(archive: tarfile.TarFile, name: str, payload: bytes) -> None:
    """Put bytes into a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(payload)
    archive.addfile(member, io.BytesIO(payload))


def write_parquet(path: Path, files: list[tuple[str, str, bytes]], *, group_size: int = 50) -> Path:
    """As Hugging Face writes images: a struct of bytes and path, and a label."""
    rows = {
        "image": [{"bytes": payload, "path": name} for name, _, payload in files],
        "label": [label for _, label, _ in files],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), path, row_group_size=group_size)
    return path


def write_list(path: Path, folder: Path, files: list[tuple[str, str, bytes]]) -> Path:
    """Relative paths, a comment and an empty line."""
    lines = [f"{folder.name}/{label}/{name}" for name, label, _ in files]
    path.write_text("# digits\n\n" + "\n".join(lines) + "\n")
    return path


def write_extractor(path: Path, *, seed: int = 0) -> Path:
    """A random ConvNet."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ConvNet(ConvNetConfig(image_size=SIDE, num_features=NUM_FEATURES))
    save_convnet(str(path), net)
    return path


def pixels_of(files: list[tuple[str, str, bytes]]) -> torch.Tensor:
    """[N, 3, SIDE, SIDE] in [0, 1], decoded without any of the code under test."""
    arrays = [np.asarray(Image.open(io.BytesIO(payload)).convert("RGB")) for _, _, payload in files]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
