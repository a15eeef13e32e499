"""E-ARM for fairseq: autoregressive models trained as their own energy-based models. Importing this package, as --user-dir does, registers them."""
if __name__ != "fairseq_earm":
    raise ImportError(f"--user-dir must end in a folder called fairseq_earm, not {__name__}: its modules import each other by it.")

from fairseq_earm import compat

compat.apply()

from fairseq_earm import criterions, models, tasks  # noqa: E402
