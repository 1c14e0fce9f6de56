"""Put on the path of vLLM's own processes where packages must be hidden from them (``vllm_env``)."""
