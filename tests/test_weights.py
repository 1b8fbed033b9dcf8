"""Backbones load from every form of their release, exactly or not at all, and each failure says what to do."""

import json
import logging
import shutil
import types

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_vla import weights
from hf_vla.model.configuration_vla import VGGTConfig
from hf_vla.model.modeling_vggt import VGGTModel
from hf_vla.weights import files

VGGT_KEYS = {"img_size": 28, "embed_dim": 16, "depth": 2, "num_heads": 2, "encoder_depth": 1, "encoder_num_heads": 2}
LLAMA_KEYS = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
LLAMA_KEYS |= {"num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture
def vggt():
    torch.manual_seed(0)
    return VGGTModel(VGGTConfig(**VGGT_KEYS))


@pytest.fixture
def tensors(vggt):
    """What a release's file holds: the aggregator and a head."""
    aggregator = {f"aggregator.{name}": tensor for name, tensor in vggt.state_dict().items()}
    return aggregator | {"camera_head.empty_pose_tokens": torch.zeros(1, 1, 9)}


@pytest.fixture
def folder(tmp_path, tensors):
    (tmp_path / "config.json").write_text(json.dumps({"enable_camera": True, **VGGT_KEYS}))
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**LLAMA_KEYS)).save_pretrained(folder)
    return folder


def rewritten(llama_folder, tmp_path, change):
    """Copy a LLaMA folder with its tensors changed."""
    copy = shutil.copytree(llama_folder, tmp_path / "changed")
    save_file(change(load_file(copy / "model.safetensors")), copy / "model.safetensors", metadata={"format": "pt"})
    return str(copy)


def assert_same_weights(loaded, original, dtype=torch.float32):
    state = loaded.state_dict()
    assert state.keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert state[name].dtype == dtype
        assert torch.equal(state[name], tensor.to(dtype)), name


def test_vggt_from_a_folder(folder, vggt):
    loaded = weights.load_vggt(str(folder))
    assert_same_weights(loaded, vggt)
    assert not loaded.training
    assert not loaded.patch_embed.mask_token.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["model.pt", "vggt_1B_commercial.pt"])
def test_vggt_from_a_torch_checkpoint(folder, tensors, vggt, name, dtype):
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / name)
    assert_same_weights(weights.load_vggt(str(folder), dtype), vggt, dtype)
    assert_same_weights(weights.load_vggt(str(folder / name), dtype), vggt, dtype)


def test_vggt_owns_its_weights(folder, vggt):
    """Not the file's memory: overwriting the checkpoint mustn't change a model that is running."""
    loaded = weights.load_vggt(str(folder / "model.safetensors"))
    content = (folder / "model.safetensors").read_bytes()
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(len(content) // 2)
        file.write(bytes(len(content) // 2))
    assert_same_weights(loaded, vggt)


def test_vggt_is_read_as_deep_as_it_is_built(folder, vggt):
    loaded = weights.load_vggt(str(folder), depth=1)
    pixels = torch.rand(1, 2, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(loaded(pixels, layers=[-1])[0], vggt.eval()(pixels, layers=[0])[0])
    assert len(loaded.frame_blocks) == len(loaded.global_blocks) == 1


def test_vggt_of_keys_is_random():
    first, second = (weights.load_vggt(VGGT_KEYS, torch.bfloat16) for _ in range(2))
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first.frame_blocks[0].mlp.fc1.weight, second.frame_blocks[0].mlp.fc1.weight)


def test_vggt_shapes_say_the_config(folder):
    """Without config.json, as the released .pt files come; only what no shape tells is needed."""
    (folder / "config.json").write_text(json.dumps({"encoder_num_heads": 2}))
    config = weights.vggt_config(str(folder / "model.safetensors"))
    assert {key: getattr(config, key) for key in VGGT_KEYS} == VGGT_KEYS
    assert (config.num_register_tokens, config.mlp_ratio, config.encoder_mlp_ratio) == (4, 4, 4)
    assert config.qk_norm


def test_vggt_heads_that_nothing_tells(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="don't tell encoder_num_heads"):
        weights.load_vggt(str(folder))


def test_vggt_missing_weights_are_listed(folder, tensors):
    for name in ("aggregator.frame_blocks.1.ls2.gamma", "aggregator.patch_embed.cls_token"):
        del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"2 missing: aggregator\.frame_blocks\.1\.ls2\.gamma, .*cls_token\."):
        weights.load_vggt(str(folder))


def test_vggt_missing_blocks_are_counted(folder, tensors):
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("aggregator.global_blocks.")}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"36 missing: aggregator\.global_blocks\.0\.[^;]* and 31 more"):
        weights.load_vggt(str(folder))


@pytest.mark.parametrize("name", ["gaussian_head.norm.weight", "aggregator.frame_blocks.0.attn.rope", "norm.weight"])
def test_vggt_unexpected_weights_are_listed(folder, tensors, name):
    save_file({**tensors, name: torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"1 unexpected: {name}"):
        weights.load_vggt(str(folder))


@pytest.mark.parametrize("head", ["camera_head", "point_head", "depth_head", "track_head"])
def test_vggt_heads_may_be_there(folder, tensors, vggt, head):
    save_file({**tensors, f"{head}.norm.weight": torch.zeros(3)}, folder / "model.safetensors")
    assert_same_weights(weights.load_vggt(str(folder)), vggt)


def test_vggt_of_another_shape(folder):
    (folder / "config.json").write_text(json.dumps({**VGGT_KEYS, "img_size": 42}))
    with pytest.raises(ValueError, match=r"1 of another shape: .*pos_embed \(1, 5, 16\) instead of \(1, 10, 16\)"):
        weights.load_vggt(str(folder))


def test_vggt_omega_is_named(folder, tensors):
    renamed = {name.replace("global_blocks", "inter_frame_blocks"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds VGGT-Omega.*give facebook/VGGT-1B"):
        weights.load_vggt(str(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("kept", [0, 100, -100])
def test_damaged_file(folder, tensors, name, kept):
    path = folder / name
    torch.save(tensors, folder / "model.pt")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="can't be read as weights, it is cut short or damaged"):
        weights.load_vggt(str(path))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"a": types.SimpleNamespace()}, "Python objects, which could run code"),
        ({"model": {"a": torch.zeros(1)}, "epoch": 3}, r"epoch \(int\), model \(dict\)"),
        ([torch.zeros(1)], "one list"),
    ],
)
def test_torch_checkpoint_of_more_than_tensors(tmp_path, content, found):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=f"must hold tensors by name and nothing else; it holds {found}"):
        weights.load_vggt(str(tmp_path / "model.pt"))


def test_config_that_is_no_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json can't be read as JSON"):
        weights.load_vggt(str(folder))


def test_source_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder here, nor a Hub id"):
        weights.load_vggt(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match=r"has no VGGT weights: looked for model.safetensors, model.pt"):
        weights.load_vggt(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="has no config of a language model"):
        weights.load_lang_encoder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        weights.load_tokenizer(str(tmp_path))


def serve(monkeypatch, content):
    """Stand in for the Hub: a repository of these files, or an error for whatever is asked."""

    def download(repo, name):
        if isinstance(content, Exception):
            raise content
        if name not in content:
            raise RemoteEntryNotFoundError(name, response=response())
        return str(content[name])

    monkeypatch.setattr(files, "hf_hub_download", download)


def response():
    return types.SimpleNamespace(headers={}, request=None)


def test_vggt_from_the_hub(folder, tensors, vggt, monkeypatch):
    torch.save(tensors, folder / "vggt_1B_commercial.pt")
    released = {name: folder / name for name in ("config.json", "vggt_1B_commercial.pt")}
    serve(monkeypatch, released)
    assert_same_weights(weights.load_vggt("someone/vggt"), vggt)
    assert weights.vggt_config("someone/vggt").embed_dim == 16


def test_gated_repository(monkeypatch):
    serve(monkeypatch, GatedRepoError("403", response=response()))
    with pytest.raises(FileNotFoundError, match=r"is gated\. Accept its licence at https.* log in: hf auth login"):
        weights.load_lang_encoder("meta-llama/Llama-2-7b-hf")


def test_no_network(monkeypatch):
    serve(monkeypatch, LocalEntryNotFoundError("offline"))
    for load in (weights.load_vggt, weights.load_lang_encoder, weights.load_tokenizer):
        with pytest.raises(FileNotFoundError, match=r"the Hub can't be reached\. Connect and run `hf download"):
            load("facebook/VGGT-1B")


def test_released_configs_need_no_network(monkeypatch):
    serve(monkeypatch, LocalEntryNotFoundError("offline"))
    with torch.device("meta"):
        vggt = VGGTModel(weights.vggt_config("facebook/VGGT-1B"))
        llama = AutoModel.from_config(weights.lang_encoder_config("meta-llama/Llama-2-7b-hf"))
    assert vggt.num_parameters() == 909_112_320
    assert llama.num_parameters() == 6_607_343_616


def test_unknown_config_keys():
    with pytest.raises(ValueError, match=r"model.vggt: unknown config key 'embed_dims'. Did you mean 'embed_dim'"):
        weights.load_vggt({"embed_dims": 16})
    with pytest.raises(ValueError, match=r"model.lang_encoder: .*'hiden_size'. Did you mean 'hidden_size'"):
        weights.load_lang_encoder({"hiden_size": 16})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoder_from_a_folder(llama_folder, dtype):
    loaded = weights.load_lang_encoder(str(llama_folder), dtype)
    assert_same_weights(loaded, LlamaForCausalLM.from_pretrained(llama_folder).model, dtype)
    assert loaded.config._attn_implementation == "causal_sdpa"


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_decoder_of_keys(kind):
    model = weights.load_lang_encoder({"model_type": kind, **LLAMA_KEYS}, torch.bfloat16)
    assert model.config.model_type == kind
    assert model.dtype == torch.bfloat16
    assert model(input_ids=torch.ones(1, 3, dtype=torch.long)).last_hidden_state.shape == (1, 3, 16)


def test_decoder_without_its_lm_head_is_no_cause_for_a_warning(llama_folder, monkeypatch):
    said = []
    logger = logging.getLogger("transformers.modeling_utils")
    monkeypatch.setattr(logger, "handle", said.append)
    AutoModel.from_pretrained(llama_folder)
    assert "lm_head" in said.pop().getMessage()
    weights.load_lang_encoder(str(llama_folder))
    assert not said


def test_decoder_leaves_only_the_lm_head_out(llama_folder, tmp_path):
    extra = rewritten(llama_folder, tmp_path / "a", lambda tensors: {**tensors, "model.gate": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"1 unexpected: model\.gate\."):
        weights.load_lang_encoder(extra)
    missing = rewritten(
        llama_folder, tmp_path / "b", lambda tensors: {n: t for n, t in tensors.items() if "q_proj" not in n}
    )
    with pytest.raises(ValueError, match=r"1 missing: layers\.0\.self_attn\.q_proj\.weight"):
        weights.load_lang_encoder(missing)
    reshaped = rewritten(llama_folder, tmp_path / "c", lambda tensors: {**tensors, "model.norm.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"1 of another shape: norm\.weight"):
        weights.load_lang_encoder(reshaped)


def test_decoder_whose_weights_are_damaged_or_gone(llama_folder, tmp_path):
    copy = shutil.copytree(llama_folder, tmp_path / "copy")
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="cut short or damaged"):
        weights.load_lang_encoder(str(copy))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"its weights can't be loaded.*model\.safetensors"):
        weights.load_lang_encoder(str(copy))


def test_encoder_decoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ValueError, match="is a t5: the language encoder must be a decoder"):
        weights.lang_encoder_config(str(tmp_path))


@pytest.mark.parametrize(("quantization", "bits"), [("nf4", torch.uint8), ("int8", torch.int8)])
def test_quantised_decoder(llama_folder, quantization, bits):
    pytest.importorskip("bitsandbytes")
    for source in (str(llama_folder), LLAMA_KEYS):
        model = weights.load_lang_encoder(source, torch.bfloat16, quantization)
        assert model.layers[0].mlp.up_proj.weight.dtype == bits
        assert model.norm.weight.dtype == torch.bfloat16
    if quantization == "nf4":
        assert model.layers[0].mlp.up_proj.weight.quant_state.nested


def test_evaluating_leaves_quantised_weights_as_they_are():
    pytest.importorskip("bitsandbytes")
    keys = {**LLAMA_KEYS, "hidden_size": 64, "intermediate_size": 64}
    model = weights.load_lang_encoder(keys, torch.float32, "nf4")
    projection = model.layers[0].mlp.up_proj
    x = torch.randn(1, 3, 64, requires_grad=True)
    packed, expected = projection.weight.data.clone(), torch.autograd.grad(projection.train()(x).sum(), x)[0]
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(3)[None])
    assert torch.equal(projection.weight.data, packed)
    assert torch.equal(torch.autograd.grad(projection.train()(x).sum(), x)[0], expected)


def test_unknown_quantization():
    with pytest.raises(ValueError, match="Unknown quantization 'int3'; allowed: none, nf4, int8"):
        weights.load_lang_encoder(LLAMA_KEYS, quantization="int3")


def test_byte_tokenizer_keeps_any_text(tmp_path):
    weights.load_tokenizer(LLAMA_KEYS).save_pretrained(tmp_path)
    tokenizer = weights.load_tokenizer(str(tmp_path))
    text = "Öffne die  Schublade…\n抽屉"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == 259
    batch = tokenizer(["a", "abc"], padding=True)
    assert batch.attention_mask == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == ids
