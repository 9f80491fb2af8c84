"""Every kind of image file becomes the pixels that it shows, or is refused by its row."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cluster.workload.datasets import DataError, open_dataset
from cluster.workload.preparing import prepare
from tests.cluster import workloads
from tests.cluster.workload.parquet_folders import encoded, pictures, write_split

COLOUR = np.full((4, 4, 3), (204, 0, 51), np.uint8)  # in PIL's default palette
GREY = pictures(1, (4, 4))[0]


def decoded(tmp_path, content, label=0):
    write_split(tmp_path / "set", "train", [content], [label])
    write_split(tmp_path / "set", "test", [encoded(COLOUR)], [label])
    folder = prepare(name="mine", path=str(tmp_path / "set"), cache_dir=tmp_path / "cache")
    return open_dataset(folder).train.inputs[0]


def saved(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def with_text(text, compressed):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", text, zip=compressed)
    return saved(Image.fromarray(COLOUR), pnginfo=info)


def deep_png(colour, samples):
    """A PNG of 1 x 1 pixels with 16 bits a channel, by hand."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, colour, 0, 0, 0)
    pixels = zlib.compress(b"\0" + struct.pack(f">{len(samples)}H", *samples))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def alpha(opacity):
    return Image.fromarray(np.dstack([COLOUR, np.full((4, 4), opacity, np.uint8)]))


@pytest.mark.parametrize(
    "content",
    [
        saved(Image.fromarray(COLOUR).convert("P")),
        saved(Image.fromarray(COLOUR).convert("P"), "GIF"),
        saved(alpha(255)),
        saved(alpha(7)),  # the colour below is kept, as torchvision keeps it
        saved(Image.fromarray(COLOUR), "BMP"),
        saved(Image.fromarray(COLOUR), "PPM"),
        saved(Image.fromarray(COLOUR).convert("RGB"), "TIFF", compression="tiff_lzw"),
        saved(Image.fromarray(COLOUR), "TIFF"),
        saved(Image.fromarray(COLOUR), "WEBP", lossless=True),
        saved(Image.fromarray(COLOUR).convert("CMYK"), "TIFF"),
        with_text("a short remark", compressed=True),
        with_text("x" * 1000, compressed=False),
    ],
)
def test_kinds_of_files_with_the_same_pixels(tmp_path, content):
    np.testing.assert_array_equal(decoded(tmp_path, content), COLOUR.transpose(2, 0, 1))


def test_rows_of_sixteen_bytes_are_not_taken_for_sixteen_bits(tmp_path):
    pixels = pictures(1, (5, 5, 3))[0]
    for split in ("train", "test"):
        write_split(tmp_path / "set", split, [encoded(pixels, format="BMP")], [0])
    folder = prepare(name="mine", path=str(tmp_path / "set"), cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(open_dataset(folder).train.inputs[0], pixels.transpose(2, 0, 1))


def test_grey_with_transparency_is_colour_of_equal_channels(tmp_path):
    content = saved(Image.fromarray(GREY).convert("LA"))
    np.testing.assert_array_equal(decoded(tmp_path, content), np.stack([GREY] * 3))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (with_text("x" * 3_000_000, compressed=True), "cannot be decoded: .*too large"),
        (encoded(COLOUR)[:-30], "cannot be decoded: "),
        (encoded(COLOUR)[:40], "cannot be decoded: "),
        (encoded(COLOUR).replace(b"IDAT", b"IDAX"), "cannot be decoded: "),
        (
            saved(Image.fromarray(np.tile(GREY, (20, 20))), "JPEG")[:300],
            "cannot be decoded: Truncated File Read",
        ),
        (b"", "holds nothing"),
        (b"<html>not found</html>", "cannot be decoded: cannot identify"),
        (
            saved(Image.fromarray(COLOUR), "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4))]),
            "has 2 frames; allowed are still images",
        ),
        (
            saved(Image.fromarray(COLOUR), "PNG", save_all=True, append_images=[Image.new("RGB", (4, 4))]),
            "has 2 frames",
        ),
        (
            saved(Image.fromarray(COLOUR), "TIFF", save_all=True, append_images=[Image.new("RGB", (4, 4))]),
            "has 2 frames",
        ),
        (encoded(np.zeros((4, 4), np.uint16)), "has more than 8 bits a channel .mode 'I;16'"),
        (deep_png(2, (1000, 2000, 3000)), "has more than 8 bits a channel .mode 'RGB'"),
        (deep_png(6, (1000, 2000, 3000, 65535)), "has more than 8 bits a channel"),
        (deep_png(4, (1000, 65535)), "has more than 8 bits a channel"),
        (saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "has more than 8 bits a channel"),
        (saved(Image.fromarray(np.zeros((4, 4), np.int32)), "TIFF"), "has more than 8 bits a channel"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_their_row(tmp_path, content, match):
    with pytest.raises(DataError, match="^image 0 in column 'image' of .*train.*parquet " + match):
        decoded(tmp_path, content)


# --- one size


def of_sizes(tmp_path, shapes, size):
    pixels = [pictures(1, shape, seed)[0] for seed, shape in enumerate(shapes)]
    write_split(tmp_path / "set", "train", [encoded(each) for each in pixels], [0] * len(pixels))
    write_split(tmp_path / "set", "test", [encoded(pixels[0])], [0])
    where = {"path": str(tmp_path / "set"), "cache_dir": tmp_path / "cache"}
    return pixels, prepare(name="mine", image_size=size, **where)


def test_images_of_any_size_come_to_one(tmp_path):
    """Against plain loops: the triangle filter as wide as a pixel of the result, then the middle."""
    shapes = [(12, 8, 3), (8, 12, 3), (4, 7, 3), (9, 6, 3), (4, 4, 3)]
    pixels, folder = of_sizes(tmp_path, shapes, 4)
    found = open_dataset(folder).train.inputs
    assert found.shape == (5, 3, 4, 4)

    def resampled(line, length):
        scale = len(line) / length
        wide = max(scale, 1.0)
        values = []
        for place in range(length):
            centre = (place + 0.5) * scale
            weights = [max(0.0, 1 - abs((at + 0.5 - centre) / wide)) for at in range(len(line))]
            values.append(sum(w * v for w, v in zip(weights, line, strict=True)) / sum(weights))
        return np.array(values)

    for image, one in zip(pixels, found, strict=True):
        height, width = image.shape[:2]
        high, wide = 4 * height // min(height, width), 4 * width // min(height, width)
        across = np.array([resampled(row, wide) for row in image.astype(float)])
        both = np.array([resampled(column, high) for column in across.transpose(1, 0, 2)]).transpose(1, 0, 2)
        top, left = round((high - 4) / 2), round((wide - 4) / 2)
        expected = both[top : top + 4, left : left + 4].transpose(2, 0, 1)
        assert np.abs(one - expected).max() <= 1.01  # whole numbers, rounded twice
    np.testing.assert_array_equal(found[4], pixels[4].transpose(2, 0, 1))  # what has the size is left alone


def test_grey_and_palettes_are_resized_as_what_they_show(tmp_path):
    _, folder = of_sizes(tmp_path, [(8, 6), (6, 8)], 3)
    assert open_dataset(folder).train.inputs.shape == (2, 1, 3, 3)
    palette = saved(Image.fromarray(np.full((6, 6, 3), (204, 0, 51), np.uint8)).convert("P"))
    for split in ("train", "test"):
        write_split(tmp_path / "palette", split, [palette], [0])
    folder = prepare(name="mine", path=str(tmp_path / "palette"), image_size=4, cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(open_dataset(folder).train.inputs[0], COLOUR.transpose(2, 0, 1))


def test_the_size_is_part_of_a_prepared_data_sets_name(tmp_path):
    shapes = [(6, 6, 3), (6, 6, 3)]
    _, four = of_sizes(tmp_path, shapes, 4)
    _, five = of_sizes(tmp_path, shapes, 5)
    _, plain = of_sizes(tmp_path, shapes, None)
    assert len({four, five, plain}) == 3
    assert [open_dataset(each).input_shape for each in (four, five, plain)] == [
        (3, 4, 4),
        (3, 5, 5),
        (3, 6, 6),
    ]


def test_unequal_sizes_name_the_key_that_helps(tmp_path):
    with pytest.raises(DataError, match=r"image 1 .* is 6x8 pixels, .* 8x9; .*with data\.image_size=8$"):
        of_sizes(tmp_path, [(9, 8, 3), (8, 6, 3)], None)


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"name": "digits"}, "data.image_size = 4 has no meaning for data.name = 'digits': leave it out"),
        ({"name": "tiny_text"}, "data.image_size = 4 has no meaning for text: leave it out"),
    ],
)
def test_what_has_no_size_to_change(tmp_path, asked, match):
    with pytest.raises(DataError, match=match):
        prepare(**asked, image_size=4, cache_dir=tmp_path)


def test_clips_have_no_size_to_change(tmp_path):
    folder = workloads.speech_commands(tmp_path / "speech")
    with pytest.raises(DataError, match=r"image_size = 4 has no meaning for the clips in column"):
        prepare(name="speech", path=str(folder), image_size=4, cache_dir=tmp_path / "cache")
