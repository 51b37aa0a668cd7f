"""Chat templates of real tokenizers: what marks the assistant's text, and what cannot be rendered."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from evalq.backends import _chat_template
from evalq.backends.gguf import places
from evalq.backends.hf import load_tokenizer
from evalq.data import chat
from evalq.errors import ModelError
from evalq.run import tokenizing
from evalq.run.chat import tokenized_chat, tokenized_prompt
from evalq.run.job import TokenizeJob

MESSAGES = [
    {"role": "user", "content": "Sky?"},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Grass?"},
    {"role": "assistant", "content": " Green "},
]
CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3 does: what renders last has a thought in front, and no longer once another turn follows.
THINKING = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
)
MARKING = (
    "{%- for m in messages %}{% if m.role == 'assistant' %}[A]{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}[U]{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def with_template(
    smollm2: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str | None], Path]:
    """SmolLM2's tokenizer with another chat template, or none."""

    def make(template: str | None) -> Path:
        folder = tmp_path_factory.mktemp("tokenizer")
        for file in smollm2("bf16").iterdir():
            if file.name.startswith(("tokenizer", "config", "special", "generation")):
                shutil.copy(file, folder / file.name)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


def counted(folder: Path, messages: list[dict[str, str]]) -> str:
    """What counts, in one string."""
    tokenizer = load_tokenizer(folder)
    found = tokenized_chat(tokenizer, messages)
    return tokenizer.decode([i for i, kept in zip(found.ids, found.mask, strict=True) if kept])


@pytest.mark.engine
@pytest.mark.parametrize("template", [CHATML, THINKING, MARKING])
def test_what_the_assistant_says_and_the_end_of_its_turn_count(
    with_template: Callable[[str | None], Path], template: str
) -> None:
    assert counted(with_template(template), MESSAGES) == "Blue.<|im_end|> Green <|im_end|>"


@pytest.mark.engine
def test_a_template_that_looks_into_contents_is_told_with_the_conversation(
    with_template: Callable[[str | None], Path], tmp_path: Path
) -> None:
    thought = [MESSAGES[0], {"role": "assistant", "content": "<think>Hm.</think>Blue."}]
    job = job_of(with_template(THINKING), tmp_path, MESSAGES, thought)
    with pytest.raises(ModelError, match="conversation 2: the chat template does not show which text"):
        tokenizing.tokenize(job, lambda event, **fields: None)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, r"conversation 1: there is no chat template \(set tokenizer_dir to the instruct model"),
        ("{{ raise_exception('only \x1b[2Jtwo turns') }}", "cannot be rendered: only .*two turns"),
        ("{% for m in messages %}", "cannot be rendered: .*end of"),
        ("{{ messages[9].content.x }}", "cannot be rendered: .*has no element 9"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered: access to attribute"),
        ("", "there is no chat template|leaves out what the assistant says"),
        ("{{ messages[0].content }}", "leaves out what the assistant says"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_one_line(
    with_template: Callable[[str | None], Path], tmp_path: Path, template: str | None, why: str
) -> None:
    with pytest.raises(ModelError, match=why) as caught:
        tokenizing.tokenize(job_of(with_template(template), tmp_path, MESSAGES), lambda event, **fields: None)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def job_of(folder: Path, tmp_path: Path, *chats: list[dict[str, str]]) -> TokenizeJob:
    return TokenizeJob(
        backend="hf",
        path=str(folder),
        trust_remote_code=False,
        documents=tuple(map(chat.as_document, chats)),
        add_special=False,
        chat_template=False,
        chat="answers",
        out=str(tmp_path / "stream.safetensors"),
    )


@pytest.mark.engine
def test_a_prompt_ends_with_the_assistants_header_and_knows_what_ends_its_turn(
    with_template: Callable[[str | None], Path],
) -> None:
    tokenizer = load_tokenizer(with_template(CHATML))
    found = tokenized_prompt(tokenizer, MESSAGES[:1])
    assert tokenizer.decode(found.ids) == "<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode([i]) for i in found.ends_with] == ["<|im_end|>"] and not found.mask.any()


@pytest.mark.engine
@pytest.mark.parametrize("template", [CHATML, THINKING, MARKING])
def test_without_transformers_a_template_renders_the_same(
    with_template: Callable[[str | None], Path], template: str
) -> None:
    tokenizer = load_tokenizer(with_template(template))
    for opening in (False, True):
        wanted = tokenizer.chat_text(MESSAGES, opening)
        assert _chat_template.render(template, MESSAGES, opening, {}) == wanted


def test_places_of_tokens_by_what_they_stand_for() -> None:
    text = "a 日x"
    whole = text.encode()
    parts = [b"a", b" ", whole[2:4], whole[4:5], b"x"]
    assert places(text, parts) == [(0, 1), (1, 2), (2, 3), (2, 3), (3, 4)]
    assert places(text, [b" a", b" ", whole[2:5], b" x"]) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert places(text, [b"a", b" ", whole[2:5]]) is None, "something is left"
    assert places(text, [b"b"]) is None and places("", []) == []
    assert places("a", [b"a", b""]) == [(0, 1), (1, 1)]
