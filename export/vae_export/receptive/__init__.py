"""How far the outputs of a convolutional graph look: their receptive fields, computed from the graph itself."""

from .field import ReceptiveField, receptive_fields, widest

__all__ = ["ReceptiveField", "receptive_fields", "widest"]
