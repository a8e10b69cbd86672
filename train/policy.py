"""Policy, reference policy and critic: Hugging Face models on DeepSpeed ZeRO-3, driven by packed groups.

Order at start: train.distributed.init() -> init_deepspeed() -> build_policy() -> [build_reference / build_critic] ->
RolloutEngine. vLLM comes last: it sizes its memory by what is left, and replaces torch.set_num_threads.

One optimiser step:

    for groups in micro_batches:                       # as many on every rank: the calls inside are collective
        logprobs, _ = policy.logprobs(groups)          # (B, R)
        policy.backward(loss)                          # gradients add up, over micro-batches and over ranks
    report = policy.step(lr)                           # clip, AdamW; skipped on all ranks if a gradient is not finite
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from data.encode import read_config
from data.normalise import read_normalisation
from data.records import Group
from train.group_attention import choose_attention, pack
from train.optimizer import OPTIMIZERS, parameter_groups
from train.packed_model import PackedModel
from train.resident import gather, remove_hooks, settle
from train.sequence_parallel import SequenceSet, check_model, sequence_set
from train.transfer import Pace
from train.vision import choose_vision_attention

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """--dtype auto | bf16 | fp32 -> torch dtype; auto is bf16 on CUDA and fp32 on CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"--dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def merge_configs(base: dict, override: dict) -> dict:
    """`override` over `base`, dictionary by dictionary; neither is changed."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge_configs(merged[key], value) if both else value
    return merged


def deepspeed_config(args, dtype: torch.dtype, device: torch.device) -> dict:
    """ReelRL's ZeRO-3 settings with the user's --deepspeed_config file merged over them.

    Raises ValueError if the file changes what the loop relies on: stage 3 and accumulation in its own hands.
    """
    zero = {
        "stage": 3,
        "overlap_comm": device.type == "cuda",
        "contiguous_gradients": True,
        "reduce_bucket_size": 100_000_000,
        "stage3_prefetch_bucket_size": 100_000_000,
        # Parameters up to this many elements stay gathered: norms and biases cost a collective each otherwise.
        "stage3_param_persistence_threshold": 100_000,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    offload = getattr(args, "offload", "none")
    if offload in ("optimizer", "all"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if getattr(args, "hpz_partition_size", 1) > 1:
        zero["zero_hpz_partition_size"] = args.hpz_partition_size
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": float(args.max_grad_norm),
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},  # with fp32 master weights, unless the optimiser needs none
        "data_types": {"grad_accum_dtype": getattr(args, "grad_accum_dtype", "fp32")},  # bf16 sums lose small addends
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also with offload: nothing to compile
        "steps_per_print": 10**9,
    }
    if dtype == torch.bfloat16 and args.optimizer != "adamw":
        # No master copy. The second switch only stops DeepSpeed from insisting on its CPU Adam: what precision the
        # moments have is the optimiser's business, and ours keep them in fp32.
        config["bf16"].update(bf16_master_weights_and_grads=True, bf16_optimizer_states=True)
    path = getattr(args, "deepspeed_config", None)
    if path:
        with open(path, encoding="utf-8") as file:
            try:
                config = merge_configs(config, json.load(file))
            except json.JSONDecodeError as error:
                raise ValueError(f"--deepspeed_config {path}:{error.lineno}: not JSON: {error.msg}") from None
        if config["zero_optimization"].get("stage") != 3:
            raise ValueError(f"--deepspeed_config {path}: zero_optimization.stage has to stay 3")
        if config["gradient_accumulation_steps"] != 1:
            raise ValueError(
                f"--deepspeed_config {path}: gradient_accumulation_steps has to stay 1; "
                "the number of micro-batches follows from --token_budget"
            )
    return config


def part_of(name: str) -> str:
    """'tower', 'merger' or 'language_model': which of the three a parameter of a Qwen-VL model belongs to."""
    if "visual." not in name:
        return "language_model"
    return "merger" if "merger" in name else "tower"


def trained_groups(hf: nn.Module, args, base: float, extra: Iterable[tuple[str, nn.Parameter]] = ()) -> list[dict]:
    """Freeze by flag, and make the optimiser's groups: each part with its own learning rate, vectors without decay.

    base: learning rate of the language model. `lr_ratio` is a group's rate over it, so that a schedule moves all alike.
    Raises ValueError if nothing is left to train.
    """
    vision = getattr(args, "vision_learning_rate", None)
    merger = getattr(args, "merger_learning_rate", None)
    rates = {"language_model": base, "tower": base if vision is None else float(vision)}
    rates["merger"] = base if merger is None else float(merger)
    frozen = {
        "tower": getattr(args, "freeze_vision_tower", False),
        "merger": getattr(args, "freeze_merger", False),
        "language_model": getattr(args, "freeze_language_model", False),
    }
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {"tower": [], "merger": [], "language_model": []}
    for name, parameter in hf.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(not frozen[part])
        parts[part].append((name, parameter))
    parts["value_head"], rates["value_head"] = list(extra), base
    groups = []
    for part, named in parts.items():
        for group in parameter_groups(named, args.weight_decay):
            ratio = rates[part] / base if base else 1.0
            groups.append({**group, "lr": rates[part], "lr_ratio": ratio, "part": part})
    if not groups:
        raise ValueError("--freeze_vision_tower, _merger and _language_model together leave nothing to train")
    return groups


def build_trained_optimizer(groups: list[dict], args, base: float, *, offload: bool) -> torch.optim.Optimizer:
    """--optimizer on those groups; torch's AdamW runs fused where the states are on a CUDA device."""
    if args.optimizer not in OPTIMIZERS:
        raise ValueError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got {args.optimizer!r}")
    settings = {"lr": base, "betas": tuple(args.adam_betas), "eps": args.adam_eps}
    if args.optimizer == "adamw" and torch.cuda.is_available() and not offload:
        settings["fused"] = True
    seed = getattr(args, "seed", 0) * dist.get_world_size() + dist.get_rank()  # ranks hold different shards
    return OPTIMIZERS[args.optimizer](groups, settings, seed)


def start_engine(model: nn.Module, config: dict, optimizer: torch.optim.Optimizer):
    """DeepSpeed's ZeRO-3 engine. Master weights of the weights' own dtype (the bf16 optimisers', fp32 runs') are the weights.

    DeepSpeed 0.19 means them to be (_create_fp32_partitions), but compares a torch.device with its name as text, finds them
    different and keeps a copy, 2 bytes per parameter in bf16. The tensor objects stay: it finds states by them. Masters of an
    offloaded optimiser are copies on purpose.
    """
    import deepspeed

    engine, _, _, _ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    shards = engine.optimizer
    for weights, master in zip(shards.fp16_partitioned_groups_flat, shards.fp32_partitioned_groups_flat):
        same = weights is not None and (weights.dtype, weights.device) == (master.dtype, master.device)
        if same and not shards.offload_optimizer:
            master.data = weights.data
    return engine


class Policy:
    """A Qwen-VL model on ZeRO-3. `engine` is DeepSpeed's, `model` the Hugging Face model inside, `packed` the wrapper.

    Forwards, `named_tensors`, `full_state_dict`, `backward` and `step` are collective: every rank has to make the same
    calls in the same order, with whatever groups it holds.
    """

    def __init__(
        self,
        engine,
        packed: PackedModel,
        *,
        device,
        dtype,
        attention: str,
        max_nonfinite_steps: int = 5,
        sequence: SequenceSet | None = None,
        resident: bool = False,
    ):
        self.engine = engine
        self.packed = packed
        self.model = packed.hf
        self.device = device
        self.dtype = dtype
        self.attention = attention
        self.resident = list(packed.parameters()) if resident else []  # stay gathered (train.resident)
        if resident:
            remove_hooks(engine)
        self.sequence = sequence  # the ranks that hold the same groups and a slice of their tokens each
        self.world_size = dist.get_world_size()
        self.max_nonfinite_steps = max_nonfinite_steps
        self.nonfinite_steps = 0  # skipped in all
        self.nonfinite_in_a_row = 0
        self.parameter_count = sum(getattr(p, "ds_numel", p.numel()) for p in packed.parameters())
        self.tower_is_frozen = not any(p.requires_grad for p in packed.hf.model.visual.parameters())
        self._features: dict[int, list[Tensor]] | None = None  # id(prompt) -> features, frozen tower only
        self._parked: list[tuple[Tensor, torch.device]] = []
        self._pace = Pace(device)

    # ---- forward ------------------------------------------------------------------------------------------------

    def logprobs(
        self, groups: list[Group], *, entropy: bool = False, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """One micro-batch -> (log-probs (B, R), entropies (B, R) or None), float32; zero past the end of a row.

        Rows are group-major, R is the longest response of these groups. log-prob [b, t] is of token t of response b,
        given its prompt and tokens before t, at the sampler's temperature and without the ids it never samples. The
        causal shift is in here and nowhere else. Has gradients unless called under torch.no_grad().
        """
        packed = self._pack(groups)
        features = self._features_of(groups)
        gather(self.resident)
        flat, flat_entropy = self.engine(packed, temperature=temperature, entropy=entropy, features=features)
        return packed.to_rows(flat), packed.to_rows(flat_entropy) if entropy else None

    def values(self, groups: list[Group]) -> Tensor:
        """Critic only: value before each response token, (B, R) float32, zero past the end of a row."""
        if self.packed.value_head is None:
            raise ValueError("values() needs a critic; this is a policy")
        packed = self._pack(groups)
        gather(self.resident)
        flat, _ = self.engine(packed, features=self._features_of(groups))
        return packed.to_rows(flat)

    def encode_frozen(self, micro_batches: list[list[Group]]) -> None:
        """Frozen tower and merger: run them once per step, before its passes; forwards then reuse the features.

        micro_batches: all of this rank's groups of the step, as many lists on every rank (collective). Does nothing
        when the vision side is trained. Call forget_features() after the step.
        """
        if not self.tower_is_frozen:
            return
        self._features = {}
        gather(self.resident)
        for groups in micro_batches:
            with torch.no_grad():
                features = self.engine(self._pack(groups), features_only=True)
            start = 0
            for group in groups:
                if group.prompt.patches is None:
                    continue
                length = int((group.prompt.mm_type_ids != 0).sum())
                # Cloned: a view would keep the whole micro-batch's features alive.
                self._features[id(group.prompt)] = [x[start : start + length].clone() for x in features]
                start += length

    def forget_features(self) -> None:
        """Drop what encode_frozen stored; the tower runs in every forward again."""
        self._features = None

    def _pack(self, groups: list[Group]):
        self._pace.wait()
        return pack(
            groups,
            backend=self.attention,
            device=self.device,
            banned_ids=self.packed.banned_array,
            sequence=self.sequence,
        )

    def _features_of(self, groups: list[Group]) -> list[Tensor] | None:
        if self._features is None:
            return None
        stored = [self._features[id(group.prompt)] for group in groups if group.prompt.patches is not None]
        return [torch.cat(parts) for parts in zip(*stored)]

    # ---- update -------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add this micro-batch's gradients. They are summed over micro-batches and ranks, never averaged: the loss's
        denominator already counts the whole mini-batch on all ranks (train.losses.reduce_loss). Ranks that share sequences
        count the same tokens there, each, and hold the gradient of a slice: their sum is weighed by their number.

        last: False saves a copy to the host per micro-batch when the optimiser is offloaded; True is always right.
        """
        # The number of micro-batches differs from step to step, so the accumulation boundary is ours to set.
        self.engine.set_gradient_accumulation_boundary(last)
        sharing = self.sequence.size if self.sequence else 1
        self.engine.backward(loss * (self.world_size * sharing))  # ZeRO divides by the number of ranks

    def step(self, lr: float) -> dict[str, float]:
        """Clip by the global norm, one AdamW update at learning rate `lr`, and clear the gradients.

        -> grad_norm (before clipping; inf if not finite), skipped (0 or 1), nonfinite_steps (skipped so far).
        A gradient that is not finite anywhere skips the update on all ranks: weights and Adam states stay as they are.
        After --max_nonfinite_steps such steps in a row raises FloatingPointError (on all ranks).
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        skipped = bool(self.engine.optimizer.overflow)
        norm = float("inf") if skipped else float(self.engine.get_global_grad_norm())
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if skipped else 0
        self.nonfinite_steps += skipped
        if self.nonfinite_in_a_row >= self.max_nonfinite_steps:
            raise FloatingPointError(
                f"{self.nonfinite_in_a_row} optimiser steps in a row had gradients that are not finite; lower "
                "--learning_rate, or look at the last steps' ratios and lengths in metrics.jsonl"
            )
        return {"grad_norm": norm, "skipped": float(skipped), "nonfinite_steps": float(self.nonfinite_steps)}

    # ---- weights out --------------------------------------------------------------------------------------------

    def named_tensors(self, bucket_bytes: int = 512 << 20) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor) of every weight, gathered in buckets; tied weights once. Collective.

        The tensors are copies: a consumer may hold on to them (vLLM keeps q, k and v until a layer is complete). At
        most a bucket and its copy are alive here. Every rank has to exhaust the iterator.
        """
        import deepspeed

        bucket: list[tuple[str, nn.Parameter]] = []
        size = 0
        gather(self.resident)

        def flush() -> list[tuple[str, Tensor]]:
            # On leaving, the context drops what it did not gather, too.
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket], enabled=not self.resident):
                return [(name, parameter.detach().clone()) for name, parameter in bucket]

        for name, parameter in self.model.named_parameters():
            nbytes = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
            if bucket and size + nbytes > bucket_bytes:
                yield from flush()
                bucket, size = [], 0
            bucket.append((name, parameter))
            size += nbytes
        if bucket:
            yield from flush()

    def full_state_dict(self, bucket_bytes: int = 512 << 20) -> dict[str, Tensor] | None:
        """All weights on the host under their Hugging Face names, on rank 0; None on the others. Collective."""
        keep = dist.get_rank() == 0
        state = {}
        for name, tensor in self.named_tensors(bucket_bytes):
            if keep:
                state[name] = tensor.cpu()
        return state if keep else None

    def load_checkpoint(self, folder: str, tag: str) -> None:
        """Weights and optimiser from what engine.save_checkpoint wrote (collective). Raises FileNotFoundError."""
        path, _ = self.engine.load_checkpoint(folder, tag=tag)
        if path is None:
            raise FileNotFoundError(f"{folder}/{tag}: no DeepSpeed checkpoint there")

    # ---- parking ------------------------------------------------------------------------------------------------

    def park(self) -> int:
        """Move fp32 master weights and Adam states to host memory while vLLM samples; -> bytes moved.

        The bf16 weights stay, for the weight sync. Forwards without gradient work while parked, steps do not. No-op
        on CPU. (DeepSpeed's own offload_states refuses Adam states of any optimiser but its FusedAdam.)
        """
        if self.device.type != "cuda" or self._parked or self.engine.optimizer is None:
            return 0
        moved = 0
        for tensor in self._parkable():
            if tensor.is_cuda:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor)
                self._parked.append((tensor, tensor.device))
                tensor.data = host
                moved += host.numel() * host.element_size()
        torch.cuda.empty_cache()
        return moved

    def unpark(self) -> None:
        """Bring parked states back to the device."""
        for tensor, device in self._parked:
            tensor.data = tensor.data.to(device, non_blocking=True)
        if self._parked:
            torch.cuda.synchronize()
        self._parked = []

    def _parkable(self) -> Iterator[Tensor]:
        optimizer = self.engine.optimizer
        # Where they have the weights' own dtype (fp32 runs, --optimizer adamw_kahan) they are the weights.
        yield from (flat for flat in optimizer.fp32_partitioned_groups_flat if flat.dtype != self.dtype)
        for state in optimizer.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.numel() > 1)


def _load(model_dir: str, args, config: dict, dtype: torch.dtype):
    """The Hugging Face model, sharded as it is built; every rank reads the checkpoint."""
    from transformers.integrations import HfDeepSpeedConfig

    # transformers shards while this object lives (it keeps a weak reference). It must not outlive the load: any model
    # made later in the process, such as vLLM's or one on the meta device, would be sharded too.
    switch = HfDeepSpeedConfig(config)
    hf = AutoModelForImageTextToText.from_pretrained(
        model_dir,
        dtype=dtype,
        attn_implementation="sdpa",
        trust_remote_code=getattr(args, "trust_remote_code", False),
    )
    hf.config.use_cache = False
    del switch
    exact_frequencies(hf)
    return hf


def exact_frequencies(hf: nn.Module) -> None:
    """Rotary frequencies in float32, as transformers and vLLM have them, in the model's non-persistent buffers.

    While zero.Init builds a model, every floating tensor gets the weights' dtype. A frequency in bfloat16 is off by up to
    0.4 %, which at position p is an angle of up to 0.004 p radians: nothing is left of a position in the thousands.
    """
    for name, module in hf.named_modules():
        found = ((n, module._buffers.get(n)) for n in module._non_persistent_buffers_set)
        rounded = [n for n, buffer in found if buffer is not None and buffer.dtype in (torch.bfloat16, torch.float16)]
        if not rounded:
            continue
        try:
            fresh = type(module)(module.config)
        except (AttributeError, TypeError) as error:
            raise RuntimeError(
                f"{name} ({type(module).__name__}): its buffers {', '.join(sorted(rounded))} were rounded while ZeRO-3 built "
                f"the model and cannot be made again from its configuration ({error}); --dtype fp32 rounds nothing"
            ) from error
        for buffer in rounded:
            module._buffers[buffer] = fresh._buffers[buffer]


def _attention(model_dir: str, args, device: torch.device, dtype: torch.dtype) -> str:
    """choose_attention for the heads of this folder's language model."""
    text = read_config(model_dir, getattr(args, "trust_remote_code", False)).get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return choose_attention(args.attention, device, dtype, head_dim=head_dim)


def _sequence_set(model_dir: str, args) -> SequenceSet | None:
    """The ranks of --sequence_parallel that this one shares sequences with. Raises ValueError if the model cannot be cut."""
    size = getattr(args, "sequence_parallel", 1)
    if size > 1:  # before the weights are loaded
        check_model(read_config(model_dir, getattr(args, "trust_remote_code", False)), size)
    return sequence_set(size)


def buffers_to(module: nn.Module, device: torch.device) -> None:
    """Buffers of all submodules onto `device`. DeepSpeed moves none of a model that was sharded as it was built, and one
    that stays on the host is copied, with a wait for the GPU, at every use. Parameters, ZeRO-3's, stay as they are."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)


def _wrap(hf, args, model_dir, device, attention, banned_ids, normalisation, value_head=None) -> PackedModel:
    packed = PackedModel(
        hf,
        normalisation=normalisation or read_normalisation(model_dir),
        banned_ids=tuple(banned_ids),
        logit_chunk=getattr(args, "logit_chunk", 1024),
        vision_attention=choose_vision_attention(attention, device, hf.dtype),
        value_head=value_head,
        fused=device.type == "cuda" and getattr(args, "fused", False),
    )
    buffers_to(packed, device)
    return packed


def checkpoint_activations(hf: nn.Module, kept_layers: int = 0, kept_vision_layers: int = 0) -> None:
    """Recompute every layer's activations in the backward pass, but for the last ones of the decoder and of the tower.

    Each layer that is kept saves a quarter of its own time and costs what it would have recomputed.
    """
    hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layers, kept in ((hf.model.language_model.layers, kept_layers), (hf.model.visual.blocks, kept_vision_layers)):
        for layer in layers[max(0, len(layers) - kept) :]:
            layer.gradient_checkpointing = False


def _trained(model_dir: str, args, device, banned_ids, normalisation, *, critic: bool) -> Policy:
    dtype = resolve_dtype(args.dtype, device)
    attention = _attention(model_dir, args, device, dtype)
    config = deepspeed_config(args, dtype, device)
    resident = settle(args, config, dist.get_world_size())
    sequence = _sequence_set(model_dir, args)
    hf = _load(model_dir, args, config, dtype)
    value_head = None
    if critic:
        value_head = nn.Linear(hf.config.get_text_config().hidden_size, 1, dtype=dtype)
        # Zero: the first values are 0 everywhere, so the first advantages are the rewards-to-go.
        nn.init.zeros_(value_head.weight)
        nn.init.zeros_(value_head.bias)
    packed = _wrap(hf, args, model_dir, device, attention, banned_ids, normalisation, value_head)
    if args.gradient_checkpointing:
        kept = getattr(args, "kept_layers", 0)
        checkpoint_activations(hf, 0 if kept == "auto" else kept, getattr(args, "kept_vision_layers", 0))
    packed.train()
    rate = float(args.critic_learning_rate if critic else args.learning_rate)
    groups = trained_groups(hf, args, rate, value_head.named_parameters() if critic else ())
    optimizer = build_trained_optimizer(groups, args, rate, offload=getattr(args, "offload", "none") != "none")
    engine = start_engine(packed, config, optimizer)
    settings = {"device": device, "dtype": dtype, "attention": attention, "sequence": sequence, "resident": resident}
    return Policy(engine, packed, max_nonfinite_steps=getattr(args, "max_nonfinite_steps", 5), **settings)


def build_policy(args, *, device: torch.device, banned_ids: Iterable[int] = (), normalisation=None) -> Policy:
    """The policy to train, from --model.

    banned_ids: the encoder's visual_token_ids. normalisation: (mean, std), read from the processor files if None.
    """
    return _trained(args.model, args, device, banned_ids, normalisation, critic=False)


def build_critic(args, *, device: torch.device, banned_ids: Iterable[int] = (), normalisation=None) -> Policy:
    """A critic of the policy's family with a value head that starts at zero: --critic_model, else --model."""
    model_dir = getattr(args, "critic_model", None) or args.model
    return _trained(model_dir, args, device, banned_ids, normalisation, critic=True)


def build_reference(args, *, device: torch.device, banned_ids: Iterable[int] = (), normalisation=None) -> Policy:
    """The frozen reference policy: --reference_model, else --model. Forward only, sharded like the policy.

    Build it only when a loss or a metric uses it.
    """
    import deepspeed

    model_dir = getattr(args, "reference_model", None) or args.model
    dtype = resolve_dtype(args.dtype, device)
    attention = _attention(model_dir, args, device, dtype)
    config = deepspeed_config(args, dtype, device)
    if getattr(args, "offload", "none") != "all":
        config["zero_optimization"].pop("offload_optimizer", None)
    resident = settle(args, config, dist.get_world_size())
    sequence = _sequence_set(model_dir, args)
    hf = _load(model_dir, args, config, dtype)
    packed = _wrap(hf, args, model_dir, device, attention, banned_ids, normalisation)
    packed.requires_grad_(False).eval()
    engine, _, _, _ = deepspeed.initialize(model=packed, config=config)
    return Policy(engine, packed, device=device, dtype=dtype, attention=attention, sequence=sequence, resident=resident)
