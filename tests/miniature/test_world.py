"""The rendered world: captions mean what they say, and a picture depends on its scene alone."""

import pytest
import torch

from srpo_cli.metrics.pictures import STATISTICS, picture_statistics
from srpo_cli.miniature import world


@pytest.fixture(scope="module")
def scenes():
    return world.draw_scenes(24, torch.Generator().manual_seed(3))


def test_a_caption_is_read_back_as_it_was_meant(scenes):
    texts = world.captions(scenes, torch.Generator().manual_seed(0), omit=0)
    for i, text in enumerate(texts):
        meaning = world.parse(text)
        assert meaning == world.Meaning(
            *(int(getattr(scenes, name)[i]) for name in ("shape", "colour", "ground", "light", "style"))
        )


@pytest.mark.parametrize("prompt", ["a cat", "a red sphere on the moon", "", "realistic photo. a dog on grass"])
def test_a_prompt_from_elsewhere_has_no_meaning(prompt):
    assert world.parse(prompt) is None


def test_case_and_article_do_not_change_the_meaning():
    meaning = world.parse("3D render. an orange cube on a checkered floor, backlit")
    assert meaning == world.Meaning(shape=1, colour=1, ground=2, light=4, style=world.CG)
    assert world.parse("Realistic Photo. A Red Sphere").ground is None


def test_a_picture_does_not_depend_on_its_batch(scenes):
    together = world.render(scenes, batch_size=24)
    alone = torch.cat([world.render(scenes[slice(i, i + 1)]) for i in range(3)])
    torch.testing.assert_close(together[:3], alone, atol=2e-5, rtol=0)
    assert together.shape == (24, 3, world.SIZE, world.SIZE)
    assert together.min() >= 0 and together.max() <= 1


def test_realism_moves_the_statistics_that_tell_a_photograph(scenes):
    def mean(realism: float) -> dict[str, float]:
        pictures = world.render(scenes.with_style(0, torch.full((24,), realism)))
        return dict(zip(STATISTICS, picture_statistics(pictures).mean(0).tolist(), strict=True))

    glossy, photo = mean(0.05), mean(0.95)
    assert photo["grain"] > 2 * glossy["grain"]
    assert photo["saturation"] < 0.8 * glossy["saturation"]
    assert photo["band_4"] > glossy["band_4"]


def test_unstyled_scenes_are_never_as_real_as_photographs():
    generator = torch.Generator().manual_seed(1)
    unstyled = world.draw_realism(torch.zeros(4000, dtype=torch.long), generator)
    photo = world.draw_realism(torch.full((4000,), world.PHOTO), generator)
    assert unstyled.max() <= 0.65 < 0.75 <= photo.min()
    assert unstyled.mean() < 0.35


def test_the_light_word_changes_the_brightness(scenes):
    from dataclasses import replace

    def brightness(light: int) -> float:
        return world.render(replace(scenes, light=torch.full_like(scenes.light, light))).mean().item()

    assert brightness(1) < 0.6 * brightness(0) < brightness(2)


def test_the_splits_share_no_caption_and_do_not_depend_on_the_count():
    drawn = {split: set(world.draw_prompts(600, 5, split)) for split in world.SPLITS}
    assert all(len(prompts) > 50 for prompts in drawn.values())
    assert not drawn["train"] & drawn["evaluation"]
    assert not drawn["train"] & drawn["validation"]
    assert not drawn["validation"] & drawn["evaluation"]
    assert world.draw_prompts(10, 5, "train") == world.draw_prompts(10, 5, "train")


def test_scenes_of_prompts_show_what_the_prompts_say():
    prompts = world.draw_prompts(8, 0, "evaluation")
    scenes = world.draw_scenes_of(prompts, world.PHOTO, seed=0)
    for i, prompt in enumerate(prompts):
        meaning = world.parse(prompt)
        assert (int(scenes.shape[i]), int(scenes.colour[i])) == (meaning.shape, meaning.colour)
        assert (int(scenes.ground[i]), int(scenes.light[i])) == (meaning.ground, meaning.light)
    assert (scenes.realism >= 0.75).all()
    with pytest.raises(ValueError, match="a cat"):
        world.draw_scenes_of(["a cat"], world.PHOTO, seed=0)
