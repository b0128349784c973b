"Attention with the dropout mask of the Triton kernels, in plain PyTorch; stands in for the kernels on a CPU."

import torch
from torch import Tensor

_WORD = 2**32 - 1


def kept_weights(
    seed: int,
    heads: int,
    tokens: int,
    dropped: int,  # Of 256 weights
) -> Tensor:  # [heads, tokens, tokens] bool
    "Return where attention weights are kept."
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    place = (query & ~8) * 0x9E3779B1 + (key & ~8) * 0x27D4EB2F
    masks = []
    for head in range(heads):
        mixed = (seed + (head + 1) * 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
        word = (place + (mixed & _WORD)) & _WORD
        word = (word ^ word >> 16 ^ mixed >> 32) * 0x21F0AAAD & _WORD
        word = (word ^ word >> 15) * 0x735A2D97 & _WORD
        byte = (query & 8) // 4 + (key & 8) // 8
        masks.append((word >> byte * 8 & 255) >= dropped)
    return torch.stack(masks)


def _weights(query: Tensor, key: Tensor, bounds: Tensor, scale: float) -> Tensor:  # [heads, tokens, tokens]
    keys = torch.arange(len(key))
    inside = (keys >= bounds[0, :, None]) & (keys < bounds[1, :, None])
    logits = query.transpose(0, 1) @ key.permute(1, 2, 0) * scale
    return torch.softmax(logits.masked_fill(~inside, float("-inf")), -1)


def attend_reference(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float, kept: Tensor | None, dropped: int
) -> Tensor:
    "Attend within each sequence, with a mask of the weights that are kept."
    weights = _weights(query, key, bounds, scale)
    if kept is not None:
        weights = weights * kept * (256 / (256 - dropped))
    return (weights @ value.transpose(0, 1)).transpose(0, 1)


def _factors(query: Tensor, seed: Tensor | None, dropped: int) -> Tensor | float:
    if not dropped:
        return 1.0
    return kept_weights(int(seed), query.shape[1], len(query), dropped) * (256 / (256 - dropped))


def attend(query, key, value, bounds, seed, dropped, scale):
    "The operator `langmlm::attend_triton` on a CPU; its second output has no contents."
    kept = _weights(query, key, bounds, scale) * _factors(query, seed, dropped)
    output = (kept.to(value.dtype) @ value.transpose(0, 1)).transpose(0, 1).contiguous()
    return output, torch.zeros(query.shape[1], (len(query) + 255) // 128 * 128)


def attend_backward(gradient, query, key, value, bounds, seed, output, logsumexp, dropped, scale):
    "The operator `langmlm::attend_triton_backward` on a CPU."
    weights, factors = _weights(query, key, bounds, scale), _factors(query, seed, dropped)
    q, k, v, g = (tensor.transpose(0, 1) for tensor in (query, key, value, gradient))
    grad_weights = (g @ v.mT) * factors
    grad_logits = (weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) * scale).to(q.dtype)
    gradients = grad_logits @ k, grad_logits.mT @ q, (weights * factors).to(g.dtype).mT @ g
    return tuple(made.transpose(0, 1).contiguous() for made in gradients)
