"""What a recipe holds: one dataclass a section, every key with its default, its type and its meaning."""

import dataclasses
import json
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

_strict = pydantic_dataclass(config=ConfigDict(extra="forbid", strict=True))

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
"""Ranges outside which a number means nothing; without them it would fail, if at all, deep inside a training."""


class RecipeError(ValueError):
    """A recipe that can't be read or run as it stands; the message says which key and what to do."""


@_strict
class About:
    """What a reader wants to know before running the recipe; nothing here changes the run."""

    purpose: str = ""
    command: str = ""
    hardware: str = ""
    predicted_peak_bytes: int | None = None
    measured_peak_bytes: int | None = None
    samples_per_second: float | None = None
    metric: dict[str, Any] | None = None
    date: str | None = None
    source: str | None = None
    not_supported: list[str] = field(default_factory=list)


@_strict
class Fusion:
    """Keys of `model.fusion`; meanings in `FusionConfig`."""

    type: Literal["cross_attention", "prefix", "gated"] = "cross_attention"
    hidden_size: Count = 1024
    num_layers: Whole = 4
    num_heads: Count = 16
    dropout: Share = 0.0
    align_weight: float = 0.0
    align_layer: int | None = None


@_strict
class Head:
    """Keys of `model.head`; meanings in `HeadConfig`."""

    type: Literal["l1", "flow", "discrete"] = "l1"
    hidden_size: Count = 1024
    num_layers: Whole = 2
    num_inference_steps: Count = 10
    beta: list[float] = field(default_factory=lambda: [1.5, 1.0])
    num_bins: Count = 256


@_strict
class Model:
    """The policy's parts: where their weights come from, what stays frozen, and their shapes."""

    vggt: str | dict[str, Any] = "facebook/VGGT-1B"
    """Hub id, folder or file of weights; or a dict of `VGGTConfig` keys for random weights."""
    lang_encoder: str | dict[str, Any] = "meta-llama/Llama-2-7b-hf"
    """Hub id or folder of weights; or a dict of the decoder's config keys for random weights."""
    tokenizer: str | None = None
    """Hub id or folder; None takes the language encoder's own, or a byte-level one where that has none."""
    freeze_vggt: bool = True
    freeze_lang_encoder: bool = True
    """Whether the backbone's own weights stay as they are; LoRA on a backbone wants them frozen."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Of the language encoder's linear layers, through bitsandbytes."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of backbone weights. Fusion, head and adapters are float32; mixed precision is `training.bf16`."""
    fusion: Fusion = field(default_factory=Fusion)
    head: Head = field(default_factory=Head)
    prompt: str = "In: What action should the robot take to {task}?\nOut:"
    """Template around the instruction; holds `{task}` once."""
    vggt_layer: int = -1
    pool_grid: Count = 8
    chunk_size: Count = 16
    compile: list[Literal["vggt", "fusion", "head"]] = field(default_factory=list)
    """Parts that `torch.compile` compiles: the first steps take longer, the others less. Plans are of eager parts."""
    outputs: Literal["actions", "geometry"] = "actions"
    """`geometry` also builds VGGT's camera and depth heads, for the report."""


@_strict
class Lora:
    """Low-rank adapters, through PEFT; keys are named as `LoraConfig` names them."""

    apply_to: list[Literal["lang_encoder", "vggt"]] = field(default_factory=list)
    """Backbones that get adapters; none by default."""
    r: Count = 16
    lora_alpha: int = 32
    lora_dropout: Share = 0.05
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False


@_strict
class View:
    """One image of the pair."""

    camera: str
    offset: int | Literal["goal"] = 0
    """Frames from now (0 or less), or `goal`: the episode's last frame."""


@_strict
class Augmentation:
    """How far training pictures are varied, both views of a sample alike; 0 leaves them as they are."""

    brightness: float = 0.0
    """Factor drawn from 1 less this to 1 plus this; so are the next two."""
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    """Turn of the colour circle, up to 0.5 either way."""
    blur: float = 0.0
    """Standard deviation of a Gaussian, drawn from 0 to this, as a share of the shorter side."""
    crop: float = 0.0
    """Share of both sides that is cut away at most; what is kept is brought back to the picture's size."""


@_strict
class Mixed:
    """One dataset of a mixture."""

    dataset: str
    revision: str | None = None
    weight: float | None = None
    """Share of the draws, relative to the other weights; given for all datasets, or for none: all samples count alike."""
    views: list[View] | None = None
    """Its cameras in the order of the others' views; None takes `data.views`, or its first two cameras."""


@_strict
class Data:
    """Which demonstrations, and how samples are cut from them."""

    dataset: str | None = None
    """Folder or Hub id of a LeRobot dataset."""
    revision: str | None = None
    views: list[View] | None = None
    """In order (view 0 is the reference frame), each a camera's name or a View; None takes the dataset's first two."""
    batch_size: Count = 8
    """Samples of one GPU in one forward; the only place for it."""
    image_size: int = 518
    """Side in pixels that pictures are resized to; a multiple of 14."""
    resize: Literal["crop", "pad", "stretch"] = "stretch"
    """How a picture that isn't square is made so."""
    center_images: bool = False
    """Subtract the mean training picture of each view; for fixed cameras and a VGGT trained from scratch."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Of training pictures; where their features are cached, of the cache's copies."""
    pictures: Literal["seen", "mean"] = "seen"
    """`mean` replaces every picture by the mean one: the blind control."""
    normalization: Literal["mean_std", "min_max", "q01_q99"] = "q01_q99"
    action_form: Literal["recorded", "relative"] = "recorded"
    """`relative` learns actions as changes from the state: for those that command positions in the state's own dimensions,
    as joint targets do. The policy's actions are as recorded either way."""
    eval_fraction: Share = 0.1
    """Share of episodes held out, chosen by `training.seed`; at least one where it is above 0."""
    num_workers: Whole = 2
    streaming: bool = False
    """Read episode by episode, from the folder or the Hub, without ever having the whole on disk or in memory: through an
    `IterableDataset` of `datasets`, in an order that any run can go on in."""
    shuffle_episodes: Count = 8
    """Where streamed: episodes that each worker mixes at a time and keeps in memory."""
    mixture: list[Mixed] = field(default_factory=list)
    """Several datasets in place of `dataset`."""
    mixture_stats: Literal["per_dataset", "merged"] = "per_dataset"
    """How a mixture is normalised: each dataset by its own statistics, for robots or units that differ, so that who acts
    says which one's; or all by one set that covers them, for recordings of one robot."""
    on_error: Literal["raise", "skip"] = "raise"
    """What an episode or a sample that can't be read or learned from does: end the run with an error that names it, or be
    left out and counted in `run.json`."""
    video_backend: Literal["pyav", "torchcodec"] = "pyav"
    """What decodes videos. torchcodec is an extra that wants FFmpeg's libraries on the machine; it gives the same pictures
    for the same processor time, within 3 % (`benchmarks/results/video_decoders.json`)."""
    picture_cache_bytes: Whole = 0
    """Decoded pictures that each worker keeps in memory; for sets that are read many times and fit."""


@_strict
class Memory:
    """The promise: what the run may use, and what it does when that is not enough."""

    budget: str | None = None
    """Bytes that the run may use on one GPU, as "28GiB": training keeps to them even where more is free. None plans for what
    is free, less 10 %, and leaves the run uncapped."""
    gpus: Count | None = None
    """Processes, one a GPU, that the recipe is for; training refuses any other number. None takes what is launched."""
    optimizer_in_backward: bool = False
    """Update each weight as soon as its gradient is there, and free the gradient: no clipping, and no accumulation."""
    embedding_state_bits: Literal[32, 8] = 32
    """Bits in which an 8-bit `training.optim` keeps the moments of embeddings. Trainer's way, 32, takes 0.79 GB more for
    LLaMA-2-7B."""
    encode_ahead: Whole = 0
    """Pairs that a frozen VGGT encodes at once, before an optimizer step and for all its micro-batches; 0 lets each of them
    encode its own. More than a micro-batch is faster where that is small, fewer take less memory; only rounding differs."""
    encode_overlap: bool = False
    """Encode the pairs of the next optimizer step beside the training on this one, on a CUDA stream of their own, where
    `encode_ahead` is above 0. It changes no number, takes VGGT's memory beside training's instead of in turn with it, and is
    given up where memory runs out. Off, since only a GPU can say where it pays: nothing is predicted of its speed."""
    cache: list[Literal["vggt", "lang_encoder"]] = field(default_factory=list)
    """Frozen backbones whose outputs are read from a cache where `hf-vla cache` has built one, so that they aren't even
    loaded; where it hasn't, they run in each step. A cache of anything else than this recipe is an error."""
    cache_dir: str | None = None
    """Folder of the caches; None takes `cache/DATASET`."""
    cache_dtype: Literal["auto", "float32", "bfloat16", "float8"] = "auto"
    """What features are stored as. `auto` is the dtype in which backbones give them, that of `model.dtype`, and rounds
    nothing. Another takes less of the disk and changes the training: `float8` takes half of what `bfloat16` does, each
    number off by up to 1/16 of itself."""
    cache_copies: Whole = 0
    """Augmented copies of each observation that are cached, one of which is drawn each time; what augments wants some."""
    cache_budget: str | None = None
    """Bytes that one cache may take on the disk, as "200GiB"; None takes what is free."""


@_strict
class Evaluation:
    """How the trained policy is judged."""

    simulator: Literal["none", "metaworld"] = "none"
    tasks: list[str] = field(default_factory=list)
    episodes: Count = 20
    """Rollouts of each task, each from a start position that training has not seen."""
    seed: Whole = 10_000
    """First start position; recording uses seeds below it."""
    image_size: Count = 224
    field_of_view: dict[str, float] = field(default_factory=dict)
    action_repeat: Count = 4
    """Of the simulator: how the demonstrations were recorded."""
    max_steps: Count = 100
    """Actions after which a rollout counts as failed."""
    n_action_steps: Count = 8
    """Actions of a chunk that are carried out before the next look."""
    dataset: str | None = None
    """Of a policy of several datasets: the one whose robot is simulated, or acts."""
    swapped: dict[str, str] = field(default_factory=dict)
    """Task to the task whose instruction it is given instead, to see whether the policy listens."""


@_strict
class Hub:
    """Where the run is pushed, if `training.push_to_hub` says so."""

    repo_id: str | None = None
    private: bool = True


TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "max_steps": 10_000,
    "gradient_accumulation_steps": 1,
    "bf16": True,
    "save_steps": 1_000,
    "save_total_limit": 2,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # it hides what isn't finite, and waits for the GPU after every step
    "seed": 0,
    "report_to": ["tensorboard"],
}
"""Where our defaults differ from `TrainingArguments`; every other field keeps the library's own."""


@dataclasses.dataclass
class Recipe:
    """One run, fully described. `training` holds fields of `transformers.TrainingArguments`."""

    about: About = field(default_factory=About)
    model: Model = field(default_factory=Model)
    lora: Lora = field(default_factory=Lora)
    data: Data = field(default_factory=Data)
    memory: Memory = field(default_factory=Memory)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    hub: Hub = field(default_factory=Hub)

    @property
    def stored_dtype(self) -> str:
        """What cached features are stored as: `memory.cache_dtype`, settled."""
        return self.model.dtype if self.memory.cache_dtype == "auto" else self.memory.cache_dtype

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved recipe, every default written out, as JSON can hold it."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe; `load_recipe` of that file gives an equal one."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")
