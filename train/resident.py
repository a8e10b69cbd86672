"""Parameters that stay gathered on every rank (--resident_parameters), and DeepSpeed's per-module hooks taken away.

ZeRO-3 gathers a module's parameters before it runs and drops them after it, in the forward pass, its recomputation and the
backward pass, with about ten Python calls around each of these for every module; on one rank there is nothing to gather and
every fetch still waits for the device. Where the weights fit, they are gathered once after each optimiser step instead.
They then lie beside the shards that the optimiser writes, 2 bytes per parameter; on one rank they are the shard itself.
Gradients are reduced and cut as before, by hooks of the parameters themselves, and optimiser states stay sharded.

What DeepSpeed 0.19 still drops is its own shards' copies, at a step (also at one it skips), at a checkpoint and at the end of
a GatheredParameters context: `gather` brings back whatever is missing and is called before every forward.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

BUCKET = 100_000_000  # elements gathered in one collective; DeepSpeed copies each bucket once more
CHOICES = ("auto", "on", "off")


def obstacles(config: dict) -> list[str]:
    """Settings of a DeepSpeed configuration under which resident parameters would be wrong, useless or unseen."""
    zero = config["zero_optimization"]
    found = []
    if (zero.get("offload_param") or {}).get("device", "none") != "none":
        found.append("parameters are offloaded (--offload all, zero_optimization.offload_param)")
    if zero.get("zero_hpz_partition_size", 1) > 1:
        found.append("there is a second copy of the weights (--hpz_partition_size), which nothing would read")
    for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if zero.get(name):
            found.append(f"weights are gathered quantised (zero_optimization.{name})")
    if zero.get("zenflow"):
        found.append("ZenFlow works in the hooks (zero_optimization.zenflow)")
    if (config.get("compile") or {}).get("deepcompile"):
        found.append("DeepCompile has its own gathers (compile.deepcompile)")
    if config.get("wall_clock_breakdown") or (config.get("flops_profiler") or {}).get("enabled"):
        found.append("DeepSpeed measures in the hooks (wall_clock_breakdown, flops_profiler)")
    return found


def is_resident(choice: str, config: dict, world_size: int) -> bool:
    """--resident_parameters -> whether this configuration keeps its parameters gathered.

    auto: on one rank, where the gathered parameter is its own shard and costs no memory. Raises ValueError if "on" cannot be.
    """
    if choice not in CHOICES:
        raise ValueError(f"--resident_parameters must be one of {', '.join(CHOICES)}, got {choice!r}")
    found = obstacles(config)
    if choice == "on" and found:
        raise ValueError(
            f"--resident_parameters on: {'; '.join(found)}; take that away or use --resident_parameters off"
        )
    return choice != "off" and not found and (choice == "on" or world_size == 1)


def settle(args, config: dict, world_size: int) -> bool:
    """Whether a model's parameters stay gathered; `config` is then set for it, in place, before the model is loaded.

    No parameter is "persistent": DeepSpeed would gather those after each step in a collective of its own for every one.
    Its linear function, which fetches weights again in the backward pass, is not put in the place of torch's.
    """
    resident = is_resident(getattr(args, "resident_parameters", "auto"), config, world_size)
    if resident:
        zero = config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
        zero.setdefault("memory_efficient_linear", False)
    return resident


def remove_hooks(engine) -> None:
    """Take the per-module hooks from a DeepSpeed ZeRO-3 engine that has not run yet, and its watch over parameter look-ups."""
    # An engine without optimiser (the reference) has the hooks itself.
    zero = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    if not hasattr(zero, "partition_all_parameters"):  # setting it below would be in vain
        raise RuntimeError(
            "this DeepSpeed has no partition_all_parameters; use --resident_parameters off, or adapt train/resident.py"
        )
    zero._remove_module_hooks()
    parameters = list(engine.module.parameters())
    zero.partition_all_parameters = lambda: drop(parameters)
    # Both walk over all modules in every forward, to tell the dictionaries below that they are in one.
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    engine.module_forward_pre_hook = engine.module_forward_post_hook = None
    for module in engine.module.modules():
        module._parameters = dict(module._parameters)


def drop(parameters: Iterable[nn.Parameter]) -> None:
    """Leave of these gathered parameters their shards alone, as DeepSpeed wants it before it changes or reads those.

    Its own way there asks every module for its parameters and every parameter for what may still use it; without hooks
    nothing does. What was gathered was read by the stream that is current here: no other has to be waited for.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    for parameter in parameters:
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:
            parameter.data = parameter.data.new_empty(0)
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE


def gather(parameters: Iterable[nn.Parameter]) -> None:
    """All-gather those of these ZeRO-3 parameters that are not there, in buckets. Collective if any is missing."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    missing = [parameter for parameter in parameters if parameter.ds_status != ZeroParamStatus.AVAILABLE]
    while missing:
        count, size = 0, 0
        while count < len(missing) and (count == 0 or size + missing[count].ds_numel <= BUCKET):
            size += missing[count].ds_numel
            count += 1
        bucket, missing = missing[:count], missing[count:]
        bucket[0].all_gather_coalesced(bucket).wait()
