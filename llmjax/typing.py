"""Array types and THE glossary of axis letters, used in names (`x_BTD`), einsum strings ("BTD,DF->BTF") and jaxtyping.

Each letter stands for one logical axis; `llmjax.sharding` maps logical axes to mesh axes. A parameter leaf that is stacked
over layers carries a leading L that its name does not repeat.
"""

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Scalar

LOGICAL_AXES = {
    "B": "batch",  # sequences
    "T": "length",  # query positions
    "S": "length",  # key positions
    "D": "embed",  # model width
    "d": "embed",  # the same, where a matrix leads from D to D
    "N": "heads",  # query heads
    "K": "kv_heads",  # key/value heads
    "H": "head_dim",  # width of one head
    "F": "mlp",  # hidden width of a feed-forward layer or of one expert
    "E": "expert",  # experts
    "C": "choice",  # chosen experts of a token (top_k)
    "R": "latent",  # low-rank vector of latent attention
    "V": "vocab",  # token ids
    "L": "layers",  # Transformer blocks
    "r": "rank",  # of a low-rank update
}

__all__ = ["Array", "Bool", "Float", "Int", "LOGICAL_AXES", "PRNGKeyArray", "Scalar"]
