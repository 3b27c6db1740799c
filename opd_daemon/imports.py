"""Libraries that are imported late, by one thread at a time."""

from __future__ import annotations

import threading

# To be held by whoever imports transformers or mlx-lm, or makes them load a class: transformers finds its parts when
# they are first asked for, and a second thread that asks meanwhile gets an ImportError.
importing = threading.RLock()
