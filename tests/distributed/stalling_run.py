"""The product's rank, except that reading the data of step STALL_AT waits for ever: there it is killed.

Arguments: STALL_AT, then those of launcher/run.py. The wait is in the reader, so the steps before are the product's own.
"""

from __future__ import annotations

import sys
import time

from launcher import run
from launcher.data.stream import BatchStream


def main() -> int:
    stall_at = int(sys.argv[1])
    read = BatchStream.micro_batches

    def stalling(stream: BatchStream, position: int) -> object:
        while position >= stall_at * stream.global_batch_size:
            time.sleep(1)
        return read(stream, position)

    BatchStream.micro_batches = stalling  # type: ignore[method-assign, assignment]
    return run.main(sys.argv[2:])


if __name__ == "__main__":
    raise SystemExit(main())
