"""Counts in a training process whatever engine it is: steps, real tokens, seconds, memory.

Read by Python itself at the start of each process when its folder is on PYTHONPATH; does nothing
unless BENCH_OUT names a file. Tokens are ids other than 0, the workload's padding, that an
embedding sees while gradients are on. Seconds are of the CPU, or with BENCH_CLOCK=wall of the
clock, the GPU having done what it was given.
"""

import os
import sys

if os.environ.get("BENCH_OUT"):
    import importlib.abc
    import importlib.machinery
    import json
    import resource
    import time

    STEPS: list[tuple[float, int, int]] = []
    SEEN = {"real": 0, "all": 0}
    WARM = int(os.environ.get("BENCH_WARM", "3"))
    BEGUN = time.perf_counter()

    def gpu():
        """torch's view of the GPU, where the clock is that of the wall and there is one."""
        cuda = sys.modules["torch"].cuda
        return cuda if os.environ.get("BENCH_CLOCK") == "wall" and cuda.is_available() else None

    def now() -> float:
        """Seconds of the clock, or CPU seconds of this process and of children that ended."""
        if os.environ.get("BENCH_CLOCK") != "wall":
            return sum(os.times()[:4])
        if gpu():
            gpu().synchronize()
        return time.perf_counter() - BEGUN

    def after_step(*_: object) -> None:
        STEPS.append((now(), int(SEEN["real"]), SEEN["all"]))
        if len(STEPS) == WARM and gpu():
            gpu().reset_peak_memory_stats()
        spent = STEPS[-1][0] - STEPS[min(WARM, len(STEPS)) - 1][0]
        enough = len(STEPS) >= WARM + 2 and spent > float(os.environ.get("BENCH_SECONDS", "inf"))
        if enough or len(STEPS) == int(os.environ.get("BENCH_STEPS", "0")):
            seen = {
                "steps": STEPS,
                "warm": WARM,
                "peak_kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                "gpu_bytes": gpu().max_memory_allocated() if gpu() else None,
            }
            with open(os.environ["BENCH_OUT"], "w") as file:  # noqa: PTH123
                json.dump(seen, file)
            os._exit(0)

    def watch_steps(module: object) -> None:
        module.register_optimizer_step_post_hook(after_step)

    def watch_tokens(module: object) -> None:
        import torch

        plain = module.embedding

        def embedding(ids, *rest, **named):
            # Positions are looked up too, in models that learn them; this workload's does not.
            if torch.is_grad_enabled():
                # Added up where the ids are: a GPU is waited for at the end of a step alone.
                SEEN["real"] = SEEN["real"] + (ids != 0).sum()
                SEEN["all"] += ids.numel()
            return plain(ids, *rest, **named)

        module.embedding = embedding

    class Finder(importlib.abc.MetaPathFinder):
        """Adds the hooks right after torch's modules are read."""

        wanted = {"torch.optim.optimizer": watch_steps, "torch.nn.functional": watch_tokens}  # noqa: RUF012

        def find_spec(self, name, path=None, target=None):
            hook = self.wanted.pop(name, None)
            if hook is None:
                return None
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            plain = spec.loader.exec_module

            def run(module):
                plain(module)
                hook(module)

            spec.loader.exec_module = run
            return spec

    sys.meta_path.insert(0, Finder())
