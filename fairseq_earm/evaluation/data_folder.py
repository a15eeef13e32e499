"""The folder of binarised data that a command reads."""
from __future__ import annotations

import os

from fairseq import utils

from fairseq_earm.errors import UsageError


def check_data_folder(data: str) -> None:
    """Refuse what is not one folder.

    fairseq-train takes several with colons between them, the shards of one text, and reads another one in each epoch.

    Raises:
        UsageError: several folders, or one that does not exist.
    """
    folders = utils.split_paths(data)
    if len(folders) > 1:
        raise UsageError(
            f"{data} names {len(folders)} folders, and this command reads one: give one of them, or a folder with the "
            "text of all (train, train1, train2 and so on are one split)"
        )
    if not os.path.isdir(data):
        raise UsageError(f"{data}: there is no such folder; give the one that fairseq-preprocess wrote")
