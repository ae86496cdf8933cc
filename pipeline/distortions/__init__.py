"""The distortions of the house, one module each but for the policies. A new one is a module and a line here."""

from pipeline.distortions.cutout import Cutout
from pipeline.distortions.policies import AutoAugment, RandAugment, TrivialAugment
from pipeline.distortions.strong import Strong

__all__ = ["AutoAugment", "Cutout", "RandAugment", "Strong", "TrivialAugment"]
