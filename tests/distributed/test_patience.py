"""How long ranks wait for each other: as the recipe says, and as long as it takes where each has a share to do."""

from pathlib import Path

import pytest

from hf_vla.caching.build import PATIENCE
from tests.distributed.launch import torchrun
from tests.tiny_run import released_weights, tiny_recipe

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("work", "seconds"), [("train", 77), ("cache", PATIENCE.total_seconds())])
def test_ranks_wait_as_long_as_they_are_told(tmp_path, work, seconds):
    frozen = {"freeze_vggt": True, "freeze_lang_encoder": True}
    tiny_recipe(model={**frozen, **released_weights(tmp_path)}, training={"ddp_timeout": 77}).save(
        tmp_path / "recipe.json"
    )
    code, output = torchrun(Path(__file__).with_name("wait_for_others.py"), work, tmp_path)
    assert code == 0, output[-4000:]
    assert [float((tmp_path / f"seconds-{rank}").read_text()) for rank in (0, 1)] == [seconds, seconds]
