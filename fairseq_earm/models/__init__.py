"""fairseq models; importing this package registers them."""
from fairseq_earm.models import energy_transformer, pixel_cnn, residual_transformer_lm, transformer_xl  # noqa: F401, I001
from fairseq_earm.models import architectures  # noqa: F401  (names what the others register)
