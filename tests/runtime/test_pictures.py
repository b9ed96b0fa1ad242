"""PNGs carry their metadata; a grid shows its pictures' own pixels."""

import numpy as np
import torch
from PIL import Image

from srpo_cli.runtime.pictures import read_metadata, save_grid, save_png


def test_metadata_comes_back_and_foreign_files_have_none(tmp_path):
    save_png(torch.rand(3, 8, 8), tmp_path / "a.png", {"prompt": "a red sphere", "seed": 3})
    assert read_metadata(tmp_path / "a.png") == {"prompt": "a red sphere", "seed": 3}
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"not a picture")
    assert read_metadata(tmp_path / "b.png") is None
    assert read_metadata(tmp_path / "c.png") is None
    assert read_metadata(tmp_path / "missing.png") is None


def test_a_grid_shows_each_picture_enlarged_without_smoothing(tmp_path):
    pictures = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 48, 48)
    save_grid([pictures, 1 - pictures], tmp_path / "g.png", ["one", "two"], ["black", "white"])
    sheet = np.array(Image.open(tmp_path / "g.png").convert("L"))
    left = sheet.shape[1] - 2 * (144 + 4)
    assert sheet[4 + 72, left + 20] == 0 and sheet[4 + 72, left + 148 + 20] == 255
    assert sheet[152 + 72, left + 20] == 255 and sheet[152 + 72, left + 148 + 20] == 0
