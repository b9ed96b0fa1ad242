"""PNGs carry their metadata; a grid shows its pictures' own pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from srpo_cli.errors import SrpoError
from srpo_cli.runtime.pictures import (
    is_sheet,
    open_picture,
    open_with_metadata,
    prompt_of,
    read_metadata,
    save_grid,
    save_png,
    thumbnail_size,
)


def test_metadata_comes_back_and_foreign_files_have_none(tmp_path):
    save_png(torch.rand(3, 8, 8), tmp_path / "a.png", {"prompt": "a red sphere", "seed": 3})
    assert read_metadata(tmp_path / "a.png") == {"prompt": "a red sphere", "seed": 3}
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"not a picture")
    assert read_metadata(tmp_path / "b.png") is None
    assert read_metadata(tmp_path / "c.png") is None
    assert read_metadata(tmp_path / "missing.png") is None


def test_a_cut_off_picture_is_none(tmp_path):
    save_png(torch.rand(3, 48, 48), tmp_path / "a.png", {"seed": 3})
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    assert read_metadata(tmp_path / "a.png") is None


def test_a_grid_shows_each_picture_enlarged_without_smoothing(tmp_path):
    pictures = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 48, 48)
    save_grid([pictures, 1 - pictures], tmp_path / "g.png", ["one", "two"], ["black", "white"])
    sheet = np.array(Image.open(tmp_path / "g.png").convert("L"))
    left = sheet.shape[1] - 2 * (144 + 4)
    assert sheet[4 + 72, left + 20] == 0 and sheet[4 + 72, left + 148 + 20] == 255
    assert sheet[152 + 72, left + 20] == 255 and sheet[152 + 72, left + 148 + 20] == 0


def test_columns_that_do_not_fit_go_on_in_another_band(tmp_path):
    pictures = torch.linspace(0, 1, 20)[:, None, None, None].expand(20, 3, 48, 48)
    save_grid([pictures, 1 - pictures], tmp_path / "g.png", captions=[f"number {i}" for i in range(20)])
    sheet = np.array(Image.open(tmp_path / "g.png").convert("L")).astype(int)
    assert sheet.shape[1] == 10 * 148 + 4
    band = 2 * 148 + sheet.shape[0] // 2 - 2 * 148 - 2
    for i in range(20):
        y, x = 4 + i // 10 * band + 72, 4 + i % 10 * 148 + 72
        assert sheet[y, x] == round(255 * i / 19)
        assert sheet[y + 148, x] == 255 - sheet[y, x]


def test_large_pictures_are_reduced_and_long_texts_are_cut(tmp_path):
    assert thumbnail_size((48, 48)) == (144, 144)
    assert thumbnail_size((768, 1024)) == (384, 512)
    prompt = "an old lighthouse on a cliff at dawn " * 40 + "x" * 500
    save_grid([torch.zeros(2, 3, 768, 1024)], tmp_path / "g.png", [prompt], [prompt, "short"])
    sheet = np.array(Image.open(tmp_path / "g.png").convert("L"))
    assert sheet.shape[1] < 1600 and sheet.shape[0] < 600
    margins = sheet[:, :4], sheet[:, -4:], sheet[-4:]
    assert all((margin == 255).all() for margin in margins)  # nothing runs over the edge


# Pictures as people see them


def one_colour(image: Image.Image) -> list[int]:
    """The only colour of a picture."""
    return np.array(image).reshape(-1, 3).mean(0).round().astype(int).tolist()


def test_transparency_lies_over_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert one_colour(open_picture(tmp_path / "a.png")) == [255, 127, 127]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=1)
    assert one_colour(open_picture(tmp_path / "p.png")) == [255, 255, 255]


def test_sixteen_bits_keep_their_brightness(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "a.png")
    assert one_colour(open_picture(tmp_path / "a.png")) == [round(40000 / 65535 * 255)] * 3
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "f.tif")
    assert one_colour(open_picture(tmp_path / "f.tif")) == [128] * 3


def test_cmyk_is_seen_as_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = one_colour(open_picture(tmp_path / "a.jpg"))
    assert red > 250 and green < 5 and blue < 5


def test_a_turned_photograph_stands_upright(tmp_path):
    image = Image.new("RGB", (8, 4), "white")
    image.paste("black", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    image.save(tmp_path / "a.png", exif=exif)
    upright = np.array(open_picture(tmp_path / "a.png"))
    assert upright.shape == (8, 4, 3)
    assert upright[:4].max() == 0 and upright[4:].min() == 255


@pytest.mark.parametrize("damage", ["text", "cut", "gone", "folder"])
def test_what_is_no_picture_is_one_line(tmp_path, damage):
    path = tmp_path / "a.png"
    save_png(torch.rand(3, 48, 48), path, {})
    if damage == "text":
        path.write_text("hello")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    with pytest.raises(SrpoError, match=r"a\.png") as failure:
        open_picture(path)
    assert "\n" not in str(failure.value)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(SrpoError, match="more than 2000 pixels"):
        open_picture(tmp_path / "a.png")


def test_the_prompt_is_the_sidecars_then_the_metadatas(tmp_path):
    path = tmp_path / "a.png"
    save_png(torch.rand(3, 8, 8), path, {"prompt": "inside"})
    assert prompt_of(path, open_with_metadata(path)[1]) == "inside"
    path.with_suffix(".txt").write_text("beside\n")
    assert prompt_of(path, open_with_metadata(path)[1]) == "beside"


def test_another_programs_prompt_is_read(tmp_path):
    info = PngInfo()
    info.add_text("parameters", "a cat,\nsitting\nNegative prompt: dog\nSteps: 20, Sampler: Euler")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    assert open_with_metadata(tmp_path / "a.png")[1] == {"prompt": "a cat, sitting"}


def test_a_sheet_says_that_it_is_one(tmp_path):
    save_grid([torch.rand(2, 3, 8, 8)], tmp_path / "g.png")
    save_png(torch.rand(3, 8, 8), tmp_path / "a.png", {"prompt": "x"})
    assert is_sheet(open_with_metadata(tmp_path / "g.png")[1])
    assert not is_sheet(open_with_metadata(tmp_path / "a.png")[1])
