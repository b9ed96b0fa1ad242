import base64
import io
import os

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from srpo_cli.errors import SrpoError
from srpo_cli.pages import gallery as module
from srpo_cli.pages.gallery import gallery, picture_columns

LABELS = ("base", "tuned")


@pytest.fixture
def made(tmp_path, pictures, table, result):
    """Make a table of ``count`` pictures a model, and the result that belongs to it."""

    def make(count=8, edge=48, noise=0, images=1):
        files = pictures(tmp_path, LABELS, count, edge, noise)
        rows = table(LABELS, files, count // 4 // images, images=images)
        return tmp_path, result(rows), rows

    return make


def bytes_of(uri):
    return base64.b64decode(uri.partition(",")[2])


def thumbnails(folder):
    return sorted(path.relative_to(folder).as_posix() for path in (folder / "thumbnails").rglob("*") if path.is_file())


def test_few_pictures_are_held_by_the_page(made):
    folder, result, table = made()
    data = gallery(folder, result, table)
    assert all(source.startswith("data:image/png;base64,") for source in data["sources"])
    assert not (folder / "thumbnails").exists()


def test_a_small_picture_is_kept_pixel_by_pixel_without_its_metadata(made):
    folder, result, table = made()
    path = folder / table["file"][0]
    secret = PngImagePlugin.PngInfo()
    secret.add_text("prompt", "a secret")
    with Image.open(path) as picture:
        picture.load()
        picture.save(path, pnginfo=secret)
    data = gallery(folder, result, table)
    shown = Image.open(io.BytesIO(bytes_of(data["sources"][0])))
    with Image.open(path) as original:
        assert original.text == {"prompt": "a secret"}
        assert np.array_equal(np.array(shown), np.array(original))
    assert shown.format == "PNG" and not shown.text
    assert data["pixelated"] and data["links"] is None


def test_many_pictures_lie_beside_the_page_at_256_pixels_at_most(made, monkeypatch):
    monkeypatch.setattr(module, "EMBEDDED", 20_000)
    folder, result, table = made(edge=400, noise=30)
    data = gallery(folder, result, table)
    assert len(data["sources"]) == 16
    assert sorted(data["sources"]) == thumbnails(folder)
    assert {Image.open(folder / source).size for source in data["sources"]} == {(256, 256)}
    assert data["links"][1][0] == table[table["model"] == "tuned"]["file"].iloc[0]
    assert not data["pixelated"]


def test_thumbnails_that_match_are_not_made_again_and_others_are(made, monkeypatch):
    monkeypatch.setattr(module, "EMBEDDED", 0)
    folder, result, table = made(edge=200)
    first = gallery(folder, result, table)["sources"]
    before = {name: (folder / name).stat().st_mtime_ns for name in thumbnails(folder)}
    changed = folder / table["file"][0]
    Image.new("RGB", (200, 200), "navy").save(changed)
    os.utime(changed, ns=(1, 1))
    second = gallery(folder, result, table)["sources"]
    assert second[1:] == first[1:] and second[0] != first[0]
    assert all((folder / name).stat().st_mtime_ns == before[name] for name in second[1:])
    assert thumbnails(folder) == sorted(second)  # the old one is gone
    assert max(abs(np.array(Image.open(folder / second[0])).reshape(-1, 3).mean(0) - (0, 0, 128))) < 4


def test_what_is_not_a_thumbnail_of_ours_stays(made, monkeypatch):
    folder, result, table = made()
    (folder / "thumbnails" / "0").mkdir(parents=True)
    (folder / "thumbnails" / "0" / "mine.png").write_bytes(b"mine")
    (folder / "thumbnails" / "0" / f"{'0' * 16}.png").write_bytes(b"old")
    gallery(folder, result, table)
    assert thumbnails(folder) == ["thumbnails/0/mine.png"]


def test_names_of_models_are_in_no_file_name(made, monkeypatch):
    monkeypatch.setattr(module, "EMBEDDED", 0)
    folder, result, table = made()
    hostile = '../../x"<y>'
    result["models"][1]["label"] = hostile
    data = gallery(folder, result, table.replace({"model": {"tuned": hostile}}))
    assert len(thumbnails(folder)) == 16
    assert all(name.split("/")[1] in "01" for name in data["sources"])


def test_every_picture_is_found_by_its_model_and_row(made):
    folder, result, table = made(count=8, images=2)
    shuffled = table.sample(frac=1, random_state=0)
    data = gallery(folder, result, shuffled)
    assert data["models"] == list(LABELS)
    assert len(data["items"]) == 8
    for row, (item, image) in enumerate(zip(data["items"], data["images"], strict=True)):
        for number, label in enumerate(LABELS):
            match = table[(table["model"] == label) & (table["item"] == item) & (table["image"] == image)].iloc[0]
            shown = np.array(Image.open(io.BytesIO(bytes_of(data["sources"][data["pictures"][number][row]]))))
            assert np.array_equal(shown, np.array(Image.open(folder / match["file"])))
            values = {
                column["name"]: data["values"][place][number][row] for place, column in enumerate(data["columns"])
            }
            assert values["sgp:hpsv2.1"] == pytest.approx(match["gap:hpsv2.1"], rel=1e-3)
            assert data["seeds"][row] == match["seed"]
            assert data["groups"][data["group"][row]] == match["group"]


def test_a_picture_that_is_gone_is_left_out_and_one_that_is_broken_is_named(made):
    folder, result, table = made()
    (folder / table["file"][3]).unlink()
    data = gallery(folder, result, table)
    assert [index == -1 for index in data["pictures"][0]] == [False] * 3 + [True] + [False] * 4
    (folder / table["file"][3]).write_bytes(b"no picture")
    with pytest.raises(SrpoError, match=r"00003\.png cannot be read as a picture .*: draw it again"):
        gallery(folder, result, table)


def test_columns_are_what_one_picture_has_a_figure_of(made):
    _, result, table = made()
    more = {"better": "", "digits": 3, "note": ""}
    result["measures"] += [
        {"name": "caption", "title": "caption", "columns": ["shape", "light"], "reduce": "mean", **more},
        {"name": "distance", "title": "distance", "columns": ["shape", "light"], "reduce": "mean_absolute", **more},
        {"name": "absent", "title": "absent", "columns": ["absent"], "reduce": "first", **more},
        {"name": "fid", "title": "FID", "columns": [], "reduce": "first", **more},
    ]
    names = [column["name"] for column in picture_columns(result, table.assign(shape=1.0, light=0.0))]
    assert names == ["hpsv2.1", "sgp:hpsv2.1", "sgp_win_rate:hpsv2.1", "saturation", "contrast", "caption", "distance"]


def test_a_distance_is_the_pictures_own_and_is_called_so(made):
    folder, result, table = made()
    measure = {"name": "d", "title": "distance", "columns": ["shape", "light"], "reduce": "mean_absolute"}
    result["measures"] = [{**measure, "better": "lower", "digits": 3, "note": ""}]
    data = gallery(folder, result, table.assign(shape=-1.0, light=0.5))
    assert data["values"] == [[[0.75] * 8] * 2]
    assert [column["title"] for column in data["columns"]] == ["distance of the picture"]


def test_a_figure_of_several_columns_is_their_mean(made):
    folder, result, table = made()
    more = {"better": "", "digits": 3, "note": ""}
    result["measures"] = [{"name": "c", "title": "c", "columns": ["shape", "light"], "reduce": "mean", **more}]
    data = gallery(folder, result, table.assign(shape=1.0, light=0.25))
    assert data["values"] == [[[0.625] * 8] * 2]


def test_a_figure_that_was_not_measured_is_none(made):
    folder, result, table = made()
    table.loc[table["model"] == "tuned", "hpsv2.1"] = np.nan
    data = gallery(folder, result, table)
    assert set(data["values"][0][1]) == {None}
    assert None not in data["values"][0][0]


def test_progress_is_told_to_the_last_picture(made):
    folder, result, table = made()
    told = []
    gallery(folder, result, table, lambda done, of: told.append((done, of)))
    assert told == [(done, 16) for done in range(1, 17)]
