"""The texts that public perplexity tools make of wiki.test.raw. Shared by the peers; knows nothing of evalq.

Rows are those of the data set Salesforce/wikitext, wikitext-2-raw-v1: one per line of the file, a blank line
as the empty string, every other with its line end.
"""

from pathlib import Path


def rows(path: Path) -> list[str]:
    """The data set's rows, rebuilt from the file."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [line + "\n" if line.strip() else "" for line in lines]


def joined(path: Path) -> str:
    """What GPTQ, compare_q and transformers' perplexity guide tokenize."""
    return "\n\n".join(rows(path))


def pages(path: Path) -> list[str]:
    """One string per article, as in the data set EleutherAI/wikitext_document_level.

    An article begins with a top-level heading: ` = Title = ` and not ` = = Section = = `.
    """
    articles: list[str] = []
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            articles.append("\n".join(lines))
            lines = []
        lines.append(line)
    articles.append("\n".join(lines))
    return [article for article in articles if article.strip()]
