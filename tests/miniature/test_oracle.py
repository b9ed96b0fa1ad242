"""The oracle's words: photographs are photographs, renders are not, and overdoing it counts as failure."""

import pytest
import torch
import torch.nn.functional as F

from srpo_cli.metrics.pictures import STATISTICS, picture_statistics
from srpo_cli.miniature.oracle import CONTENT, Oracle
from srpo_cli.miniature.world import (
    CG,
    PHOTO,
    STYLES,
    draw_prompts,
    draw_scenes_of,
    luma,
    parse,
    render,
)
from srpo_cli.models.flux import load_flux

COUNT = 64


@pytest.fixture(scope="module")
def oracle():
    return Oracle.load()


@pytest.fixture(scope="module")
def round_trip():
    model = load_flux("miniature")

    @torch.no_grad()
    def through_the_autoencoder(images):
        return model.decode(model.encode(images), (48, 48))

    return through_the_autoencoder


@pytest.fixture(scope="module")
def prompts():
    return draw_prompts(COUNT, 77, "validation")


@pytest.fixture(scope="module")
def reference(oracle, round_trip, prompts):
    return oracle.reference(prompts, round_trip, seed=1)


@pytest.fixture(scope="module")
def photographs(round_trip, prompts):
    """Photographs of the same prompts that are not the reference's: other scenes, other grain."""
    return round_trip(render(draw_scenes_of(prompts, PHOTO, seed=2)))


@pytest.fixture(scope="module")
def renders(round_trip, prompts):
    return round_trip(render(draw_scenes_of(prompts, CG, seed=2)))


def test_photographs_are_photographs(oracle, reference, photographs):
    judged = oracle.judge(photographs, reference)
    assert judged["photo_distance"].mean < 0.06
    # 90 % by construction; 64 draws have a standard error of 4 %.
    assert 0.78 <= judged["photo_rate"].mean <= 0.99
    assert judged["caption_accuracy"].mean > 0.98


def test_cg_renders_are_far_from_photographs(oracle, reference, renders):
    judged = oracle.judge(renders, reference)
    assert judged["photo_distance"].low > 0.4
    assert judged["photo_rate"].mean < 0.15
    assert judged["caption_accuracy"].mean > 0.98, "what is in a picture is not how real it looks"


def more_grain(images: torch.Tensor, factor: float) -> torch.Tensor:
    detail = images - F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)
    return (images + (factor - 1) * detail).clamp(0, 1)


@pytest.mark.parametrize(
    "overdo",
    [
        pytest.param(lambda images: luma(images).expand(-1, 3, -1, -1), id="no colour"),
        pytest.param(lambda images: more_grain(images, 3), id="grain x3"),
        pytest.param(lambda images: images * 0.6, id="too dark"),
    ],
)
def test_overdoing_it_is_failure(oracle, reference, photographs, overdo):
    judged = oracle.judge(overdo(photographs), reference)
    assert judged["photo_distance"].low > 0.25
    assert judged["photo_rate"].mean < 0.2


def test_the_way_to_a_photograph_has_its_end_there(oracle, reference, photographs, renders):
    """From CG through a photograph and as far beyond: the distance falls, then rises again."""
    path = [renders + step * (photographs - renders) for step in (0.0, 0.5, 1.0, 1.5, 2.0)]
    distances = [oracle.judge(images.clamp(0, 1), reference)["photo_distance"].mean for images in path]
    assert distances.index(min(distances)) in (1, 2)
    assert distances[0] > 2 * min(distances) and distances[4] > distances[3] > 2 * min(distances)


@pytest.mark.parametrize(("pitch", "lag"), [(8, 8), (48 / 7, 7)], ids=["the transformer's tokens", "reward's patches"])
def test_a_patch_grid_in_a_picture_shows(oracle, reference, photographs, pitch, lag):
    column, marked = STATISTICS.index("grid"), photographs.clone()
    for line in [round(i * pitch) for i in range(int(48 / pitch))]:
        marked[:, :, line] += 0.04
        marked[:, :, :, line] += 0.04
    marked = marked.clamp(0, 1)
    before, after = (picture_statistics(images, grid=lag)[:, column] for images in (photographs, marked))
    assert (after > before).float().mean() > 0.95
    assert (after - before).mean() > 0.05
    # The oracle itself looks at the token grid, and to both sides: a pitch of 7 pixels makes 8 rarer than chance.
    clean, judged = (oracle.judge(images, reference) for images in (photographs, marked))
    assert judged["photo_distance"].mean > 5 * clean["photo_distance"].mean
    assert judged["photo_rate"].mean < 0.6 * clean["photo_rate"].mean


def test_it_reads_what_is_in_a_picture(oracle, photographs, prompts):
    hits = oracle.caption_hits(photographs, prompts)
    assert hits.shape == (COUNT, len(CONTENT)) and hits.mean() > 0.97
    others = prompts[1:] + prompts[:1]
    expected = torch.tensor(
        [
            [float(getattr(parse(p), name) == getattr(parse(q), name)) for name in CONTENT]
            for p, q in zip(prompts, others, strict=True)
        ]
    )
    assert (oracle.caption_hits(photographs, others) == expected).float().mean() > 0.97


def test_a_ground_that_the_prompt_leaves_open_is_no_mistake(oracle, photographs, prompts):
    open_ground = [prompt.split(" on ")[0] for prompt in prompts]
    assert oracle.caption_hits(photographs, open_ground)[:, CONTENT.index("ground")].all()
    assert oracle.deviations(picture_statistics(photographs), open_ground).isfinite().all()


def test_the_style_read_is_always_one_of_the_named(oracle, round_trip, prompts):
    for style in range(1, len(STYLES)):
        images = round_trip(render(draw_scenes_of(prompts, style, seed=3)))
        read = oracle.read_style(images)
        assert read.min() >= 1 and (read == style).float().mean() > 0.9, STYLES[style]
