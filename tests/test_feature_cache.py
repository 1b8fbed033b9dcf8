"""Features that are stored: the same training as without, each pair once, never another backbone's, whatever happens."""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hf_vla.caching import build_caches, settle_caches, with_cache
from hf_vla.checkpoint import save_checkpoint
from hf_vla.data import feature_build
from hf_vla.data.feature_build import Pairs, Rank, ViewBuild, build_views
from hf_vla.data.feature_cache import MANIFEST, CachedDataset, ViewCache, find_cache, read_manifest
from hf_vla.data.feature_store import pack, unpack
from hf_vla.data.mixture import CameraView, build_datasets
from hf_vla.data.windows import WindowDataset
from hf_vla.fingerprint import FileDigests
from hf_vla.memory.preflight import run_checks
from hf_vla.memory.shapes import Shapes
from hf_vla.memory.trace import make_batch
from hf_vla.policy import Policy
from hf_vla.prepare import build_trainer
from hf_vla.recipe import Recipe, RecipeError
from hf_vla.sample import Draw, Sample
from hf_vla.train import main, train
from tests.distributed.launch import ROOT, torchrun
from tests.lerobot_folders import LENGTHS, encode, write_v3
from tests.tiny_run import released_weights, tiny_recipe

FRAMES = sum(LENGTHS)
FROZEN = {"freeze_vggt": True, "freeze_lang_encoder": True}
BOTH = ["vggt", "lang_encoder"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return released_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    return write_v3(tmp_path_factory.mktemp("data") / "robot")


def cached_recipe(weights, dataset: Path, root: Path, **sections) -> Recipe:
    memory = {"cache": BOTH, "cache_dir": str(root), "cache_dtype": "float32", **sections.pop("memory", {})}
    training = {"max_steps": 4, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    return tiny_recipe(
        model={**weights, **FROZEN, **sections.pop("model", {})},
        data={"dataset": str(dataset), "batch_size": 4, **sections.pop("data", {})},
        training={**training, **sections.pop("training", {})},
        memory=memory,
        **sections,
    )


def losses(recipe: Recipe, folder: Path) -> list[float]:
    trainer = build_trainer(recipe, folder)
    trainer.train()
    return [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]


BF16 = {"model": {"dtype": "bfloat16"}, "training": {"bf16": True}, "memory": {"cache_dtype": "auto"}}
LORA = {"lora": {"apply_to": ["lang_encoder"], "r": 4, "lora_dropout": 0.1}, "memory": {"cache": ["vggt"]}}


@pytest.mark.parametrize(
    ("sections", "tolerance"),
    [
        ({"memory": {"cache_dtype": "float32"}}, 1e-5),
        ({"memory": {"cache_dtype": "bfloat16"}}, 5e-3),
        pytest.param({"memory": {"cache_dtype": "float8"}}, 5e-2, marks=pytest.mark.slow),
        pytest.param(
            {"model": {"fusion": {"type": "gated"}}, "data": {"center_images": True, "views": ["front", "wrist"]}},
            1e-5,
            marks=pytest.mark.slow,
        ),
        ({**LORA, "model": {"fusion": {"type": "prefix"}}, "training": {"activation_checkpointing": True}}, 1e-5),
        (BF16, 1e-5),
    ],
    ids=["float32", "bfloat16", "float8", "centred", "lora", "bf16 run"],
)
def test_training_and_evaluating_from_caches_give_the_losses_of_running_the_backbones(
    weights, robot, tmp_path, sections, tolerance
):
    recipe = cached_recipe(weights, robot, tmp_path / "cache", **sections)
    build_caches(recipe)
    from_cache = losses(recipe, tmp_path / "cached")
    alone = losses(with_cache(recipe, []), tmp_path / "uncached")
    assert len(from_cache) == len(alone) == 6
    np.testing.assert_allclose(from_cache, alone, rtol=tolerance)


def test_what_is_stored_follows_from_what_backbones_hand_over(weights, robot, tmp_path):
    for dtype in ("float32", "bfloat16"):  # no training: only what is written, and what the plan counts on
        recipe = cached_recipe(weights, robot, tmp_path, model={"dtype": dtype}, memory={"cache_dtype": "auto"})
        explicit = dataclasses.replace(recipe, memory=dataclasses.replace(recipe.memory, cache_dtype=dtype))
        folders = build_caches(recipe)
        assert build_caches(explicit) == folders
        assert {read_manifest(f / MANIFEST)["stored"] for f in folders} == {dtype}
        assert {read_manifest(f / MANIFEST)["relative_error"] for f in folders} == {0.0}
        batch = make_batch(build_trainer(recipe, tmp_path / dtype).model.config, Shapes(), recipe, 1)
        assert {batch[name].dtype for name in ("view_features", "text_features")} == {getattr(torch, dtype)}


@pytest.fixture(scope="module")
def built(weights, robot, tmp_path_factory):
    recipe = cached_recipe(weights, robot, tmp_path_factory.mktemp("built"))
    return recipe, build_caches(recipe)


def test_a_run_from_caches_holds_no_backbone_and_acts_with_both(built, tmp_path):
    recipe, folders = built
    checks = {check.detail for check in run_checks(recipe, tmp_path) if check.title == "Cache"}
    assert checks == {f"{n} isn't loaded, its outputs are read from {f}" for n, f in zip(BOTH, folders, strict=True)}
    run = train(recipe, tmp_path / "run")
    assert json.loads((run / "run.json").read_text())["cache"] == dict(zip(BOTH, map(str, folders), strict=True))
    trainer = build_trainer(recipe, tmp_path / "again")
    assert (trainer.bare_model().model.vggt, trainer.bare_model().model.lang_encoder) == (None, None)
    assert not list((run / "model").glob("model*.safetensors"))
    policy = Policy.from_pretrained(run / "model")
    _, eval_data = build_datasets(recipe.data, recipe.model.chunk_size, recipe.training["seed"])
    seen = policy.predict_samples([eval_data[0], eval_data[1]])
    blind = policy.predict_samples(
        [s._replace(images=[0 * i for i in s.images]) for s in (eval_data[0], eval_data[1])]
    )
    assert not np.array_equal(seen, blind)
    save_checkpoint(policy.model, policy.processor, recipe, tmp_path / "same")
    assert (tmp_path / "same/trained.safetensors").read_bytes() == (run / "model/trained.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_from_caches_goes_on_where_it_stopped(built, tmp_path):
    recipe, _ = built
    short = dataclasses.replace(recipe, training={**recipe.training, "max_steps": 2, "save_steps": 2})
    train(short, tmp_path / "cut")
    train(dataclasses.replace(short, training={**short.training, "max_steps": 4}), tmp_path / "cut", resume=True)
    train(recipe, tmp_path / "straight")
    cut, straight = (tmp_path / name / "model/trained.safetensors" for name in ("cut", "straight"))
    assert cut.read_bytes() == straight.read_bytes()


def test_without_a_cache_training_runs_the_backbones_and_says_so(weights, robot, tmp_path, caplog):
    recipe = cached_recipe(weights, robot, tmp_path / "none", training={"max_steps": 1, "eval_strategy": "no"})
    assert [check.status for check in run_checks(recipe, tmp_path) if check.title == "Cache"] == ["warn", "warn"]
    assert settle_caches(recipe).memory.cache == []
    run = train(recipe, tmp_path / "run")
    assert json.loads((run / "run.json").read_text())["cache"] == {"vggt": None, "lang_encoder": None}
    assert "vggt has no cache yet" in caplog.text
    assert "hf-vla cache" in caplog.text


def test_training_draws_from_augmented_copies_and_evaluation_from_none(weights, robot, tmp_path):
    varied = {"data": {"augmentation": {"brightness": 0.5}}, "memory": {"cache_copies": 2}}
    recipe = cached_recipe(weights, robot, tmp_path / "cache", **varied, training={"max_steps": 1})
    build_caches(recipe)
    trainer = build_trainer(recipe, tmp_path / "run")
    trainer.train()
    data = trainer.train_dataset
    seen = {tuple(data[Draw(0, epoch)].view_features.flatten().tolist()) for epoch in range(20)}
    assert len(seen) == 2
    plain = tuple(data.view_cache.read(data[Draw(0, 0)].episode_index, 0).flatten().tolist())
    assert plain not in seen
    assert not trainer.eval_dataset.wants_epoch
    more = dataclasses.replace(recipe.data.augmentation, brightness=0.6)
    other = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, augmentation=more))
    with pytest.raises(ValueError, match=r"augmentation.brightness is 0.5 there and 0.6 here\."):
        settle_caches(other)


def other_weights(recipe: Recipe, tmp_path: Path) -> Recipe:
    torch.manual_seed(1)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **released_weights(tmp_path / "other")))


def other_size(recipe: Recipe, tmp_path: Path) -> Recipe:
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, image_size=42))


def other_prompt(recipe: Recipe, tmp_path: Path) -> Recipe:
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, prompt="Please {task}."))


def one_frame_changed(recipe: Recipe, tmp_path: Path) -> Recipe:
    folder = write_v3(tmp_path / "robot")
    path = folder / "data/chunk-000/file-001.parquet"
    table = pq.read_table(path)
    column = table.column_names.index("observation.images.wrist")
    pictures = table.column(column).to_pylist()
    pictures[3]["bytes"] = encode((0, 1, 2))
    changed = pa.chunked_array([pa.array(pictures, table.schema.field(column).type)])
    pq.write_table(table.set_column(column, table.schema.field(column), changed), path)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, dataset=str(folder)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_weights, r"vggt-.*weights: model.safetensors has changed"),
        (other_size, r"image_size is 28 there and 42 here\."),
        (
            other_prompt,
            r"lang_encoder-.*prompt is .* there and \"Please \{task\}\.\" here; instructions: close the door",
        ),
        (one_frame_changed, r"frames: data/chunk-000/file-001.parquet has changed\."),
    ],
)
def test_a_cache_of_something_else_is_refused_by_name(built, tmp_path, change, words):
    recipe = change(built[0], tmp_path)
    with pytest.raises(ValueError, match=words):
        settle_caches(recipe)
    with pytest.raises(ValueError, match="Build the right one with `hf-vla cache RECIPE`"):
        build_trainer(recipe, tmp_path / "run")
    [check] = [check for check in run_checks(recipe, tmp_path) if check.title == "Cache"]
    assert check.status == "fail"
    assert re.search(words, check.detail)


def half_a_shard(recipe: Recipe, tmp_path: Path) -> Recipe:
    root = shutil.copytree(recipe.memory.cache_dir, tmp_path / "cache")
    os.truncate(next(root.glob("vggt-*/*.safetensors")), 100)
    return dataclasses.replace(recipe, memory=dataclasses.replace(recipe.memory, cache_dir=str(root)))


def varied_pictures(recipe: Recipe, tmp_path: Path) -> Recipe:
    varied = dataclasses.replace(recipe.data.augmentation, hue=0.1)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, augmentation=varied))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_weights, "weights: model.safetensors has changed"),
        (one_frame_changed, "frames: .* has changed"),
        (half_a_shard, r"damaged \(it has 100 of"),
        (varied_pictures, "set memory.cache_copies"),
    ],
)
def test_what_is_wrong_ends_training_in_one_plain_error(built, tmp_path, change, words):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(dataclasses.asdict(change(built[0], tmp_path))))
    with pytest.raises(SystemExit, match=f"(?s)^Error: .*{words}") as ended:  # Python prints this, and no traceback
        main(file, output=tmp_path / "run")
    assert ended.value.__suppress_context__


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"freeze_vggt": False}}, "'vggt', which trains"),
        ({"lora": {"apply_to": ["lang_encoder"]}}, "'lang_encoder', which trains"),
        ({"memory": {"cache_copies": -1}}, "cache_copies is -1"),
        ({"memory": {"cache_copies": 2}}, "cache_copies is 2, but data.augmentation varies nothing"),
        ({"data": {"augmentation": {"hue": 0.1}}}, "stored features show none of it: set memory.cache_copies"),
        ({"memory": {"cache_dtype": "int4"}}, "cache_dtype"),
    ],
)
def test_what_cant_be_cached_is_refused(weights, robot, tmp_path, sections, words):
    with pytest.raises(RecipeError, match=words):
        cached_recipe(weights, robot, tmp_path, **sections)


def test_nothing_is_built_that_training_would_refuse(weights, robot, tmp_path):
    recipe = cached_recipe(weights, robot, tmp_path, memory={"cache": []}, data={"streaming": True})
    with pytest.raises(RecipeError, match=r"data\.streaming"):
        build_caches(recipe)
    trained = {"freeze_vggt": False, "freeze_lang_encoder": False}
    with pytest.raises(RecipeError, match="Nothing can be cached"):
        build_caches(cached_recipe(weights, robot, tmp_path, memory={"cache": []}, model=trained))


@pytest.mark.parametrize("kind", ["vggt", "lang_encoder"])
def test_a_shard_that_is_cut_short_is_named_and_built_again_alone(weights, robot, tmp_path, kind):
    recipe = cached_recipe(weights, robot, tmp_path / "cache")
    [folder] = [folder for folder in build_caches(recipe) if folder.name.startswith(kind)]
    shard = folder / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"shard-00000.*damaged \(it has {len(whole) - 1:,} of {len(whole):,} bytes"):
        build_trainer(recipe, tmp_path / "run")
    build_caches(recipe)
    assert shard.read_bytes() == whole


@pytest.mark.parametrize(("stored", "worst"), [("float32", 0.0), ("bfloat16", 2**-8), ("float8", 2**-4 + 2**-8)])
def test_each_number_is_off_by_no_more_than_is_stated(stored, worst):
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(6, 2, 4, 64, generator=generator)
    exact[..., 7] *= 300  # VGGT's tokens have giant channels
    packed = pack(exact, stored)
    given = unpack(packed["features"], packed.get("scales")).float()
    small = exact.abs() > exact.abs().amax(-1, keepdim=True) / 2**14  # below, 8 bits have no leading one
    assert ((given - exact).abs() <= worst * exact.abs())[small].all()


# Building, with an encoder that is a sum: what is stored then says where it belongs ---------------------------------------


def prepare(images: list) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.stack(pair) for pair in images])).movedim(-1, -3).float()


def encode_pixels(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.mean((-1, -2))[:, :, None].repeat(1, 1, 4, 1)


class Brighter:
    """Stands for augmentation: epoch e makes pictures brighter by e + 1."""

    def __init__(self, dataset: WindowDataset):
        self.dataset = dataset

    def __getitem__(self, draw: Draw) -> Sample:
        sample = self.dataset[draw.index]
        return sample._replace(images=[picture + np.uint8(draw.epoch + 1) for picture in sample.images])


def make_build(dataset: WindowDataset, folder: Path, copies: int = 0, **options) -> ViewBuild:
    return ViewBuild(
        folder=folder / "vggt-0",
        key={"copies": copies},
        episodes=[(episode.index, episode.length) for episode in dataset.episodes],
        pairs=Pairs(dataset, prepare, dataset.look, copies, Brighter(dataset) if copies else None),
        encode=encode_pixels,
        row_shape=(len(dataset.views), 4, 3),
        stored="float32",
        batch_size=2,
        shard_bytes=options.pop("shard_bytes", 1000),
        **options,
    )


@pytest.fixture
def views(robot):
    info = build_datasets(tiny_recipe(data={"dataset": str(robot)}).data, 4, 0)[0].info
    return WindowDataset(info, [CameraView("front"), CameraView("wrist", -1)], chunk_size=4)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_sample_finds_its_own_features(views, tmp_path):
    build_views(make_build(views, tmp_path))
    cache = ViewCache(find_cache(tmp_path, "vggt", {"copies": 0}))
    for i in range(len(views)):
        sample = CachedDataset(views, cache, None)[i]
        assert sample.images == []
        assert torch.equal(sample.view_features, encode_pixels(prepare([views.pictures(i)]))[0])
    assert len(views) == FRAMES


def test_pairs_that_look_the_same_are_stored_once(views, tmp_path):
    goals = WindowDataset(views.info, [CameraView("front", "goal"), CameraView("wrist", "goal")], chunk_size=4)
    build_views(make_build(goals, tmp_path))
    found = find_cache(tmp_path, "vggt", {"copies": 0})
    assert found.manifest["rows"] == len(LENGTHS)
    assert torch.equal(ViewCache(found).read(1, 0), ViewCache(found).read(1, 6))


def test_augmented_copies_are_drawn_by_seed_epoch_and_index(views, tmp_path):
    build_views(make_build(views, tmp_path, copies=3))
    cache = ViewCache(find_cache(tmp_path, "vggt", {"copies": 3}))
    dataset, held_out = CachedDataset(views, cache, None, augments=True, seed=5), CachedDataset(views, cache, None)
    plain = encode_pixels(prepare([views.pictures(4)]))[0]
    added = [(dataset[Draw(4, epoch)].view_features - plain).mean().item() for epoch in range(30)]
    assert {round(value) for value in added} == {1, 2, 3}
    assert added == [(dataset[Draw(4, epoch)].view_features - plain).mean().item() for epoch in range(30)]
    assert torch.equal(held_out[4].view_features, plain)
    assert (dataset.wants_epoch, held_out.wants_epoch) == (True, False)


def killed_by(build: ViewBuild, after: int) -> None:
    counts = iter(range(after))
    kill = partial(os.kill, os.getpid(), signal.SIGKILL)
    tick = lambda what, done, total: next(counts, None) is None and kill()  # noqa: E731
    build_views(dataclasses.replace(build, tick=tick))


def test_a_killed_build_goes_on_with_what_is_missing(views, tmp_path):
    build_views(make_build(views, tmp_path / "whole", shard_bytes=200))
    build = make_build(views, tmp_path / "killed", shard_bytes=200)
    looks = (FRAMES + 1) // 2
    for after in (3, looks + 5):
        process = multiprocessing.get_context("fork").Process(target=killed_by, args=(build, after))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert find_cache(tmp_path / "killed", "vggt", {"copies": 0}) is None
    # A shard counts once its note is there too: the kill may fall between the two.
    shards = [note.with_suffix(".safetensors") for note in build.folder.glob("shard-*.json")]
    there = {shard.name: shard.stat().st_mtime_ns for shard in shards}
    assert there
    encoded = []
    build_views(dataclasses.replace(build, tick=lambda what, done, total: encoded.append((what, done))))
    assert {name: (build.folder / name).stat().st_mtime_ns for name in there} == there
    assert sum(done for what, done in encoded if what == "encoded") < FRAMES
    assert content(build.folder) == content(tmp_path / "whole/vggt-0")


def test_ranks_deal_out_the_shards(views, tmp_path):
    build_views(make_build(views, tmp_path / "alone"))
    build, barrier = make_build(views, tmp_path / "ranks"), threading.Barrier(3, timeout=60)
    ranks = [threading.Thread(target=build_views, args=(build, Rank(index, 3, barrier.wait))) for index in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert content(tmp_path / "ranks/vggt-0") == content(tmp_path / "alone/vggt-0")


@pytest.mark.parametrize(
    ("file", "kept"), [("shard-00001.safetensors", 1), ("shard-00002.json", 2), ("cache.json", 3)]
)
def test_a_full_disk_is_said_and_what_is_written_is_kept(views, tmp_path, file, kept):
    build = make_build(views, tmp_path)
    build.folder.mkdir()
    (build.folder / f"{file}.part").symlink_to("/dev/full")  # the kernel's own full disk
    with pytest.raises(
        OSError, match=rf"vggt-0: the disk is full. What is written is kept, {kept} shards of the cache"
    ):
        build_views(build)
    (build.folder / f"{file}.part").unlink(missing_ok=True)
    assert find_cache(tmp_path, "vggt", {"copies": 0}) is None
    build_views(build)
    assert len(ViewCache(find_cache(tmp_path, "vggt", {"copies": 0})).read(0, 0)) == 2


def test_what_would_not_fit_is_said_before_anything_is_encoded(views, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"would take .* and may take 0.00 MiB \(memory.cache_budget\)"):
        build_views(make_build(views, tmp_path, max_bytes=100))
    free = feature_build.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(feature_build.shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match=r"still to be written, and the disk has 0\.00 MiB free"):
        build_views(make_build(views, tmp_path))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_real_processes_build_one_cache_together(built, tmp_path):
    recipe, folders = built
    recipe.save(tmp_path / "recipe.json")
    command = ["cache", tmp_path / "recipe.json", "--output", tmp_path / "caches"]
    code, said = torchrun(ROOT / "hf_vla/cli.py", *command)
    assert code == 0, said
    assert said.count("Train with: --set memory.cache_dir=") == 1
    for folder in folders:
        assert content(tmp_path / "caches" / folder.name) == content(folder)


def test_a_file_is_read_again_only_if_it_was_touched(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_vla.fingerprint.SETTLED", -1)
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    digests = FileDigests(tmp_path / "digests.json")
    first = digests.of(path)
    digests.keep()
    monkeypatch.setattr("hf_vla.fingerprint._read_through", lambda path: "read")
    assert FileDigests(tmp_path / "digests.json").of(path) == first
    path.write_bytes(b"two")
    os.utime(path, (0, 0))
    assert FileDigests(tmp_path / "digests.json").of(path) == "read"
