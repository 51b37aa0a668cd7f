"""Dense weights out of packed ones: single layers, and which layers a checkpoint holds.

The arithmetic is compressed-tensors' (https://github.com/vllm-project/compressed-tensors); what is here finds
the tensors of a layer, checks them, and says what is wrong with them.
"""
