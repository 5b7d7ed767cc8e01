"""Continue a few Chinese and English beginnings with transformers, from a converted checkpoint."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ("今天上午，", "这本书", "酒店的房间", "Return the", "The following", "def __init__(self")


def main() -> None:
    """Load the folder as any user of transformers would and print one continuation a prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1234)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 20, "max_new_tokens": options.max_new_tokens}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        tokens = model.generate(**ids, **settings)[0, ids["input_ids"].shape[1] :]
        print(f"{prompt} >>> {tokenizer.decode(tokens, skip_special_tokens=True)!r}")


if __name__ == "__main__":
    main()
