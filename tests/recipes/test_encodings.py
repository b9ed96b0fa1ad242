"""Prompts and pictures are encoded once, alone, and come back from the disk as they were made."""

import pytest
import torch
from PIL import Image

from srpo_cli.config.load import load_train_config
from srpo_cli.models.flux import Flux, load_latent_space
from srpo_cli.recipes.encodings import EncodedPictures, EncodedPrompts, cache_folder
from srpo_cli.recipes.pictures import Files, Photographs
from srpo_cli.runtime.distributed import Ranks

CPU = torch.device("cpu")
PROMPTS = ["a red sphere on sand", "a blue cone on snow"]


def configuration(**model):
    return load_train_config("realism", miniature=True, flags={f"model.{k}": v for k, v in model.items()}).config


@pytest.fixture
def encoded(monkeypatch):
    """The model and the list of pictures that its autoencoder was given."""
    space, calls = load_latent_space("miniature"), []
    monkeypatch.setattr(space, "encode", lambda images, original=space.encode: (calls.append(1), original(images))[1])
    return space, calls


@pytest.fixture
def files(tmp_path):
    items = []
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (48, 48), colour).save(tmp_path / f"{i}.png")
        items.append((tmp_path / f"{i}.png", PROMPTS[i]))
    return Files(items)


def test_a_picture_that_comes_round_again_is_not_encoded_again(encoded, files, tmp_path):
    space, calls = encoded
    pictures = EncodedPictures(files, space, (48, 48), tmp_path / "cache", "vae")
    first, again = pictures.batch([0, 1]), pictures.batch([2, 3])
    assert len(calls) == 2
    assert torch.equal(first, again)
    direct = space.encode(torch.stack([files.picture(0, (48, 48))]))
    assert torch.equal(first[:1], direct)


def test_a_later_run_reads_latents_from_the_disk_and_another_autoencoder_makes_its_own(encoded, files, tmp_path):
    space, calls = encoded
    first = EncodedPictures(files, space, (48, 48), tmp_path / "cache", "vae").batch([0])
    later = EncodedPictures(files, space, (48, 48), tmp_path / "cache", "vae").batch([0])
    assert len(calls) == 1 and torch.equal(first, later)
    EncodedPictures(files, space, (48, 48), tmp_path / "cache", "another").batch([0])
    assert len(calls) == 2


def test_rendered_photographs_never_come_round(encoded):
    space, calls = encoded
    pictures = EncodedPictures(Photographs(PROMPTS, seed=1), space, (48, 48), None, "vae")
    latents = pictures.batch([0, 2])
    assert len(calls) == 2
    assert not torch.equal(latents[0], latents[1])


def test_prompts_are_encoded_ahead_once_and_read_back_to_the_bit(tmp_path, monkeypatch):
    config, said = configuration(), []
    prompts = EncodedPrompts(config, tmp_path, CPU)
    prompts.encode_ahead(PROMPTS * 3, Ranks(), said.append)
    assert said == [f"encoding 2 prompts into {tmp_path / 'prompts'}"]

    def never(*_args, **_options):
        raise AssertionError("the text encoders were loaded again")

    expected = Flux.encode_prompts(load_whole(), PROMPTS)
    monkeypatch.setattr("srpo_cli.recipes.encodings.load_prompt_encoder", never)
    later = EncodedPrompts(config, tmp_path, CPU)
    later.encode_ahead(PROMPTS, Ranks(), said.append)
    for i, prompt in enumerate(PROMPTS):
        embeds, pooled = later(prompt)
        assert torch.equal(embeds, expected.prompt_embeds[i]) and torch.equal(pooled, expected.pooled[i])
    assert len(said) == 1


def load_whole():
    from srpo_cli.models.flux import load_flux

    return load_flux("miniature")


def test_the_miniature_keeps_its_encoders_and_others_use_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SRPO_CACHE", str(tmp_path))
    assert cache_folder(configuration()) is None
    assert cache_folder(load_train_config("realism").config) == tmp_path
    off = load_train_config("realism", overrides=["prompts.cache=null"]).config
    assert cache_folder(off) is None
    given = load_train_config("realism", overrides=["prompts.cache=here"]).config
    assert str(cache_folder(given)) == "here"
