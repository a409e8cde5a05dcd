"""How many devices each stage's engines are spread over."""

from pear_ray.config.corpus import SampledCorpus
from pear_ray.config.run import RunConfig

# By stage, the setting that says it.
SPAN_SETTINGS = {
    "collect": "corpus.tensor_parallel_size",
    "score": "score.tensor_parallel_size",
    "diagnose": "score.tensor_parallel_size",
    "rl": "rl.tensor_parallel_size",
    "evaluate": "evaluate.tensor_parallel_size",
}


def engine_span(config: RunConfig, stage: str) -> int:
    """Devices that an engine of `stage` is spread over, all on one node."""
    match stage:
        case "collect" if isinstance(config.corpus, SampledCorpus):
            return config.corpus.tensor_parallel_size
        case "score" | "diagnose":
            return config.score.tensor_parallel_size
        case "rl":
            return config.rl.tensor_parallel_size
        case "evaluate":
            return config.evaluate.tensor_parallel_size
        case _:
            return 1


def spans_in_words(config: RunConfig) -> str:
    """`rl.tensor_parallel_size=2, ...`: those of the run that are more than one device."""
    stages = ("collect", "score", "rl", "evaluate")
    wide = [stage for stage in stages if engine_span(config, stage) > 1]
    return ", ".join(f"{SPAN_SETTINGS[stage]}={engine_span(config, stage)}" for stage in wide)
