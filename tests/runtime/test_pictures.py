"""PNGs carry their metadata; a grid shows its pictures' own pixels."""

import numpy as np
import torch
from PIL import Image

from srpo_cli.runtime.pictures import read_metadata, save_grid, save_png, thumbnail_size


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
