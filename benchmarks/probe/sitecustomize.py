"""Counts in a training process whatever engine it is: steps, real tokens, CPU seconds, memory.

Read by Python itself at the start of each process when its folder is on PYTHONPATH; does nothing
unless BENCH_OUT names a file. Tokens are ids other than 0, the workload's padding, that an
embedding sees while gradients are on.
"""

import os
import sys

if os.environ.get("BENCH_OUT"):
    import importlib.abc
    import importlib.machinery
    import json
    import resource

    STEPS: list[tuple[float, int]] = []
    SEEN = {"real": 0, "all": 0}

    def cpu() -> float:
        """CPU seconds of this process and of the children that it has waited for."""
        return sum(os.times()[:4])

    def after_step(*_: object) -> None:
        STEPS.append((cpu(), SEEN["real"], SEEN["all"]))
        spent = STEPS[-1][0] - STEPS[min(2, len(STEPS) - 1)][0]
        enough = len(STEPS) >= 5 and spent > float(os.environ.get("BENCH_SECONDS", "inf"))
        if enough or len(STEPS) == int(os.environ.get("BENCH_STEPS", "0")):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with open(os.environ["BENCH_OUT"], "w") as file:  # noqa: PTH123
                json.dump({"steps": STEPS, "peak_kb": peak}, file)
            os._exit(0)

    def watch_steps(module: object) -> None:
        module.register_optimizer_step_post_hook(after_step)

    def watch_tokens(module: object) -> None:
        import torch

        plain = module.embedding

        def embedding(ids, *rest, **named):
            # Positions are looked up too, in models that learn them; this workload's does not.
            if torch.is_grad_enabled():
                SEEN["real"] += int((ids != 0).sum())
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
