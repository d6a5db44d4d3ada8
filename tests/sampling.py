"""What the tests of both samplers share: seeds, repeated prompts, and log-probabilities found another way."""

import torch

PAD, BOS, EOS = 0, 1, 2
IDS = dict(eos_id=EOS, pad_id=PAD)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def repeated(queries, times):
    """Each query `times` times."""
    tokens, mask = queries
    return tokens.repeat_interleave(times, dim=0), mask.repeat_interleave(times, dim=0)


@torch.no_grad()
def teacher_forced(lm, prompt, response, temperature=1.0):
    """log π of each response token, from the plain model on the unpadded text alone: no cache, mask or position ids.

    The token at index i is predicted by the output at index i − 1.
    """
    ids = prompt + response
    log_probs = torch.log_softmax(lm(torch.tensor([ids]), use_cache=False).logits[0].double() / temperature, dim=-1)
    return [log_probs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))]
