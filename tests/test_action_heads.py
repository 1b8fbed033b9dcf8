import pytest
import torch
from tiny_policy import HEAD_TYPES, tiny_config, tiny_model

from hf_vla.model.action_heads import HEADS, DiscreteHead, FlowHead

B, T, A, F = 6, 5, 4, 32


@pytest.fixture(params=HEAD_TYPES)
def head(request):
    return tiny_model(head=request.param).head


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(B, T, F, generator=generator)
    actions = torch.rand(B, T, A, generator=generator) * 2 - 1
    is_pad = torch.arange(T) >= torch.tensor([5, 4, 3, 2, 1, 5])[:, None]
    return context, actions, is_pad


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_head_is_tested_here():
    assert set(HEAD_TYPES) == set(HEADS)


def test_a_batch_in_pieces_has_the_whole_ones_loss(head, inputs):
    context, actions, is_pad = inputs
    draws = head.draws(actions, seeded())
    whole = head.loss(context, actions, is_pad, draws)
    parts = [
        head.loss(
            context[i : i + 2], actions[i : i + 2], is_pad[i : i + 2], {k: v[i : i + 2] for k, v in draws.items()}
        )
        for i in (0, 2, 4)
    ]
    assert whole.dtype == torch.float32
    assert torch.allclose(sum(parts), whole, rtol=1e-5)


def test_what_stands_in_padded_steps_changes_no_bit(head, inputs):
    context, actions, is_pad = inputs
    draws = head.draws(actions, seeded())
    before = head.loss(context, actions, is_pad, draws)
    other = torch.where(is_pad[..., None], torch.rand_like(actions), actions)
    assert not torch.equal(other, actions)
    assert torch.equal(head.loss(context, other, is_pad, draws), before)


def test_valid_steps_do_count(head, inputs):
    context, actions, is_pad = inputs
    draws = head.draws(actions, seeded())
    before = head.loss(context, actions, is_pad, draws)
    assert not torch.equal(head.loss(context, -actions, is_pad, draws), before)


def test_a_sample_that_is_all_padding_gives_zero_not_nan(head, inputs):
    context, actions, _ = inputs
    context.requires_grad_()
    loss = head.loss(context, actions, torch.ones(B, T, dtype=torch.bool), head.draws(actions, seeded()))
    loss.backward()
    assert loss == 0
    assert not context.grad.any()


def test_draws_and_samples_follow_the_generator(head, inputs):
    context, actions, _ = inputs
    first, again = head.draws(actions, seeded()), head.draws(actions, seeded())
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(len(value) == B for value in first.values())
    torch.manual_seed(0)
    sample = head.sample(context, seeded())
    torch.manual_seed(1)
    assert torch.equal(head.sample(context, seeded()), sample)
    assert sample.shape == (B, T, A)
    assert sample.dtype == torch.float32


def test_the_call_is_the_loss(head, inputs):
    context, actions, is_pad = inputs
    draws = head.draws(actions, seeded())
    assert torch.equal(head(context, actions, is_pad, draws), head.loss(context, actions, is_pad, draws))


def test_l1_is_the_mean_absolute_error_times_its_count(inputs):
    context, actions, is_pad = inputs
    head = tiny_model(head="l1").head
    errors = (head.sample(context) - actions).abs()[~is_pad]
    assert torch.allclose(head.loss(context, actions, is_pad, {}), errors.sum())


class Straight(FlowHead):
    """Knows the true velocity from any noise to `goal`."""

    def _velocity(self, context, noisy, time, is_read=None):
        return (noisy - self.goal) / time[:, None, None]


class TestFlow:
    def test_euler_steps_end_where_the_velocity_leads(self):
        head = Straight(tiny_config(head="flow"))
        head.goal = torch.rand(B, T, A)
        assert torch.allclose(head.sample(torch.zeros(B, T, F), seeded()), head.goal, atol=1e-5)

    def test_the_loss_vanishes_at_the_true_velocity(self, inputs):
        context, actions, is_pad = inputs
        head = Straight(tiny_config(head="flow"))
        head.goal = actions
        assert head.loss(context, actions, is_pad, head.draws(actions, seeded())) < 1e-6

    def test_times_follow_beta_and_noise_is_standard(self):
        head = tiny_model(head="flow").head
        draws = head.draws(torch.zeros(20_000, 1, 1), seeded())
        assert draws["time"].mean() == pytest.approx(1.5 / 2.5, abs=0.01)
        assert draws["time"].std() == pytest.approx((1.5 / (2.5**2 * 3.5)) ** 0.5, abs=0.01)
        assert 0.001 <= draws["time"].min() < draws["time"].max() <= 1
        assert draws["noise"].std() == pytest.approx(1, abs=0.02)

    def test_a_generator_may_stay_on_the_cpu(self):
        draws = tiny_model(head="flow").head.draws(torch.zeros(2, T, A, device="meta"), seeded())
        assert {value.device.type for value in draws.values()} == {"meta"}


class TestDiscrete:
    def head(self, num_bins=16) -> DiscreteHead:
        return tiny_model(head={"type": "discrete", "num_bins": num_bins}).head

    def decoded(self, head, actions):
        """What an ideal classifier would make of these actions."""
        index = head._bins(actions)
        return head.levels[torch.arange(A), index]

    def test_before_fitting_levels_spread_evenly(self):
        head = self.head()
        actions = torch.rand(B, T, A) * 2 - 1
        assert (self.decoded(head, actions) - actions).abs().max() <= 1 / 16 + 1e-6

    def test_levels_are_quantiles_so_that_each_bin_holds_as_many(self):
        head, actions = self.head(), torch.rand(16_000, A, generator=seeded()) ** 3
        head.fit_levels(actions)
        counts = torch.bincount(head._bins(actions[None])[0, :, 0], minlength=16)
        assert counts.min() > 700
        assert counts.max() < 1300
        fitted = (self.decoded(head, actions[None]) - actions[None]).abs().mean()
        assert fitted < (self.decoded(self.head(), actions[None]) - actions[None]).abs().mean() / 2

    def test_a_gripper_comes_back_exactly(self):
        head = self.head()
        actions = torch.randn(999, A)
        actions[:, 3] = torch.where(torch.rand(999) < 0.3, -1.0, 1.0)
        head.fit_levels(actions)
        assert torch.equal(self.decoded(head, actions[None])[..., 3], actions[None][..., 3])

    def test_actions_outside_fall_into_the_end_bins(self):
        index = self.head()._bins(torch.tensor([[[-9.0, 9.0, -9.0, 9.0]]]))
        assert index.flatten().tolist() == [0, 15, 0, 15]

    def test_levels_are_saved(self):
        assert "levels" in self.head().state_dict()

    def test_the_likeliest_bin_is_decoded(self, inputs):
        context, actions, is_pad = inputs
        head = self.head()
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            head.loss(context, actions, is_pad, {}).backward()
            optimizer.step()
        assert torch.equal(head.sample(context)[~is_pad], self.decoded(head, actions)[~is_pad])
