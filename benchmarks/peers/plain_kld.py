"""KL divergence of two checkpoints by transformers, in float64, written down plainly. Knows nothing of evalq.

    python benchmarks/peers/plain_kld.py --reference bf16/ --model int4/ --text wiki.test.raw --rows 4

Both run in float32, windows side by side as in the GPTQ papers, every token but a window's first is scored.
Keys: kld, same_top, acceptance, tokens; "top" holds for each K the mean of the reference's most probable K
tokens and one bucket for all others: a lower bound of kld, computed here by its definition.
"""

import argparse
import json
from pathlib import Path

import torch
import wikitext
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig


def load(folder: Path) -> torch.nn.Module:
    """A checkpoint in float32, decompressed where it is compressed."""
    config = json.loads((folder / "config.json").read_text())
    more = (
        {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        if "quantization_config" in config
        else {}
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model


def main() -> None:
    """Window by window."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("reference", "model", "text"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--top", type=int, nargs="*", default=[])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.reference)
    ids = torch.tensor(tokenizer(wikitext.joined(args.text), verbose=False).input_ids)
    windows = ids[: args.rows * args.length].reshape(args.rows, args.length)
    reference, model = load(args.reference), load(args.model)
    kld, same, accepted = [], [], []
    top: dict[int, list[torch.Tensor]] = {k: [] for k in args.top}
    with torch.inference_mode():
        for window in windows:
            p = reference(window[None]).logits[0, :-1].double().log_softmax(-1)
            q = model(window[None]).logits[0, :-1].double().log_softmax(-1)
            kld.append((p.exp() * (p - q)).sum(-1))
            same.append(p.argmax(-1) == q.argmax(-1))
            accepted.append(torch.minimum(p.exp(), q.exp()).sum(-1))
            for k, found in top.items():
                ids_k = p.topk(k).indices
                p_k, q_k = p.gather(-1, ids_k), q.gather(-1, ids_k)
                p_rest, q_rest = 1 - p_k.exp().sum(-1), 1 - q_k.exp().sum(-1)
                rest = torch.where(p_rest > 1e-9, p_rest * (p_rest / q_rest.clamp_min(1e-12)).log(), 0.0)
                found.append((p_k.exp() * (p_k - q_k)).sum(-1) + rest)
    print(
        json.dumps(
            {
                "kld": float(torch.cat(kld).mean()),
                "same_top": float(torch.cat(same).double().mean()),
                "acceptance": float(torch.cat(accepted).mean()),
                "tokens": int(torch.cat(kld).numel()),
                "top": {str(k): float(torch.cat(found).mean()) for k, found in top.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
