"""Settings of the process that libraries read only while torch is loaded.

Every script imports this module first. `ruff` keeps it above torch: pyproject.toml gives it a
section of its own in the order of imports.
"""

import os

# libgomp, which runs torch's loops on CPUs, lets a thread that has finished its part wait in a busy
# loop: 300,000 rounds, some milliseconds, before it sleeps. On a busy machine that takes the core
# from the very thread it waits for. 1,000 rounds make a step next to other programs up to 2.4 times
# faster; on an idle machine they cost 1 to 4%, with --compile up to 10% (docs/log.md, 2026-11-25
# and 26). The processes that a script starts inherit the setting. OMP_WAIT_POLICY means the same;
# whoever sets it knows why.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
