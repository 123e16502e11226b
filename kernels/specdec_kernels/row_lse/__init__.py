"""Log-sum-exp, arg-max and chosen log-probabilities of rows of logits: reference.py says what, gpu.py how fast."""
