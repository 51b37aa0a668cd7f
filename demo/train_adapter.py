"""Train a small LoRA adapter with PEFT, to have one to evaluate.

    python demo/train_adapter.py --base models/smollm2/bf16 --out models/smollm2/adapter

It learns from the second half of the text that ships with evalq; the first half is left to be scored. The
base is a directory of transformers, quantized ones too (they are dequantized in memory, so the adapter is
trained on the weights it will be used with). Source: https://huggingface.co/docs/peft
"""

import argparse
import os
import sys
from importlib import resources
from pathlib import Path
from typing import Any

WINDOW_TOKENS = 128
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train_adapter(base: Path, out: Path, rank: int = 8, steps: int = 12, learning_rate: float = 1e-3) -> None:
    """Write a PEFT directory.

    Args:
        base: the model's directory, with its tokenizer.
        out: the directory to write; it must not exist.
        rank: r of every layer; alpha is twice that.
        steps: of AdamW, one window each.
        learning_rate: falls to zero over the steps.

    Raises:
        FileExistsError: `out` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    ids = _second_half(AutoTokenizer.from_pretrained(base, local_files_only=True))
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(_load(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    windows = torch.tensor(ids[: len(ids) // WINDOW_TOKENS * WINDOW_TOKENS]).view(-1, WINDOW_TOKENS)
    model.train()
    for step in range(steps):
        window = windows[step % len(windows), None]
        loss = model(window, labels=window).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(str(out))
    print(f"{out}: rank {rank}, {steps} steps, last loss {loss.item():.3f} nats a token")


def _load(base: Path) -> Any:
    """The model, dense; in float32, which CPUs multiply fastest."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    quantized = hasattr(AutoConfig.from_pretrained(base, local_files_only=True), "quantization_config")
    more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if quantized else {}
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True, **more)


def _second_half(tokenizer: Any) -> list[int]:
    text = resources.files("evalq.data").joinpath("sample.txt").read_text(encoding="utf-8")
    return list(tokenizer(text[len(text) // 2 :], add_special_tokens=False, verbose=False)["input_ids"])


def main(arguments: list[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Train a small LoRA adapter.")
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="the model it is for")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="PEFT directory to write")
    parser.add_argument("--rank", type=int, default=8, metavar="R")
    parser.add_argument("--steps", type=int, default=12, metavar="N")
    args = parser.parse_args(arguments)
    os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TORCHDYNAMO_DISABLE="1")
    try:
        train_adapter(args.base, args.out, args.rank, args.steps)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
