"""What a person wants to train, in a few words, and the recipe that says so in full."""

from dataclasses import dataclass, replace

from hf_vla.recipe import Recipe, make_recipe

TRAIN = {"language": ("lora", "qlora", "full", "frozen"), "vggt": ("frozen", "lora", "full")}
ALLOW = ("quantize", "freeze", "image_size")
"""Changes that alter results, which the search makes only if allowed."""
SMALLER_SIZES = (392, 336, 224)


@dataclass(frozen=True)
class Wish:
    """A search's question."""

    language: str = "lora"
    vggt: str = "frozen"
    image_size: int | None = None
    """None takes the base recipe's."""
    effective_batch: int = 64
    gpus: int = 1
    allow: tuple[str, ...] = ()
    cached: bool = False
    """Whether to count on cached outputs of frozen backbones, which `hf-vla cache` builds first."""


def parse_train(text: str) -> dict[str, str]:
    """Read "language=lora,vggt=frozen".

    Raises:
        ValueError: for an unknown part or way to train it.
    """
    chosen = {}
    for item in text.split(","):
        part, _, way = (word.strip() for word in item.partition("="))
        if part not in TRAIN or way not in TRAIN[part]:
            allowed = "; ".join(f"{name}={'|'.join(ways)}" for name, ways in TRAIN.items())
            raise ValueError(f"--train {text}: {item!r} isn't a part and how to train it. Allowed: {allowed}.")
        chosen[part] = way
    return chosen


def recipe_of(wish: Wish, base: Recipe) -> Recipe:
    """Write a wish into a recipe; what it doesn't speak of stays the base's."""
    raw = base.to_dict()
    ways = {"lang_encoder": wish.language, "vggt": wish.vggt}
    for part, way in ways.items():
        raw["model"][f"freeze_{part}"] = way != "full"
    raw["model"]["quantization"] = "nf4" if wish.language == "qlora" else "none"
    raw["lora"]["apply_to"] = [part for part, way in ways.items() if way in ("lora", "qlora")]
    raw["data"]["image_size"] = wish.image_size or base.data.image_size
    raw["memory"]["gpus"] = wish.gpus
    return make_recipe(raw)


def allowed_changes(wish: Wish) -> list[tuple[Wish, tuple[str, ...]]]:
    """List the wish itself and each allowed change of it, with what that changes in the results."""
    options: list[tuple[Wish, tuple[str, ...]]] = [(wish, ())]
    if "quantize" in wish.allow and wish.language == "lora":
        options.append((replace(wish, language="qlora"), ("the language weights are rounded to 4 bits (NF4)",)))
    if "freeze" in wish.allow and wish.language == "full":
        options.append((replace(wish, language="lora"), ("LLaMA trains adapters only",)))
    if "freeze" in wish.allow and wish.vggt == "full":
        options.append((replace(wish, vggt="frozen"), ("VGGT stays frozen",)))
    if "image_size" in wish.allow:
        for size in SMALLER_SIZES:
            if size < (wish.image_size or 518):
                options.append((replace(wish, image_size=size), (f"pictures are {size} pixels wide",)))
    return options
