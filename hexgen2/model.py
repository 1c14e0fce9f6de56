"""What is known of a model from its Hugging Face folder: shape, limits, identity. Pure but for reading the folder."""

from dataclasses import dataclass

from hexgen2.kv.wire import KvShape


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as served. ``sha256`` names config and weights: two replicas with the same hash have the same model."""

    name: str
    sha256: bytes
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    #: Of weights and KV as served.
    dtype: str

    @property
    def kv_shape(self) -> KvShape:
        """KV of the whole model."""
        return KvShape(self.num_layers, self.num_kv_heads, self.head_dim, self.dtype)
