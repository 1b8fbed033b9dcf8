import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_vla.data.collator import VLACollator
from hf_vla.model.processing_vla import VLAProcessor
from hf_vla.sample import Sample


def sample(i, task):
    return Sample(
        images=[np.full((20, 30, 3), 10 * i + v, np.uint8) for v in range(2)],
        state=np.full(3, i, np.float32),
        actions=np.full((4, 2), i / 10, np.float32),
        action_is_pad=np.array([False, False, i == 1, True]),
        task=task,
        episode_index=i,
        frame_index=0,
        source="doors",
    )


def make_processor():
    vocabulary = {"<pad>": 0, "<unk>": 1, "open": 2, "the": 3, "door": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = {"mean": 0, "std": 1, "min": -1, "max": 1, "q01": -1, "q99": 1}
    stats = {
        key: {name: [value] * dim for name, value in plain.items()}
        for key, dim in (("observation.state", 3), ("action", 2))
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<pad>")
    return VLAProcessor(
        fast, views=["front", "wrist"], stats=stats, image_size=14, normalization="mean_std", prompt="{task}"
    )


def test_a_batch_holds_every_sample_in_order_in_the_shapes_of_the_contract():
    batch = VLACollator(make_processor())([sample(0, "open"), sample(1, "open the door"), sample(2, "door")])
    assert batch["pixel_values"].shape == (3, 2, 3, 14, 14)
    assert batch["pixel_values"][:, :, 0, 0, 0].tolist() == [[0, 1], [10, 11], [20, 21]]
    assert batch["input_ids"].tolist() == [[2, 0, 0], [2, 3, 4], [4, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [1, 3, 1]
    assert batch["state"].shape == (3, 3)
    assert batch["actions"].shape == (3, 4, 2)
    assert batch["action_is_pad"].tolist() == [[False, False, i == 1, True] for i in range(3)]


def test_the_order_of_a_batch_does_not_matter():
    samples, collate = [sample(i, "open") for i in range(3)], VLACollator(make_processor())
    forward, backward = collate(samples), collate(samples[::-1])
    for key in forward:
        assert (forward[key] == backward[key].flip(0)).all(), key
