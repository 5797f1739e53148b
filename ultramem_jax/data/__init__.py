"""Text as batches of tokens: `corpus = data.open(config)`."""

from ultramem_jax.data.corpus import Corpus, open
from ultramem_jax.data.index_cache import IndexCache

__all__ = ["Corpus", "IndexCache", "open"]
