"""Why two checkpoints differ: known mistakes, each tried on the data and believed only if it fits.

A hypothesis is a lazy tensor: what B would hold under a name if just this mistake had been made of
A. A few elements dismiss it, or it is compared with all of B, streamed. What explains a tensor of
one layer is tried first in the others. Pairs of mistakes are tried on a few tensors of each kind.
What no hypothesis explains to the last bit, or to the rounding of a dtype, stays unexplained.
"""

from ckptx.verification.diagnosis.search import Finding, diagnose

__all__ = ["Finding", "diagnose"]
