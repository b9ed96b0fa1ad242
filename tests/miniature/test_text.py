"""The miniature's tokenizers: FLUX's and open_clip's agree, and every word of the world is one token."""

import gzip

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from srpo_cli.miniature import WEIGHTS
from srpo_cli.miniature.build import text
from srpo_cli.miniature.world import caption, captions, draw_scenes, vocabulary

CASES = (str.lower, str.capitalize, str.upper)
PROMPTS = ["3D render. an orange cube on a checkered floor, backlit", "Realistic Photo. A Red Sphere", "a cat, 47 %"]


@pytest.fixture(scope="module")
def open_clip_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "bpe.txt.gz"
    text.write_bpe(path)
    return SimpleTokenizer(str(path), context_length=text.CLIP_LENGTH)


def clip_ids(tokenizer, texts):
    return tokenizer(texts, padding="max_length", max_length=text.CLIP_LENGTH, truncation=True).input_ids


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_clip_and_open_clip_give_the_same_ids(open_clip_tokenizer, case):
    texts = [case(word) for word in vocabulary()] + [case(prompt) for prompt in PROMPTS]
    end = open_clip_tokenizer.eot_token_id
    for ours, theirs in zip(clip_ids(text.clip_tokenizer(), texts), open_clip_tokenizer(texts).tolist(), strict=True):
        length = theirs.index(end) + 1  # open_clip fills up with zeros, CLIP with its end token
        assert ours[:length] == theirs[:length]
        assert set(ours[length:]) <= {end} and set(theirs[length:]) <= {0}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_word_is_one_token(case):
    clip, t5 = text.clip_tokenizer(), text.t5_tokenizer()
    for word in vocabulary():
        # CLIP takes digits from letters before it looks for words, so "3d" is two.
        assert len(clip(case(word)).input_ids) == 2 + (1 if word.isalpha() else 2), word
        ids = t5(case(word)).input_ids
        assert len(ids) == 2 and t5.unk_token_id not in ids, word


def test_the_longest_caption_fits():
    longest = caption(3, 3, 2, 3, "realistic photo")
    assert len(text.clip_tokenizer()(longest).input_ids) <= text.CLIP_LENGTH
    assert len(text.t5_tokenizer()(longest).input_ids) <= text.T5_LENGTH


def test_what_the_encoders_say_does_not_depend_on_case():
    encoders = text.text_encoders()
    for case in CASES:
        sequence, pooled = text.embed([case(prompt) for prompt in PROMPTS[:2]], *encoders)
        expected = text.embed([prompt.lower() for prompt in PROMPTS[:2]], *encoders)
        torch.testing.assert_close((sequence, pooled), expected)


def test_tokenizers_come_back_as_they_were_saved(tmp_path):
    scenes = draw_scenes(40, torch.Generator().manual_seed(0))
    texts = [*captions(scenes, torch.Generator().manual_seed(0)), *PROMPTS]
    for made, cls in ((text.clip_tokenizer(), CLIPTokenizer), (text.t5_tokenizer(), T5TokenizerFast)):
        made.save_pretrained(tmp_path / cls.__name__)
        loaded = cls.from_pretrained(tmp_path / cls.__name__)
        assert loaded(texts).input_ids == made(texts).input_ids
        assert loaded.model_max_length == made.model_max_length


def test_the_shipped_tokenizers_and_encoders_are_these(tmp_path):
    """They come from a seed: what is in the package is what the build makes."""
    texts, folder = PROMPTS[:2], WEIGHTS / "pipeline"
    clip, t5 = (
        cls.from_pretrained(folder / name)
        for cls, name in ((CLIPTokenizer, "tokenizer"), (T5TokenizerFast, "tokenizer_2"))
    )
    assert clip(texts).input_ids == text.clip_tokenizer()(texts).input_ids
    assert t5(texts).input_ids == text.t5_tokenizer()(texts).input_ids
    shipped = (
        CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32),
    )
    # Shipped in half precision.
    torch.testing.assert_close(
        text.embed(texts, *shipped), text.embed(texts, *text.text_encoders()), atol=0.02, rtol=0.02
    )
    text.write_bpe(tmp_path / "bpe.txt.gz")
    made, bpe = (gzip.decompress((folder / "bpe.txt.gz").read_bytes()) for folder in (tmp_path, WEIGHTS / "reward"))
    assert made == bpe
