"""All that a training needs, each part built when what it needs is there: data, processor, model, trainer."""

from functools import partial
from pathlib import Path

from hf_vla.arguments import training_arguments
from hf_vla.assemble import build_config, build_model, build_processor
from hf_vla.caching import find_caches, fit_views, read_from_caches
from hf_vla.curves import outlive_tensorboard
from hf_vla.data.augmentation import AugmentedDataset, varies
from hf_vla.data.collator import VLACollator
from hf_vla.data.mixture import Samples, build_datasets, mean_pictures, order_of, stats_of
from hf_vla.model.modeling_vla import VLAForActionPrediction
from hf_vla.model.processing_vla import VLAProcessor
from hf_vla.planning import what_fits
from hf_vla.recipe import Recipe
from hf_vla.sample import view_name
from hf_vla.trainer import VLATrainer


def build_trainer(recipe: Recipe, output: Path) -> VLATrainer:
    """Build data, processor, model and trainer, in the order in which each needs the one before."""
    arguments = training_arguments(recipe, str(output))
    train_data, eval_data = build_datasets(
        recipe.data, recipe.model.chunk_size, arguments.seed, recipe.data.picture_cache_bytes
    )
    order = order_of(train_data, arguments.seed if arguments.data_seed is None else arguments.data_seed)
    info, views = train_data.info, [view_name(view.camera, view.offset) for view in train_data.views]
    means = mean_pictures(train_data, partial(fit_views, recipe), on_error=recipe.data.on_error)
    caches = find_caches(recipe, train_data, means)
    stats = stats_of(train_data, recipe.data.mixture_stats)
    processor = build_processor(recipe, views, stats, means, train_data.tasks)
    if recipe.evaluation.dataset is not None:
        processor.stats_of(recipe.evaluation.dataset)  # a wrong name fails before training, not behind it
    model = build_model(
        recipe, build_config(recipe, len(views), info.state_dim, info.action_dim), without=list(caches)
    )
    # As Trainer does, and warns of it. Not before the model is built: that would change its embedding of padding.
    model.config.text_config.pad_token_id = processor.tokenizer.pad_token_id
    if recipe.model.head.type == "discrete":
        fit_levels(model, processor, train_data)
    train_data, eval_data = read_from_caches(recipe, caches, train_data, eval_data)
    if varies(recipe.data.augmentation) and "vggt" not in caches:
        train_data = AugmentedDataset(train_data, recipe.data.augmentation, arguments.seed)
    trainer = VLATrainer(
        recipe=recipe,
        processor=processor,
        model=model,
        args=arguments,
        order=order,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=VLACollator(processor),
        what_fits=what_fits,
        left_out=info.left_out,
    )
    outlive_tensorboard(trainer)
    return trainer


def fit_levels(model: VLAForActionPrediction, processor: VLAProcessor, train_data: Samples) -> None:
    """Give a discrete head the levels that training actions take."""
    numbers = train_data.numbers()
    sources = numbers.sources if processor.datasets else None
    actions = processor(actions=numbers.actions, dataset=sources)["actions"]
    model.head.fit_levels(actions)
