"""Fine-tunes SD3 or SD3.5 with a reward. Alone it trains on the built-in world; --help lists the options."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sd3_adrpo import cli, plan
from sd3_adrpo.config import Config
from sd3_adrpo.errors import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 an error the user can mend (one message, no traceback), 2 bad options."""
    config = cli.parse(argv)
    return exit_code("train_sd3.py", lambda: train(config))


def train(config: Config) -> None:
    """Says what will be done, and does it."""
    planned = plan.check(config)
    if os.environ.get("RANK", "0") == "0":  # accelerate's launcher numbers its processes
        print(planned, flush=True)
    if not config.dry_run:
        from sd3_adrpo.run import Run  # late: loads diffusers, which a dry run does not need

        Run(config, planned)()


if __name__ == "__main__":
    sys.exit(main())
