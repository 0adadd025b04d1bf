"""Networks by name, the loop, losses, optimisers and checkpoints that teacher and student share."""

import os

# Before torch loads OpenMP. Its threads otherwise spin at every barrier, and the loader's process needs those cores:
# on two cores under load, training ran 4 to 5 times faster with threads that sleep. A value of the user's own stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
