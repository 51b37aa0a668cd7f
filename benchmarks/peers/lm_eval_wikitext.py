"""Runs lm-evaluation-harness's own task `wikitext` over a local file, for comparison. Knows nothing of evalq.

The task is the installed one (its detokenizer, its counts, its metrics); only its data set is replaced by the
62 articles of wiki.test.raw, so that nothing is downloaded. Runs in the environment that make_lm_eval_env.sh
beside this file creates.

    .work/lm-eval/bin/python benchmarks/peers/lm_eval_wikitext.py --model models/smollm2/bf16 \
        --text wiki.test.raw --max-length 2048 --limit 4

Prints one JSON object: word_ppl, byte_ppl, bits_per_byte, documents, windows, tokens (scored), seconds (spent
scoring, without loading and tokenization), and resident memory in GiB after loading and at the peak.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import lm_eval  # type: ignore[import-not-found]  # noqa: E402
import resident  # noqa: E402
import torch  # noqa: E402
import wikitext  # noqa: E402
from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]  # noqa: E402
from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]  # noqa: E402

TASK_YAML = """include: {installed}
task: wikitext_local
dataset_path: json
dataset_name: null
training_split: null
validation_split: null
dataset_kwargs:
  data_files:
    test: {data}
"""


class TimedHFLM(HFLM):  # type: ignore[misc]
    """HFLM with a clock around its scoring."""

    seconds = 0.0
    windows = 0
    tokens = 0

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        scores = super()._loglikelihood_tokens(requests, *args, **kwargs)
        self.seconds += time.perf_counter() - began
        self.windows += len(requests)
        self.tokens += sum(len(continuation) for _, _, continuation in requests)
        return scores


def write_task(folder: Path, text: Path) -> None:
    """The installed task with local data."""
    data = folder / "wikitext.jsonl"
    with data.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"page": page}) + "\n" for page in wikitext.pages(text))
    installed = Path(lm_eval.__file__).parent / "tasks/wikitext/wikitext.yaml"
    (folder / "wikitext_local.yaml").write_text(TASK_YAML.format(installed=installed, data=data))


def main() -> None:
    parser = argparse.ArgumentParser(description="word perplexity by lm-eval")
    parser.add_argument("--model", required=True, help="a checkpoint directory")
    parser.add_argument("--text", required=True, type=Path, help="wiki.test.raw")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--limit", type=int, help="only the first documents")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    model = TimedHFLM(
        pretrained=args.model,
        device="cpu",
        dtype=args.dtype,
        max_length=args.max_length,
        batch_size=args.batch_size,
    )
    resident.forget_peak()
    after_load_gib = resident.now_gib()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, args.text)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        found = lm_eval.simple_evaluate(
            model,
            tasks=["wikitext_local"],
            task_manager=TaskManager(include_path=name, include_defaults=False),
            limit=args.limit,
            bootstrap_iters=0,
        )
    scores = found["results"]["wikitext_local"]
    print(
        json.dumps(
            {
                "word_ppl": scores["word_perplexity,none"],
                "byte_ppl": scores["byte_perplexity,none"],
                "bits_per_byte": scores["bits_per_byte,none"],
                "documents": found["n-samples"]["wikitext_local"]["effective"],
                "windows": model.windows,
                "tokens": model.tokens,
                "seconds": model.seconds,
                "after_load_gib": after_load_gib,
                "peak_rss_gib": resident.peak_gib(),
            }
        )
    )


if __name__ == "__main__":
    main()
