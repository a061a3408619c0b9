"""PyramidInfer (arXiv 2405.12532): fewer tokens go on from layer to layer, already while the prompt is read."""
