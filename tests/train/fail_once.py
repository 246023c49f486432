"""`python -m tests.train.fail_once MARKER train ...`: the trainer, whose rank 1 is killed once.

Before its third step it writes the file MARKER; while that exists, it is not killed again.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # not in the verifier's workers
    from kdrl_train import train
    from kdrl_train.__main__ import start

    marker = Path(sys.argv[1])
    learn = train.learn

    def fail_once(run: train.Run, step: int, stages: train.Stages) -> Any:
        if step == 2 and run.world.rank == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return learn(run, step, stages)

    train.learn = fail_once
    sys.argv = ["kdrl_train", *sys.argv[2:]]
    sys.exit(start())
