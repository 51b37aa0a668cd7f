"""A GGUF file made for tests."""

from pathlib import Path

import gguf as gguf_files
import numpy as np

TINY_VOCAB = 32


def write_tiny(
    path: Path,
    split: int = 0,
    tokenizer: str = "llama",
    flat_head: bool = False,
    arch: str = "llama",
    heads: int = 2,
) -> None:
    """A random two-layer llama of 32 ids, positions for 64 tokens; `split` tensors per file when not 0."""
    rng = np.random.default_rng(7)
    writer = gguf_files.GGUFWriter(path, arch, split_max_tensors=split)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads // 2)
    writer.add_rope_dimension_count(64 // max(1, heads))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(TINY_VOCAB)
    writer.add_file_type(gguf_files.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model(tokenizer)
    if tokenizer == "llama":
        names = ["<unk>", "<s>", "</s>", "▁"] + [chr(ord("a") + i) for i in range(TINY_VOCAB - 4)]
        kinds = [2, 3, 3] + [1] * (TINY_VOCAB - 3)
        writer.add_token_list(names)
        writer.add_token_scores([-float(i) for i in range(TINY_VOCAB)])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(True)
        writer.add_add_space_prefix(False)
    shapes = {"token_embd.weight": (TINY_VOCAB, 64), "output.weight": (TINY_VOCAB, 64)}
    for i in range(2):
        layer = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
        layer |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32) * (0 if flat_head and name[0] == "o" else 0.4)
        writer.add_tensor(name, values)
    for name in ("output_norm", *(f"blk.{i}.{kind}_norm" for i in range(2) for kind in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
