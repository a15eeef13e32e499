"""fairseq tasks; importing this package registers them."""
from fairseq_earm.tasks import earm_translation  # noqa: F401
