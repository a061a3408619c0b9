"""The engine: prefill, decode, feed, generate and score with a transformers causal LM and a kvbench cache.

    logits = prefill(model, cache, input_ids, attention_mask)   # run the prompt and compress its cache
    logits = decode(model, cache, token)                        # one more token per row
    for logits in feed(model, cache, ids):                      # several more tokens per row

Everything that differs between methods happens inside the cache.
"""

from .batching import left_padded
from .decoding import decode, decode_step, feed
from .generation import Generation, generate
from .likelihoods import score
from .prefilling import prefill
from .sampling import Sampling
from .step import DecodeStep

__all__ = [
    "DecodeStep",
    "Generation",
    "Sampling",
    "decode",
    "decode_step",
    "feed",
    "generate",
    "left_padded",
    "prefill",
    "score",
]
