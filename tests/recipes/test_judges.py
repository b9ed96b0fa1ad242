"""Judges of a benchmark: planned by name, loaded one by one, each number what its own metric says of the picture."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from srpo_cli.algorithms.base import ControlWords
from srpo_cli.config.benchmark import Benchmark
from srpo_cli.errors import MissingError, SrpoError, UsageError
from srpo_cli.metrics.distribution import frechet_distance
from srpo_cli.metrics.diversity import mean_pairwise_distance
from srpo_cli.metrics.pictures import STATISTICS, picture_statistics
from srpo_cli.miniature.oracle import Reference
from srpo_cli.miniature.world import CG, PHOTO, draw_prompts, draw_scenes_of, render
from srpo_cli.models.flux import load_flux
from srpo_cli.recipes.judges import OracleJudge, Picture, RewardJudge, Skipped, plan_judges
from srpo_cli.recipes.score import to_images
from srpo_cli.registry import METRICS, REWARDS, metric_parts, rewards_of, weights_of
from srpo_cli.rewards.base import Reward
from srpo_cli.rewards.miniature import load_miniature
from srpo_cli.runtime.benchmarks import Item
from srpo_cli.trust import trust

CPU = torch.device("cpu")
COUNT = 12


@pytest.fixture(autouse=True)
def nothing_is_in_the_caches(monkeypatch, tmp_path):
    """No weights, and nobody has trusted anything."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("srpo_cli.trust._this_process", set())


def benchmark(*metrics, images=1, positive=("Realistic photo",), negative=("CG Render",)):
    return Benchmark.model_validate(
        {
            "name": "test",
            "description": "pictures of a test",
            "prompts": {"layout": "world", "count": COUNT},
            "images_per_prompt": images,
            "metrics": metrics,
            "control_words": {"positive": positive, "negative": negative},
        }
    )


def load_judges(*metrics, weights=None, reference=None, **changes):
    return [plan.load(CPU) for plan in plan_judges(benchmark(*metrics, **changes), weights, reference)]


def to_pixels(images):
    """Images (N, 3, H, W) as files keep them, (N, H, W, 3)."""
    return (images * 255).round().byte().movedim(1, -1)


@pytest.fixture(scope="module")
def pictures():
    """Renders and photographs of prompts, one of each."""
    prompts = draw_prompts(COUNT, 5, "evaluation")
    images = torch.cat(
        [render(draw_scenes_of([prompt], (PHOTO, CG)[i % 2], seed=i)) for i, prompt in enumerate(prompts)]
    )
    items = [Item(i, "", i, prompt) for i, prompt in enumerate(prompts)]
    return [Picture(item, pixels) for item, pixels in zip(items, to_pixels(images), strict=True)]


def images_of(pictures):
    return to_images(torch.stack([picture.pixels for picture in pictures]))


# Names


@pytest.mark.parametrize("metric", METRICS.names)
def test_every_metric_has_a_planner_and_parts(metric):
    name = metric.replace("REWARD", "clip:ViT-B-32/openai")
    assert callable(METRICS.get(name))
    assert metric_parts(name) == (metric.partition(":")[0], "clip:ViT-B-32/openai" if ":" in metric else "")


def test_a_reward_is_a_metric_of_its_own_name():
    assert metric_parts("pickscore:cosine") == ("reward", "pickscore:cosine")
    assert metric_parts("sgp:pickscore:cosine") == ("sgp", "pickscore:cosine")
    assert metric_parts("miniature:clip") == ("reward", "miniature:clip")
    assert metric_parts("diversity:miniature:clip") == ("diversity", "miniature:clip")


def test_what_metrics_read_is_known_by_name():
    metrics = ["sgp:hpsv2.1", "hpsv2.1", "statistics", "geneval", "fid", "diversity:./judge.py"]
    assert rewards_of(metrics) == ["hpsv2.1", "clip:ViT-L-14/openai", "./judge.py"]
    assert weights_of(metrics) == [*rewards_of(metrics), "mask2former", "inception"]


def test_an_unknown_metric_is_told_with_the_nearest_and_all_names():
    with pytest.raises(UsageError, match=r"Unknown metric 'statistic'. Did you mean 'statistics'\?.*sgp:REWARD.*hpsv2"):
        plan_judges(benchmark("statistic"))
    with pytest.raises(UsageError, match=r"Unknown reward 'hpsv2.2'. Did you mean 'hpsv2.[01]'"):
        plan_judges(benchmark("sgp:hpsv2.2"))


def test_metrics_that_read_the_same_share_a_judge_and_keep_their_order(tmp_path):
    Image.new("RGB", (48, 48)).save(tmp_path / "real.png")
    metrics = ("sgp:hpsv2.1", "statistics", "fid:miniature", "hpsv2.1", "fid", "kid:miniature", "hpsv2.1")
    plans = plan_judges(benchmark(*metrics), reference=tmp_path)
    assert [(plan.name, plan.metrics, plan.of_set) for plan in plans] == [
        ("hpsv2.1", ("sgp:hpsv2.1", "hpsv2.1"), False),
        ("statistics", ("statistics",), False),
        ("fid:miniature", ("fid:miniature", "kid:miniature"), True),
        ("fid", ("fid",), True),
    ]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("sgp:aesthetic-v2.5", "aesthetic-v2.5 reads no text"),
        ("sgp:laion-aesthetic-v1", "reads no text"),
        ("diversity:miniature", "--num-images 2"),
        ("fid", "--reference"),
        ("kid:miniature", "--reference"),
    ],
)
def test_what_a_metric_cannot_be_is_told_before_anything_is_loaded(metric, message):
    with pytest.raises(UsageError, match=message):
        plan_judges(benchmark(metric))


@pytest.mark.parametrize("metric", ["diversity:imagereward", "fid:imagereward", "fid:judge.py"])
def test_features_are_asked_only_of_rewards_that_have_them(metric, tmp_path):
    with pytest.raises(UsageError, match="no picture features"):
        plan_judges(benchmark(metric, images=2), reference=tmp_path)


@pytest.mark.parametrize("reward", [name for name in REWARDS.names if name.islower()])
def test_what_a_reward_reads_is_known_without_its_weights(reward):
    rates_only = reward.startswith(("aesthetic", "laion"))
    if rates_only:
        with pytest.raises(UsageError):
            plan_judges(benchmark(f"sgp:{reward}"))
    else:
        assert plan_judges(benchmark(f"sgp:{reward}"))


# What is not here


def test_a_metric_without_weights_is_left_out_by_name_with_the_command():
    (plan,) = plan_judges(benchmark("hpsv2.1", "sgp:hpsv2.1"))
    with pytest.raises(MissingError) as error:
        plan.load(CPU)
    skipped = plan.skipped(error.value)
    assert [each.metric for each in skipped] == ["hpsv2.1", "sgp:hpsv2.1"]
    assert all("hf download xswu/HPSv2 HPS_v2.1_compressed.pt" in each.reason for each in skipped)
    assert isinstance(skipped[0], Skipped)
    assert not skipped[0].reason.startswith("hpsv2.1")  # the name stands before it already


def test_geneval_without_its_detector_is_left_out_with_the_command():
    (plan,) = plan_judges(benchmark("geneval"))
    with pytest.raises(MissingError, match="hf download facebook/mask2former-swin-small-coco-instance"):
        plan.load(CPU)


@pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="torch-fidelity is here")
def test_fid_without_its_network_is_left_out_with_the_command(tmp_path):
    Image.new("RGB", (48, 48)).save(tmp_path / "real.png")
    (plan,) = plan_judges(benchmark("fid"), reference=tmp_path)
    with pytest.raises(MissingError, match=r"pip install 'srpo-cli\[fid\]'"):
        plan.load(CPU)


# Rewards and control words


def test_a_reward_and_its_gap_are_what_the_reward_says_of_each_text(pictures):
    words = {"positive": ("Realistic photo", "sharp"), "negative": ("CG Render", "blurry", "flat")}
    (judge,) = load_judges("miniature", "sgp:miniature", **words)
    reward, images = load_miniature(), images_of(pictures)
    prompts = [picture.item.prompt for picture in pictures]

    def mean_over(words):
        texts = [[f"{word}. {prompt}" for prompt in prompts] for word in words]
        return torch.stack([reward(images, column).double() for column in texts]).mean(0)

    positive, negative = mean_over(words["positive"]), mean_over(words["negative"])
    expected = {
        "miniature": reward(images, prompts).double(),
        "positive:miniature": positive,
        "negative:miniature": negative,
        "gap:miniature": positive - negative,
        "win:miniature": (positive > negative).double(),
    }
    said = judge(pictures)
    assert list(said) == list(judge.columns) == list(expected)
    for column, values in expected.items():
        assert said[column].dtype == torch.float64
        torch.testing.assert_close(said[column], values, atol=1e-6, rtol=0)


def test_a_picture_is_looked_at_once_for_all_texts(pictures):
    (judge,) = load_judges("miniature", "sgp:miniature")
    looks = []
    judge.reward.clip.visual.register_forward_hook(lambda *_: looks.append(1))
    judge(pictures)
    assert len(looks) == 1


@pytest.mark.parametrize(
    ("metrics", "columns"),
    [
        (("miniature",), ["miniature"]),
        (("sgp:miniature",), ["positive:miniature", "negative:miniature", "gap:miniature", "win:miniature"]),
    ],
)
def test_only_what_is_asked_for_becomes_a_column(pictures, metrics, columns):
    (judge,) = load_judges(*metrics)
    assert list(judge(pictures)) == list(judge.columns) == columns
    assert {column for measure in judge.measures for column in measure.columns} <= set(columns)


class Told(Reward):
    """Gives each text the number that ends it, plus the brightness of the picture."""

    unit = "told"

    def __call__(self, images, prompts):
        bright = torch.stack([image.mean() for image in images])
        return bright + torch.tensor([float(prompt.split()[-1]) for prompt in prompts])


def words_of(*numbers):
    return ControlWords([str(numbers[0])], [str(numbers[1])], template="{prompt} {word}")


@pytest.mark.parametrize(("positive", "negative", "win"), [(2, 1, 1.0), (1, 1, 0.5), (1, 2, 0.0)])
def test_a_tie_is_half_a_win(positive, negative, win):
    judge = RewardJudge("told", Told(), True, words_of(positive, negative))
    black = Picture(Item(0, "", 0, "prompt 7"), torch.zeros(4, 4, 3, dtype=torch.uint8))
    said = judge([black])
    assert said["told"].tolist() == [7]
    assert said["gap:told"].tolist() == [positive - negative]
    assert said["win:told"].tolist() == [win]


def test_the_three_figures_of_a_gap_agree(pictures):
    (judge,) = load_judges("sgp:miniature")
    said = judge(pictures)
    figures = {
        measure.name: measure.reduce(torch.stack([said[column].mean() for column in measure.columns])).item()
        for measure in judge.measures
    }
    assert figures["sgp_x100:miniature"] == pytest.approx(100 * figures["sgp:miniature"])
    assert figures["sgp_win_rate:miniature"] == (said["gap:miniature"] > 0).double().mean().item()
    assert figures["sgp:miniature"] == pytest.approx(said["gap:miniature"].mean().item())


def test_pictures_of_many_sizes_are_judged_each_on_its_own(pictures):
    (judge,) = load_judges("miniature")
    odd = [Picture(picture.item, picture.pixels[: 30 + i]) for i, picture in enumerate(pictures)]
    together = judge(odd)["miniature"]
    alone = torch.cat([judge([picture])["miniature"] for picture in odd])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_a_number_that_is_none_is_an_error_and_names_the_picture():
    judge = RewardJudge("told", Told(), True, None)
    black = torch.zeros(4, 4, 3, dtype=torch.uint8)
    with pytest.raises(SrpoError, match="told gave no finite number for a picture of anime/00003"):
        judge([Picture(Item(0, "", 0, "is 1"), black), Picture(Item(5, "anime", 3, "is nan"), black)])


def test_the_record_says_what_decides_the_numbers():
    (judge,) = load_judges("miniature", "sgp:miniature")
    assert judge.record["weights"].startswith("reward.safetensors sha256:")
    assert judge.record["preprocess"] == "crop"
    assert judge.record["unit"] == "cosine"
    assert judge.record["control_words"] == {
        "positive": ["Realistic photo"],
        "negative": ["CG Render"],
        "template": "{word}. {prompt}",
    }
    (plain,) = load_judges("miniature")
    assert "control_words" not in plain.record


PLUGIN = """
import torch
from srpo_cli.rewards.plugins import reward

@reward(unit="stars", reads_text={reads_text}, differentiable=False)
def load(images, prompts):
    return torch.stack([image.mean() for image in images]) + len(prompts[0])
"""


def test_a_plug_in_is_a_metric_and_is_shown_by_its_short_name(tmp_path, pictures):
    path = tmp_path / "deqa.py"
    path.write_text(PLUGIN.format(reads_text=True))
    trust(path)
    (judge,) = load_judges(str(path), f"sgp:{path}")
    said = judge(pictures[:2])
    expected = images_of(pictures[:2]).double().mean((1, 2, 3)) + len(pictures[0].item.prompt)
    torch.testing.assert_close(said[str(path)], expected, atol=1e-4, rtol=0)
    assert [measure.title for measure in judge.measures][:2] == ["DeQA", "SGP-DeQA"]


def test_words_for_a_plug_in_that_reads_no_text_are_refused_when_it_is_known(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(PLUGIN.format(reads_text=False))
    trust(path)
    (plan,) = plan_judges(benchmark(f"sgp:{path}"))
    with pytest.raises(UsageError, match="reads no text"):
        plan.load(CPU)


@pytest.mark.parametrize(
    ("reward", "title", "digits"),
    [
        ("aesthetic-v2.5", "Aes", 3),
        ("pickscore", "Pick", 3),
        ("imagereward", "IR", 3),
        ("hpsv2.1", "HPS", 4),
        ("clip:ViT-L-14/openai", "CLIPScore (ViT-L-14/openai)", 4),
    ],
)
def test_measures_are_headed_as_the_papers_table_is(reward, title, digits):
    told = Told()
    told.unit = "cosine" if digits == 4 else "rating"
    plain, gap, *_ = RewardJudge(reward, told, True, words_of(1, 0)).measures
    assert (plain.name, plain.title, plain.digits, plain.better) == (reward, title, digits, "higher")
    assert (gap.name, gap.title) == (f"sgp:{reward}", f"SGP-{title}")


# Statistics


def test_statistics_are_those_of_the_picture_and_clipping_counts_pixels(pictures):
    (judge,) = load_judges("statistics")
    said = judge(pictures)
    assert list(said) == list(judge.columns) == [*STATISTICS, "clipping"]
    expected = picture_statistics(images_of(pictures)).double()
    for number, name in enumerate(STATISTICS):
        torch.testing.assert_close(said[name], expected[:, number])
    pixels = torch.full((20, 10, 3), 128, dtype=torch.uint8)
    pixels[0, :5, 1] = 255  # five pixels by one channel
    pixels[1, 0] = 0  # one by all
    assert judge([Picture(pictures[0].item, pixels)])["clipping"].item() == pytest.approx(6 / 200)


def test_the_grid_is_sixteen_pixels_but_for_the_miniature(pictures):
    (judge,) = load_judges("statistics")
    pixels = torch.full((64, 64, 3), 128, dtype=torch.uint8)
    pixels[::16] = pixels[:, ::16] = 160
    large = judge([Picture(pictures[0].item, pixels)])["grid"].item()
    assert large == pytest.approx(picture_statistics(to_images(pixels)[None], 16)[0, STATISTICS.index("grid")].item())
    assert large > 0.2


def test_large_pictures_are_measured_a_few_at_a_time_to_the_same_numbers(monkeypatch, pictures):
    (judge,) = load_judges("statistics")
    odd = [Picture(picture.item, picture.pixels[: 40 + i % 2]) for i, picture in enumerate(pictures)]
    expected = judge(odd)
    monkeypatch.setattr("srpo_cli.recipes.judges._PIXELS", 5 * 48 * 41)
    for column, values in judge(odd).items():
        torch.testing.assert_close(values, expected[column])


# The oracle


@pytest.fixture(scope="module")
def oracle_judge() -> OracleJudge:
    (judge,) = load_judges("oracle")
    return judge


def figures_of(judge, said):
    return {
        measure.name: measure.reduce(torch.stack([said[column].mean() for column in measure.columns])).item()
        for measure in judge.measures
    }


def test_the_oracles_figures_are_the_means_of_its_columns(oracle_judge, pictures):
    oracle = oracle_judge.oracle
    prompts = [picture.item.prompt for picture in pictures]
    photographs = torch.cat([oracle_judge.photographs(picture.item) for picture in pictures])
    expected = oracle.judge(images_of(pictures), Reference(prompts, photographs))
    figures = figures_of(oracle_judge, oracle_judge(pictures))
    for name, figure in figures.items():
        assert figure == pytest.approx(expected[name].mean, rel=1e-6, abs=1e-7), name
    assert set(figures) == set(expected) - {"saturation", "grain"}
    assert 0 < figures["photo_rate"] < 1  # half of the pictures are photographs


def test_a_prompts_photographs_are_photographs_of_it_and_no_others(oracle_judge, pictures):
    """They are what the oracle makes of the prompt alone, through the model's own autoencoder."""
    model = load_flux("miniature")
    item = pictures[3].item
    own = oracle_judge.photographs(item)
    assert own.shape == (2, len(STATISTICS))
    with torch.no_grad():
        round_trip = oracle_judge.round_trip(images_of(pictures))
        expected = model.decode(model.encode(images_of(pictures)), (48, 48))
    torch.testing.assert_close(round_trip, expected)
    other = oracle_judge.photographs(Item(77, "", 77, item.prompt))
    assert not torch.equal(own, other)
    assert oracle_judge.oracle.is_photo(own, [item.prompt] * 2).any()


def test_what_a_picture_gets_depends_on_no_other(oracle_judge, pictures):
    together = oracle_judge(pictures)
    (fresh,) = load_judges("oracle")
    backwards = fresh(pictures[5:][::-1])
    for column, values in together.items():
        torch.testing.assert_close(backwards[column].flip(0), values[5:], atol=1e-4, rtol=0)


def test_an_open_ground_counts_as_shown(oracle_judge, pictures):
    item = Item(0, "", 0, "a red sphere")
    said = oracle_judge([Picture(item, picture.pixels) for picture in pictures])
    assert said["ground"].tolist() == [1.0] * COUNT
    assert 0 < said["colour"].mean() < 1


def test_the_oracle_refuses_other_worlds_and_other_sizes(oracle_judge, pictures):
    foreign = Item(0, "", 0, "a cat in a hat")
    (plan,) = plan_judges(benchmark("oracle"))
    plan.check([picture.item for picture in pictures])
    for refuse in (lambda: plan.check([foreign]), lambda: oracle_judge([Picture(foreign, pictures[0].pixels)])):
        with pytest.raises(UsageError, match="'a cat in a hat'"):
            refuse()
    with pytest.raises(UsageError, match="48x48 px, and 00000 has 40x48"):
        oracle_judge([Picture(pictures[0].item, pictures[0].pixels[:40])])


# Diversity


def test_diversity_is_the_distance_between_a_prompts_pictures(pictures):
    (judge,) = load_judges("diversity:miniature", images=3)
    mixed = [Picture(pictures[i % 2].item, pictures[i].pixels) for i in range(6)]  # prompts 0 and 1 in turn
    features = load_miniature().image_features(images_of(mixed))
    expected = [mean_pairwise_distance(features[start::2]) for start in (0, 1)]
    said = judge(mixed)["diversity:miniature"]
    assert said.tolist() == pytest.approx(expected * 3, abs=1e-6)
    assert min(expected) > 0.01


def test_copies_have_no_diversity(pictures):
    (judge,) = load_judges("diversity:miniature", images=4)
    assert judge([pictures[0]] * 4)["diversity:miniature"].abs().max() < 1e-6


def test_a_prompt_that_is_cut_in_two_is_noticed(pictures):
    (judge,) = load_judges("diversity:miniature", images=2)
    with pytest.raises(ValueError, match="1 of 2 pictures of 00001"):
        judge([pictures[0], pictures[0], pictures[1]])


# Distance to a set


@pytest.fixture
def reference(pictures, tmp_path) -> Path:
    """A folder with the test's own pictures."""
    folder = tmp_path / "reference"
    folder.mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture.pixels.numpy()).save(folder / f"{number:03d}.png")
    return folder


def darker(pictures, factor):
    return [Picture(picture.item, (picture.pixels * factor).byte()) for picture in pictures]


def test_a_set_is_at_no_distance_from_itself_and_darkening_moves_it_away(pictures, reference):
    (judge,) = load_judges("kid:miniature", "fid:miniature", reference=reference)
    distances = []
    for factor in (1.0, 0.7, 0.4):
        shown = darker(pictures, factor)
        judge.update(shown[:5])
        judge.update(shown[5:])
        distances.append(judge.compute())
    assert [measure.name for measure in judge.measures] == list(distances[0])
    fids = [each["fid:miniature"] for each in distances]
    kids = [each["kid:miniature"] for each in distances]
    assert fids[0] == pytest.approx(0, abs=1e-4)
    assert fids[0] + 0.01 < fids[1] < fids[2]
    assert kids[0] < kids[1] < kids[2]
    assert all(each["kid_std:miniature"] > 0 for each in distances)


def test_the_distance_is_that_of_the_rewards_features(pictures, reference):
    (judge,) = load_judges("fid:miniature", reference=reference)
    reward = load_miniature()
    judge.update(darker(pictures, 0.6))
    expected = frechet_distance(
        reward.image_features(images_of(pictures)), reward.image_features(images_of(darker(pictures, 0.6)))
    )
    assert judge.compute() == {"fid:miniature": pytest.approx(expected, rel=1e-3)}


def test_a_model_starts_without_the_last_ones_pictures(pictures, reference):
    (judge,) = load_judges("fid:miniature", reference=reference)
    judge.update(darker(pictures, 0.3))
    judge.compute()
    judge.update(pictures)
    assert judge.compute()["fid:miniature"] == pytest.approx(0, abs=1e-4)
    with pytest.raises(UsageError, match="the model has 0"):
        judge.compute()


def test_the_record_knows_the_reference_by_its_pixels(reference):
    (judge,) = load_judges("fid:miniature", reference=reference)
    (same,) = load_judges("fid:miniature", reference=reference)
    (reference / "000.png").unlink()
    (other,) = load_judges("fid:miniature", reference=reference)
    assert judge.record == same.record
    assert judge.record["reference"]["pictures"] == COUNT
    assert other.record["reference"]["pictures"] == COUNT - 1
    assert other.record["reference"]["sha256"] != judge.record["reference"]["sha256"]


def test_a_reference_picture_that_cannot_be_read_is_an_error_not_a_hole(reference):
    (reference / "005.png").write_bytes(b"no picture")
    (plan,) = plan_judges(benchmark("fid:miniature"), reference=reference)
    with pytest.raises(SrpoError, match=r"005.png .*take it out"):
        plan.load(CPU)
    with pytest.raises(UsageError, match="no folder"):
        plan_judges(benchmark("fid:miniature"), reference=reference / "000.png")
