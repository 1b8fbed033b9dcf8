"""Backbones and tokenizer, from released weights or from a config alone.

A source is a Hub id, a folder, a file (VGGT only), or a dict of config keys for random weights.
"""

from .decoder import attend_without_asking, lang_encoder_config, load_lang_encoder, quantize_skeleton
from .geometry import load_geometry_heads
from .tokenizer import byte_tokenizer, load_tokenizer
from .vggt import load_vggt, vggt_config

__all__ = [
    "attend_without_asking",
    "byte_tokenizer",
    "lang_encoder_config",
    "load_geometry_heads",
    "load_lang_encoder",
    "load_tokenizer",
    "load_vggt",
    "quantize_skeleton",
    "vggt_config",
]
