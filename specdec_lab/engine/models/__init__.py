"""Model runners: FastLlama for speed, HFRunner for any transformers causal LM; both write and read our KV cache."""
