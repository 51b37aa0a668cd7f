"""Dense weights behind packed ones, for looking inside, merging and fine-tuning.

    unpack_int4_weights(packed, scale, shape)      compressed-tensors' int32 layout, 4 bits or 1, 2, 8
    unpack_nvfp4_weights(packed, scale, global_scale)
    unpack_mxfp4_weights(packed, scale)
    WeightCache(max_bytes).weight(file, name)      the same by name out of a file, kept for the next call

Importing this imports torch and compressed-tensors.
"""

from evalq.convert.unpack.cache import WeightCache
from evalq.convert.unpack.packed import unpack_int4_weights, unpack_mxfp4_weights, unpack_nvfp4_weights

__all__ = ["WeightCache", "unpack_int4_weights", "unpack_mxfp4_weights", "unpack_nvfp4_weights"]
