"""The episode loop on a toy world: a point on a line that has to come to its goal."""

import functools
import math

import numpy as np
import pytest
import torch

from hf_vla.rollout.loop import (
    EnvStep,
    ExpertPolicy,
    Job,
    RandomPolicy,
    contact_sheet,
    run_episodes,
    run_in_processes,
    split_job,
)


class LineEnv:
    """The goal is `seed` to the right of 0; an action moves by itself; solved within half a step."""

    instruction = "go to the goal"

    def __init__(self, picture_side=200):
        self.looks, self.closed, self._side = 0, False, picture_side

    def reset(self, seed):
        self.left = float(seed)

    def observe(self):
        self.looks += 1
        view = np.full((self._side, self._side, 3), self.looks, np.uint8)
        state = np.array([self.left], np.float32)
        return {
            "observation.images.a": view,
            "observation.images.b": view,
            "observation.state": state,
            "task": self.instruction,
        }

    def step(self, action):
        self.left -= float(action[0])
        return EnvStep(abs(self.left) < 0.5, abs(self.left))

    def expert_action(self):
        return np.clip(np.array([self.left], np.float32), -1, 1)

    def close(self):
        self.closed = True


class HoldStillPolicy:
    """Command no movement, without looking."""

    needs_observation = False

    def reset(self):
        pass

    def select_action(self, observation):
        return np.zeros(1, np.float32)


class TwoStepPolicy:
    """Look, then do the same thing twice."""

    def __init__(self, env):
        self.resets = 0

    def reset(self):
        self.resets += 1
        self.queued = 0

    @property
    def needs_observation(self):
        return self.queued == 0

    def select_action(self, observation):
        if self.queued == 0:
            assert observation["task"] == "go to the goal"
            self.queued = 2
        else:
            assert observation is None
        self.queued -= 1
        return np.ones(1, np.float32)


def test_episode_ends_on_success_and_reports_where_it_started():
    results = run_episodes(LineEnv(), ExpertPolicy(env := LineEnv()), [], max_steps=9)
    assert results == []
    results = run_episodes(env, ExpertPolicy(env), [3, 5], max_steps=9)
    assert [(r.seed, r.success, r.steps, r.measure) for r in results] == [(3, True, 3, 0.0), (5, True, 5, 0.0)]
    assert env.looks == 0  # nothing is rendered for a policy that doesn't look


def test_episode_stops_at_max_steps_with_the_last_measure():
    (result,) = run_episodes(LineEnv(), HoldStillPolicy(), [4], max_steps=6)
    assert (result.success, result.steps, result.measure) == (False, 6, 4.0)


def test_env_is_looked_at_only_when_the_policy_needs_it():
    env, seen = LineEnv(), []
    policy = TwoStepPolicy(env)
    results = run_episodes(env, policy, [5, 2], max_steps=9, on_episode=seen.append)
    assert [r.steps for r in results] == [5, 2]
    assert env.looks == 3 + 1  # five steps of two an observation, then two
    assert policy.resets == 2
    assert seen == results


def test_frames_are_small_copies_side_by_side():
    (result,) = run_episodes(env := LineEnv(), TwoStepPolicy(env), [3], max_steps=9)
    assert [frame.shape for frame in result.frames] == [(96, 192, 3)] * 2
    assert [int(frame.mean()) for frame in result.frames] == [1, 2]


def test_max_steps_of_zero_leaves_no_measure():
    (result,) = run_episodes(LineEnv(), HoldStillPolicy(), [1], max_steps=0)
    assert math.isnan(result.measure) and not result.success


def test_random_policy_is_decided_by_its_seed_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first, second = RandomPolicy(seed=3, action_dim=4), RandomPolicy(seed=3, action_dim=4)
    draws = np.stack([first.select_action(None) for _ in range(500)])
    assert np.array_equal(draws, np.stack([second.select_action(None) for _ in range(500)]))
    assert draws.min() < -0.95 and draws.max() > 0.95 and abs(draws.mean()) < 0.1
    assert not np.array_equal(draws[0], RandomPolicy(seed=4, action_dim=4).select_action(None))
    assert torch.equal(before, torch.random.get_rng_state())


def test_split_job_keeps_every_seed_once_and_in_order():
    job = Job(LineEnv, TwoStepPolicy, range(7), max_steps=3)
    assert [part.seeds for part in split_job(job, 3)] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [part.seeds for part in split_job(job, 99)] == [[i] for i in range(7)]


@pytest.mark.distributed
def test_processes_give_what_one_process_gives_in_the_order_of_the_jobs():
    make_env = functools.partial(LineEnv, picture_side=8)
    jobs = [Job(make_env, TwoStepPolicy, [9, 2], 20), Job(make_env, ExpertPolicy, [1], 20)]
    order = []
    results = run_in_processes(jobs, workers=2, on_job=lambda index, episodes: order.append(index))
    assert [[(r.seed, r.steps, r.success) for r in job] for job in results] == [
        [(9, 9, True), (2, 2, True)],
        [(1, 1, True)],
    ]
    assert order == [0, 1]
    assert results[0][0].frames[0].shape == (8, 16, 3)


def test_contact_sheet_has_a_row_an_episode_and_spans_it():
    episodes = run_episodes(env := LineEnv(picture_side=8), TwoStepPolicy(env), [19, 3], max_steps=30)
    sheet = contact_sheet(episodes, columns=3)
    assert sheet.size == (3 * 16, 2 * 8)
    first_look, last_look = sheet.getpixel((0, 0))[0], sheet.getpixel((40, 0))[0]
    assert (first_look, last_look) == (1, 10)
    assert sheet.getpixel((40, 12)) == (255, 255, 255)  # the second episode looked only twice


def test_contact_sheet_of_nothing_says_so():
    with pytest.raises(ValueError, match="no frames"):
        contact_sheet(run_episodes(LineEnv(), HoldStillPolicy(), [2], max_steps=2))
