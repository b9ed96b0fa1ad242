"""GRPO on a small velocity model and a reward without a gradient: ratios, advantages, exact gradients, and a rise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from srpo_cli.algorithms.base import ControlWords, Rollout
from srpo_cli.algorithms.grpo import GRPO, StepDraws, Transition, advantages, clipped_surrogate
from srpo_cli.core.schedule import expand_to, shifted_sigmas
from srpo_cli.core.sde import sde_step
from srpo_cli.errors import UsageError

SIZE = (8, 8)
STEPS = 6
GUIDANCE = 1.5
CHANNELS = {"red": 0, "green": 1, "blue": 2}
DRAWS = StepDraws(STEPS, fraction=1.0)


class ColourFlow(nn.Module):
    """Velocity of the flow to pictures of unit noise, plus a learned map of the colours, plus guidance times
    conditioning, (B,); decodes softly."""

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Conv2d(3, 3, 1)
        nn.init.zeros_(self.colours.weight)
        nn.init.zeros_(self.colours.bias)
        self.asked: list[int] = []

    def velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Tensor, guidance: float, size: tuple[int, int]
    ) -> Tensor:
        self.asked.append(len(latents))
        sigma = expand_to(sigma.expand(len(latents)).to(latents), latents)
        asked = guidance * expand_to(conditioning, latents)
        return (2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2) * latents + self.colours(latents) + asked

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return latents.sigmoid()


class MostlyColour:
    """The share of pixels above one half in the colour that a text begins with, red if with none: a count, so that it
    has no gradient."""

    def scores(self, images: Tensor, *texts: Sequence[str]) -> tuple[Tensor, ...]:
        counted = (images > 0.5).float().mean((-2, -1))
        return tuple(
            torch.stack([one[CHANNELS.get(text.split(".")[0], 0)] for one, text in zip(counted, column, strict=True)])
            for column in texts
        )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_grpo(dtype: torch.dtype = torch.float64, *, colourful: bool = True, **options: object) -> GRPO:
    """With ``colourful`` the model's colour map is some map, not zero."""
    model = ColourFlow()
    if colourful:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3, generator=seeded(9))
    options = {"guidance": GUIDANCE, "sde": sde_step("dance", 0.5), **options}
    return GRPO(model.to(dtype), MostlyColour(), ControlWords(["red"], ["blue"]), **options)


def sample(grpo: GRPO, batch: int, seed: int = 0) -> Rollout:
    """Rollouts with noise, random steps and conditioning of their own, and some advantages."""
    dtype = grpo.model.colours.weight.dtype
    noise = torch.randn(batch, 3, *SIZE, generator=seeded(seed), dtype=dtype)
    generators = [seeded(100 * seed + i) for i in range(batch)]
    sigmas = shifted_sigmas(STEPS, 1.5, dtype)
    conditioning, given = torch.randn(2, batch, generator=seeded(seed + 1), dtype=dtype)
    path = grpo.sample(conditioning, noise, SIZE, sigmas, generators)
    return Rollout(path[-1], noise, ["a wall"] * batch, conditioning, SIZE, sigmas, path, given)


def part(rollout: Rollout, rows: slice) -> Rollout:
    return replace(
        rollout,
        x_0=rollout.x_0[rows],
        eps=rollout.eps[rows],
        prompts=rollout.prompts[rows],
        conditioning=rollout.conditioning[rows],
        path=rollout.path[:, rows],
        advantages=rollout.advantages[rows],
    )


def lots_of(batch: int, count: int = 1, draws: StepDraws = DRAWS) -> list[list[Transition]]:
    return draws.pairs([seeded(i) for i in range(batch)], count)


def gradient(grpo: GRPO, rollout: Rollout, draws: Sequence[Transition], **options: object) -> Tensor:
    grpo.model.zero_grad()
    grpo.backward(rollout, draws, 0, **options)
    return torch.cat([parameter.grad.flatten() for parameter in grpo.model.parameters()])


def shift(grpo: GRPO, by: float = 0.1) -> None:
    """Change the policy a little."""
    with torch.no_grad():
        for parameter in grpo.model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=seeded(5)))


def log_probs(grpo: GRPO, rollout: Rollout, draw: Transition) -> tuple[Tensor, Tensor, Tensor]:
    """The slow way, sample by sample, with torch's own Gaussian: log-probabilities (B,), and mean and std of each."""
    found = []
    for sample, index in enumerate(draw.index.tolist()):
        x, x_next = rollout.path[index, sample], rollout.path[index + 1, sample]
        sigma, sigma_next = rollout.sigmas[index], rollout.sigmas[index + 1]
        velocity = grpo.model.velocity(x[None], sigma, rollout.conditioning[sample, None], GUIDANCE, SIZE)[0]
        x_0_hat = x - sigma * velocity
        score = -(x - (1 - sigma) * x_0_hat) / sigma**2
        mean = x + (sigma_next - sigma) * velocity - 0.5 * 0.5**2 * score * (sigma_next - sigma)
        std = 0.5 * (sigma - sigma_next).sqrt()
        found.append((Normal(mean, std).log_prob(x_next).mean(), mean, std))
    return tuple(torch.stack(column) for column in zip(*found, strict=True))


def test_the_calls_of_a_draw_are_those_that_its_backward_makes() -> None:
    grpo = make_grpo()
    rollout, ((draw, *_),) = sample(grpo, 3), lots_of(3)
    grpo.model.asked.clear()
    grpo.backward(rollout, [draw], 0)
    assert grpo.calls(draw, 3) == sum(grpo.model.asked) == 3


@pytest.mark.parametrize("over", ["group", "batch"])
def test_a_policy_compares_pictures_as_it_was_told_to(over: str) -> None:
    rewards = torch.tensor([0.0, 0.1, 0.2, 9.0, 0.5, 0.4])
    grpo = make_grpo(group=3, over=over, advantage_clip=1.0)
    assert torch.equal(grpo.advantages(rewards), advantages(rewards, 3, over, 1.0))
    assert grpo.advantages(rewards).abs().max() == 1
    others = [make_grpo(group=2, over=over), make_grpo(group=3, over=over, advantage_clip=5.0)]
    assert not any(torch.equal(grpo.advantages(rewards), other.advantages(rewards)) for other in others)
    with pytest.raises(UsageError, match="no whole number of groups of 3"):
        grpo.advantages(rewards[:5])


# --- the ratio ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("batched", [False, True])
def test_the_ratio_is_exactly_1_until_the_policy_changes(batch: int, batched: bool) -> None:
    grpo = make_grpo(torch.float32)
    rollout, lots = sample(grpo, 10), lots_of(10, 3)
    for start in range(0, 10, batch):
        rows = slice(start, start + batch)
        own = [[replace(draw, index=draw.index[rows]) for draw in lot] for lot in lots]
        for lot in grpo.remember(part(rollout, rows), own, batched=batched):
            for draws in [lot] if batched else [[draw] for draw in lot]:
                for trace in grpo.backward_pass(part(rollout, rows), draws):
                    assert torch.equal(trace.ratio, torch.ones(batch))


def test_after_an_update_the_ratio_is_that_of_the_new_policy_over_the_one_that_took_the_steps() -> None:
    grpo = make_grpo()
    rollout = sample(grpo, 3)
    with torch.no_grad():
        old = [log_probs(grpo, rollout, draw)[0] for draw in lots_of(3, 2)[1]]
    _, second = grpo.remember(rollout, lots_of(3, 2))
    shift(grpo)
    for draw, before in zip(second, old, strict=True):
        (trace,) = grpo.backward_pass(rollout, [draw])
        with torch.no_grad():
            ratio = (log_probs(grpo, rollout, draw)[0] - before).exp()
        torch.testing.assert_close(trace.ratio, ratio, rtol=1e-12, atol=0)
        assert (ratio - 1).abs().min() > 1e-4


def test_the_log_probability_of_a_rollouts_own_steps_is_that_of_the_noise_they_were_drawn_with() -> None:
    grpo = make_grpo()
    rollout = sample(grpo, 2, seed=3)
    fresh = torch.stack([torch.randn(STEPS - 1, 3, *SIZE, generator=seeded(300 + i)) for i in range(2)], 1).double()
    for index in range(STEPS - 1):
        (trace,) = grpo.backward_pass(rollout, [Transition(torch.full((2,), index))])
        std = 0.5 * (rollout.sigmas[index] - rollout.sigmas[index + 1]).sqrt()
        expected = Normal(torch.zeros(()).double(), 1.0).log_prob(fresh[index]).mean((1, 2, 3)) - std.log()
        torch.testing.assert_close(trace.log_prob, expected, rtol=1e-9, atol=1e-9)


def test_a_later_lot_that_was_not_remembered_is_refused() -> None:
    grpo = make_grpo()
    with pytest.raises(ValueError, match="remember"):
        grpo.backward(sample(grpo, 2), lots_of(2, 2)[1], 0)


def test_remembering_asks_for_the_later_lots_alone_and_leaves_no_gradient() -> None:
    grpo = make_grpo()
    rollout = sample(grpo, 2)
    grpo.model.asked.clear()
    first, second = grpo.remember(rollout, lots_of(2, 2))
    assert grpo.model.asked == [2] * len(second)
    assert all(draw.old_log_prob is None for draw in first)
    assert not any(draw.old_log_prob.requires_grad for draw in second)
    assert all(parameter.grad is None for parameter in grpo.model.parameters())


# --- the gradient ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("batched", [False, True])
def test_the_gradient_is_that_of_a_plain_loop(batched: bool, kl: float) -> None:
    reference = make_grpo(colourful=False)
    grpo = make_grpo(clip=0.003, kl=kl, reference_velocity=reference.model.velocity if kl else None)
    rollout, weights = sample(grpo, 4), torch.tensor([1.0, -0.5, 0.7, 1.2])
    _, lot = grpo.remember(rollout, lots_of(4, 2), batched=batched)
    shift(grpo)
    exact = gradient(grpo, rollout, lot, batched=batched, weights=weights)

    loss, beyond = 0, []
    for draw in lot:
        now, mean, std = log_probs(grpo, rollout, draw)
        _, mean_ref, _ = log_probs(reference, rollout, draw)
        ratio = (now - draw.old_log_prob).exp()
        beyond += [*((ratio - 1).abs() > 0.003)]
        worse = torch.minimum(ratio * rollout.advantages, ratio.clamp(0.997, 1.003) * rollout.advantages)
        spread = std.view(-1, 1, 1, 1)
        divergence = kl_divergence(Normal(mean, spread), Normal(mean_ref, spread)).mean((1, 2, 3))
        loss = loss + (weights * (-worse + kl * divergence)).mean() / len(lot)
    plain = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(grpo.model.parameters()))])
    torch.testing.assert_close(exact, plain, rtol=1e-12, atol=1e-15)
    assert plain.norm() > 1e-3 and 0 < sum(beyond) < len(beyond)


def test_the_first_pass_is_reinforce() -> None:
    grpo = make_grpo()
    rollout, (lot,) = sample(grpo, 4), lots_of(4)
    loss = -sum((rollout.advantages * log_probs(grpo, rollout, draw)[0]).mean() for draw in lot) / len(lot)
    plain = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(grpo.model.parameters()))])
    torch.testing.assert_close(gradient(grpo, rollout, lot), plain, rtol=1e-12, atol=1e-15)
    assert plain.norm() > 1e-3


@pytest.mark.parametrize(
    ("advantage", "ratio", "slope"),
    [(2, 1.2, 0), (2, 0.8, -2), (2, 1.05, -2), (2, 1.0, -2), (-2, 0.8, 0), (-2, 1.2, 2), (-2, 0.95, 2), (-2, 1.0, 2)],
)
def test_clipping_stops_what_has_gone_far_enough_and_nothing_else(advantage: int, ratio: float, slope: int) -> None:
    ratio = torch.tensor([ratio], requires_grad=True)
    clipped_surrogate(ratio, torch.tensor([float(advantage)]), 0.1).backward()
    assert ratio.grad.item() == slope


def test_the_clipped_loss_by_hand() -> None:
    ratio, advantage = torch.tensor([1.3, 0.7, 1.3, 0.7]), torch.tensor([2.0, 2.0, -2.0, -2.0])
    torch.testing.assert_close(clipped_surrogate(ratio, advantage, 0.1), torch.tensor([-2.2, -1.4, 2.6, 1.8]))


def test_a_batch_is_the_mean_of_its_samples() -> None:
    grpo = make_grpo()
    rollout = sample(grpo, 4)
    lots = grpo.remember(rollout, lots_of(4, 2))
    shift(grpo, 0.001)
    for lot in lots:
        parts = []
        for rows in (slice(0, 1), slice(1, 2), slice(2, 4)):
            own = [
                replace(one, index=one.index[rows], old_log_prob=old if old is None else old[rows])
                for one, old in ((draw, draw.old_log_prob) for draw in lot)
            ]
            parts.append((rows.stop - rows.start) / 4 * gradient(grpo, part(rollout, rows), own))
        torch.testing.assert_close(gradient(grpo, rollout, lot), sum(parts), rtol=1e-10, atol=1e-14)


def test_a_lot_is_the_mean_of_its_draws() -> None:
    grpo = make_grpo()
    rollout, (lot,) = sample(grpo, 3), lots_of(3)
    parts = [gradient(grpo, rollout, [draw], scale=1 / len(lot)) for draw in lot]
    torch.testing.assert_close(gradient(grpo, rollout, lot), sum(parts), rtol=1e-12, atol=1e-15)


def test_all_draws_in_one_pass_give_the_same_gradient_with_one_call() -> None:
    grpo = make_grpo()
    rollout, (lot,) = sample(grpo, 3), lots_of(3)
    apart = gradient(grpo, rollout, lot)
    grpo.model.asked.clear()
    torch.testing.assert_close(gradient(grpo, rollout, lot, batched=True), apart, rtol=1e-12, atol=1e-15)
    assert grpo.model.asked == [3 * len(lot)]


def test_sample_weights_switch_samples_off_and_turn_them_round() -> None:
    grpo = make_grpo()
    rollout, (lot,) = sample(grpo, 2), lots_of(2)

    def weighted(*weights: float) -> Tensor:
        return gradient(grpo, rollout, lot, weights=torch.tensor(weights))

    torch.testing.assert_close(weighted(1, 0) + weighted(0, 1), gradient(grpo, rollout, lot))
    torch.testing.assert_close(weighted(-1, 0), -weighted(1, 0))
    assert not weighted(0, 0).any()


def test_where_no_picture_is_better_than_another_nothing_is_learnt() -> None:
    grpo = make_grpo()
    rollout = replace(sample(grpo, 3), advantages=advantages(torch.full((3,), 0.1), 3))
    assert not gradient(grpo, rollout, lots_of(3)[0]).any()


def test_rollout_tensors_are_constants() -> None:
    grpo = make_grpo()
    rollout = sample(grpo, 2)
    rollout.path.requires_grad_()
    grpo.backward(rollout, lots_of(2)[0], 0)
    assert rollout.path.grad is None


def test_metrics_tell_loss_ratio_clipping_and_divergence() -> None:
    grpo = make_grpo(kl=0.3, reference_velocity=make_grpo(colourful=False).model.velocity, clip=0.003)
    rollout = sample(grpo, 4)
    _, lot = grpo.remember(rollout, lots_of(4, 2))
    shift(grpo)
    metrics = grpo.backward(rollout, lot, 0)
    assert set(metrics) == {"loss", "policy/loss", "policy/ratio", "policy/clipped", "policy/kl"}
    torch.testing.assert_close(metrics["loss"], metrics["policy/loss"] + 0.3 * metrics["policy/kl"])
    traces = [grpo.backward_pass(rollout, [draw])[0] for draw in lot]
    ratio = torch.cat([trace.ratio for trace in traces])
    torch.testing.assert_close(metrics["policy/ratio"], ratio.mean())
    torch.testing.assert_close(metrics["policy/clipped"], ((ratio < 0.997) | (ratio > 1.003)).double().mean())
    assert 0 < metrics["policy/clipped"] < 1
    assert "policy/kl" not in make_grpo().backward(rollout, lots_of(4)[0], 0)


# --- advantages -----------------------------------------------------------------------------------------


def some_rewards(count: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=seeded(seed)) * torch.linspace(0.5, 2, count)


def test_the_advantages_of_a_group_have_mean_0_and_unit_deviation() -> None:
    grouped = advantages(some_rewards(), 4).view(3, 4)
    torch.testing.assert_close(grouped.mean(1), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(grouped.std(1), torch.ones(3), rtol=1e-6, atol=0)


def test_over_the_batch_groups_have_mean_0_and_keep_their_sizes() -> None:
    rewards = some_rewards()
    grouped, rewards = advantages(rewards, 4, "batch").view(3, 4), rewards.view(3, 4)
    torch.testing.assert_close(grouped, (rewards - rewards.mean(1, keepdim=True)) / rewards.std())


@pytest.mark.parametrize("over", ["group", "batch"])
def test_advantages_do_not_depend_on_the_rewards_scale_and_zero(over: str) -> None:
    rewards = some_rewards()
    torch.testing.assert_close(advantages(0.01 * rewards + 3, 4, over), advantages(rewards, 4, over), rtol=0, atol=1e-4)
    torch.testing.assert_close(advantages(-rewards, 4, over), -advantages(rewards, 4, over))


@pytest.mark.parametrize("over", ["group", "batch"])
@pytest.mark.parametrize("group", [3, 7, 12])
def test_equal_rewards_have_no_advantage(over: str, group: int) -> None:
    for reward in (0.1, -7.3, 0.2871, 1e4):
        assert torch.equal(advantages(torch.full((2 * group,), reward), group, over), torch.zeros(2 * group))


def test_an_advantage_by_hand_and_its_clipping() -> None:
    # Mean 1, deviation sqrt((1 + 1 + 4) / 2)
    torch.testing.assert_close(advantages(torch.tensor([0.0, 0.0, 3.0]), 3), torch.tensor([-1, -1, 2]) / 3**0.5)
    assert advantages(torch.tensor([0.0, 0.0, 3.0]), 3, clip=1.0).tolist() == pytest.approx([-(3**-0.5)] * 2 + [1.0])


def test_several_rewards_count_by_their_weights_whatever_their_scales() -> None:
    one, other = some_rewards(seed=1), some_rewards(seed=2)
    together = advantages(torch.stack([one, 100 * other]), 4, weights=[0.7, 1.4])
    torch.testing.assert_close(together, 0.7 * advantages(one, 4) + 1.4 * advantages(other, 4))
    clipped = advantages(torch.stack([one, other]), 4, clip=1.0, weights=[0.7, 1.4])
    torch.testing.assert_close(clipped, 0.7 * advantages(one, 4, clip=1.0) + 1.4 * advantages(other, 4, clip=1.0))


class Louder:
    """Another reward in larger units: the least of the colour that a text begins with."""

    def scores(self, images: Tensor, *texts: Sequence[str]) -> tuple[Tensor, ...]:
        least = 100 * images.amin((-2, -1))
        return tuple(least[:, CHANNELS.get(column[0].split(".")[0], 0)] for column in texts)


@pytest.mark.parametrize("relative", [False, True])
def test_mixed_rewards_are_asked_what_one_is_and_their_advantages_added(relative: bool) -> None:
    images, prompts = torch.rand(4, 3, *SIZE, generator=seeded()), ["a wall"] * 4
    parts = [(0.7, MostlyColour()), (-1.4, Louder())]
    alone = [make_grpo(group=4, relative=relative, mixed=[(1, reward)]) for _, reward in parts]
    one, other = (grpo.judge(images, prompts, 1) for grpo in alone)
    texts = [["red. a wall"] * 4, ["blue. a wall"] * 4] if relative else [prompts]
    asked = [torch.stack(reward.scores(images, *texts)) for _, reward in parts]
    expected = [each[0] - each[1] if relative else each[0] for each in asked]
    torch.testing.assert_close(torch.cat([one, other]), torch.stack(expected))

    mixed = make_grpo(group=4, relative=relative, mixed=parts)
    judged = mixed.judge(images, prompts, 1)
    torch.testing.assert_close(judged, torch.cat([one, other]))
    by_hand = 0.7 * advantages(one[0], 4) - 1.4 * advantages(other[0], 4)
    torch.testing.assert_close(mixed.advantages(judged), by_hand)


@pytest.mark.parametrize(("count", "group"), [(7, 3), (4, 1), (2, 4)])
def test_groups_that_cannot_be_are_refused(count: int, group: int) -> None:
    with pytest.raises(UsageError, match=r"at least 2|train\.batch_size"):
        advantages(torch.randn(count), group)


# --- which steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "fraction", "drawn"), [(16, 0.6, 9), (12, 0.6, 6), (10, 1.0, 9), (101, 0.29, 29), (2, 0.1, 1)]
)
def test_a_share_of_the_steps_before_the_last_is_drawn(steps: int, fraction: float, drawn: int) -> None:
    assert StepDraws(steps, fraction).drawn == drawn
    (lot,) = lots_of(2, 1, StepDraws(steps, fraction))
    assert len(lot) == drawn


def test_random_steps_are_drawn_without_replacement_and_for_each_sample_its_own() -> None:
    seen = set()
    for seed in range(50):
        (lot,) = StepDraws(9, 0.5).pairs([seeded(2 * seed), seeded(2 * seed + 1)], 1)
        drawn = torch.stack([draw.index for draw in lot])
        assert all(len(column.unique()) == 4 for column in drawn.T)
        seen |= {tuple(column.sort().values.tolist()) for column in drawn.T}
    assert len(seen) > 40  # of the 70 that there are
    assert {index for steps in seen for index in steps} == set(range(8))


def test_first_steps_are_the_noisiest() -> None:
    (lot,) = lots_of(2, 1, StepDraws(9, 0.5, "first"))
    assert [draw.index.tolist() for draw in lot] == [[0, 0], [1, 1], [2, 2], [3, 3]]


@pytest.mark.parametrize("order", ["random", "first"])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_lots_share_the_steps_out(order: str, count: int) -> None:
    draws = StepDraws(9, 1.0, order)
    lots = lots_of(3, count, draws)
    assert [draw.lot for lot in lots for draw in lot] == [number for number, lot in enumerate(lots) for _ in lot]
    sizes = [len(lot) for lot in lots]
    assert len(lots) == count and max(sizes) - min(sizes) <= 1
    drawn = torch.stack([draw.index for lot in lots for draw in lot])
    assert torch.equal(drawn.sort(0).values, torch.arange(8)[:, None].expand(8, 3))


def test_lots_of_first_steps_all_reach_from_early_to_late() -> None:
    lots = lots_of(1, 2, StepDraws(9, 1.0, "first"))
    assert [[draw.index.item() for draw in lot] for lot in lots] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_sample_is_drawn_alike_in_a_batch_of_any_size() -> None:
    together = lots_of(3, 2)
    for sample in range(3):
        alone = DRAWS.pairs([seeded(sample)], 2)
        for lot, own in zip(together, alone, strict=True):
            assert [draw.index[sample].item() for draw in lot] == [draw.index.item() for draw in own]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepDraws(1), r"^rollout\.steps 1 "),
        (lambda: StepDraws(8, 0.0), r"^timestep fraction 0 "),
        (lambda: StepDraws(8, 1.1), r"^timestep fraction 1\.1 "),
        (lambda: lots_of(1, 4, StepDraws(8, 0.5)), r"^4 updates .* 3 of the sampler's 8"),
        (lambda: make_grpo(kl=0.1), r"^kl 0\.1 .* set it to 0"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_rollouts_without_a_path_are_refused() -> None:
    grpo = make_grpo()
    with pytest.raises(UsageError, match="pictures that the model draws"):
        grpo.backward(replace(sample(grpo, 2), path=None), lots_of(2)[0], 0)


# --- twenty updates -------------------------------------------------------------------------------------


def roll_out(grpo: GRPO, groups: int, seed: int) -> Rollout:
    """Groups of eight, each from one start."""
    noise = torch.randn(groups, 3, *SIZE, generator=seeded(seed)).repeat_interleave(8, 0)
    conditioning, sigmas = torch.zeros(8 * groups), shifted_sigmas(STEPS, 1.0)
    path = grpo.sample(conditioning, noise, SIZE, sigmas, [seeded(1000 * seed + i) for i in range(8 * groups)])
    return Rollout(path[-1], noise, ["a wall"] * 8 * groups, conditioning, SIZE, sigmas, path)


def train(grpo: GRPO, lots: int, updates: int = 20) -> tuple[float, float]:
    """The reward of the same starts before and after some updates."""

    def judged(rollout: Rollout, step: int) -> Tensor:
        return grpo.judge(grpo.model.decode(rollout.x_0, SIZE), rollout.prompts, step)

    optimizer = torch.optim.AdamW(grpo.model.parameters(), lr=0.02)
    before = judged(roll_out(grpo, 8, seed=999), 0).mean().item()
    for step in range(updates // lots):
        rollout = roll_out(grpo, 2, seed=step)
        rollout = replace(rollout, advantages=advantages(judged(rollout, step), 8))
        generators = [seeded(1000 * step + i) for i in range(16)]
        for lot in grpo.remember(rollout, StepDraws(STEPS, 0.6).pairs(generators, lots)):
            optimizer.zero_grad()
            grpo.backward(rollout, lot, step)
            optimizer.step()
    return before, judged(roll_out(grpo, 8, seed=999), 0).mean().item()


@pytest.mark.parametrize("lots", [1, 2])
@pytest.mark.parametrize(("kind", "level"), [("dance", 0.5), ("flow", 0.7)])
def test_twenty_updates_raise_a_reward_without_a_gradient(kind: str, level: float, lots: int) -> None:
    before, after = train(make_grpo(torch.float32, colourful=False, sde=sde_step(kind, level), clip=1e-2), lots)
    assert before == pytest.approx(0.5, abs=0.05)
    assert after > before + 0.08


def test_twenty_updates_raise_the_relative_reward() -> None:
    before, after = train(make_grpo(torch.float32, colourful=False, relative=True), 1)
    assert before == pytest.approx(0, abs=0.05)
    assert after > before + 0.15
