"""fairseq tasks; importing this package registers them."""
from fairseq_earm.tasks import (  # noqa: F401
    earm_image_modeling, earm_language_modeling, earm_translation, residual_language_modeling, residual_translation,
)
