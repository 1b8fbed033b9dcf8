"""The policy as Hugging Face parts: what travels to the Hub. Needs torch and transformers and no more."""
