"""A padded checkpoint computes what the original does."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from conftest import ROOT

SCRIPT = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(hidden_size=192, intermediate_size=200, num_hidden_layers=2, num_attention_heads=3,
                     num_key_value_heads=1, vocab_size=100, tie_word_embeddings=True, initializer_range=0.2)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
"""


def run(*arguments: object) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], check=True, capture_output=True)


def test_padding_changes_sizes_and_no_logit(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "padded"
    run("-W", "ignore", "-c", SCRIPT, source)
    run(ROOT / "demo" / "pad.py", source, target)
    config = json.loads((target / "config.json").read_text())
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    assert (config["hidden_size"], config["intermediate_size"], heads) == (384, 256, (6, 2))
    from transformers import LlamaForCausalLM

    ids = torch.arange(40)[None]
    with torch.inference_mode():
        one, two = (LlamaForCausalLM.from_pretrained(path)(ids).logits for path in (source, target))
    assert torch.allclose(one, two, atol=1e-4) and one.std() > 0.1
