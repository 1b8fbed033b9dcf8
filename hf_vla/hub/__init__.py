"""Publishing a run on the Hugging Face Hub: what is sent, and the card that says what it is."""

from hf_vla.hub.publish import push, push_if_asked

__all__ = ["push", "push_if_asked"]
