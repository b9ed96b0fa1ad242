"""The miniature's world: an analytic ray tracer in which caption, style, lighting and realism are known exactly.

A scene is one coloured object on a ground under a light, drawn in a style. ``realism`` in [0, 1] is a continuous
property of the renderer: 1 is a photograph (texture, soft shadows, muted colours, film grain), 0 is a glossy CG
render. Prompts without a style word are drawn with a realism skewed towards CG, as FLUX.1-dev's pictures are, so
that a model trained on this world has room to become more realistic and the renderer can tell whether it did.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 48
"""Edge of a picture in pixels."""

SHAPES = ("sphere", "cube", "cone", "cylinder")
COLOURS = {
    "red": (0.85, 0.10, 0.10),
    "orange": (0.98, 0.50, 0.05),
    "yellow": (0.95, 0.85, 0.10),
    "green": (0.10, 0.62, 0.16),
    "blue": (0.12, 0.26, 0.88),
    "purple": (0.55, 0.14, 0.70),
}
GROUNDS = {  # ground albedo, second albedo, wall or sky
    "a wooden table": ((0.55, 0.33, 0.18), (0.38, 0.21, 0.11), (0.80, 0.70, 0.58)),
    "grass": ((0.24, 0.50, 0.14), (0.14, 0.34, 0.09), (0.52, 0.72, 0.95)),
    "a checkered floor": ((0.92, 0.92, 0.92), (0.16, 0.16, 0.17), (0.62, 0.63, 0.66)),
    "sand": ((0.84, 0.72, 0.48), (0.72, 0.59, 0.36), (0.62, 0.80, 0.95)),
    "snow": ((0.93, 0.95, 0.98), (0.82, 0.86, 0.93), (0.70, 0.76, 0.84)),
}
LIGHTS = ("", "dark", "bright", "natural lighting", "backlit")
STYLES = ("", "realistic photo", "cg render", "comic", "oil painting")
STYLE_WORDS = {
    "": ("",),
    "realistic photo": ("realistic photo", "photo"),
    "cg render": ("cg render", "3d render"),
    "comic": ("comic", "cartoon"),
    "oil painting": ("oil painting", "painting"),
}
PHOTO, CG, COMIC, PAINTING = 1, 2, 3, 4
STYLE_SHARES = (0.36, 0.22, 0.20, 0.11, 0.11)
LIGHT_SHARES = (0.40, 0.15, 0.15, 0.15, 0.15)


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes; every field is a (B,) tensor.

    ``shape``, ``colour``, ``ground``, ``light`` and ``style`` index the tuples of this module; ``realism`` is in
    [0, 1]; ``x``, ``z`` and ``size`` are in world units; ``yaw``, ``azimuth`` and ``elevation`` are in radians;
    ``seed`` fixes textures and grain.
    """

    shape: Tensor
    colour: Tensor
    ground: Tensor
    light: Tensor
    style: Tensor
    realism: Tensor
    x: Tensor
    z: Tensor
    size: Tensor
    yaw: Tensor
    azimuth: Tensor
    elevation: Tensor
    seed: Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        return Scenes(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def with_style(self, style: int, realism: Tensor) -> Scenes:
        """The same scenes drawn in another style."""
        return replace(self, style=torch.full_like(self.style, style), realism=realism)


def draw_realism(style: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the realism that goes with each style: photographs near 1, CG near 0, unstyled skewed to CG, (B,)."""
    u = torch.rand(len(style), generator=generator)
    by_style = torch.stack([0.05 + 0.6 * u**1.3, 0.75 + 0.25 * u, 0.2 * u, 0.2 * u, 0.3 * u])
    return by_style.gather(0, style[None])[0]


def draw_scenes(count: int, generator: torch.Generator) -> Scenes:
    """Draw ``count`` scenes from the world's distribution."""

    def pick(size: int) -> Tensor:
        return torch.randint(size, (count,), generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    def weighted(shares: tuple[float, ...]) -> Tensor:
        return torch.multinomial(torch.tensor(shares), count, replacement=True, generator=generator)

    style = weighted(STYLE_SHARES)
    return Scenes(
        shape=pick(len(SHAPES)),
        colour=pick(len(COLOURS)),
        ground=pick(len(GROUNDS)),
        light=weighted(LIGHT_SHARES),
        style=style,
        realism=draw_realism(style, generator),
        x=uniform(-0.42, 0.42),
        z=uniform(-0.25, 0.45),
        size=uniform(0.62, 0.80),
        yaw=uniform(0.35, 1.22),  # two faces of a cube always show
        azimuth=uniform(-2.75, -2.05),
        elevation=uniform(0.75, 1.15),
        seed=torch.randint(2**31, (count,), generator=generator),
    )


# --- captions -----------------------------------------------------------------------------------------------------


def caption(shape: int, colour: int, ground: int | None = None, light: int = 0, style_word: str = "") -> str:
    """Write the caption of a scene: ``[style. ]a COLOUR SHAPE[ on GROUND][, LIGHT]``."""
    colour_word = list(COLOURS)[colour]
    text = f"{'an' if colour_word[0] == 'o' else 'a'} {colour_word} {SHAPES[shape]}"
    if ground is not None:
        text += f" on {list(GROUNDS)[ground]}"
    if light:
        text += f", {LIGHTS[light]}"
    return f"{style_word}. {text}" if style_word else text


def captions(scenes: Scenes, generator: torch.Generator, omit: float = 0.12) -> list[str]:
    """Caption each scene with a random synonym of its style, leaving ground and light out with probability ``omit``."""
    drops = torch.rand(len(scenes), 2, generator=generator)
    synonyms = torch.rand(len(scenes), generator=generator)
    texts = []
    for i in range(len(scenes)):
        words = STYLE_WORDS[STYLES[scenes.style[i]]]
        texts.append(
            caption(
                int(scenes.shape[i]),
                int(scenes.colour[i]),
                None if drops[i, 0] < omit else int(scenes.ground[i]),
                0 if drops[i, 1] < omit else int(scenes.light[i]),
                words[int(synonyms[i] * len(words))],
            )
        )
    return texts


def vocabulary() -> list[str]:
    """Every word that a caption can hold, in a fixed order."""
    phrases = [*SHAPES, *COLOURS, *GROUNDS, *LIGHTS, *itertools.chain(*STYLE_WORDS.values()), "a", "an", "on"]
    return sorted({word for phrase in phrases for word in phrase.split()})


@dataclass(frozen=True)
class Meaning:
    """What a prompt asks for: indices into this module's tuples, ``None`` where it does not say."""

    shape: int
    colour: int
    ground: int | None
    light: int
    style: int


def parse(prompt: str) -> Meaning | None:
    """Read a prompt in the world's grammar; ``None`` when it speaks of anything else."""
    words = [style for synonyms in STYLE_WORDS.values() for style in synonyms if style]
    lights = [light for light in LIGHTS if light]
    match = re.fullmatch(
        rf"(?:(?P<style>{'|'.join(words)})\. )?an? (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"
        rf"(?: on (?P<ground>{'|'.join(GROUNDS)}))?(?:, (?P<light>{'|'.join(lights)}))?",
        prompt.strip().lower(),
    )
    if match is None:
        return None
    style = next(i for i, name in enumerate(STYLES) if (match["style"] or "") in STYLE_WORDS[name])
    return Meaning(
        shape=SHAPES.index(match["shape"]),
        colour=list(COLOURS).index(match["colour"]),
        ground=list(GROUNDS).index(match["ground"]) if match["ground"] else None,
        light=LIGHTS.index(match["light"] or ""),
        style=style,
    )


SPLITS = {"evaluation": (0,), "validation": (1,), "train": (2, 3)}
"""Captions by the sum of their four indices modulo 4: reports, the choice of settings and training never share one."""


def draw_prompts(count: int, seed: int, split: str, lit: bool = True) -> list[str]:
    """Draw ``count`` prompts of a split, without a style word, naming shape, colour, ground and any light.

    With ``lit`` false the light is left open in every one, for control words that are lights.
    """
    generator, prompts = torch.Generator().manual_seed(seed), []
    while len(prompts) < count:
        scenes = draw_scenes(4 * count, generator)
        contents = torch.stack([scenes.shape, scenes.colour, scenes.ground, scenes.light], 1).tolist()
        contents = [content for content in contents if sum(content) % 4 in SPLITS[split]]
        prompts += [caption(*content) for content in contents if lit or not content[3]]
    return prompts[:count]


def draw_scenes_of(prompts: list[str], style: int, seed: int) -> Scenes:
    """Draw, for each prompt, a scene that it describes, in the given style; what the prompt leaves open is random.

    Raises ``ValueError`` when a prompt is not in the world's grammar.
    """
    generator = torch.Generator().manual_seed(seed)
    scenes = draw_scenes(len(prompts), generator)
    meanings = [parse(prompt) for prompt in prompts]
    for prompt, meaning in zip(prompts, meanings, strict=True):
        if meaning is None:
            raise ValueError(f"the miniature's world has no {prompt!r}")
    grounds = [scenes.ground[i] if m.ground is None else m.ground for i, m in enumerate(meanings)]
    scenes = replace(
        scenes,
        shape=torch.tensor([m.shape for m in meanings]),
        colour=torch.tensor([m.colour for m in meanings]),
        ground=torch.tensor(grounds),
        light=torch.tensor([m.light for m in meanings]),
    )
    styles = torch.full_like(scenes.style, style)
    return scenes.with_style(style, draw_realism(styles, generator))


# --- rendering ----------------------------------------------------------------------------------------------------

_SUPERSAMPLING = 2
_CAMERA = (0.0, 1.45, -3.2)
_PITCH, _TAN_HALF_FOV = -0.27, 0.40
_HORIZON = 7.0  # where the ground ends and the wall or sky begins
_LUMA = (0.299, 0.587, 0.114)
_OUTSIDE = 1e9


def render(scenes: Scenes, batch_size: int = 16) -> Tensor:
    """Render scenes, (B, 3, SIZE, SIZE) in [0, 1], float32; the same scene gives the same picture in any batch."""
    chunks = [_render_batch(scenes[i : i + batch_size]) for i in range(0, len(scenes), batch_size)]
    return torch.cat(chunks)


def luma(images: Tensor) -> Tensor:
    """Luma of images, (B, 3, H, W) -> (B, 1, H, W)."""
    return (images * images.new_tensor(_LUMA)[None, :, None, None]).sum(1, keepdim=True)


def _render_batch(scenes: Scenes) -> Tensor:
    count, edge = len(scenes), SIZE * _SUPERSAMPLING
    g = scenes.realism[:, None]
    noise = _scene_noise(scenes.seed)
    origin, rays = _camera_rays(edge)

    # Geometry: the object first, then the ground plane, then the backdrop.
    depth, normal = _object_hits(scenes, origin.expand(count, 1, 3), rays.expand(count, -1, 3))
    on_object = depth < _OUTSIDE
    ground_depth = torch.where(rays[:, 1] < -1e-4, -origin[1] / rays[:, 1].clamp(max=-1e-4), _OUTSIDE)
    on_ground = ~on_object & (ground_depth < _HORIZON)
    point = origin + rays * torch.where(on_object, depth, ground_depth.clamp(max=_HORIZON))[..., None]
    normal = torch.where(on_object[..., None], normal, normal.new_tensor([0.0, 1.0, 0.0]))

    light, key, ambient, tint = _lighting(scenes)
    albedo = _albedo(scenes, point, normal, on_object, noise.offset)
    lambert = (normal * light[:, None]).sum(-1).clamp(min=0)
    shadow = _shadow(scenes, point, light, on_ground)
    contact = _contact_occlusion(scenes, point, on_object)
    occlusion = 1 - (0.3 + 0.7 * g) * 0.55 * contact

    diffuse = key[:, None] * lambert * shadow
    comic = (scenes.style == COMIC)[:, None]
    diffuse = torch.where(comic, key[:, None] * _posterise(lambert * shadow, 3), diffuse)
    shaded = (
        albedo * (ambient[:, None] * torch.where(comic, torch.ones_like(occlusion), occlusion) + diffuse)[..., None]
    )
    shaded = shaded * tint[:, None] + _specular(scenes, rays, normal, light, on_object, shadow)[..., None]

    sky = _backdrop(scenes, rays, noise.offset, edge)
    image = torch.where((on_object | on_ground)[..., None], shaded, sky)
    image = image.transpose(1, 2).reshape(count, 3, edge, edge)
    outline = _outlines(on_object, normal, depth, edge)
    image = torch.where(comic[..., None, None] & outline, torch.full_like(image, 0.02), image)
    image = F.avg_pool2d(image, _SUPERSAMPLING)
    return _develop(scenes, image, noise)


@dataclass(frozen=True)
class _Noise:
    offset: Tensor  # (B, 4) texture offsets in [0, 1)
    grain: Tensor  # (B, 3, SIZE, SIZE) unit variance
    field: Tensor  # (B, 2, SIZE, SIZE) smooth displacement, about unit variance


def _scene_noise(seeds: Tensor) -> _Noise:
    """Draw each scene's noise from its own seed, so that a picture does not depend on its batch."""
    offsets, grains, coarse = [], [], []
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed(seed)
        offsets.append(torch.rand(4, generator=generator))
        grains.append(torch.randn(3, SIZE, SIZE, generator=generator))
        coarse.append(torch.randn(2, 9, 9, generator=generator))
    grain = torch.stack(grains)
    # Film grain clumps over about a pixel and a half: binomial filter, then unit variance again.
    kernel = torch.tensor([0.25, 1.0, 0.25])
    kernel = (kernel[:, None] * kernel[None])[None, None].repeat(3, 1, 1, 1)
    grain = F.conv2d(F.pad(grain, (1, 1, 1, 1), mode="reflect"), kernel, groups=3) / kernel[0].square().sum().sqrt()
    field = F.interpolate(torch.stack(coarse), size=(SIZE, SIZE), mode="bicubic", align_corners=True)
    return _Noise(torch.stack(offsets), grain, field)


def _camera_rays(edge: int) -> tuple[Tensor, Tensor]:
    """Camera origin (3,) and unit ray directions (edge * edge, 3), row by row from the top left."""
    axis = (torch.arange(edge) + 0.5) / edge * 2 - 1
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    rays = torch.stack([x * _TAN_HALF_FOV, y * _TAN_HALF_FOV, torch.ones_like(x)], -1).reshape(-1, 3)
    pitch = torch.tensor(_PITCH)
    up_down = torch.stack(
        [
            pitch.cos() * rays[:, 1] + pitch.sin() * rays[:, 2],
            pitch.cos() * rays[:, 2] - pitch.sin() * rays[:, 1],
        ],
        -1,
    )
    rays = torch.cat([rays[:, :1], up_down], -1)
    return torch.tensor(_CAMERA), F.normalize(rays, dim=-1)


def _object_hits(scenes: Scenes, origin: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (B, P), ``_OUTSIDE`` where missed, and world normal (B, P, 3) of each scene's object along each ray."""
    depth = torch.full(rays.shape[:2], _OUTSIDE)
    normal = torch.zeros(rays.shape)
    sin, cos = scenes.yaw.sin()[:, None], scenes.yaw.cos()[:, None]

    def turn(v: Tensor, s: Tensor) -> Tensor:
        return torch.stack([cos * v[..., 0] - s * v[..., 2], v[..., 1], s * v[..., 0] + cos * v[..., 2]], -1)

    base = torch.stack([scenes.x, torch.zeros_like(scenes.x), scenes.z], -1)[:, None]
    size = scenes.size[:, None, None]
    local_origin = turn((origin - base) / size, sin).expand_as(rays)
    local_rays = turn(rays, sin)
    for index, hit in enumerate((_hit_sphere, _hit_cube, _hit_cone, _hit_cylinder)):
        rows = (scenes.shape == index).nonzero()[:, 0]
        if len(rows):
            depth[rows], normal[rows] = hit(local_origin[rows], local_rays[rows])
    return torch.where(depth < _OUTSIDE, depth * size[..., 0], depth), turn(normal, -sin)


# The four bodies stand on y = 0 in units of ``Scenes.size``.
_CUBE_HALF, _CONE_RADIUS, _CONE_HEIGHT, _CYLINDER_RADIUS, _CYLINDER_HEIGHT = 0.74, 0.98, 2.15, 0.68, 1.9


def _nearest(a: Tensor, b: Tensor, c: Tensor, inside) -> Tensor:
    """Smallest positive root of ``a t^2 + 2 b t + c`` that ``inside(t)`` accepts, else ``_OUTSIDE``."""
    discriminant = b * b - a * c
    root = discriminant.clamp(min=0).sqrt()
    a = torch.where(a.abs() < 1e-9, torch.full_like(a, 1e-9), a)
    best = torch.full_like(b, _OUTSIDE)
    for t in ((-b - root) / a, (-b + root) / a):
        valid = (discriminant > 0) & (t > 1e-4) & inside(t)
        best = torch.where(valid & (t < best), t, best)
    return best


def _hit_sphere(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    o = o - o.new_tensor([0.0, 1.0, 0.0])
    t = _nearest((d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1, lambda t: torch.ones_like(t, dtype=torch.bool))
    return t, o + d * t.clamp(max=1e3)[..., None]


def _hit_cube(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    o = o - o.new_tensor([0.0, _CUBE_HALF, 0.0])
    d = torch.where(d.abs() < 1e-9, torch.full_like(d, 1e-9), d)
    first, second = (-_CUBE_HALF - o) / d, (_CUBE_HALF - o) / d
    near, axis = torch.minimum(first, second).max(-1)
    far = torch.maximum(first, second).min(-1).values
    t = torch.where((near < far) & (near > 1e-4), near, torch.full_like(near, _OUTSIDE))
    return t, F.one_hot(axis, 3) * -d.sign()


def _hit_cylinder(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    flat = o.new_tensor([1.0, 0.0, 1.0])
    of, df = o * flat, d * flat
    c = (of * of).sum(-1) - _CYLINDER_RADIUS**2

    def inside(t: Tensor) -> Tensor:
        y = o[..., 1] + t * d[..., 1]
        return (y >= 0) & (y <= _CYLINDER_HEIGHT)

    side = _nearest((df * df).sum(-1), (of * df).sum(-1), c, inside)
    dy = torch.where(d[..., 1].abs() < 1e-9, torch.full_like(d[..., 1], 1e-9), d[..., 1])
    cap = (_CYLINDER_HEIGHT - o[..., 1]) / dy
    radius = (of + df * cap[..., None]).square().sum(-1)
    cap = torch.where((cap > 1e-4) & (radius <= _CYLINDER_RADIUS**2), cap, torch.full_like(cap, _OUTSIDE))
    t = torch.minimum(side, cap)
    around = F.normalize((o + d * t.clamp(max=1e3)[..., None]) * flat, dim=-1)
    return t, torch.where((cap < side)[..., None], o.new_tensor([0.0, 1.0, 0.0]), around)


def _hit_cone(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    slope = _CONE_RADIUS / _CONE_HEIGHT
    form = o.new_tensor([1.0, -(slope**2), 1.0])
    apex = o - o.new_tensor([0.0, _CONE_HEIGHT, 0.0])

    def inside(t: Tensor) -> Tensor:
        y = o[..., 1] + t * d[..., 1]
        return (y >= 0) & (y <= _CONE_HEIGHT)

    t = _nearest((form * d * d).sum(-1), (form * apex * d).sum(-1), (form * apex * apex).sum(-1), inside)
    return t, F.normalize((apex + d * t.clamp(max=1e3)[..., None]) * form, dim=-1)


def _lighting(scenes: Scenes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit direction to the light (B, 3), key (B,), ambient (B,) and tint (B, 3)."""
    natural, backlit = scenes.light == 3, scenes.light == 4
    azimuth = torch.where(backlit, scenes.azimuth.neg(), scenes.azimuth)  # from behind the object
    elevation = torch.where(
        natural, scenes.elevation * 0.52, torch.where(backlit, scenes.elevation * 0.62, scenes.elevation)
    )
    light = torch.stack([azimuth.cos() * elevation.cos(), elevation.sin(), azimuth.sin() * elevation.cos()], -1)
    key = torch.where(backlit, 0.60, 0.80 - 0.20 * scenes.realism)
    ambient = torch.where(backlit, 0.32, 0.40 + 0.12 * scenes.realism)
    tint = torch.where(natural[:, None], torch.tensor([1.16, 1.0, 0.74]), torch.ones(3))
    return light, key, ambient, tint


def _noise_tile() -> Tensor:
    """A seamless tile of four octaves of smooth noise, (1, 1, 129, 129), about unit variance."""
    generator, tile = torch.Generator().manual_seed(7), torch.zeros(1, 1, 128, 128)
    for octave, cells in enumerate((8, 16, 32, 64)):
        grid = torch.randn(1, 1, cells, cells, generator=generator)
        wrapped = F.pad(grid, (2, 2, 2, 2), mode="circular")
        step = 128 // cells
        smooth = F.interpolate(wrapped, scale_factor=step, mode="bicubic", align_corners=False)
        tile += 0.62**octave * smooth[..., 2 * step : -2 * step, 2 * step : -2 * step]
    return F.pad(tile / tile.std(), (0, 1, 0, 1), mode="circular")


_TILE = _noise_tile()


def _texture(uv: Tensor) -> Tensor:
    """Sample the noise tile at (B, P, 2) coordinates in tiles, -> (B, P)."""
    grid = (uv - uv.floor()) * 2 - 1
    return F.grid_sample(_TILE.expand(len(uv), -1, -1, -1), grid[:, None], align_corners=True)[:, 0, 0]


def _albedo(scenes: Scenes, point: Tensor, normal: Tensor, on_object: Tensor, offset: Tensor) -> Tensor:
    """Surface colour before light, (B, P, 3)."""
    palette = torch.tensor(list(COLOURS.values()))
    first, second, _ = torch.tensor(list(GROUNDS.values()))[scenes.ground].unbind(1)
    ground = scenes.ground[:, None]
    x, z = point[..., 0], point[..., 2]
    checker = ((x * 1.6).floor() + (z * 1.6).floor()).remainder(2)
    planks = _texture(torch.stack([x * 0.04, z * 0.55], -1) + offset[:, None, :2]).mul(0.9).sigmoid()
    patches = _texture(point[..., [0, 2]] * 0.22 + offset[:, None, :2]).mul(1.2).sigmoid()
    mix = torch.where(ground == 2, checker, torch.where(ground == 0, planks, patches * 0.8))
    comic = (scenes.style == COMIC)[:, None]
    mix = torch.where(comic & (ground != 2), torch.zeros_like(mix), mix)[..., None]
    surface = torch.where(
        on_object[..., None],
        palette[scenes.colour][:, None],
        first[:, None] * (1 - mix) + second[:, None] * mix,
    )

    uv = torch.where(
        on_object[..., None],
        torch.stack([x + 0.7 * z, point[..., 1] + 0.4 * normal[..., 0]], -1) * 0.30,
        point[..., [0, 2]] * 0.42,
    )
    amplitude = torch.where(comic[:, 0], 0.0, 0.06 + 0.20 * scenes.realism)[:, None]
    grit = _texture(uv + offset[:, None, 2:]) * amplitude
    return surface * (1 + 0.55 * grit[..., None]).clamp(min=0.25)


def _posterise(value: Tensor, levels: int) -> Tensor:
    return (value * levels).round() / levels


def _shadow(scenes: Scenes, point: Tensor, light: Tensor, on_ground: Tensor) -> Tensor:
    """Share of the light that reaches each point, (B, P); only the ground can be shadowed, all bodies are convex."""
    radius = (0.02 + 0.26 * scenes.realism)[:, None]
    side = F.normalize(torch.linalg.cross(light, light.new_tensor([[0.0, 1.0, 0.0]]).expand_as(light)), dim=-1)
    other = torch.linalg.cross(light, side)
    lit = torch.zeros_like(point[..., 0])
    samples = ((0.0, 0.0), (0.9, 0.2), (-0.2, 0.9), (-0.9, -0.2), (0.2, -0.9))
    for a, b in samples:
        towards = F.normalize(light + radius * (a * side + b * other), dim=-1)
        hit, _ = _object_hits(scenes, point, towards[:, None].expand_as(point))
        lit += (hit >= _OUTSIDE).float() / len(samples)
    return torch.where(on_ground, lit, torch.ones_like(lit))


def _contact_occlusion(scenes: Scenes, point: Tensor, on_object: Tensor) -> Tensor:
    """How much the object and the ground darken each other where they meet, in [0, 1], (B, P)."""
    footprint = torch.tensor([0.55, _CUBE_HALF * 1.1, _CONE_RADIUS, _CYLINDER_RADIUS])[scenes.shape] * scenes.size
    centre = torch.stack([scenes.x, scenes.z], -1)[:, None]
    outside = ((point[..., [0, 2]] - centre).norm(dim=-1) - footprint[:, None]).clamp(min=0)
    return torch.where(on_object, (-point[..., 1].clamp(min=0) / 0.22).exp() * 0.8, (-outside / 0.20).exp())


def _specular(scenes: Scenes, rays: Tensor, normal: Tensor, light: Tensor, on_object: Tensor, shadow: Tensor) -> Tensor:
    gloss = (1 - scenes.realism)[:, None]
    half = F.normalize(light[:, None] - rays, dim=-1)
    highlight = (normal * half).sum(-1).clamp(min=0) ** (10 + 40 * gloss)
    rim = (1 - (-(normal * rays).sum(-1)).clamp(0, 1)) ** 4 * 0.25
    strength = torch.where(scenes.style[:, None] >= COMIC, 0.0, 0.04 + 0.85 * gloss**1.2)
    return strength * (highlight + rim * gloss) * on_object * shadow


def _backdrop(scenes: Scenes, rays: Tensor, offset: Tensor, edge: int) -> Tensor:
    colour = torch.tensor(list(GROUNDS.values()))[scenes.ground, 2][:, None]
    height = torch.linspace(1, 0, edge).repeat_interleave(edge)
    clouds = _texture(rays[None, :, :2] * 1.1 + offset[:, None, 2:])
    amplitude = torch.where(scenes.style == COMIC, 0.0, 0.02 + 0.09 * scenes.realism)[:, None]
    gain = torch.where(scenes.light == 4, 1.25, 1.0)[:, None]
    return colour * ((0.94 + 0.10 * height) * gain + amplitude * clouds)[..., None]


def _outlines(on_object: Tensor, normal: Tensor, depth: Tensor, edge: int) -> Tensor:
    """Comic ink: the silhouette and the creases of the object, (B, 1, edge, edge) bool."""
    marks = torch.cat([on_object[:, None].float(), normal.transpose(1, 2) * on_object[:, None]], 1)
    marks = marks.reshape(len(depth), 4, edge, edge)
    spread = F.max_pool2d(marks, 3, 1, 1) + F.max_pool2d(-marks, 3, 1, 1)
    ink = (spread[:, :1] > 0.5) | (spread[:, 1:].amax(1, keepdim=True) > 0.75)
    return F.max_pool2d(ink.float(), 3, 1, 1) > 0.5


def _develop(scenes: Scenes, image: Tensor, noise: _Noise) -> Tensor:
    """Exposure, tone, colour, painting, vignette and film grain, in that order."""
    g = scenes.realism[:, None, None, None]
    painting = (scenes.style == PAINTING)[:, None, None, None]
    image = image * torch.tensor([1.0, 0.42, 1.45, 1.0, 1.0])[scenes.light][:, None, None, None]
    image = image / (1 + 0.25 * image) * 1.12
    image = torch.where(painting, _paint(image, noise), image)
    grey = luma(image)
    image = grey + (image - grey) * torch.where(painting, 0.95, 1.08 - 0.50 * g)
    axis = torch.linspace(-1, 1, SIZE)
    image = image * (1 - 0.16 * g * (axis[:, None] ** 2 + axis[None] ** 2))
    sigma = 0.003 + 0.045 * g**1.3
    monochrome = noise.grain[:, :1]
    strength = 0.45 + 0.9 * luma(image).clamp(0, 1).sqrt()
    grain = torch.where(painting, 0.0, sigma) * strength * (0.97 * monochrome + 0.24 * noise.grain)
    return (image + grain).clamp(0, 1)


def _paint(image: Tensor, noise: _Noise) -> Tensor:
    """Brush work: colours dragged along a smooth field, few tones, and strokes in relief."""
    blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="reflect"), 3, 1)
    axis = torch.linspace(-1, 1, SIZE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    drag = noise.field.permute(0, 2, 3, 1) * 0.032
    dragged = F.grid_sample(blurred, torch.stack([x, y], -1) + drag, padding_mode="border", align_corners=True)
    tones = 0.35 * dragged + 0.65 * _posterise(dragged, 6)
    strokes = torch.sin((x + 0.8 * y) * 26 + 2.2 * noise.field[:, :1])
    return tones * (1 + 0.13 * strokes)
