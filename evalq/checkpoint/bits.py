"""What a checkpoint's headers say about its size.

Convention (exllamav3's, https://github.com/turboderp-org/exllamav3, so that charts are comparable):

    layer  every weight of two or more dimensions outside embedding and head, with all its scales, zero
           points, codebooks and sign vectors; biases, norms and router gates are left out
    head   the output projection, or the embedding's storage where the two are tied
    bpw    8 * bytes / weights
    vram   layer + head bytes in GiB; an untied embedding is not counted
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["layer", "head", "embedding", "norm", "router", "other"]
GIB = 2**30


@dataclass(frozen=True, slots=True)
class TensorBits:
    """One logical weight.

    Args:
        name: as the unquantized model would call it ("model.layers.0.mlp.up_proj.weight").
        kind: its part in the totals.
        numel: weights it stands for, padding included where the file stores padding.
        bytes: of the weight and all its sidecars.
        format: "INT4 group 128", "BF16", "Q6_K", ...
    """

    name: str
    kind: Kind
    numel: int
    bytes: int
    format: str


@dataclass(frozen=True)
class StorageReport:
    """The sizes of one checkpoint, from its headers alone.

    Args:
        format: one line a person reads.
        container: "safetensors" or "gguf".
        layer_bytes: of the layers' weights and sidecars.
        layer_weights: how many weights those bytes stand for.
        head_bytes: of the head, or of the tied embedding.
        head_weights: how many weights those bytes stand for.
        disk_bytes: of every tensor in the files.
        tied_head: the head is the embedding.
        tensors: every logical weight, in the order of the files.
        findings: what a person should know before trusting a score, each starting with its name.
        layer_weights_true: `layer_weights` without padding (EXL3), None where nothing is padded or the
            config does not tell.
    """

    format: str
    container: str
    layer_bytes: int
    layer_weights: int
    head_bytes: int
    head_weights: int
    disk_bytes: int
    tied_head: bool
    tensors: tuple[TensorBits, ...]
    findings: tuple[str, ...] = ()
    layer_weights_true: int | None = None

    @property
    def layer_bpw(self) -> float | None:
        """Bits per stored weight of the layers; None without layers."""
        return 8 * self.layer_bytes / self.layer_weights if self.layer_weights else None

    @property
    def layer_bpw_true(self) -> float | None:
        """Bits per weight of the layers with padding not counted as weights (EXL3), else None."""
        return 8 * self.layer_bytes / self.layer_weights_true if self.layer_weights_true else None

    @property
    def head_bpw(self) -> float | None:
        """Bits per stored weight of the head; None for a model without one."""
        return 8 * self.head_bytes / self.head_weights if self.head_weights else None

    @property
    def vram_gb(self) -> float:
        """Layers and head in GiB. The name is exllamav3's."""
        return (self.layer_bytes + self.head_bytes) / GIB

    @property
    def disk_gib(self) -> float:
        """Every tensor in GiB."""
        return self.disk_bytes / GIB


@dataclass(frozen=True)
class HeadStorage:
    """Where the output projection lives: its tensors, and whether they are the embedding's."""

    tensors: tuple[TensorBits, ...]
    tied: bool


# Module names of token embeddings, most specific first; other embeddings (positions, patches, per-layer
# inputs) never serve as a head.
_TOKEN_EMBEDDINGS = (
    "embed_tokens",
    "token_embd",
    "tok_embeddings",
    "word_embeddings",
    "wte",
    "embed_in",
    "embed",
    "embedding",
)


def head_storage(tensors: Iterable[TensorBits]) -> HeadStorage:
    """Find the head: its own tensor where the file has one, else the token embedding's."""
    tensors = tuple(tensors)
    own = tuple(t for t in tensors if t.kind == "head")
    if own:
        return HeadStorage(own, tied=False)
    embeddings = [t for t in tensors if t.kind == "embedding"]
    for module in _TOKEN_EMBEDDINGS:
        for tensor in embeddings:
            if module in tensor.name.split(".")[-2:]:
                return HeadStorage((tensor,), tied=True)
    return HeadStorage((), tied=False)


def shares(tensors: Iterable[TensorBits], kind: Kind = "layer") -> list[tuple[str, float]]:
    """Formats of the weights of one kind with their share of its weights, the largest first."""
    weights: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.kind == kind:
            weights[tensor.format] += tensor.numel
    total = sum(weights.values())
    return [(name, numel / total) for name, numel in weights.most_common() if total]


def percent(share: float) -> str:
    """A share of a format in one short word; a trace never reads as 0% nor as 100%."""
    value = 100 * share
    if value < 0.1:
        return "<0.1%"
    return f"{value:.1f}%" if value < 10 or 99 < value < 100 else f"{value:.0f}%"


def assemble(
    tensors: tuple[TensorBits, ...],
    *,
    format_line: str,
    container: str,
    disk_bytes: int,
    findings: tuple[str, ...] = (),
    layer_weights_true: int | None = None,
) -> StorageReport:
    """Add up the logical weights of a checkpoint."""
    layers = [t for t in tensors if t.kind == "layer"]
    head = head_storage(tensors)
    return StorageReport(
        format=format_line,
        container=container,
        layer_bytes=sum(t.bytes for t in layers),
        layer_weights=sum(t.numel for t in layers),
        head_bytes=sum(t.bytes for t in head.tensors),
        head_weights=sum(t.numel for t in head.tensors),
        disk_bytes=disk_bytes,
        tied_head=head.tied,
        tensors=tensors,
        findings=findings,
        layer_weights_true=layer_weights_true,
    )
