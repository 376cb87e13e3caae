"""Serves an adapter with vLLM: the LoRA weights are merged into the base weights, the side path stays beside them.

Printed is vLLM's answer to each prompt. vLLM finds this package by an entry point, so nothing is imported for it; the
folder works with `vllm serve FOLDER`, too.

    pip install vllm ./peft_talan
    python examples/sft_with_trl.py     # writes the adapter `calls-adapter`
    python examples/serve_with_vllm.py
    python examples/serve_with_vllm.py --adapter user/adapter --prompts "A question." "Another question."
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer


def merge(adapter: str, folder: str) -> None:
    """Write one model folder that vLLM can serve; `peft-talan merge ADAPTER FOLDER` does the same.

    Args:
        adapter: The adapter's folder or hub id; its tokenizer was saved with it.
        folder: Where the model goes.
    """
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="auto")
    model.merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Merge, start vLLM, and ask.

    Args:
        arguments: Words of the command line. None: the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="calls-adapter", help="folder or hub id (default: %(default)s)")
    parser.add_argument("--prompts", nargs="+", default=["Please set a timer for 25 minutes."])
    parser.add_argument("--folder", default="merged", help="where the merged model goes (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    options = parser.parse_args(arguments)
    from vllm import LLM, SamplingParams

    merge(options.adapter, options.folder)
    server = LLM(model=options.folder, max_model_len=512)
    conversations = [[{"role": "user", "content": prompt}] for prompt in options.prompts]
    greedy = SamplingParams(temperature=0.0, max_tokens=options.max_new_tokens)
    for prompt, output in zip(options.prompts, server.chat(conversations, greedy), strict=True):
        print(prompt, "->", output.outputs[0].text)


if __name__ == "__main__":
    main()
