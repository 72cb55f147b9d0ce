"""The model's layers through torch.compile while it trains, if they then compute the same.

Needs torch.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from itune import errors, jobs, probing, recipes

# Layers that differ (sliding and full attention, with and without experts) share one code object.
# torch's limit is 8, beyond which it goes back to plain computing with a line in its own log.
VARIANTS = 64


@contextlib.contextmanager
def layers(
    job: jobs.Job,
    settings: recipes.Training,
    kernel: str,
    autocast: probing.Autocast,
    say: Callable[[str], None],
) -> Iterator[None]:
    """While this holds, the job's repeated layers run compiled where `torch_compile` is set.

    Each layer by itself: they share what is compiled, so their number costs nothing. Embedding,
    attention of packed rows and loss, whose shapes follow the rows, stay as they are.
    They are compared with what the model gives row by row, uncompiled and in its own attention
    `kernel`. Raises EnvironmentRefusal where the backend cannot compile or gives other numbers.
    """
    if not settings.torch_compile:
        yield
        return
    found = repeated(job.model)
    if not found:
        raise errors.RecipeError(
            f"training.torch_compile: {type(job.model).__name__} has no repeated layers to "
            "compile. Set it to false."
        )
    backend = settings.torch_compile_backend
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise errors.RecipeError(
            f"training.torch_compile_backend: unknown {backend!r}.{errors.nearest(backend, known)}"
        )
    with torch._dynamo.config.patch(recompile_limit=VARIANTS), warnings.catch_warnings():
        # torch warns of its own looking at gradients while it compiles.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
        for layer in found:
            layer.compile(backend=backend, dynamic=True)
        try:
            longest = int(job.corpus.lengths.max())
            why = probing.differs(job.model, job.path, kernel, longest, autocast)
            if why is not None:
                raise errors.EnvironmentRefusal(
                    f"training.torch_compile: the compiled layers ({backend}) do not serve: {why}. "
                    "Set it to false, or name another training.torch_compile_backend."
                )
            say(f"compiled: {len(found)} layers by {backend}, compared with plain computing")
            yield
        finally:
            for layer in found:
                layer._compiled_call_impl = None


def repeated(model: Any) -> list[torch.nn.Module]:
    """The layers of a model: the members of its lists of two and more modules of one class.

    What stands inside of such a layer belongs to it.
    """
    found: list[torch.nn.Module] = []

    def look(module: torch.nn.Module) -> None:
        for child in module.children():
            members = list(child.children())
            if isinstance(child, torch.nn.ModuleList) and len({type(m) for m in members}) == 1:
                found.extend(members)
            else:
                look(child)

    look(model)
    return found
