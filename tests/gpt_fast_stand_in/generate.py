"""Decoding with the surface that our adapter for gpt-fast relies on; written for the tests, nothing copied."""

import torch
import torch._inductor.config
from model import Transformer
from tokenizer import get_tokenizer  # noqa: F401  # the command line needs it, and we do not

torch._inductor.config.coordinate_descent_tuning = True  # as the real one does, for the whole process


def decode_one_token(model: Transformer, ids, positions):
    return model(ids, positions)[:, -1].argmax(-1, keepdim=True)


def model_forward(model, ids, positions):
    return model(ids, positions)


@torch.no_grad()
def generate(model, prompt, max_new_tokens, batch_size, *, interactive, draft_model, speculate_k, temperature, top_k):
    assert (batch_size, interactive, top_k) == (1, False, 1)
    length, accepted = prompt.shape[0], [0] * (speculate_k + 1)
    first = {}
    for net in filter(None, (model, draft_model)):
        net.setup_caches(max_batch_size=1, max_seq_length=length + max_new_tokens + speculate_k + 1)
        first[net] = int(net(prompt[None], torch.arange(length))[:, -1].argmax(-1))
    tokens = [*prompt.tolist(), first[model]]
    while len(tokens) < length + max_new_tokens:
        at = len(tokens) - 1
        if draft_model is None:
            tokens.append(int(decode_one_token(model, torch.tensor([[tokens[at]]]), torch.tensor([at]))))
            continue
        guessed = [tokens[at]]
        for step in range(speculate_k):
            guessed.append(int(decode_one_token(draft_model, torch.tensor([[guessed[-1]]]), torch.tensor([at + step]))))
        best = model_forward(model, torch.tensor([guessed]), torch.arange(at, at + speculate_k + 1))[0].argmax(-1).tolist()
        count = next((i for i in range(speculate_k) if guessed[i + 1] != best[i]), speculate_k)
        accepted[count] += 1
        tokens += best[: count + 1]
    return torch.tensor([tokens[: length + max_new_tokens]]), {"accept_counts": accepted}
