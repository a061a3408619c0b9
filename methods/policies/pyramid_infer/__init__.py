"""PyramidInfer (arXiv 2405.12532): each layer forwards fewer prompt tokens to the next."""
