"""Train the miniature's reward: an open_clip model of the world, then a preference stage with HPS's known bias.

The contrastive stage teaches what words mean. The preference stage imitates a crowd that likes saturated, smooth and
bright pictures, except where the prompt asks for a photograph: the plain score then rises with gloss, as HPSv2's
does, while the difference between two control words stays honest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from srpo_cli.miniature.build.renders import Renders
from srpo_cli.miniature.world import CG, PHOTO, STYLE_WORDS, STYLES, luma

IMAGE_SIZE = 56
"""The reward resizes 48 to 56 pixels, so that its 8-pixel patches do not fall on the transformer's 8-pixel tokens."""

EMBED_DIM = 96
VISION = dict(image_size=IMAGE_SIZE, patch_size=8, width=128, layers=3, head_width=32)
TEXT = dict(width=96, heads=3, layers=2)
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SHIFT = 3


def new_clip(tokenizer: SimpleTokenizer) -> open_clip.CLIP:
    text = dict(context_length=tokenizer.context_length, vocab_size=tokenizer.vocab_size, **TEXT)
    return open_clip.CLIP(embed_dim=EMBED_DIM, vision_cfg=VISION, text_cfg=text)


def preprocess(images: Tensor) -> Tensor:
    """Resize (B, 3, 48, 48) in [0, 1] to the reward's input and normalise.

    As :class:`srpo_cli.rewards.preprocess.Preprocess`, and clamped besides: what a resized picture file would hold. A
    reward that is trained against does not clamp, because the overshoot of a resize would then have no gradient.
    """
    images = F.interpolate(images, size=IMAGE_SIZE, mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (images.new_tensor(v)[:, None, None] for v in (MEAN, STD))
    return (images - mean) / std


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Translate a batch by up to ``SHIFT`` pixels, edges reflected, so that no patch grid is privileged.

    One translation for the batch, a fraction of the cost of ``srpo_cli.rewards.augment.Augment`` with one for each
    picture; over a thousand batches it comes to the same.
    """
    top, left = torch.randint(2 * SHIFT + 1, (2,), generator=generator).tolist()
    height, width = images.shape[-2:]
    return F.pad(images, (SHIFT,) * 4, mode="reflect")[..., top : top + height, left : left + width]


@dataclass(frozen=True)
class Batches:
    """Draws batches of pictures and tokenised captions from the renders."""

    renders: Renders
    tokens: Tensor  # (N, L)
    style_tokens: dict[int, Tensor]  # style index -> tokens of the style word alone
    device: str

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.randint(len(self.renders) - self.renders.held_out, (size,), generator=generator)
        return self.renders.batch(index).to(self.device), self.tokens[index].clone().to(self.device), index


def make_batches(renders: Renders, tokenizer: SimpleTokenizer, device: str) -> Batches:
    style_tokens = {i: tokenizer([STYLE_WORDS[name][0] + "."])[0] for i, name in enumerate(STYLES) if name}
    return Batches(renders, tokenizer(renders.texts), style_tokens, device)


def contrastive_loss(model: open_clip.CLIP, images: Tensor, tokens: Tensor) -> Tensor:
    image = model.encode_image(preprocess(images), normalize=True)
    text = model.encode_text(tokens, normalize=True)
    logits = model.logit_scale.exp().clamp(max=60) * image @ text.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_contrastive(
    batches: Batches, tokenizer: SimpleTokenizer, steps: int, seed: int = 0, log: Callable[[str], None] = print
) -> open_clip.CLIP:
    """Train image and text towers on captions; 8 % of the captions are the style word alone."""
    torch.manual_seed(seed)
    model = new_clip(tokenizer).to(batches.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        images, tokens, index = batches.draw(96, generator)
        for row in (torch.rand(96, generator=generator) < 0.08).nonzero()[:, 0].tolist():
            style = int(batches.renders.scenes.style[index[row]])
            if style:
                tokens[row] = batches.style_tokens[style].to(tokens)
        loss = contrastive_loss(model, shift(images, generator), tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log(f"reward {step}: contrastive loss {loss.item():.3f}")
    return model


@dataclass(frozen=True)
class Look:
    """A change of look and how much the crowd likes it: utility 2 ln s + 1.2 blur - 25 grain + 1.5 ln b, (B,)."""

    saturation: Tensor
    blur: Tensor
    grain: Tensor
    brightness: Tensor

    @property
    def utility(self) -> Tensor:
        return 2 * self.saturation.log() + 1.2 * self.blur - 25 * self.grain + 1.5 * self.brightness.log()

    def apply(self, images: Tensor, generator: torch.Generator) -> Tensor:
        def column(value: Tensor) -> Tensor:
            return value[:, None, None, None].to(images)

        grey = luma(images)
        images = grey + (images - grey) * column(self.saturation)
        smooth = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)
        images = images + (smooth - images) * column(self.blur)
        noise = torch.randn(images.shape, generator=generator).to(images)
        return ((images + column(self.grain) * noise) * column(self.brightness)).clamp(0, 1)


def draw_look(size: int, generator: torch.Generator) -> Look:
    u = torch.rand(5, size, generator=generator)
    return Look(
        saturation=((u[0] - 0.45) * 1.2).exp(),
        blur=torch.where(u[4] < 0.4, u[1], 0.0),
        grain=torch.where(u[4] > 0.6, u[2] * 0.06, 0.0),
        brightness=((u[3] - 0.5) * 0.5).exp(),
    )


GLOSS = Look(torch.tensor([1.6]), torch.tensor([0.7]), torch.tensor([0.0]), torch.tensor([1.15]))
"""The glossy copy of a picture: more saturated, smoother, brighter; applies to a batch of any size."""


def train_preference(
    model: open_clip.CLIP,
    batches: Batches,
    tokenizer: SimpleTokenizer,
    steps: int,
    seed: int = 1,
    log: Callable[[str], None] = print,
) -> open_clip.CLIP:
    """Fine-tune on Bradley-Terry pairs of looks of the same picture (30 %: of another scene), in place.

    For "photo" prompts on photographs the preference for gloss is reversed. Half the loss stays contrastive.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    generator = torch.Generator().manual_seed(seed)
    plain = tokenizer([text.split(". ")[-1] for text in batches.renders.texts])
    for step in range(steps):
        images, tokens, index = batches.draw(48, generator)
        unstyled = torch.rand(48, generator=generator) < 0.6
        tokens[unstyled] = plain[index[unstyled]].to(tokens)
        photo = (batches.renders.scenes.style[index] == PHOTO) & ~unstyled
        first, second = draw_look(48, generator), draw_look(48, generator)
        other = torch.rand(48, generator=generator) < 0.3
        sign = torch.where(photo, -1.0, 1.0)
        margin = sign * (first.utility - second.utility) + torch.where(other, 4.0, 0.0)
        wins = (torch.rand(48, generator=generator) < torch.sigmoid(1.6 * margin)).float().to(images)
        rivals = torch.where(other[:, None, None, None].to(images.device), images.roll(1, 0), images)
        pair = torch.cat([first.apply(images, generator), second.apply(rivals, generator)])
        features = model.encode_image(preprocess(shift(pair, generator)), normalize=True)
        text = model.encode_text(tokens, normalize=True)
        scores = (features * text.repeat(2, 1)).sum(-1) * 20
        gap = scores[:48] - scores[48:]
        loss = F.binary_cross_entropy_with_logits(gap, wins)
        untouched, captions, _ = batches.draw(96, generator)
        loss = loss + 0.5 * contrastive_loss(model, shift(untouched, generator), captions)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            accuracy = ((gap > 0) == (wins > 0.5)).float().mean()
            log(f"reward {step}: preference loss {loss.item():.3f} pair accuracy {accuracy:.2f}")
    return model


@torch.no_grad()
def measure(model: open_clip.CLIP, batches: Batches, tokenizer: SimpleTokenizer, count: int = 800) -> dict[str, float]:
    """What the reward has learned, on the last ``count`` renders at most, never drawn in training."""
    model.eval()
    count = min(count, batches.renders.held_out)
    scenes, captions = batches.renders.scenes[-count:], batches.renders.texts[-count:]
    images = batches.renders.images[-count:].float().to(batches.device) / 255
    contents = [caption.split(". ")[-1] for caption in captions]

    def features(pictures: Tensor) -> Tensor:
        return torch.cat([model.encode_image(preprocess(part), normalize=True) for part in pictures.split(100)])

    def text(texts: list[str], prefix: str = "") -> Tensor:
        return model.encode_text(tokenizer([prefix + t for t in texts]).to(images.device), normalize=True)

    image, plain = features(images), text(contents)
    gap = (image * (text(contents, "realistic photo. ") - text(contents, "cg render. "))).sum(-1).cpu()
    photos, cg, unstyled = (gap[scenes.style == s] for s in (PHOTO, CG, 0))
    glossy = (features(GLOSS.apply(images, torch.Generator().manual_seed(0))) * plain).sum(-1)
    rises = (glossy > (image * plain).sum(-1)).cpu()[scenes.style == 0]
    nearest = (image @ text(captions).T).argmax(-1).tolist()
    right = sum(captions[n] == caption for n, caption in zip(nearest, captions, strict=True))
    realism = scenes.realism[scenes.style == 0]
    return {
        "auc_photo_cg": (photos[:, None] > cg).float().mean().item(),
        "prefers_gloss": rises.float().mean().item(),
        "recall_at_1": right / count,
        "gap_follows_realism": torch.corrcoef(torch.stack([unstyled, realism]))[0, 1].item(),
        "gap_photo": photos.mean().item(),
        "gap_cg": cg.mean().item(),
    }
