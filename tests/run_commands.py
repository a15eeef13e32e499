"""fairseq's commands under the interpreter that runs this: `python -m tests.run_commands` in the folder above.

On standard input a JSON list of [name, arguments]; on standard output, in its last line, a JSON list of what each of
`fairseq-{name}` printed and of its log's records of updates.
"""
import json
import sys

import torch

import fairseq_earm  # noqa: F401  (mends the installed versions)
from tests.tiny_translation import Run, command, recorded_log


def main() -> None:
    torch.set_num_threads(1)
    done = []
    for name, arguments in json.load(sys.stdin):
        with recorded_log() as records:
            printed = command(name, *arguments)
        done.append([printed, Run(None, records).log()])
    print(json.dumps(done))


if __name__ == "__main__":
    main()
