"""Types of arrays, apart from `types`: an idle daemon knows what scores are and does without numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
