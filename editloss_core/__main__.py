"""``editloss COMMAND``, and ``python -m editloss_core COMMAND``."""

import sys
from typing import NoReturn

from .commands.programs import main


def enter() -> NoReturn:
    status = main()
    if "torch.distributed" in sys.modules:  # perhaps one of several processes, which end in a way of their own
        from .processes import leave

        leave(status)
    sys.exit(status)


if __name__ == "__main__":
    enter()
