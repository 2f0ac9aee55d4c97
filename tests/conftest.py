"""Set-up of every test: quiet, offline, repeatable, with the shapes in the core's signatures enforced."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

# Before torch or ray are imported, and inherited by every process that a test starts.
for name, value in {
    "OMP_NUM_THREADS": "1",  # results do not depend on the number of cores, and workers do not fight over them
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",  # a test that needs the network is a test that fails on the next machine
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # by default Ray's workers wait until nothing else wants the core, other tests included
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "DS_ACCELERATOR": "cpu",  # transformers imports deepspeed, which would say that it found no GPU
}.items():
    os.environ.setdefault(name, value)
# A shell that starts this in the background has Ctrl-C ignored, here and in every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# ruff: noqa: E402
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

if "PYTEST_XDIST_WORKER" in os.environ:
    # What is first imported below a module under the hook is compiled anew, torch and all: in `make test`, that comes
    # before. One file has to be quick to run, and may need none of it.
    import beartype  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

# Only the packages of tensors: beartype would also wrap pydantic classes, which check themselves.
install_import_hook(
    [
        f"cortex_core.{name}"
        for name in ("fast_weights", "backbone", "optim", "consolidation", "dreaming", "training", "eval")
    ],
    "beartype.beartype",
)

# The same examples in every run: what fails for one fails for all. No deadline, because first calls import torch.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.hookimpl(wrapper=True)  # before pytest-xdist reads the groups, and after
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Skip what is marked `gpu` on a machine without one. In `make test`, which has two processes: a group runs in one of
    them, one test after the other. All slow tests are a group, because they start Ray clusters and processes of their own,
    and the first, because they take longest. Of the others, a file stays together, for its fixtures."""
    in_make_test = "PYTEST_XDIST_WORKER" in os.environ
    if in_make_test:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
        for item in items:
            group = "slow" if item.get_closest_marker("slow") else item.path.stem
            item.add_marker(pytest.mark.xdist_group(group))
    skip_without_gpu(items)
    yield
    if in_make_test and not all(item.nodeid.endswith("@slow") for item in items if item.get_closest_marker("slow")):
        raise pytest.UsageError("pytest-xdist does not group the slow tests: run with --dist loadgroup, or -n 0")


def skip_without_gpu(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
