"""GPU memory of vLLM: what a log says it took, and what a model will take."""
