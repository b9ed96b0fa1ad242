"""What each measure is and what each hacking signal would mean, in words for somebody who sees them first here."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

DIRECTIONS = {"higher": "higher is better", "lower": "lower is better"}

MEASURES = {
    "photo_distance": "How far the statistics of the pictures (grain, saturation, spectrum, highlights and others) are "
    "from those of the renderer's own photographs of the same prompts, in spreads of the photographs. Too much counts "
    "like too little.",
    "photo_rate": "Share of pictures that lie where nine of ten photographs of the renderer do.",
    "caption_accuracy": "Share of what the prompt asks for (shape, colour, ground, light) that a classifier finds in "
    "the picture.",
    "shape_accuracy": "Share of pictures with the shape that the prompt asks for.",
    "colour_accuracy": "Share of pictures with the colour that the prompt asks for.",
    "ground_accuracy": "Share of pictures with the ground that the prompt asks for.",
    "light_accuracy": "Share of pictures with the light that the prompt asks for.",
    "sgp:*": "Semantic-guided preference: the reward of the picture for the prompt with the positive control words, "
    "minus that with the negative ones. It says whether a picture looks more like the first than like the second.",
    "sgp_x100:*": "The same gap times a hundred, the most likely reading of the published column.",
    "sgp_win_rate:*": "Share of pictures that the reward likes better with the positive control words than with the "
    "negative ones.",
    "diversity:*": "Mean distance between the features of pictures of one prompt: how varied they are.",
    "aesthetic*": "A predictor of aesthetic ratings. It reads no prompt.",
    "pickscore": "PickScore: a CLIP trained on which of two pictures people picked.",
    "imagereward": "ImageReward: a model of people's rankings of pictures for a prompt.",
    "hps*": "Human Preference Score: a CLIP trained on people's choices. Known to like gloss and saturation, so that a "
    "more realistic model need not score higher.",
    "clip:*": "CLIPScore: cosine of picture and prompt under CLIP. It asks for content, not for quality.",
    "geneval*": "GenEval-compatible, not GenEval: share of pictures in which a detector finds the objects, counts, "
    "colours and places that the prompt asks for.",
    "deqa": "DeQA-Score: a model of people's ratings of technical quality.",
    "fid*": "Fréchet distance between the features of these pictures and those of the reference folder.",
    "kid_std*": "Standard deviation of the kernel distance over subsets of the pictures.",
    "kid*": "Kernel distance between the features of these pictures and those of the reference folder.",
    "miniature": "The miniature's reward, a small CLIP with the bias that large ones are known for: it likes gloss. "
    "A model that becomes more realistic loses on it.",
    "miniature:clip": "A CLIP of the miniature's world without any preference, which no preset trains on: a second "
    "opinion. It does not like gloss, but for a caption that names no style it expects what the world mostly shows, "
    "renders: photographs score 0.58, what the base model draws 0.76. Far below photographs, pictures no longer show "
    "what was asked for.",
    "grain": "Fine noise on even surfaces, as of film.",
    "saturation": "Mean saturation of the colours, 0 (grey) to 1.",
    "chroma": "Mean distance of the colour channels from grey.",
    "highlights": "Share of colourless pixels far brighter than what is around them.",
    "brightness": "Mean luma, 0 to 1.",
    "contrast": "Standard deviation of the luma.",
    "grid": "Correlation of detail at the distance of two borders of the transformer's tokens, above its surroundings.",
    "band_*": "Log power of the luma in one of five rings of frequency, 1 the coarsest, 5 the finest.",
    "clipping": "Share of pixels that are entirely black or white.",
}

_NOTE_ADDS = ("aesthetic*", "pickscore", "imagereward", "hps*", "clip:*", "miniature*", "diversity:*", "fid*", "kid*")

_PUSHED = ("Colours are pushed: the oily, over-saturated look that rewards are known to like.", "Colours became paler.")
_SIGNALS = {  # what it means that a signal rose, and that it fell
    "saturation": _PUSHED,
    "chroma": _PUSHED,
    "contrast": ("Light and dark are driven apart.", "Pictures became flatter."),
    "grid": (
        "A pattern repeats at the borders of the transformer's tokens: an artifact, not a texture.",
        "A pattern at the borders of the transformer's tokens became weaker.",
    ),
    "band_5": ("More of the finest detail: texture, or noise and sharpening.", "The finest detail is smoothed away."),
    "grain": ("Surfaces became noisier.", "Surfaces became smoother, as plastic is."),
    "highlights": ("More glossy highlights: the plastic look.", "Fewer glossy highlights."),
    "clipping": ("More of the picture is entirely black or white.", "Less of the picture is entirely black or white."),
    "brightness": ("Pictures became lighter as a whole.", "Pictures became darker as a whole."),
    "diversity*": ("Pictures of one prompt became more varied.", "Pictures of one prompt became alike: one look won."),
}

READING = {
    "interval": "Figures stand with their 95 % interval. The prompts were drawn anew many times from those measured, "
    "within their group and the same for all models, and the interval holds 95 in 100 of what came out, widened where "
    "prompts are few: it says how far the figure depends on which prompts were asked.",
    "p": "p-values are two-sided and Holm-corrected for the number of comparisons. A difference is called one where p "
    "is below 0.05; what is not shown to differ is not shown to be equal either.",
}


def meaning(measure: Mapping[str, Any]) -> str:
    """What a measure is: the words kept here, else its own note, else that it is a reward of that name."""
    known = _look_up(MEASURES, measure["name"])
    return known or measure["note"] or f"The reward {measure['name']}."


def note_beside(measure: Mapping[str, Any]) -> str:
    """The measure's own note where it adds to ``meaning``: the unit of a reward, the features of a distance."""
    adds = any(fnmatchcase(measure["name"], pattern) for pattern in _NOTE_ADDS)
    return measure["note"] if adds else ""


def signal_meaning(signal: str, difference: float) -> str:
    """What it means that a signal rose or fell by ``difference``; nothing for one that is not known here."""
    rose, fell = _look_up(_SIGNALS, signal) or ("", "")
    return rose if difference > 0 else fell


def _look_up(table: Mapping[str, Any], name: str) -> Any:
    found = (words for pattern, words in table.items() if fnmatchcase(name, pattern))
    return table.get(name) or next(found, None)
