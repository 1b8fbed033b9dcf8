"""Configuration of the policy: one VLAConfig that holds the configs of its four parts."""

from transformers import AutoConfig, PreTrainedConfig


class VGGTConfig(PreTrainedConfig):
    """Configuration of VGGT's aggregator; the defaults are those of facebook/VGGT-1B.

    Args:
        img_size: side of the square image, in pixels, that the position embedding was trained at.
        patch_size: side of a patch in pixels.
        embed_dim: width C of every block; outputs are 2C wide.
        depth: number of frame blocks, and of global blocks.
        num_heads: attention heads of a frame or global block.
        mlp_ratio: hidden width of a block's MLP over C.
        num_register_tokens: register tokens of a view, beside its one camera token.
        qk_norm: whether queries and keys pass a LayerNorm before the rotary embedding.
        rope_freq: base of the rotary frequencies.
        init_values: initial LayerScale of frame and global blocks.
        encoder_depth: number of blocks of the patch encoder (DINOv2).
        encoder_num_heads: attention heads of the patch encoder.
        encoder_mlp_ratio: hidden width of the patch encoder's MLPs over C.
        encoder_init_values: initial LayerScale of the patch encoder.
    """

    model_type = "hf_vla_vggt"

    def __init__(
        self,
        img_size: int = 518,
        patch_size: int = 14,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_register_tokens: int = 4,
        qk_norm: bool = True,
        rope_freq: float = 100.0,
        init_values: float = 0.01,
        encoder_depth: int = 24,
        encoder_num_heads: int = 16,
        encoder_mlp_ratio: float = 4.0,
        encoder_init_values: float = 1.0,
        **kwargs,
    ):
        self.img_size = img_size
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.depth = depth
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.num_register_tokens = num_register_tokens
        self.qk_norm = qk_norm
        self.rope_freq = rope_freq
        self.init_values = init_values
        self.encoder_depth = encoder_depth
        self.encoder_num_heads = encoder_num_heads
        self.encoder_mlp_ratio = encoder_mlp_ratio
        self.encoder_init_values = encoder_init_values
        super().__init__(**kwargs)


class FusionConfig(PreTrainedConfig):
    """Configuration of the fusion: how view tokens, text and robot state meet.

    Args:
        type: `cross_attention` (action queries attend to view tokens and text states; LLaMA reads text only), `gated`
            (the same, with a gate on the view tokens that the text controls) or `prefix` (view tokens, text and state
            run through LLaMA, followed by action queries).
        hidden_size: width of the fusion, and of the context that the head reads.
        num_layers: transformer blocks of the fusion; `prefix` has none, LLaMA's layers do its work.
        num_heads: attention heads of a block.
        dropout: dropout probability inside the blocks.
        align_weight: weight of the auxiliary loss that draws a middle LLaMA layer towards VGGT's tokens; 0 leaves it
            out. `prefix` only.
        align_layer: the LLaMA layer whose states are aligned; None takes the middle one.
    """

    model_type = "hf_vla_fusion"

    def __init__(
        self,
        type: str = "cross_attention",
        hidden_size: int = 1024,
        num_layers: int = 4,
        num_heads: int = 16,
        dropout: float = 0.0,
        align_weight: float = 0.0,
        align_layer: int | None = None,
        **kwargs,
    ):
        self.type = type
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.dropout = dropout
        self.align_weight = align_weight
        self.align_layer = align_layer
        super().__init__(**kwargs)


class HeadConfig(PreTrainedConfig):
    """Configuration of the action head.

    Args:
        type: `l1` (regression), `flow` (flow matching) or `discrete` (quantile bins, decoded in parallel).
        hidden_size: width of the head's layers.
        num_layers: layers of the head.
        num_inference_steps: Euler steps of `flow`.
        beta: the two parameters of the Beta distribution that `flow` draws its times from.
        num_bins: bins of a dimension for `discrete`.
    """

    model_type = "hf_vla_head"

    def __init__(
        self,
        type: str = "l1",
        hidden_size: int = 1024,
        num_layers: int = 2,
        num_inference_steps: int = 10,
        beta: tuple[float, float] = (1.5, 1.0),
        num_bins: int = 256,
        **kwargs,
    ):
        self.type = type
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_inference_steps = num_inference_steps
        self.beta = tuple(beta)
        self.num_bins = num_bins
        super().__init__(**kwargs)


class VLAConfig(PreTrainedConfig):
    """Configuration of the whole policy.

    Args:
        vggt_config: config (or its dict) of the geometry backbone.
        text_config: config (or its dict) of the language backbone, any decoder that `AutoModel` builds.
        view_fusion_config: config (or its dict) of the fusion; plain `fusion_config` is transformers' own, for kernels.
        head_config: config (or its dict) of the action head.
        num_views: views of an observation, V.
        state_dim: robot state dimensions, S.
        action_dim: action dimensions, A.
        chunk_size: actions predicted at once, T.
        vggt_layer: index of the VGGT layer whose patch tokens are used; negative counts from the end.
        pool_grid: side g of the grid that each view's patch tokens are pooled to; g² tokens a view.
        initializer_range: standard deviation of newly made embeddings and queries; linear layers are scaled by their inputs.
    """

    model_type = "hf_vla"
    _auto_class = "AutoConfig"  # as VLAForActionPrediction's: a saved directory holds the code too
    sub_configs = {  # noqa: RUF012 - the name and form that transformers reads
        "vggt_config": VGGTConfig,
        "text_config": AutoConfig,
        "view_fusion_config": FusionConfig,
        "head_config": HeadConfig,
    }

    def __init__(
        self,
        vggt_config: VGGTConfig | dict | None = None,
        text_config: PreTrainedConfig | dict | None = None,
        view_fusion_config: FusionConfig | dict | None = None,
        head_config: HeadConfig | dict | None = None,
        num_views: int = 2,
        state_dim: int = 8,
        action_dim: int = 7,
        chunk_size: int = 16,
        vggt_layer: int = -1,
        pool_grid: int = 8,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        self.vggt_config = _sub_config(VGGTConfig, vggt_config)
        self.text_config = _text_config(text_config)
        self.view_fusion_config = _sub_config(FusionConfig, view_fusion_config)
        self.head_config = _sub_config(HeadConfig, head_config)
        self.num_views = num_views
        self.state_dim = state_dim
        self.action_dim = action_dim
        self.chunk_size = chunk_size
        self.vggt_layer = vggt_layer
        self.pool_grid = pool_grid
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


def _sub_config(cls, value):
    return value if isinstance(value, cls) else cls(**(value or {}))


def _text_config(value) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    value = dict(value or {})
    return AutoConfig.for_model(value.pop("model_type", "llama"), **value)
