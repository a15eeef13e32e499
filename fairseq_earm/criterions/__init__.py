"""Criterions, thin: tensors from model and sampler go to `fairseq_earm.ebm`, results to the log."""
from fairseq_earm.criterions import earm_cross_entropy, residual_nce  # noqa: F401  (they register themselves)
