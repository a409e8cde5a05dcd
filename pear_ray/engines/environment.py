"""What a process must be told before it imports torch or vLLM."""

import os


def engine_environment(*, device: str, num_threads: int, kv_cache_gib: int) -> dict[str, str]:
    """Environment variables for a process that holds an in-process vLLM engine.

    Set them before vLLM is imported: it reads most of them once, at import.
    """
    shared = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in our process: weights by reference
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        # Scoring asks for one token past the longest row and throws it away: never a position too
        # far.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(num_threads),
        # glibc otherwise asks the kernel for fresh pages for every tensor of a few MB and gives
        # them back at once: weights of 32k tokens took 0.6 to 1.6 ms, by chance of the process.
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
        "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    }
    if device == "cuda":
        return shared
    return shared | {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        # Several engines share the cores; vLLM's own binding would pin them all to the first ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",  # DeepSpeed otherwise warns that it guesses
    }
