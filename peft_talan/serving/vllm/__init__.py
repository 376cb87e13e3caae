"""vLLM runs the side path of a model that embeds a TALAN adapter; vLLM calls `plugin.register`."""
