"""The PEFT side of `peft_logits.py`, for the environment with torch: logits of a base with an adapter, "" for none.

Once in float32 and once in float64, which tells how far off float32 is by itself.

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
    ids = torch.tensor(np.load(tokens).astype(np.int64))
    with torch.no_grad():
        single = model(ids).logits
        double = model.double()(ids).logits
    np.save(logits, np.stack([single.double().numpy(), double.numpy()]))


if __name__ == "__main__":
    main()
