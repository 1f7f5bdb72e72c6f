"""SGLang alone, with the arguments that the session's engine has: what the session is held to."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from benchmarks.gpu_parts.children import Report
from benchmarks.gpu_parts.workload import Workload


def measure(_: None, work: Workload, report: Report) -> None:
    """Seconds of responses by requests decoded together, with log-probs; the most also without."""
    engine = _engine(work, report)
    try:
        for count in work.requests:
            prompts = work.token_rows(count)
            _generate(engine, prompts, work, log_probs=True)
            seconds = [
                _generate(engine, prompts, work, log_probs=True) for _ in range(work.repeats)
            ]
            report.put(f"raw_{count}", seconds)
            report.say(f"{count} requests: {min(seconds):.2f} s")
        prompts = work.token_rows(work.requests[-1])
        report.put("raw_without", [_generate(engine, prompts, work, log_probs=False)])
    finally:
        engine.shutdown()


def _engine(work: Workload, report: Report) -> Any:
    from kit.cluster.client import kept_kernels
    from kit.engine import patches
    from kit.engine.server_args import server_arguments
    from kit.memory.plan import plan_for
    from kit.models.source import find
    from kit.stack.actors import engine_settings
    from kit.stack.stack import Stack

    config = work.config()
    model, length = find(config.model), work.response_tokens
    plan = plan_for(config, model, work.device, length)
    stack = Stack(config, model, work.device, length, plan)
    settings = engine_settings(stack.settings)  # the session's own
    begin = time.perf_counter()
    os.environ |= kept_kernels()  # what the session's engine has compiled need not be made again
    if work.device == "cpu":
        prepare_cpu()
    import sglang

    engine_class: Any = sglang.Engine
    if work.device == "cpu":  # which SGLang alone does not know to use
        engine_class = patches.engine_class(settings)
    engine = engine_class(**server_arguments(settings))
    report.put("start_seconds", seconds := time.perf_counter() - begin)
    report.say(f"started in {seconds:.1f} s")
    return engine


def prepare_cpu() -> None:
    """What SGLang has to find before it is imported where there is no GPU."""
    from kit.cluster.client import CPU_OPERATORS

    paths = [str(CPU_OPERATORS), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ |= {
        "SGLANG_USE_CPU_ENGINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    sys.path.insert(0, str(CPU_OPERATORS))


def _generate(engine: Any, prompts: list[list[int]], work: Workload, *, log_probs: bool) -> float:
    """Seconds of one call, with an empty cache as after every sync of a training."""
    engine.flush_cache()
    begin = time.perf_counter()
    outputs = engine.generate(
        input_ids=prompts,
        sampling_params={"temperature": 1.0, "max_new_tokens": work.response_tokens},
        return_logprob=log_probs,
    )
    seconds = time.perf_counter() - begin
    lengths = {output["meta_info"]["completion_tokens"] for output in outputs}
    if lengths != {work.response_tokens}:
        raise ValueError(f"responses have {lengths} tokens, not {work.response_tokens}")
    return seconds
