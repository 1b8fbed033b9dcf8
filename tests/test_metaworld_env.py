"""Meta-World behind our names; needs MuJoCo and, for pictures, a graphics library."""

import subprocess
import sys

import numpy as np
import pytest

from hf_vla.rollout import graphics
from hf_vla.rollout.graphics import graphics_problem
from hf_vla.rollout.loop import ExpertPolicy, RandomPolicy, run_episodes
from hf_vla.rollout.metaworld_env import MetaWorldEnv, control_rate, instruction_of
from hf_vla.rollout.metaworld_tasks import GOAL_DOTS, INSTRUCTIONS

# Meta-World's experts ask for more than an action can hold, say so, and are clipped.
pytestmark = pytest.mark.filterwarnings("ignore:Constant")
FOUR = ("button-press-topdown-v3", "reach-v3", "faucet-open-v3", "faucet-close-v3")
PAIR = ("observation.images.corner2", "observation.images.gripperPOV")


@pytest.fixture
def make_env():
    made = []

    def make(task, **settings):
        made.append(MetaWorldEnv(task, **{"image_size": 48, "action_repeat": 4, **settings}))
        return made[-1]

    yield make
    for env in made:
        env.close()


def test_instructions_are_by_name_and_an_unknown_one_names_the_nearest():
    assert len(INSTRUCTIONS) == 50 and set(GOAL_DOTS) < set(INSTRUCTIONS)
    assert instruction_of("faucet-open-v3") == "Rotate the faucet counter-clockwise"
    with pytest.raises(ValueError, match=r"no task 'faucet-opn-v3'\. Did you mean faucet-open-v3"):
        instruction_of("faucet-opn-v3")


def test_control_rate_is_a_whole_number_of_frames():
    assert [control_rate(k) for k in (1, 4, 5, 80)] == [80, 20, 16, 1]
    for bad in (0, 6, 81):
        with pytest.raises(ValueError, match="must divide 80"):
            control_rate(bad)


def test_missing_graphics_library_is_reported_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(graphics.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(graphics, "_can_draw", lambda backend: False)
    problem = graphics_problem.__wrapped__()
    assert "apt-get install" in problem and "no graphics library" in problem


def test_missing_metaworld_is_reported_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(graphics.importlib.util, "find_spec", lambda name: None)
    assert 'pip install "hf-vla[sim]"' in graphics_problem.__wrapped__()


def test_importing_the_module_imports_no_simulator():
    check = "import sys, hf_vla.rollout.metaworld_env as m; assert not {'mujoco', 'metaworld'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.sim
def test_observation_has_the_keys_shapes_and_units_of_the_contract(make_env):
    env = make_env("reach-v3")
    env.reset(0)
    observation = env.observe()
    assert set(observation) == {*PAIR, "observation.state", "task"}
    for key in PAIR:
        assert observation[key].shape == (48, 48, 3) and observation[key].dtype == np.uint8
        assert observation[key].std() > 10  # a scene, not a blank
    state = observation["observation.state"]
    assert state.shape == (4,) and state.dtype == np.float32
    assert np.allclose(state[:3], env._env.data.body("hand").xpos) and 0 <= state[3] <= 1
    assert observation["task"] == "Reach a goal position"
    assert env.fps == 20 == round(1 / (env._env.dt * env.action_repeat))


@pytest.mark.sim
def test_corner2_is_upright(make_env):
    env = make_env("reach-v3", cameras=("corner2",), field_of_view={"corner2": 60.0})
    env.reset(0)
    low = env.observe()[PAIR[0]].astype(int)
    for _ in range(15):
        env.step(np.array([0, 0, 1, 0]))
    high = env.observe()[PAIR[0]].astype(int)
    rows = np.arange(48)[:, None]
    appeared, left = np.clip(low - high, 0, None).sum(2), np.clip(high - low, 0, None).sum(2)  # the arm is dark
    assert (rows * appeared).sum() / appeared.sum() < (rows * left).sum() / left.sum()


@pytest.mark.sim
@pytest.mark.parametrize("task", FOUR)
def test_seed_alone_decides_the_start(make_env, task):
    fresh, used = make_env(task), make_env(task)
    used.reset(7)
    for _ in range(20):
        used.step(np.array([0.5, 0.7, -1, 1]))
    fresh.reset(3), used.reset(3)
    seen, seen_again = fresh.observe(), used.observe()
    for key in (*PAIR, "observation.state"):
        assert np.array_equal(seen[key], seen_again[key]), key
    assert np.array_equal(fresh.expert_action(), used.expert_action())
    used.reset(4)
    assert not np.array_equal(fresh._env._get_pos_goal(), used._env._get_pos_goal())


@pytest.mark.sim
def test_action_is_held_for_action_repeat_steps_and_clipped(make_env):
    held, single = make_env("reach-v3"), make_env("reach-v3", action_repeat=1)
    held.reset(1), single.reset(1)
    result = held.step(np.array([3.0, 0.2, -9.0, 0.0]))
    for _ in range(4):
        expected = single.step(np.array([1.0, 0.2, -1.0, 0.0]))
    assert result == expected
    assert np.array_equal(held._observation, single._observation)


@pytest.mark.sim
@pytest.mark.parametrize("task", FOUR)
def test_expert_solves_what_chance_does_not(make_env, task):
    env = make_env(task)
    expert = run_episodes(env, ExpertPolicy(env), range(5), max_steps=50)
    assert sum(episode.success for episode in expert) >= 4
    assert all(np.abs(env.expert_action()) <= 1)
    chance = run_episodes(env, RandomPolicy(0, action_dim=4), range(5), max_steps=50)
    assert sum(episode.success for episode in chance) == 0


@pytest.mark.sim
def test_expert_is_scaled_down_into_what_an_action_holds_and_keeps_its_direction(make_env):
    env = make_env("reach-v3")
    env.reset(1)
    asked = env._expert.get_action(np.concatenate([env._observation[:-3], env._env._get_pos_goal()]))
    assert np.abs(asked[:3]).max() > 1
    given = env.expert_action()
    assert np.abs(given[:3]).max() == pytest.approx(1)
    assert np.allclose(given[:3] * np.abs(asked[:3]).max(), asked[:3], atol=1e-6)


@pytest.mark.sim
def test_faucet_angle_says_which_way_it_was_turned(make_env):
    for task, sign in (("faucet-open-v3", 1), ("faucet-close-v3", -1)):
        env = make_env(task)
        (episode,) = run_episodes(env, ExpertPolicy(env), [2], max_steps=50)
        assert sign * episode.measure > 0.5


@pytest.mark.sim
def test_faucets_share_one_picture_so_only_the_instruction_tells_them_apart(make_env):
    opening, closing = make_env("faucet-open-v3"), make_env("faucet-close-v3")
    opening.reset(5), closing.reset(5)
    closing._env.model.body("faucetBase").pos = opening._env.model.body("faucetBase").pos  # drawn from a wider range
    closing._mujoco.mj_forward(closing._env.model, closing._env.data)
    seen, seen_too = opening.observe(), closing.observe()
    for key in (*PAIR, "observation.state"):
        assert np.array_equal(seen[key], seen_too[key]), key
    assert seen["task"] != seen_too["task"]
    assert make_env("faucet-open-v3", instruction=closing.instruction).instruction == seen_too["task"]


@pytest.mark.sim
def test_goal_dot_is_visible_on_reach(make_env):
    env = make_env("reach-v3", image_size=84)
    env.reset(0)
    seen = env.observe()[PAIR[0]]
    env._env.model.site("goal").pos = [9, 9, 9]
    env._mujoco.mj_forward(env._env.model, env._env.data)
    assert (seen != env.observe()[PAIR[0]]).any()


@pytest.mark.sim
def test_zoom_and_cameras_are_as_asked(make_env):
    wide, near = make_env("reach-v3"), make_env("reach-v3", field_of_view={"corner2": 30.0})
    wide.reset(0), near.reset(0)
    assert not np.array_equal(wide.observe()[PAIR[0]], near.observe()[PAIR[0]])
    assert np.array_equal(wide.observe()[PAIR[1]], near.observe()[PAIR[1]])
    with pytest.raises(ValueError, match=r"no camera 'corner9'; it has .*corner2"):
        make_env("reach-v3", cameras=("corner9",))


@pytest.mark.sim
@pytest.mark.slow
def test_every_task_starts_by_its_seed_and_has_its_goal_dot_where_the_goal_is(make_env):
    for task in INSTRUCTIONS:
        fresh, used = make_env(task), make_env(task)
        used.reset(7)
        for _ in range(10):
            used.step(used.expert_action())
        fresh.reset(3), used.reset(3)
        assert np.array_equal(fresh._observation, used._observation), task
        fresh.step(fresh.expert_action())
        if task in GOAL_DOTS:
            dot = fresh._env.data.site(GOAL_DOTS[task]).xpos
            assert np.allclose(dot, fresh._env._get_pos_goal(), atol=0.03), task
