"""What is published opens where nothing is installed but torch and transformers, and acts as it did here."""

import importlib.metadata
import json
import os
import subprocess
import venv
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from hf_vla.merge import merge
from hf_vla.policy import Policy
from hf_vla.train import train
from tests.test_training import FROZEN, observation
from tests.tiny_run import SAMPLE, tiny_recipe, with_other_units

OPEN_AND_ACT = """
import importlib.util, json, sys
import numpy as np, torch
from transformers import AutoModel, AutoProcessor

assert not [name for name in ("hf_vla", "peft", "accelerate") if importlib.util.find_spec(name)]
folders, task = json.loads(sys.argv[2]), sys.argv[3]
seen = np.load(sys.argv[1])
result = {}
for folder in folders:
    try:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    except OSError as error:
        result[folder] = str(error)
        continue
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    chosen = {"dataset": processor.datasets[-1]} if processor.datasets else {}
    batch = processor(images=[list(seen["pictures"])], task=[task], state=seen["state"][None], **chosen)
    actions = model.predict_action(**batch, generator=torch.Generator().manual_seed(0))
    result[folder] = processor.unnormalize_actions(actions, **chosen)[0].numpy().tobytes().hex()
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """The Python of a venv that holds torch, transformers and what these require: links to the packages installed here."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in required_by(["torch", "transformers", "pillow"]):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return folder / "bin/python"


def required_by(names: list[str]) -> set[str]:
    """These packages and all that they require without extras, by the metadata of what is installed here."""
    found: set[str] = set()
    while names:
        name = names.pop()
        found.add(name)
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.name not in found and (
                requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            ):
                names.append(requirement.name)
    return found


@pytest.mark.slow
def test_a_whole_model_acts_the_same_and_adapters_say_that_they_want_merging(bare_python, tmp_path):
    fusion, lora = {"type": "prefix"}, {"apply_to": ["lang_encoder"], "r": 4}
    full = train(tiny_recipe(), tmp_path / "full") / "model"
    mixed = {"dtype": "bfloat16", "head": {"type": "discrete"}}
    bf16 = train(tiny_recipe(model=mixed, training={"bf16": True}), tmp_path / "bf16") / "model"
    both = [{"dataset": str(SAMPLE)}, {"dataset": str(with_other_units(tmp_path / "other"))}]
    several = train(tiny_recipe(data={"dataset": None, "mixture": both}), tmp_path / "several") / "model"
    adapted = {**FROZEN, "fusion": fusion, "head": {"type": "flow"}}
    adapters = train(tiny_recipe(model=adapted, lora=lora), tmp_path / "lora") / "model"
    merge(adapters, tmp_path / "merged")

    whole = {full: None, bf16: None, tmp_path / "merged": None, several: "other"}
    said = open_and_act(bare_python, [*whole, adapters], tmp_path)
    for folder, dataset in whole.items():
        here = Policy.from_pretrained(folder, dataset=dataset).predict_action_chunk(observation())
        assert said[str(folder)] == here.tobytes().hex()
    assert f"{adapters} holds only what training changed" in said[str(adapters)]
    assert "Merge it first" in said[str(adapters)]


def open_and_act(python: Path, folders: list[Path], scratch: Path) -> dict[str, str]:
    """For each folder the bytes of the chunk that is predicted there, or the error that opening it ends in."""
    seen = observation()
    pictures = np.stack([seen[f"observation.images.{camera}"] for camera in ("corner2", "gripperPOV")])
    np.savez(scratch / "seen.npz", pictures=pictures, state=seen["observation.state"])
    words = [scratch / "seen.npz", json.dumps([str(folder) for folder in folders]), seen["task"]]
    environment = {**os.environ, "HF_HOME": str(scratch / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-I", "-c", OPEN_AND_ACT, *map(str, words)],
        cwd=scratch,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
