"""Triton kernels for the attention of decode steps on CUDA; nothing outside this package imports Triton.

Every kernel is flash-decoding: programs attend over one split of the tokens of one KV head each and store weighted sums
with the maximum and the total of their logits (``split`` kernels), and a small second kernel joins the splits by
log-sum-exp. All query heads of a KV head are rows of one matrix, so keys and values are read once and never expanded.

With ``TRITON_INTERPRET=1`` in the environment the kernels run, slowly, on CPU tensors for tests.
"""
