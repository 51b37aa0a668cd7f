"""Per-token outputs: what an engine can say about each scored token, by name.

A column is declared once, here or in a backend of your own. An engine lists the columns it can give, a metric
lists those it needs, the store keeps whatever came. Nothing in between knows a column by name.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One value for each scored token.

    Args:
        name: in the store, in batches and in metrics.
        dtype: numpy's name of what is stored, "float32", "int32" or "bool".
        help: one line: what the value is, and its unit.
        needs: names of the inputs that a batch must carry for it (`Batch.inputs`).
        bound: the column that a model gives instead where it knows a lower bound only; it is another
            quantity with a name of its own, so the two are never mixed.
    """

    name: str
    dtype: str
    help: str
    needs: tuple[str, ...] = ()
    bound: str | None = None


LOGPROB = Column("logprob", "float32", "ln P(token | everything before it in its window), nats")
TOP1_BOUND = Column("top1_bound", "bool", "whether the token is known to be the most probable one")
TOP1 = Column("top1", "bool", "whether the token is the most probable one", bound=TOP1_BOUND.name)
ENTROPY = Column("entropy", "float32", "entropy of the model's distribution for the token, nats")
ARGMAX = Column("argmax", "int32", "id of the most probable token, the first one of equals")
MAX_PROB = Column("max_prob", "float32", "probability of the most probable token")

# Beside the reference p, over the whole vocabulary that both share; q is the model.
REFERENCE = "reference"
KLD_BOUND = Column(
    "kld_bound", "float32", "a lower bound of kld, from a part of the vocabulary", (REFERENCE,)
)
KLD = Column("kld", "float32", "sum p (ln p - ln q), nats", (REFERENCE,), KLD_BOUND.name)
KEPT_MASS = Column(
    "kept_mass", "float32", "the reference's probability of the tokens behind kld_bound", (REFERENCE,)
)
# Tells whether the reference's distributions are made again as they were.
REFERENCE_LOGPROB = Column(
    "reference_logprob", "float32", "ln P(token) by the reference, made again, nats", (REFERENCE,)
)
ACCEPTANCE = Column("acceptance", "float32", "sum min(p, q)", (REFERENCE,))
# What goes into the reference's head: no number a token, so it is kept apart (`evalq.results.kept`).
REFERENCE_ROWS = "reference_rows"

# What logits give alone, beside the whole distribution of a reference, and beside a part of it.
OWN = (LOGPROB, TOP1, ENTROPY, ARGMAX, MAX_PROB)
BESIDE = (KLD, ACCEPTANCE, REFERENCE_LOGPROB)
BOUND = (KLD_BOUND, KEPT_MASS)

# Names of what every comparison asks for; metrics that need more ask for more.
DEFAULT_COLUMNS = (LOGPROB.name, TOP1.name)
# Names of what a comparison with KL divergence asks of every model, and of those beside the reference.
DISTRIBUTION_COLUMNS = tuple(column.name for column in OWN if column.name not in DEFAULT_COLUMNS)
DIVERGENCE_COLUMNS = (*(column.name for column in BESIDE), KEPT_MASS.name)
# Names of all that such a comparison may ask for beyond the others.
KLD_COLUMNS = frozenset(
    (*DISTRIBUTION_COLUMNS, *(column.name for column in (*BESIDE, *BOUND)), REFERENCE_ROWS)
)
