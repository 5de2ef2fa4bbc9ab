"""Streams of images: every packing, any starting point, classes, and sources that are wrong."""

import io
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from rlgen.errors import ConfigError, StorageError
from rlgen.evaluation.image_plan import ImagePlan, plan_images
from rlgen.evaluation.images import ImageItem
from rlgen.evaluation.pixels import crop_square, decode
from tests.image_sources import (
    add_member,
    digit_files,
    write_folder,
    write_list,
    write_parquet,
    write_tar,
)

FILES = digit_files(300)


def stream(plan: ImagePlan) -> list[tuple[str | None, bytes]]:
    return [(item.label, item.read()) for shard in plan.shards for item in shard.items()]


def expected(files: list[tuple[str, str, bytes]]) -> list[tuple[str | None, bytes]]:
    return [(label, payload) for _, label, payload in files]


def write_source(packing: str, folder: Path) -> str:
    if packing == "folder":
        return str(write_folder(folder / "images", FILES))
    if packing == "list":
        return str(write_list(folder / "list.txt", write_folder(folder / "images", FILES), FILES))
    if packing == "parquet":
        return str(write_parquet(folder / "digits.parquet", FILES))
    if packing == "tar.gz":
        return str(write_tar(folder / "digits.tar.gz", FILES, mode="w:gz"))
    return str(write_tar(folder / "digits.tar", FILES))


PACKINGS = ["folder", "list", "parquet", "tar", "tar.gz"]


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing_gives_the_same_bytes_and_classes(tmp_path: Path, packing: str) -> None:
    plan = plan_images([write_source(packing, tmp_path)])
    assert stream(plan) == expected(FILES)
    assert plan.num_images == (None if "tar" in packing else 300)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("skip", [1, 100, 299, 300, 400])
def test_a_stream_can_begin_anywhere(tmp_path: Path, packing: str, skip: int) -> None:
    (shard, *others) = plan_images([write_source(packing, tmp_path)]).shards
    found = [item.read() for item in shard.items(skip=skip)]
    in_shard = 300 - sum(len(list(other.items())) for other in others)
    assert found == [payload for _, _, payload in FILES[:in_shard]][skip:]


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_limit_keeps_images_evenly_spread(tmp_path: Path, packing: str) -> None:
    plan = plan_images([write_source(packing, tmp_path)], limit=40)
    assert plan.num_images == 40
    # Image g of 300 is kept if a multiple of 300 / 40 = 7.5 ends in it.
    places = [g for g in range(300) if (g + 1) * 40 // 300 > g * 40 // 300]
    assert stream(plan) == expected([FILES[place] for place in places])
    tail = [item.read() for shard in plan.shards for item in shard.items(skip=10)]
    sizes = [len(list(shard.items())) for shard in plan.shards]
    assert len(tail) == sum(max(size - 10, 0) for size in sizes)


def test_a_limit_beyond_the_source_keeps_all(tmp_path: Path) -> None:
    plan = plan_images([write_source("tar", tmp_path)], limit=1000)
    assert plan.num_images == 300 and stream(plan) == expected(FILES)


def test_shards_of_a_pattern_come_in_order_and_are_cut_the_same_each_time(tmp_path: Path) -> None:
    for index in range(3):
        write_tar(tmp_path / f"shard-{index}.tar", FILES[index * 100 : (index + 1) * 100])
    plan = plan_images([str(tmp_path / "shard-*.tar")])
    assert stream(plan) == expected(FILES)
    assert len(plan.shards) == 3
    assert plan == plan_images([str(tmp_path / "shard-*.tar")])
    limited = plan_images([str(tmp_path / "shard-*.tar")], limit=30)
    assert len(stream(limited)) == 30 and limited.digest != plan.digest


def test_many_tars_share_a_shard_and_resume_in_the_middle_of_it(tmp_path: Path) -> None:
    for index in range(150):
        write_tar(tmp_path / f"{index:03d}.tar", FILES[index * 2 : index * 2 + 2])
    plan = plan_images([str(tmp_path / "*.tar")])
    assert len(plan.shards) == 75
    assert stream(plan) == expected(FILES)
    resumed = [item.read() for item in plan.shards[3].items(skip=3)]
    assert resumed == [FILES[15][2]], "the fourth image of its two tars"


def test_large_sources_are_cut_into_many_shards(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "digits.parquet", digit_files(700), group_size=100)
    plan = plan_images([str(path)])
    assert [len(list(shard.items())) for shard in plan.shards] == [300, 300, 100]
    assert stream(plan) == expected(digit_files(700))


def test_a_changed_source_has_another_digest(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", FILES[:5])
    before = plan_images([str(path)]).digest
    write_tar(path, FILES[:105])
    assert plan_images([str(path)]).digest != before
    folder = write_folder(tmp_path / "f", FILES[:5])
    before = plan_images([str(folder)]).digest
    write_folder(folder, FILES[5:6])
    assert plan_images([str(folder)]).digest != before


def test_the_class_is_the_folder_and_a_cls_file_goes_before_it(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add_member(archive, "n01/a.png", b"1")
        add_member(archive, "n02/b.cls", b"7\n")
        add_member(archive, "n02/b.png", b"2")
        add_member(archive, "c.png", b"3")
        add_member(archive, "c.json", b"{}")
        add_member(archive, "._d.png", b"macOS")
    found = stream(plan_images([str(tmp_path / "a.tar")]))
    assert found == [("n01", b"1"), ("7", b"2"), (None, b"3")]
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.JPEG").write_bytes(b"4")
    assert stream(plan_images([str(tmp_path / "flat")])) == [(None, b"4")]


def test_binary_columns_and_number_labels_work(tmp_path: Path) -> None:
    table = pyarrow.table({"id": [1, 2], "jpg": [b"a", None], "label": [3, None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    # A missing image is empty bytes, which later counts as one that can't be decoded.
    assert stream(plan_images([str(tmp_path / "a.parquet")])) == [("3", b"a"), (None, b"")]


def test_urls_are_listed_and_read(tmp_path: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    for name, label, payload in FILES[:20]:
        filesystem.pipe(f"/pictures/{label}/{name}", payload)
    try:
        assert stream(plan_images(["memory://pictures"])) == expected(FILES[:20])
        assert len(stream(plan_images(["memory://pictures/eight/*.png"]))) == 20
    finally:
        filesystem.rm("/pictures", recursive=True)


def test_sources_without_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing-here does not exist"):
        plan_images([str(tmp_path / "nothing-here")])
    (tmp_path / "data.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"1 files \(\.tar\) found; give a folder"):
        plan_images([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"x-\*\.tar: no file has such a name"):
        plan_images([str(tmp_path / "x-*.tar")])
    with pytest.raises(ConfigError, match=r"gone\.tar does not exist"):
        plan_images([str(tmp_path / "gone.tar")])
    (tmp_path / "list.txt").write_text("# only this\n")
    with pytest.raises(ConfigError, match="lists no path"):
        plan_images([str(tmp_path / "list.txt")])


def test_broken_packings_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("no tar at all")
    with pytest.raises(ConfigError, match=r"text\.tar is no tar"):
        stream(plan_images([str(tmp_path / "text.tar")]))
    whole = write_tar(tmp_path / "whole.tar", FILES[:50]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2 + 700])
    with pytest.raises(ConfigError, match=r"cut\.tar is no tar, or a damaged one"):
        stream(plan_images([str(tmp_path / "cut.tar")]))
    (tmp_path / "text.parquet").write_text("no parquet at all")
    with pytest.raises(ConfigError, match=r"text\.parquet is no parquet"):
        plan_images([str(tmp_path / "text.parquet")])
    for columns in ({"n": [1]}, {"a": [b"1"], "b": [b"2"]}):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "odd.parquet")
        with pytest.raises(ConfigError, match="must be named `image`"):
            plan_images([str(tmp_path / "odd.parquet")])


def test_a_listed_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("gone.png\n")
    with pytest.raises(StorageError, match=r"gone\.png does not exist"):
        stream(plan_images([str(tmp_path / "list.txt")]))


def item_of(image: Image.Image, suffix: str = "PNG", **options: object) -> ImageItem:
    stream = io.BytesIO()
    image.save(stream, suffix, **options)
    return ImageItem("x", None, stream.getvalue)


def test_the_centre_is_cut_out_at_the_shorter_side() -> None:
    wide = np.zeros((8, 20, 3), np.uint8)
    wide[:, 6:14] = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    found = decode(item_of(Image.fromarray(wide)), image_size=8).pixels_u8
    np.testing.assert_array_equal(found, wide[:, 6:14].transpose(2, 0, 1))


def test_reduction_halves_by_box_means_before_it_is_bicubic() -> None:
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    means = image.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
    found = decode(item_of(Image.fromarray(image)), image_size=8).pixels_u8
    assert found is not None
    # Two halvings of rows and columns: four times rounded to whole levels.
    assert abs(found.transpose(1, 2, 0) - means).max() <= 2.0
    aliased = Image.fromarray(image).resize((8, 8), Image.Resampling.BICUBIC)
    assert abs(np.asarray(aliased) - means).max() > 5, "bicubic alone is something else"


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (257, 256), (256, 1000), (100, 90)])
def test_every_shape_becomes_the_square(size: tuple[int, int]) -> None:
    assert crop_square(Image.new("RGB", size), 256).size == (256, 256)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (16, 16), (200, 200, 200)).convert(mode)
    suffix = "TIFF" if mode == "CMYK" else "PNG"
    picture = decode(item_of(image, suffix), image_size=16)
    assert picture.pixels_u8 is not None and picture.pixels_u8.shape == (3, 16, 16)
    assert picture.pixels_u8.mean() > 190


@pytest.mark.parametrize("kind", ["empty", "text", "cut png", "cut jpeg", "flipped png"])
def test_bytes_that_are_no_image_are_told_not_raised(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8))
    png, jpeg = item_of(noise).read(), item_of(noise, "JPEG").read()
    payload = {
        "empty": b"",
        "text": b"<html>404</html>",
        "cut png": png[: len(png) // 2],
        "cut jpeg": jpeg[: len(jpeg) // 2],
        "flipped png": png[:40] + b"\xff\xff\xff\xff" + png[44:],
    }[kind]
    picture = decode(ImageItem("x", None, lambda: payload), image_size=16)
    assert picture.pixels_u8 is None and picture.problem
