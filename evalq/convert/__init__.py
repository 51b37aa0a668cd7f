"""Plain checkpoints out of quantized ones: dequantize, merge a LoRA adapter.

One way: stored weights, one at a time -> dense -> changed -> shards of a new directory.
"""
