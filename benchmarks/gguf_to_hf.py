"""A Hugging Face checkpoint in BF16 of what a GGUF file holds, for measurements that need both.

    python benchmarks/gguf_to_hf.py MODEL.gguf TOKENIZER OUT

Weights are those of the file, dequantized by transformers and rounded to BF16. TOKENIZER is a folder with the
tokenizer's files, which are copied.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GgufConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def main() -> None:
    """Read, round, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("gguf", "tokenizer", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    read = AutoModelForCausalLM.from_pretrained(
        given.gguf.parent,
        gguf_file=given.gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # A model of its own: what was read from a GGUF file is written with the marks of one.
    config = type(read.config)(
        **{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(given.out)
    for name in TOKENIZER_FILES:
        if (given.tokenizer / name).is_file():
            shutil.copyfile(given.tokenizer / name, given.out / name)


if __name__ == "__main__":
    main()
