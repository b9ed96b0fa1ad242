"""SRPO on a linear velocity model and a colour-mean reward: exact gradients, draws, words, and a reward that
rises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from srpo_cli.algorithms.base import ControlWords, Rollout
from srpo_cli.algorithms.injection import Injection, ReferenceDraws, SigmaDraws
from srpo_cli.algorithms.judging import Captions
from srpo_cli.algorithms.srpo import SRPO
from srpo_cli.core.recover import add_noise, recover
from srpo_cli.core.sampling import euler_sample
from srpo_cli.core.schedule import expand_to, shifted_sigmas
from srpo_cli.core.target import Target
from srpo_cli.errors import UsageError
from srpo_cli.rewards.augment import Augment

SIZE = (8, 8)
DRAWS = SigmaDraws(window=(0.3, 0.9), delta_sigma=0.1, common_weight=(-0.2, 0.2))
CHANNELS = {"red": 0, "green": 1, "blue": 2}


class LinearFlow(nn.Module):
    """Velocity of the flow to one constant picture, plus a learned linear map of the colours; decodes
    softly."""

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Conv2d(3, 3, 1)
        nn.init.zeros_(self.colours.weight)
        nn.init.zeros_(self.colours.bias)
        self.asked: list[Tensor] = []

    def velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: object, guidance: float, size: tuple[int, int]
    ) -> Tensor:
        self.asked.append(sigma)
        return latents / expand_to(sigma.expand(len(latents)).to(latents), latents) + self.colours(latents)

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return latents.sigmoid()


class ColourMean:
    """The reward for "<colour>. <prompt>" is the mean of that colour."""

    def scores(self, images: Tensor, *texts: Sequence[str]) -> tuple[Tensor, ...]:
        means = images.mean((-2, -1))
        return tuple(
            torch.stack([mean[CHANNELS[text.split(".")[0]]] for mean, text in zip(means, column, strict=True)])
            for column in texts
        )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_rollout(batch: int = 3, seed: int = 0) -> Rollout:
    x_0, eps = torch.randn(2, batch, 3, *SIZE, generator=seeded(seed), dtype=torch.float64)
    return Rollout(x_0, eps, ["a wall"] * batch, None, SIZE)


def make_srpo(**options: object) -> SRPO:
    return SRPO(LinearFlow().double(), ColourMean(), ControlWords(["red"], ["blue"]), guidance=1.0, **options)


def gradient(srpo: SRPO, rollout: Rollout, injections: list[Injection], **options: object) -> Tensor:
    srpo.model.zero_grad()
    srpo.backward(rollout, injections, 0, **options)
    return torch.cat([parameter.grad.flatten() for parameter in srpo.model.parameters()])


# --- the gradient ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("hinge", [None, 0.7])
@pytest.mark.parametrize("branch", [0, 1])
def test_cutting_the_graph_does_not_change_the_gradient(branch: int, hinge: float | None) -> None:
    srpo, rollout = make_srpo(hinge=hinge), make_rollout()
    injection = DRAWS.draw(3, seeded())[branch]
    cut = gradient(srpo, rollout, [injection])

    sigma, delta = (expand_to(x, rollout.x_0) for x in (injection.sigma, injection.delta_sigma))
    x_t = add_noise(rollout.x_0, rollout.eps, sigma)
    model_out = srpo.model.velocity(x_t, injection.sigma, None, 1.0, SIZE)
    colours = srpo.model.decode(recover(x_t, rollout.eps, model_out, sigma, delta), SIZE).mean((-2, -1))
    reward = injection.positive_weight * colours[:, 0] + injection.negative_weight * colours[:, 2]
    loss = -reward.mean() if hinge is None else (hinge - reward).relu().mean()
    uncut = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(srpo.model.parameters()))])

    torch.testing.assert_close(cut, uncut, rtol=1e-12, atol=1e-15)
    assert uncut.norm() > 1e-4


def test_both_branches_train_the_model_the_same_way() -> None:
    srpo, rollout = make_srpo(), make_rollout()
    denoise, invert = (gradient(srpo, rollout, [injection]) for injection in DRAWS.draw(3, seeded()))
    assert torch.cosine_similarity(denoise, invert, dim=0) > 0.9


def test_the_gradient_of_a_pair_is_the_mean_of_its_branches() -> None:
    srpo, rollout = make_srpo(), make_rollout()
    pair = DRAWS.draw(3, seeded())
    parts = [gradient(srpo, rollout, [injection]) for injection in pair]
    torch.testing.assert_close(gradient(srpo, rollout, pair), sum(parts) / 2)
    torch.testing.assert_close(gradient(srpo, rollout, pair, scale=1.0), sum(parts))


def test_sample_weights_switch_samples_off_and_turn_them_round() -> None:
    srpo, rollout = make_srpo(), make_rollout(2)
    injection = DRAWS.draw(2, seeded())[0]

    def weighted(*weights: float) -> Tensor:
        return gradient(srpo, rollout, [injection], weights=torch.tensor(weights))

    torch.testing.assert_close(weighted(1, 0) + weighted(0, 1), gradient(srpo, rollout, [injection]))
    torch.testing.assert_close(weighted(-1, 0), -weighted(1, 0))
    assert not weighted(0, 0).any()


@pytest.mark.parametrize("batched", [False, True])
def test_captions_are_raised_beside_the_reward_whatever_the_sample_weights_are(batched: bool) -> None:
    """An independent loss: denoising raises own minus wrong, inverting lowers it."""
    srpo, rollout = make_srpo(), replace(make_rollout(), prompts=["green. a wall", "red. a wall", "blue. a wall"])
    own, wrong = torch.tensor([1, 0, 2]), torch.tensor([2, 1, 0])
    captions = Captions(0.3, [["blue. a wall", "green. a wall", "red. a wall"]])
    pair = DRAWS.draw(3, seeded())
    raised = gradient(srpo, rollout, pair, weights=torch.zeros(3), captions=captions, batched=batched)

    loss = 0
    for injection, sign in zip(pair, (1, -1), strict=True):
        pictures = srpo.model.decode(srpo.predict(rollout, [injection]), SIZE).mean((-2, -1))
        margin = pictures.gather(1, own[:, None]) - pictures.gather(1, wrong[:, None])
        loss = loss - 0.3 * sign * margin.mean() / 2
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(srpo.model.parameters()))])
    torch.testing.assert_close(raised, expected, rtol=1e-12, atol=1e-15)
    assert expected.norm() > 1e-4

    both = gradient(srpo, rollout, pair, captions=captions, batched=batched)
    torch.testing.assert_close(both, raised + gradient(srpo, rollout, pair, batched=batched), rtol=1e-12, atol=1e-15)


def test_an_inactive_hinge_leaves_no_gradient_at_all() -> None:
    gradients = gradient(make_srpo(hinge=-9.0), make_rollout(), DRAWS.draw(3, seeded()))
    assert torch.equal(gradients, torch.zeros_like(gradients))


def test_rollout_tensors_are_constants() -> None:
    rollout = make_rollout()
    rollout.x_0.requires_grad_()
    make_srpo().backward(rollout, DRAWS.draw(3, seeded()), 0)
    assert rollout.x_0.grad is None


def test_the_augmentation_is_as_random_as_its_generator() -> None:
    srpo, rollout = make_srpo(augment=Augment(shift=2, noise=0.1)), make_rollout()
    pair = DRAWS.draw(3, seeded())
    first, again, other = (gradient(srpo, rollout, pair, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_both_branches_in_one_pass_give_the_same_gradient_with_half_the_calls() -> None:
    srpo, rollout = make_srpo(augment=Augment(shift=2, noise=0.1)), make_rollout()
    pair = DRAWS.draw(3, seeded())
    options = {"weights": torch.tensor([1.0, -0.5, 0.2])}
    metrics, gradients, calls = [], [], []
    for batched in (False, True):
        srpo.model.zero_grad()
        srpo.model.asked.clear()
        generators = [seeded(i) for i in range(3)]
        metrics.append(srpo.backward(rollout, pair, 0, generator=generators, batched=batched, **options))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in srpo.model.parameters()]))
        calls.append([len(sigma) for sigma in srpo.model.asked])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(metrics[0], metrics[1], rtol=1e-12, atol=1e-15)
    assert calls == [[3, 3], [6]]


def test_metrics_tell_loss_reward_and_gap_by_branch() -> None:
    metrics = make_srpo().backward(make_rollout(), DRAWS.draw(3, seeded()), 0)
    assert set(metrics) == {"loss"} | {f"{b}/{m}" for b in ("denoise", "invert") for m in ("loss", "reward", "gap")}
    torch.testing.assert_close(metrics["loss"], metrics["denoise/loss"] + metrics["invert/loss"])
    torch.testing.assert_close(metrics["denoise/loss"], -metrics["denoise/reward"] / 2)


# --- twenty steps ---------------------------------------------------------------------------------------


def train(target: Target | None = None, steps: int = 20) -> list[float]:
    """Mean gap of the rollouts of each step, and of one more after the last."""
    srpo = make_srpo(augment=Augment(shift=1, noise=0.05))
    optimizer = torch.optim.AdamW(srpo.model.parameters(), lr=0.03)
    gaps = []
    for step in range(steps + 1):
        eps = torch.randn(4, 3, *SIZE, generator=seeded(step), dtype=torch.float64)
        with torch.no_grad():
            x_0 = euler_sample(lambda x, s: srpo.model.velocity(x, s, None, 1.0, SIZE), eps, shifted_sigmas(6, 1.0))
        prompts = ["a wall"] * 4
        gap = srpo.gap(srpo.model.decode(x_0, SIZE), prompts, generator=seeded(step))
        gaps.append(gap.mean().item())
        if target:
            target.update(gaps[-1])
        for pair in DRAWS.pairs([seeded(4 * step + i) for i in range(4)], 2):
            optimizer.zero_grad()
            weights = target.weights(gap) if target else None
            srpo.backward(Rollout(x_0, eps, prompts, None, SIZE), pair, step, weights=weights, generator=seeded(step))
            optimizer.step()
    return gaps


def test_twenty_steps_raise_the_reward() -> None:
    gaps = train()
    assert gaps[0] == pytest.approx(0, abs=0.02)
    assert gaps[-1] > 0.1


def test_a_target_holds_what_would_run_on() -> None:
    gaps = train(Target(base=0.0, value=0.05), steps=40)
    assert sum(gaps[-10:]) / 10 == pytest.approx(0.05, abs=0.02)


# --- where the gradient is taken ------------------------------------------------------------------------


def test_sigma_draws_stay_inside_the_window_and_differ_by_sample() -> None:
    denoise, invert = DRAWS.draw(256, seeded())
    assert (denoise.branch, invert.branch) == ("denoise", "invert")
    assert denoise.sigma.max() <= 0.9 + 1e-6 and invert.sigma.min() >= 0.3 - 1e-6
    assert denoise.sigma.max() > 0.88 and invert.sigma.min() < 0.32
    assert len(denoise.sigma.unique()) > 250


def test_both_branches_recover_at_one_level_with_opposite_steps() -> None:
    denoise, invert = DRAWS.draw(8, seeded())
    assert torch.equal(denoise.sigma_recover, invert.sigma_recover)
    torch.testing.assert_close(denoise.delta_sigma, torch.full((8,), 0.1))
    torch.testing.assert_close(invert.delta_sigma, torch.full((8,), -0.1))
    torch.testing.assert_close(denoise.positive_weight, -invert.positive_weight)
    torch.testing.assert_close(denoise.negative_weight, -invert.negative_weight)


def test_weight_curves_reach_the_draws() -> None:
    draws = SigmaDraws((0.3, 0.9), 0.1, semantic_weight=(2.0, 1.0), common_weight=(-0.2, 0.4))
    denoise, _ = draws.at(torch.tensor([0.6]))
    assert denoise.positive_weight.item() == pytest.approx(1.5 + 0.1)
    assert denoise.negative_weight.item() == pytest.approx(-1.5)


def test_pairs_of_a_rollout_are_independent_unless_shared() -> None:
    first, second = DRAWS.pairs([seeded(i) for i in range(4)], 2)
    assert not torch.equal(first[0].sigma, second[0].sigma)
    first, second = ReferenceDraws().pairs([seeded(i) for i in range(4)], 2)
    assert torch.equal(first[0].sigma, second[0].sigma)


@pytest.mark.parametrize("draws", [DRAWS, ReferenceDraws()])
def test_a_sample_is_drawn_alike_in_a_batch_of_any_size(draws: SigmaDraws | ReferenceDraws) -> None:
    together = draws.pairs([seeded(i) for i in range(3)], 2)
    for sample in range(3):
        alone = draws.pairs([seeded(sample)], 2)
        for pair, own in zip(together, alone, strict=True):
            for one, other in zip(pair, own, strict=True):
                assert one.sigma[sample] == other.sigma[0]
                assert one.positive_weight[sample] == other.positive_weight[0]
    assert len(together[0][0].sigma.unique()) == 3


def test_draws_repeat_with_their_seed_and_branches_can_be_left_out() -> None:
    draws = SigmaDraws((0.3, 0.9), 0.1, branches=["invert"])
    (first,), (again,) = draws.draw(4, seeded(7)), draws.draw(4, seeded(7))
    assert first.branch == "invert" and torch.equal(first.sigma, again.sigma)


@pytest.mark.parametrize(
    ("window", "delta"), [((0.9, 0.3), 0.1), ((0.3, 1.0), 0.1), ((0.3, 0.5), 0.11), ((0.3, 0.5), 0)]
)
def test_impossible_windows_and_steps_are_refused(window: tuple[float, float], delta: float) -> None:
    with pytest.raises(UsageError, match=r"^(window|delta_sigma) "):
        SigmaDraws(window, delta)


def test_reference_draws_use_one_timestep_for_the_batch_and_cover_both_ends() -> None:
    draws = ReferenceDraws(timestep_length=20, groundtruth_ratio=0.9)
    drawn = set()
    for seed in range(200):
        denoise, _ = draws.draw(3, seeded(seed))
        assert len(denoise.sigma_recover.unique()) == 1
        drawn.add(20 - draws.sigmas.tolist().index(denoise.sigma_recover[0].item()))
    assert drawn == set(range(5, 16))


@pytest.mark.parametrize("timestep", [5, 995])
def test_the_reference_step_is_clipped_at_both_ends_of_the_window(timestep: int) -> None:
    draws = ReferenceDraws()
    denoise, _ = draws.at(timestep)
    spacing = (draws.sigmas[0] - draws.sigmas[-1]) / 999
    torch.testing.assert_close(denoise.delta_sigma[0], 5 * spacing, rtol=1e-3, atol=0)


def test_sigma_mode_contains_the_reference_mode() -> None:
    reference = ReferenceDraws()
    low, high = reference.sigmas[-1].item(), reference.sigmas[0].item()
    mode = SigmaDraws((low, high), delta_sigma=100 * (high - low) / 999)
    for ours, theirs in zip(mode.at(reference.sigmas[500:501]), reference.at(500), strict=True):
        assert ours.branch == theirs.branch
        torch.testing.assert_close(ours.sigma, theirs.sigma)
        torch.testing.assert_close(ours.sigma_recover, theirs.sigma_recover)


def test_only_the_reference_mode_tells_the_model_a_truncated_time() -> None:
    sigma = ReferenceDraws().at(500)[0]
    assert sigma.sigma_model.item() == 0.878 and sigma.sigma.item() > 0.8784
    exact = DRAWS.draw(1, seeded())[0]
    assert torch.equal(exact.sigma_model, exact.sigma)
    srpo = make_srpo()
    srpo.backward(make_rollout(1), [sigma], 0)
    assert srpo.model.asked[-1].item() == 0.878


# --- words ----------------------------------------------------------------------------------------------


def test_words_rotate_each_list_at_its_own_length() -> None:
    words = ControlWords(["a", "b"], ["x", "y", "z"])
    assert [words.at(step) for step in range(4)] == [("a", "x"), ("b", "y"), ("a", "z"), ("b", "x")]
    assert len({words.at(step) for step in range(6)}) == 6


def test_the_template_puts_the_word_to_each_prompt() -> None:
    words = ControlWords(["dark"], ["bright"], template="{prompt}, {word}")
    assert words.texts("dark", ["a cat", "{x}"]) == ["a cat, dark", "{x}, dark"]


def test_the_gap_is_averaged_over_all_words() -> None:
    srpo = make_srpo()
    srpo.control_words = ControlWords(["red", "green"], ["blue"])
    images = torch.zeros(1, 3, *SIZE)
    images[:, 0], images[:, 1], images[:, 2] = 0.6, 0.2, 0.1
    torch.testing.assert_close(srpo.gap(images, ["a wall"]), torch.tensor([(0.6 + 0.2) / 2 - 0.1]))


def test_a_missing_list_of_words_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one positive and one negative"):
        ControlWords([], ["x"])
