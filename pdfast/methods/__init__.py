"""What the loop trains: a teacher, a v-predicting copy of one, a student of fewer steps. One file a method."""

from pdfast.methods.denoise import Denoise
from pdfast.methods.distillation import Distillation, RoundTable
from pdfast.methods.progressive import Progressive
from pdfast.methods.reparameterize import Reparameterize

__all__ = ["Denoise", "Distillation", "Progressive", "Reparameterize", "RoundTable"]
