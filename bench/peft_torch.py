"""The PEFT side of `peft_logits.py`, for the environment with torch: logits of a base with an adapter, "" for none.

python bench/peft_torch.py BASE ADAPTER TOKENS.npy LOGITS.npy
"""

from __future__ import annotations

import sys
import warnings

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    """Load as a user of PEFT would, and tell every warning PEFT gives of the adapter."""
    base, adapter, tokens, logits = sys.argv[1:]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = (PeftModel.from_pretrained(plain, adapter) if adapter else plain).eval()
    for warning in caught:
        print(f"PEFT: {warning.message}")
    with torch.no_grad():
        found = model(torch.tensor(np.load(tokens).astype(np.int64))).logits
    np.save(logits, found.numpy())


if __name__ == "__main__":
    main()
