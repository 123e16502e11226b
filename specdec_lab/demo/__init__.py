"""The shipped model pair: its text, its tokenizer, its weights and the scripts that made them."""
