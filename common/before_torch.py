"""Settings of the process that libraries read only while torch is loaded.

Every script imports this module first. `ruff` keeps it above torch: pyproject.toml gives it a
section of its own in the order of imports.
"""

import os

# libgomp, which runs torch's loops on CPUs, lets a thread that has finished its part wait in a busy
# loop for some rounds before it sleeps. By default these are 300,000 rounds, some milliseconds: on
# a busy machine that takes the core from the very thread it waits for, and a step takes up to 4
# times as long. With few rounds, threads sleep and wake between small operations: with 1,000, an
# idle machine took 1.1 to 1.2 times as long for training, and 1.2 to 1.5 times for generation, as
# with 10,000. With 10,000 it is almost as fast as by default, and a busy machine takes 1.2 to 1.5
# times as long as with 1,000 (docs/log.md, 2026-11-29). The processes that a script starts inherit
# the setting. OMP_WAIT_POLICY means the same; whoever sets it knows why.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
