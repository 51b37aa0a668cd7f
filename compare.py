"""Score quantized models on one text and chart bits per weight against perplexity; see --help."""

import sys

try:
    from evalq.cli.main import compare_main
except ModuleNotFoundError as error:
    sys.exit(f'compare.py: {error}; install evalq first: pip install -e ".[hf,gguf,plot,data]"')

if __name__ == "__main__":
    sys.exit(compare_main())
