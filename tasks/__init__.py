"""What a model is asked and how its answer is scored. No model code here, and no method code."""
