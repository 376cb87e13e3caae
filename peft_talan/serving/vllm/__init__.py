"""vLLM runs the side path of a model that embeds a TALAN adapter; `peft_talan.autoload.vllm` is what vLLM calls."""
